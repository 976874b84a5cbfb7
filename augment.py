"""The views: one picture becomes 2 global and n local crops, each altered on its own.

    views = MultiCrop()                                   # the paper's recipe
    tensors = views(image)                                # PIL image -> 2 x [3, 224, 224] + 8 x [3, 96, 96]
    tensors = views(image, key=(seed, epoch, index))      # the same key gives the same views, anywhere

    views = BatchMultiCrop()                              # the same views of a whole batch, on any device
    pixels, plans = zip(*(views.prepare(image) for image in images))
    tensors = views([p.cuda() for p in pixels], torch.stack(plans))    # 2 x [B, 3, 224, 224] + 8 x [B, 3, 96, 96]

Caron et al. 2021, section 3.1 and appendix C; the colour changes are those of BYOL (Grill et al. 2020,
appendix B). Randomness is counted, not consumed: `sample` draws every number of a view from its key
alone, what follows is a pure function of picture and numbers. The operations are Pillow's, in whole numbers from 0
to 255: all but resize, hue and blur to the bit, those to rounding. This file needs torch and nothing else.
"""

import functools
import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHUNK_BYTES = 2**30  # of a batch's pictures and what is made of them, at once


class View(NamedTuple):
    """Every random number of one view."""

    size: int  # side of the result, pixels
    box: tuple  # (left, top, right, bottom) in the picture, pixels
    flip: bool
    jitter: tuple  # (name, amount) in the order of application; empty for none
    grayscale: bool
    blur: float  # standard deviation of the Gaussian, pixels of the result; 0 for none
    solarize: bool


class MultiCrop:
    """The views of one picture, on a CPU worker.

    Args:
        global_size, local_size: side of the global and local views, pixels.
        global_scale, local_scale: range of the crop's share of the picture's area.
        local_number: local views.
        global_number: global views, 1 or 2.
        ratio: range of the crop's width / height, drawn log-uniformly.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter, whose four parts come in random order.
        brightness, contrast, saturation: factors are drawn from [1 - x, 1 + x].
        hue: turn of the colour circle, drawn from [-x, x], in whole turns.
        grayscale: probability of dropping the colour.
        blur: probability of a Gaussian blur for the first global, second global and local views.
        blur_radius: range of its standard deviation, pixels.
        solarize: probability of inverting bright pixels, second global view only.
        mean, std: per-channel normalisation of values in [0, 1].
    """

    def __init__(self, global_size=224, global_scale=(0.4, 1.0), local_size=96, local_scale=(0.05, 0.4),
                 local_number=8, ratio=(3 / 4, 4 / 3), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                 saturation=0.2, hue=0.1, grayscale=0.2, blur=(1.0, 0.1, 0.5), blur_radius=(0.1, 2.0), solarize=0.2,
                 mean=IMAGENET_MEAN, std=IMAGENET_STD, global_number=2):
        # (size, scale, blur probability, solarize probability) of each view
        self.kinds = [(global_size, global_scale, blur[0], 0.0), (global_size, global_scale, blur[1], solarize)]
        self.kinds = self.kinds[:global_number]
        self.kinds += [(local_size, local_scale, blur[2], 0.0)] * local_number
        self.ratio, self.flip, self.jitter, self.grayscale, self.blur_radius = ratio, flip, jitter, grayscale, blur_radius
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.mean, self.std = 255 * torch.tensor(mean).view(3, 1, 1), 255 * torch.tensor(std).view(3, 1, 1)

    def __call__(self, image, key=None):
        """RGB image -> list of V tensors [3, s, s], normalised. Without a key the views are new each time."""
        pixels = to_pixels(image).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
        return [self.normalize(render(pixels, view))[0] for view in self.sample(image.width, image.height, key)]

    def reduction(self, width, height):
        """By how much (1, 2, 4 ...) a picture may be reduced before its views are cut, without showing in them.

        The smallest crop keeps three times the pixels of its view in each direction: on photographs such a view
        differs by less than 0.5 of 255 on average, and 999 of 1000 pixels by no more than 4.
        """
        shortest = min(min(width, height, math.sqrt(width * height * scale[0] * min(self.ratio[0], 1 / self.ratio[1])))
                       / size for size, scale, _, _ in self.kinds)
        return 2 ** math.floor(math.log2(max(1, shortest / 3)))

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
            grayscale=rng.random() < self.grayscale,
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

    def normalize(self, x):
        """[..., 3, s, s] in 0 to 255 -> normalised."""
        return (x - self.mean).div_(self.std)


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


