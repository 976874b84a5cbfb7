"""The views: one picture becomes 2 global and n local crops, each altered on its own.

    views = MultiCrop()                                   # the paper's recipe
    tensors = views(image)                                # PIL image -> 2 x [3, 224, 224] + 8 x [3, 96, 96]
    tensors = views(image, key=(seed, epoch, index))      # the same key gives the same views, anywhere

Caron et al. 2021, section 3.1 and appendix C; the colour changes are those of BYOL (Grill et al. 2020,
appendix B). Randomness is counted, not consumed: `sample` draws every number of a view from its key
alone, `render` is a pure function of picture and numbers. This file needs torch and Pillow.
"""

import math
import random
from typing import NamedTuple

import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class View(NamedTuple):
    """Every random number of one view."""

    size: int  # side of the result, pixels
    box: tuple  # (left, top, right, bottom) in the picture, pixels
    flip: bool
    jitter: tuple  # (name, amount) in the order of application; empty for none
    grey: bool
    blur: float  # standard deviation of the Gaussian, pixels of the result; 0 for none
    solarize: bool


class MultiCrop:
    """The views of one picture, on a CPU worker.

    Args:
        global_size, local_size: side of the global and local views, pixels.
        global_scale, local_scale: range of the crop's share of the picture's area.
        local_number: local views; the global ones are always two.
        ratio: range of the crop's width / height, drawn log-uniformly.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter, whose four parts come in random order.
        brightness, contrast, saturation: factors are drawn from [1 - x, 1 + x].
        hue: turn of the colour circle, drawn from [-x, x], in whole turns.
        grey: probability of dropping the colour.
        blur: probability of a Gaussian blur for the first global, second global and local views.
        blur_radius: range of its standard deviation, pixels.
        solarize: probability of inverting bright pixels, second global view only.
        mean, std: per-channel normalisation of values in [0, 1].
    """

    def __init__(self, global_size=224, global_scale=(0.4, 1.0), local_size=96, local_scale=(0.05, 0.4),
                 local_number=8, ratio=(3 / 4, 4 / 3), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                 saturation=0.2, hue=0.1, grey=0.2, blur=(1.0, 0.1, 0.5), blur_radius=(0.1, 2.0), solarize=0.2,
                 mean=IMAGENET_MEAN, std=IMAGENET_STD):
        # (size, scale, blur probability, solarize probability) of each view
        self.kinds = [(global_size, global_scale, blur[0], 0.0), (global_size, global_scale, blur[1], solarize)]
        self.kinds += [(local_size, local_scale, blur[2], 0.0)] * local_number
        self.ratio, self.flip, self.jitter, self.grey, self.blur_radius = ratio, flip, jitter, grey, blur_radius
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, image, key=None):
        """RGB image -> list of V tensors [3, s, s], normalised. Without a key the views are new each time."""
        return [self.normalize(render(image, view)) for view in self.sample(image.width, image.height, key)]

    def sample(self, width, height, key=None):
        """Draw the numbers of all V views of a width x height picture; equal keys, equal views."""
        rng = random.Random() if key is None else random.Random(repr(key))
        return [self.sample_view(rng, width, height, *kind) for kind in self.kinds]

    def sample_view(self, rng, width, height, size, scale, blur, solarize):
        return View(
            size=size,
            box=sample_box(rng, width, height, scale, self.ratio),
            flip=rng.random() < self.flip,
            jitter=self.sample_jitter(rng) if rng.random() < self.jitter else (),
            grey=rng.random() < self.grey,
            blur=rng.uniform(*self.blur_radius) if rng.random() < blur else 0.0,
            solarize=rng.random() < solarize,
        )

    def sample_jitter(self, rng):
        jitter = [("brightness", 1 + rng.uniform(-self.brightness, self.brightness)),
                  ("contrast", 1 + rng.uniform(-self.contrast, self.contrast)),
                  ("saturation", 1 + rng.uniform(-self.saturation, self.saturation)),
                  ("hue", rng.uniform(-self.hue, self.hue))]
        rng.shuffle(jitter)
        return tuple(jitter)

    def normalize(self, image):
        """RGB image -> [3, H, W] float32."""
        return (to_tensor(image) - self.mean) / self.std


def sample_box(rng, width, height, scale, ratio):
    """A box of random area and aspect inside a width x height picture: (left, top, right, bottom).

    Ten tries as in torchvision's RandomResizedCrop, then the largest central box of a permitted aspect.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def render(image, view):
    """Apply the numbers of one view to an RGB image -> RGB image of view.size x view.size."""
    image = image.crop(view.box).resize((view.size, view.size), Image.Resampling.BICUBIC)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, amount in view.jitter:
        image = JITTER[name](image, amount)
    if view.grey:
        image = image.convert("L").convert("RGB")
    if view.blur:
        image = image.filter(ImageFilter.GaussianBlur(view.blur))
    if view.solarize:
        image = ImageOps.solarize(image)
    return image


def turn_hue(image, turn):
    """Rotate the hue by `turn` whole turns, in steps of 1/255."""
    hue, saturation, value = image.convert("HSV").split()
    hue = ImageChops.add_modulo(hue, Image.new("L", image.size, int(turn * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


JITTER = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": turn_hue,
}


def to_tensor(image):
    """RGB image -> [3, H, W] float32 in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous().float().div_(255)


if __name__ == "__main__":
    picture = Image.effect_noise((320, 240), 64).convert("RGB")
    multicrop = MultiCrop()
    first, again = (multicrop(picture, key=(0, 0, 7)) for _ in range(2))
    for view in multicrop.sample(320, 240, key=(0, 0, 7))[:4]:
        print(view)
    print([list(x.shape) for x in first], "equal for equal keys:", all(map(torch.equal, first, again)))