# ---- one view of one picture ----

def to_pixels(image):
    """RGB image -> [H, W, 3] uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def render(pixels, view):
    """[1, 3, H, W] uint8 -> [1, 3, s, s] float32, whole numbers in 0 to 255: the view with these numbers."""
    left, top, right, bottom = view.box
    x = F.interpolate(pixels[..., top:bottom, left:right], (view.size, view.size), mode="bicubic", antialias=True)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    if view.flip:
        x = x.flip(-1)
    for name, amount in view.jitter:
        x = JITTER[name](x, amount)
    if view.grayscale:
        x = grayscale(x)
    if view.blur:
        x = blur(x, torch.tensor(blur_box(view.blur)))
    if view.solarize:
        x = solarize(x)
    return x.expand(1, 3, view.size, view.size)


# ---- operations on whole numbers in 0 to 255, [S, 3, H, W], which they may overwrite ----
# Amounts are numbers, or one for each of S as [S, 1, 1, 1].

def brightness(x, factor):
    return x.mul_(factor).clamp_(0, 255).floor_()


def contrast(x, factor):
    mean = grayscale(x).mean(dim=(-2, -1), keepdim=True).add_(0.5).floor_()
    return x.sub_(mean).mul_(factor).add_(mean).clamp_(0, 255).floor_()


def saturation(x, factor):
    grey_x = grayscale(x)
    return x.sub_(grey_x).mul_(factor).add_(grey_x).clamp_(0, 255).floor_()


def grayscale(x):
    """Luminance as [S, 1, H, W]: ITU-R 601-2 in 16 bits, which float32 holds exactly."""
    r, g, b = x.split(1, dim=-3)
    return (r * (19595 / 65536)).add_(g, alpha=38470 / 65536).add_(b, alpha=7471 / 65536).add_(0.5).floor_()


def hue(x, turn):
    """Rotate the hue by `turn` whole turns, through a hue of 256 steps and a saturation of 256, as Pillow has them."""
    r, g, b = x.split(1, dim=-3)
    value = x.amax(dim=-3, keepdim=True)
    chroma = value - x.amin(dim=-3, keepdim=True)
    # the hue in sixths of a turn, from -1 to 5: the sector of the largest channel, and the difference of the others;
    # for whole numbers clamp(., 0, 1) tells zero from more, faster than a comparison
    sixths = torch.lerp((b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4), (value - g).clamp_(0, 1))
    sixths = torch.lerp(g - b, sixths, (value - r).clamp_(0, 1)).div_(chroma.clamp(min=1))
    step = sixths.mul_(255 / 6).floor_()
    step = step.sub_(step.clamp(-1, 0), alpha=255).add_(whole_steps(turn))
    step = step.sub_((step - 255).clamp_(0, 1), alpha=256)
    chroma = chroma.mul_(255).div_(value.clamp(min=1)).floor_().mul_(value).div_(255)
    # each channel falls from the value to the value less chroma with the distance of its colour on the circle
    step.mul_(6 / 255)
    for channel, colour in ((r, 3), (g, 5), (b, 1)):
        torch.sub(step, colour, out=channel)
    fall = x.abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(value + chroma, fall, chroma, value=-1).round_()


def whole_steps(turn):
    """Turns -> steps of 1/255 from 0 to 255, those below 0 from above."""
    if isinstance(turn, torch.Tensor):
        return (turn * 255).trunc().remainder(256)
    return int(turn * 255) % 256


def solarize(x):
    return x.sub_(127.5).abs_().neg_().add_(127.5)


def blur(x, box):
    """Gaussian blur by three boxes with weights [T] or [S, T] from the centre outwards, edges repeated each time."""
    weights = box.view(-1, box.shape[-1], 1, 1, 1).unbind(1)  # T of [1 or S, 1, 1, 1]
    reach = len(weights) - 1
    for dim in (-1, -1, -1, -2, -2, -2):
        length = x.shape[dim]
        padded = F.pad(x, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="replicate")
        x = padded.narrow(dim, reach, length) * weights[0]
        for i in range(1, reach + 1):
            x.addcmul_(padded.narrow(dim, reach - i, length), weights[i])
            x.addcmul_(padded.narrow(dim, reach + i, length), weights[i])
        x.round_()
    return x


def blur_box(sigma):
    """Weights, from the centre outwards, of the box that three times in a row blurs like a Gaussian.

    Gwosdek et al. 2011, "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", section 2:
    the outermost pixels weigh less, so that the variance is sigma^2 / 3.
    """
    variance = sigma**2 / 3
    reach = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    outermost = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance) / (6 * (variance - (reach + 1) ** 2))
    total = 2 * reach + 1 + 2 * outermost
    return [1 / total] * (reach + 1) + [outermost / total]


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


# ---- all views of many pictures ----

class BatchMultiCrop(MultiCrop):
    """The views of a batch, on any device: what MultiCrop makes of each picture, to rounding.

    Crop, resize and flip are two matrix products a picture, in float32 (or TF32 if allowed, which holds the pixels
    exactly and the weights to 10 bits); the rest is done to all views of a size together, each with its own numbers.
    Memory beyond the views themselves stays below CHUNK_BYTES, or what a single picture needs.

    Args:
        compile: fuse each operation with torch.compile.
        Others as in MultiCrop.
    """

    def __init__(self, *args, compile=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.compile, self.widest = compile, len(blur_box(self.blur_radius[1]))

    def prepare(self, image, key=None):
        """RGB image -> pixels [H, W, 3] uint8 and plan [V, P]: what `__call__` needs, and a worker sends."""
        return to_pixels(image), torch.tensor([self.row(view) for view in self.sample(*image.size, key)])

    def row(self, view):
        """A view's numbers as floats, taken apart again in `alter`."""
        names = [list(JITTER).index(name) for name, _ in view.jitter] or [-1.0] * 4
        amounts = [amount for _, amount in view.jitter] or [0.0] * 4
        box = blur_box(view.blur) if view.blur else []
        return [*view.box, view.flip, *names, *amounts, view.grayscale, view.solarize, bool(view.blur),
                *box, *[0.0] * (self.widest - len(box))]

    @torch.no_grad()
    def __call__(self, pixels, plans):
        """B tensors [H, W, 3] uint8 on one device and plans [B, V, P] -> V tensors [B, 3, s, s], normalised."""
        device, sizes = pixels[0].device, [size for size, _, _, _ in self.kinds]
        views = [torch.empty(len(pixels), 3, size, size, device=device) for size in sizes]
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        for chunk in self.chunks([p.shape[:2] for p in pixels]):
            images, where = padded([pixels[i] for i in chunk]), torch.tensor(chunk, device=device)
            for size in dict.fromkeys(sizes):
                alike = [v for v, s in enumerate(sizes) if s == size]
                plan = plans[chunk][:, alike]
                numbers = plan.to(device)
                with torch.autocast(device.type, enabled=False):
                    x = crop(images, numbers[..., :5], size)  # [b, V, 3, s, s]
                    altered = self.alter(x.flatten(0, 1), plan.flatten(0, 1), numbers.flatten(0, 1))
                for v, view in zip(alike, self.normalize(altered).view(x.shape).unbind(1)):
                    views[v][where] = view
        return views

    def chunks(self, sizes):
        """Cut a batch into lists of indices whose pictures, padded to the largest of them, fit into CHUNK_BYTES."""
        sides = [size for size, _, _, _ in self.kinds]
        rows, area = max(size * sides.count(size) for size in sides), sum(size**2 for size in sides)
        chunk = []
        for i in sorted(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1]):
            height, width = (max(sizes[j][side] for j in (*chunk, i)) for side in (0, 1))
            floats = 3 * height * width + (8 * height + 8 * width) * rows + 8 * area  # measured: hardly more
            if chunk and 4 * floats * (len(chunk) + 1) > CHUNK_BYTES:
                yield chunk
                chunk = []
            chunk.append(i)
        yield chunk

    def alter(self, x, plan, numbers):
        """Everything after the crop: [S, 3, s, s] by plan [S, P], whose `numbers` are on the device too."""
        names, (is_grey, is_solarized, is_blurred) = plan[:, 5:9].T, plan[:, 13:16].T
        amounts, boxes = numbers[:, 9:13].view(-1, 4, 1, 1, 1).unbind(1), numbers[:, 16:]
        # (operation, which samples it alters, its number for each of all samples if it takes one), in their order
        todo = [(op, name == i, [amount])
                for name, amount in zip(names, amounts) for i, op in enumerate(JITTER.values())]
        todo += [(grayscale, is_grey, []), (blur, is_blurred, [boxes]), (solarize, is_solarized, [])]
        indices = [which.nonzero().flatten() for _, which, _ in todo]
        indices = torch.cat(indices).to(x.device).split([len(index) for index in indices])  # one transfer for all
        for (op, _, number), index in zip(todo, indices):
            if len(index):
                x[index] = (fused(op) if self.compile else op)(x[index], *(n[index] for n in number))
        return x


@functools.cache
def fused(op):
    return torch.compile(op, dynamic=True)


def padded(pixels):
    """B tensors [H, W, 3] uint8 of several sizes -> [B, 3, H, W] float32, what lies beyond a picture being 0."""
    height, width = (max(p.shape[side] for p in pixels) for side in (0, 1))
    images = torch.zeros(len(pixels), 3, height, width, device=pixels[0].device)
    for image, p in zip(images, pixels):
        image[:, :p.shape[0], :p.shape[1]] = p.permute(2, 0, 1)
    return images


def crop(images, boxes, size):
    """Cut, resize and flip: [B, 3, H, W] and (left, top, right, bottom, flip) [B, V, 5] -> [B, V, 3, size, size]."""
    left, top, right, bottom, flip = boxes.unbind(-1)
    columns = bicubic_weights(left, right, size, images.shape[3])  # [B, V, size, W]
    columns = torch.where(flip.view(*flip.shape, 1, 1) > 0, columns.flip(-2), columns)
    rows = bicubic_weights(top, bottom, size, images.shape[2])
    x = torch.einsum("bchw,bvxw->bvhcx", images, columns).round_().clamp_(0, 255)  # Pillow rounds after each direction
    return torch.einsum("bvyh,bvhcx->bvcyx", rows, x).round_().clamp_(0, 255).contiguous()


def bicubic_weights(start, end, size, length):
    """The antialiased bicubic filter (Keys 1981, a = -0.5) from [start, end) of `length` pixels to `size`.

    Args:
        start, end: [...] float, pixels.

    Returns:
        [..., size, length], each row summing to 1, nothing being taken from outside of [start, end).
    """
    start, end = start.view(*start.shape, 1, 1), end.view(*end.shape, 1, 1)
    scale = (end - start) / size
    centre = (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * scale
    place = torch.arange(length, device=start.device) + 0.5 - start  # from the start on, for float32's sake
    x = ((place - centre) / scale.clamp(min=1)).abs_()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0)) * ((place > 0) & (place < end - start))
    return weights / weights.sum(dim=-1, keepdim=True)


if __name__ == "__main__":
    from types import SimpleNamespace

    noise = torch.randint(0, 256, (240, 320, 3), dtype=torch.uint8)
    picture = SimpleNamespace(width=320, height=240, size=(320, 240), tobytes=noise.numpy().tobytes)  # as a PIL image
    multicrop, batch = MultiCrop(), BatchMultiCrop()
    first, again = (multicrop(picture, key=(0, 0, 7)) for _ in range(2))
    for view in multicrop.sample(320, 240, key=(0, 0, 7))[:4]:
        print(view)
    print([list(x.shape) for x in first], "equal for equal keys:", all(map(torch.equal, first, again)))
    pixels, plans = zip(*[batch.prepare(picture, key=(0, 0, 7))])
    views = batch(pixels, torch.stack(plans))
    print("largest difference of the batch's views:", *(f"{(a - b).abs().max():.2f}" for a, b in zip(views, first)))
