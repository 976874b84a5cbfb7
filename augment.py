"""Multi-crop augmentation: 2 global and n local crops of an image, each with its own color jitter, blur and so on.

    multicrop = MultiCrop()                                 # the paper's recipe, for data loader workers
    crops = multicrop(image)                                # PIL image -> 2 x [3, 224, 224] + 8 x [3, 96, 96]
    crops = multicrop(image, key=(seed, epoch, index))      # equal keys give equal crops, in any process

    multicrop = BatchMultiCrop()                            # the same crops for a whole batch, on any device
    pixels, params = zip(*(multicrop.prepare(image) for image in images))
    crops = multicrop(torch.cat(pixels).cuda(), torch.stack(params))      # 2 x [B, 3, 224, 224] + 8 x [B, 3, 96, 96]

    x = EvalTransform(224)(image)                           # for evaluation: resize, center crop -> [3, 224, 224]

An image is a PIL image in RGB, or a tensor [3, H, W], uint8 or float in [0, 1]; with `channels`, a float tensor
[C, H, W] in [0, 1] of any depth, whose values are not rounded.
Caron et al. 2021, section 3.1 and appendix C; color augmentation of BYOL (Grill et al. 2020, appendix B). `sample`
draws all crop parameters from the key, the rest is a function of image and parameters. The operations are Pillow's, on
whole numbers from 0 to 255: resize, hue and blur are equal up to rounding, the others to the bit. The resize begins
horizontally; Pillow does so since version 13 only where that is less work. Needs torch only.
"""

import functools
import itertools
import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BICUBIC = 3  # of PIL.Image.Resampling
CHUNK_BYTES = 2**30  # memory for intermediate results of BatchMultiCrop

Range = tuple[float, float]


class View(NamedTuple):
    """Crop parameters: all that is random about one crop."""

    size: int  # side of the crop after resizing, pixels
    box: tuple  # (left, top, right, bottom) in the image, pixels
    flip: bool
    jitter: tuple  # (name, amount, or with channels one for each) in order of application, empty for none
    grayscale: bool
    blur: float  # standard deviation of the Gaussian after resizing, pixels; 0 for none
    solarize: bool
    vertical_flip: bool = False
    turns: int = 0  # counterclockwise rotation after the flips, quarter turns


class MultiCrop:
    """All crops of one image, for data loader workers on the CPU.

    Args:
        global_size, local_size: side of the global and local crops, pixels.
        global_scale, local_scale: range of the crop's area relative to the image's.
        local_number: number of local crops.
        ratio: range of the crop's width / height, sampled log-uniformly.
        flip: probability of a horizontal flip.
        jitter: probability of color jitter, whose four operations come in random order.
        brightness, contrast, saturation: factors are sampled from [1 - x, 1 + x].
        hue: shift of the hue in turns of the color circle, sampled from [-x, x].
        grayscale: probability of conversion to grayscale.
        blur: probability of Gaussian blur for the first global, second global and local crops.
        blur_radius: range of its standard deviation, pixels.
        solarize: probability of solarization, second global crop only.
        mean, std: per-channel normalization of values in [0, 1].
        global_number: number of global crops, 1 or 2.
        vertical_flip: probability of a vertical flip, for images without a canonical orientation.
        rotate90: rotate each crop by 0, 90, 180 or 270 degrees.
        channels: C of images that are tensors [C, H, W]; None for RGB. Brightness and contrast are then sampled for
            each channel; there is no saturation, hue, grayscale and solarization. Needs C values of mean and std.

    Raises:
        TypeError, ValueError: by the calls below, on an image that is not RGB, see `to_pixels`.
    """

    def __init__(self, global_size: int = 224, global_scale: Range = (0.4, 1.0), local_size: int = 96,
                 local_scale: Range = (0.05, 0.4), local_number: int = 8, ratio: Range = (3 / 4, 4 / 3),
                 flip: float = 0.5, jitter: float = 0.8, brightness: float = 0.4, contrast: float = 0.4,
                 saturation: float = 0.2, hue: float = 0.1, grayscale: float = 0.2,
                 blur: tuple[float, float, float] = (1.0, 0.1, 0.5), blur_radius: Range = (0.1, 2.0),
                 solarize: float = 0.2, mean=IMAGENET_MEAN, std=IMAGENET_STD, global_number: int = 2,
                 vertical_flip: float = 0.0, rotate90: bool = False, channels: int | None = None):
        self.arguments = dict(locals())
        del self.arguments["self"]
        solarize, grayscale = (0.0, 0.0) if channels else (solarize, grayscale)
        first = global_size, global_scale, blur[0], 0.0  # (size, scale, blur probability, solarize probability)
        second = global_size, global_scale, blur[1], solarize
        self.kinds = [first, second][:global_number] + [(local_size, local_scale, blur[2], 0.0)] * local_number
        self.crop_sizes = [size for size, _, _, _ in self.kinds]
        self.ratio, self.flip, self.jitter = ratio, flip, jitter
        self.grayscale, self.blur_radius = grayscale, blur_radius
        self.amounts = [("brightness", 1, brightness), ("contrast", 1, contrast), ("saturation", 1, saturation),
                        ("hue", 0, hue)][:2 if channels else 4]  # (name, center and half width of the amount's range)
        self.vertical_flip, self.rotate90, self.channels = vertical_flip, rotate90, channels
        self.mean, self.std = 255 * torch.tensor(mean).view(-1, 1, 1), 255 * torch.tensor(std).view(-1, 1, 1)

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.arguments.items())})"

    def __call__(self, image, key=None) -> list[Tensor]:
        """Image -> V normalized tensors [C, s, s]; without a key the crops are new each time."""
        with torch.inference_mode():  # faster, since crops are many small operations
            if self.channels:
                check_image(image, self.channels)
                pixels, draw = image, render_channels
            else:
                pixels, draw = to_pixels(image).permute(2, 0, 1), render
            height, width = pixels.shape[1:]
            crops = [draw(pixels[None], view) for view in self.sample(width, height, key)]
        return [self.normalize(crop)[0] for crop in crops]

    def reduction(self, width: int, height: int) -> int:
        """Factor (1, 2, 4 ...) by which an image can be downsampled before cropping without a visible difference.

        The smallest possible crop keeps three pixels for each of its pixels after resizing, in each direction. On
        photographs its values then differ by less than 0.5 of 255 on average, and 999 of 1000 by at most 4.
        """
        shortest = min(min(width, height, math.sqrt(width * height * scale[0] * min(self.ratio[0], 1 / self.ratio[1])))
                       / size for size, scale, _, _ in self.kinds)
        return 2 ** math.floor(math.log2(max(1, shortest / 3)))

    def sample(self, width: int, height: int, key=None) -> list[View]:
        """Sample the parameters of all V crops of a width x height image; they depend on the key only."""
        rng = random.Random() if key is None else random.Random(repr(key))
        return [View(
            size=size,
            box=sample_box(rng, width, height, scale, self.ratio),
            flip=rng.random() < self.flip,
            jitter=self.sample_jitter(rng) if rng.random() < self.jitter else (),
            grayscale=rng.random() < self.grayscale,
            blur=rng.uniform(*self.blur_radius) if rng.random() < blur else 0.0,
            solarize=rng.random() < solarize,
            vertical_flip=self.vertical_flip > 0 and rng.random() < self.vertical_flip,
            turns=rng.randrange(4) if self.rotate90 else 0) for size, scale, blur, solarize in self.kinds]

    def sample_jitter(self, rng):
        def draw(center, width):
            return center + rng.uniform(-width, width)

        jitter = [(name, tuple(draw(*limits) for _ in range(self.channels)) if self.channels else draw(*limits))
                  for name, *limits in self.amounts]
        rng.shuffle(jitter)
        return tuple(jitter)

    def normalize(self, x):
        """[..., C, s, s] in 0 to 255 -> normalized."""
        return (x - self.mean).div_(self.std)


def sample_box(rng, width, height, scale, ratio):
    """Sample (left, top, right, bottom), a box of random area and aspect ratio inside a width x height image.

    Ten trials, then the largest center box of an allowed aspect ratio, as torchvision's RandomResizedCrop.
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


class EvalTransform:
    """Evaluation view of an image: shorter side resized to the crop's / 0.875 (bicubic), center crop, normalized.

    As for ImageNet, where the sides are 256 and 224. An image that already has the crop's size is taken as it is.

    Args:
        size: side of the crop, or height and width, pixels.
        mean, std: per-channel normalization of values in [0, 1].
        channels: see `MultiCrop`.
    """

    def __init__(self, size: int | tuple[int, int] = 224, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                 channels: int | None = None):
        self.size, self.mean, self.std = (size, size) if isinstance(size, int) else tuple(size), mean, std
        self.channels = channels

    def __repr__(self):
        return f"EvalTransform(size={self.size}, mean={self.mean}, std={self.std}, channels={self.channels})"

    def __call__(self, image) -> Tensor:
        """Image -> [C, height, width]; a tensor is resized as Pillow does, up to rounding."""
        (H, W), (height, width) = check_image(image, self.channels), self.size
        if self.size != (H, W):
            shorter = round(min(H, W) * (max(height / H, width / W) / 0.875))
            H, W = (int(shorter * side / min(H, W)) for side in (H, W))
            if self.channels:
                image = F.interpolate(image[None], (H, W), mode="bicubic", antialias=True)[0].clamp_(0, 1)
            elif isinstance(image, Tensor):
                x = to_pixels(image).permute(2, 0, 1).unsqueeze(0)
                image = F.interpolate(x, (H, W), mode="bicubic", antialias=True)[0]
            else:
                image = image.resize((W, H), BICUBIC)
        top, left = round((H - height) / 2), round((W - width) / 2)
        if self.channels:
            x = image[:, top:top + height, left:left + width]
        else:
            x = to_pixels(image)[top:top + height, left:left + width].permute(2, 0, 1).float().contiguous() / 255
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)


# ---- one crop of one image ----

def check_image(image, channels=None) -> tuple[int, int]:
    """Height and width of a PIL image in RGB or a tensor [3, H, W]; with channels, of a float tensor [channels, H, W].

    Raises:
        TypeError: neither, or a tensor that is neither uint8 nor float.
        ValueError: another mode or shape.
    """
    if channels and not (isinstance(image, Tensor) and image.is_floating_point()):
        raise TypeError(f"expected a float tensor [{channels}, H, W], got {getattr(image, 'dtype', type(image))}")
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"expected an image of uint8, or of floats in [0, 1], got {image.dtype}")
        if image.ndim != 3 or image.shape[0] != (channels or 3):
            expected = f"image [{channels}, H, W]" if channels else "RGB image [3, H, W]"
            raise ValueError(f"expected one {expected}, got {list(image.shape)}")
        return tuple(image.shape[1:])
    if getattr(image, "mode", "RGB") != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}: use image.convert('RGB')")
    if not hasattr(image, "mode"):
        raise TypeError(f"expected a PIL image or a tensor [3, H, W], got {type(image).__name__}")
    return image.height, image.width


def to_pixels(image) -> Tensor:
    """PIL image in RGB, or tensor [3, H, W], uint8 or float in [0, 1] -> [H, W, 3] uint8.

    Raises:
        TypeError, ValueError: see `check_image`; or floats outside of [0, 1].
    """
    height, width = check_image(image)
    if not isinstance(image, Tensor):
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    if image.is_floating_point():
        if not (image.amin() >= 0 and image.amax() <= 1):
            raise ValueError(f"expected floats in [0, 1], got {image.amin():.3g} to {image.amax():.3g}")
        image = image.mul(255).round().to(torch.uint8)
    return image.permute(1, 2, 0)


def render(pixels, view):
    """Image [1, 3, H, W] uint8 -> crop [1, 3, s, s] float32, whole numbers in 0 to 255."""
    left, top, right, bottom = view.box
    x = F.interpolate(pixels[..., top:bottom, left:right], (view.size, view.size), mode="bicubic", antialias=True)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    x = orient(x, view)
    for name, amount in view.jitter:
        x = JITTER[name](x, amount)
    if view.grayscale:
        x = to_grayscale(x)
    if view.blur:
        x = gaussian_blur(x, torch.tensor(box_weights(view.blur)).unbind())
    if view.solarize:
        x = solarize(x)
    return x.expand(1, 3, view.size, view.size)


def render_channels(image, view):
    """Image [1, C, H, W], float in [0, 1] -> crop [1, C, s, s], float in 0 to 255, not rounded."""
    left, top, right, bottom = view.box
    x = F.interpolate(image[..., top:bottom, left:right], (view.size, view.size), mode="bicubic", antialias=True)
    x = orient(x.clamp(0, 1), view)
    for name, amounts in view.jitter:
        base = x.mean(dim=(-2, -1), keepdim=True) if name == "contrast" else 0.0
        x = ((x - base) * torch.tensor(amounts).view(-1, 1, 1) + base).clamp_(0, 1)
    if view.blur:
        weights = torch.tensor(box_weights(view.blur)).unbind()
        for dim in BLUR_DIMS:
            x = box_blur(x, weights, dim)
    return 255 * x


def orient(x, view):
    """Flip and rotate crops [..., s, s]."""
    if view.flip:
        x = x.flip(-1)
    if view.vertical_flip:
        x = x.flip(-2)
    return x.rot90(view.turns, (-2, -1)) if view.turns else x


# ---- operations on whole numbers in 0 to 255, [S, 3, H, W], possibly in place; amounts are floats or [S, 1, 1, 1] ----

def adjust_brightness(x, factor):
    return x.mul_(factor).clamp_(0, 255).floor_()


def adjust_contrast(x, factor):
    return blend(x, mean_luminance(to_grayscale(x)), factor)


def adjust_saturation(x, factor):
    return blend(x, to_grayscale(x), factor)


def blend(x, base, factor):
    return x.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def mean_luminance(luminance):
    return luminance.mean(dim=(-2, -1), keepdim=True).add_(0.5).floor_()


def to_grayscale(x):
    """Luminance [S, 1, H, W]: ITU-R 601-2 in 16 bits, which float32 holds exactly."""
    r, g, b = x.chunk(3, dim=-3)
    return (r * (19595 / 65536)).add_(g, alpha=38470 / 65536).add_(b, alpha=7471 / 65536).add_(0.5).floor_()


def adjust_hue(x, turn):
    """Shift the hue by `turn` turns, through an HSV of 256 steps as Pillow's."""
    r, g, b = x.chunk(3, dim=-3)
    value = x.amax(dim=-3, keepdim=True)
    chroma = value - x.amin(dim=-3, keepdim=True)
    # Hue in sixths of a turn, from -1 to 5. On whole numbers clamp(., 0, 1) selects the largest channel, and is fast.
    sixths = torch.lerp((b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4), (value - g).clamp_(0, 1))
    sixths = torch.lerp(g - b, sixths, (value - r).clamp_(0, 1)).div_(chroma.clamp(min=1))
    hue = sixths.mul_(255 / 6).floor_()
    shift = turn * 255
    hue = hue.sub_(hue.clamp(-1, 0), alpha=255).add_((shift.trunc() if isinstance(turn, Tensor) else int(shift)) % 256)
    hue = hue.sub_((hue - 255).clamp_(0, 1), alpha=256)
    chroma = chroma.mul_(255).div_(value.clamp(min=1)).floor_().mul_(value).div_(255)
    # Each channel is value - chroma * clamp(distance - 1, 0, 1), with the distance on the color circle in sixths.
    opposite = torch.arange(3.0, 8.0, 2.0, device=x.device).remainder_(6).view(3, 1, 1)  # 3, 5, 1 for r, g, b
    fall = (hue.mul_(6 / 255) - opposite).abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(value + chroma, fall, chroma, value=-1).round_()


def solarize(x):
    return x.sub_(127.5).abs_().neg_().add_(127.5)


def gaussian_blur(x, weights):
    for dim in BLUR_DIMS:
        x = box_blur(x, weights, dim).round_()
    return x


def box_blur(x, weights, dim):
    """Blur [S, C, H, W] along one dimension by `box_weights`, T of [] or [S, 1, 1, 1], replicating the edges."""
    reach, length = len(weights) - 1, x.shape[dim]
    padded = F.pad(x, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="replicate")
    x = padded.narrow(dim, reach, length) * weights[0]
    for i in range(1, reach + 1):
        x.addcmul_(padded.narrow(dim, reach - i, length), weights[i])
        x.addcmul_(padded.narrow(dim, reach + i, length), weights[i])
    return x


def box_weights(sigma):
    """Weights, from the center outwards, of the box filter that applied three times is a Gaussian of this sigma.

    Gwosdek et al. 2011, "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", section 2: the
    outermost pixels weigh less, so that the variance is sigma^2 / 3.
    """
    variance = sigma**2 / 3
    reach = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    outermost = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance) / (6 * (variance - (reach + 1) ** 2))
    total = 2 * reach + 1 + 2 * outermost
    return [1 / total] * (reach + 1) + [outermost / total]


JITTER = dict(brightness=adjust_brightness, contrast=adjust_contrast, saturation=adjust_saturation, hue=adjust_hue)
BLUR_DIMS = (-1, -1, -1, -2, -2, -2)  # a Gaussian is three box filters in each direction


# ---- all crops of a batch ----

@functools.cache
def compile_operation(op):
    return torch.compile(op, dynamic=op is crop_and_resize)  # others have the same shapes in every batch


class BatchMultiCrop(MultiCrop):
    """All crops of a batch of images, on any device: those of MultiCrop, up to rounding.

    Images of any sizes lie one after another. Crop, resize and flip gather the few pixels that each pixel of a crop
    depends on. Then each operation runs on all crops of a size, in uint8 (with channels, in float32), and changes
    nothing where it does not apply: shapes stay the same, and nothing waits for the device. Intermediate results take
    at most CHUNK_BYTES, or what a single crop needs.

    Args:
        args, kwargs: as for MultiCrop.
        compile: fuse each operation with torch.compile.
    """

    def __init__(self, *args, compile: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.arguments["compile"] = compile
        self.compile, self.max_weights = compile, len(box_weights(self.blur_radius[1]))

    def prepare(self, image, key=None) -> tuple[Tensor, Tensor]:
        """Image -> pixels [H * W, C] uint8, or float32 in 0 to 255, and crop parameters [V, P], the worker's part."""
        height, width = check_image(image, self.channels)
        params = torch.tensor([self.pack_view(view, (width, height)) for view in self.sample(width, height, key)])
        if self.channels:
            return (255 * image.float()).permute(1, 2, 0).reshape(-1, self.channels), params
        return to_pixels(image).reshape(-1, 3), params

    def pack_view(self, view, image_size):
        """View -> P floats, which change nothing if it has no jitter or blur.

        0, 1 image size, 2-6 box and flip, 7 grayscale, 8 solarize, 9 vertical flip, 10 quarter turns, from 11 blur
        weights, then for each jitter operation its number and its amount, or one for each channel.
        """
        weights = box_weights(view.blur) if view.blur else [1.0]
        no_change = "brightness", (1.0,) * self.channels if self.channels else 1.0
        jitter = [(list(JITTER).index(name), *(amount if self.channels else [amount]))
                  for name, amount in view.jitter or [no_change] * len(self.amounts)]
        return [*image_size, *view.box, view.flip, view.grayscale, view.solarize, view.vertical_flip, view.turns,
                *weights, *[0.0] * (self.max_weights - len(weights)), *itertools.chain(*jitter)]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, params: Tensor) -> list[Tensor]:
        """Pixels [N, C] of B images and crop parameters [B, V, P] -> V normalized tensors [B, C, s, s].

        Args:
            pixels: those of `prepare`, concatenated, on the device of the crops.
            params: those of `prepare`, stacked, on the CPU, because shapes depend on them; best in pinned memory.

        Raises:
            TypeError: other pixels.
        """
        number, dtype = (self.channels, torch.float32) if self.channels else (3, torch.uint8)
        if pixels.dtype != dtype or pixels.shape[1:] != (number,):
            raise TypeError(f"expected pixels of prepare, {str(dtype)[6:]} [N, {number}], got {pixels.dtype} "
                            f"{list(pixels.shape)}")
        device, crops = pixels.device, []
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        values = params.to(device, non_blocking=params.is_pinned()).permute(2, 1, 0)  # [P, V, B]
        areas = values[0].long() * values[1].long()
        offsets = areas.cumsum(dim=1) - areas  # of the first pixel of each image, [V, B]
        sides = (params[..., 4:6] - params[..., 2:4]).amax(dim=0)  # of the largest boxes, [V, 2]
        shrinking = (max(1, side / size) for side, size in zip(sides.amax(dim=1).tolist(), self.crop_sizes))
        taps = [4 * 2 ** math.ceil(math.log2(factor)) for factor in shrinking]  # few values, each compiled once
        pixels = F.pad(pixels, (0, 0, 0, max(taps)))
        for size in dict.fromkeys(self.crop_sizes):
            first, count = self.crop_sizes.index(size), self.crop_sizes.count(size)
            views = slice(first, first + count)
            rows, chosen = max(int(sides[views, 1].max()), *taps[views]), values[:, views].flatten(1)  # [P, S]
            # so many bytes for each pixel between the two passes of the resize, and for each pixel of an operation
            resizing, operating = (16 * number, 16 * number) if self.channels else (32, 80)
            chunk = max(1, CHUNK_BYTES // (resizing * size * rows))
            x = torch.cat([self.run(crop_and_resize, pixels, *part, size, rows, max(taps[views])) for part in zip(
                offsets[views].flatten().split(chunk), chosen[:7].split(chunk, dim=1))])
            chunk = max(1, CHUNK_BYTES // (operating * size**2))  # the same in every batch
            x = torch.cat([self.apply_operations(*part, self.kinds[views])
                           for part in zip(x.split(chunk), chosen.split(chunk, dim=1))])
            crops += self.run(MultiCrop.normalize, self, x).unflatten(0, (count, -1)).unbind(0)
        return crops

    def apply_operations(self, x, params, kinds):
        """Orientation, color jitter, grayscale, blur, solarization of crops [S, C, s, s], by params [P, S]."""
        _, _, blurs, solarizes = zip(*kinds)
        columns, jitter = params.view(*params.shape, 1, 1, 1), 11 + self.max_weights
        if self.vertical_flip or self.rotate90:
            x = self.run(orient_crops, x, columns[9], columns[10])
        for part in params[jitter:].unflatten(0, (len(self.amounts), -1)) if self.jitter else ():  # [1 + amounts, S]
            operation, amounts = part[0].view(-1, 1, 1, 1), part[1:].T[..., None, None]
            x = self.run(jitter_channels if self.channels else jitter_crops, x, operation, amounts)
        if self.grayscale:
            x = self.run(grayscale_crops, x, columns[7])
        if any(blurs):
            for dim in BLUR_DIMS:
                x = self.run(box_blur if self.channels else blur_crops, x, columns[11:jitter].unbind(), dim)
        return self.run(solarize_crops, x, columns[8]) if any(solarizes) else x

    def run(self, op, *args):
        return (compile_operation(op) if self.compile else op)(*args)


def crop_and_resize(pixels, offsets, params, size, rows, taps):
    """Boxes of images, resized and flipped as by Pillow: [S, C, size, size].

    Args:
        pixels: [N, C] uint8 of all images, or floats in 0 to 255, with `taps` more at the end.
        offsets: [S], of the first pixel of the image that the crop is of.
        params: [7, S], width and height of that image, box and flip.
        rows: at least the height of every box, and taps.
        taps: at least 4, and 4 * side of the box / size.
    """
    channels, (width, _, left, top, right, bottom, flip) = pixels.shape[1], params.unsqueeze(-1)  # [S, 1]
    place = torch.arange(size, device=pixels.device)
    first, weights = bicubic_taps(right - left, torch.where(flip > 0, size - 1 - place, place), size, taps)
    row = (top + torch.arange(rows, device=pixels.device)).minimum(bottom - 1)
    start = offsets.unsqueeze(-1) + row.long() * width.long() + left.long()  # of each row of the box, [S, rows]
    weights = weights[:, :, None, :, None].repeat(1, 1, 1, 1, channels)
    x = sum_taps(pixels, start.unsqueeze(-1) + first.unsqueeze(1), weights)  # [S, rows, size, C]
    first, weights = bicubic_taps(bottom - top, place, size, taps)
    start = rows * torch.arange(len(first), device=pixels.device).unsqueeze(-1)
    x = sum_taps(x.view(-1, size * channels), start + first, weights.unsqueeze(-1))  # [S, size, size * C]
    x = x.view(-1, size, size, channels).permute(0, 3, 1, 2).contiguous()
    return x.clamp_(0, 255) if x.is_floating_point() else x


def bicubic_taps(length, place, size, taps):
    """Antialiased bicubic filter (Keys 1981, a = -0.5) for pixels `place` of `size`, from `length` pixels.

    Args:
        length: [S, 1]
        place: [size] or [S, size]

    Returns:
        The first of the pixels to sum [S, size], and weights of it and the following ones [taps, S, size]; they sum to
        1 and are 0 beyond the last pixel.
    """
    scale = length / size
    center, width = (place + 0.5) * scale, scale.clamp(min=1)
    first = (center - 2 * width + 0.5).floor().minimum(length - taps).clamp(min=0)
    position = first + torch.arange(taps, device=length.device).view(-1, 1, 1) + 0.5
    x = ((position - center) / width).abs()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0)) * (position < length)
    return first.long(), weights / weights.sum(dim=0)


def sum_taps(table, index, weights):
    """Sum of weights[t] * table[index + t] over all T taps, as uint8 if the table is; its rows are the last dimension.
    """
    x = F.embedding(index, table) * weights[0]
    for t in range(1, len(weights)):
        x.addcmul_(F.embedding(index, table[t:]), weights[t])
    return x if table.is_floating_point() else x.round_().clamp_(0, 255).to(torch.uint8)


def orient_crops(x, vertical_flip, turns):
    x = torch.where(vertical_flip > 0, x.flip(-2), x)
    half = torch.where(turns >= 2, x.rot90(2, (-2, -1)), x)
    return torch.where(turns % 2 > 0, half.rot90(1, (-2, -1)), half)


def jitter_crops(x, operation, amount):
    """Apply to each crop [S, 3, s, s] uint8 an operation of JITTER, by its number [S, 1, 1, 1]."""
    x = x.float()
    luminance, names = to_grayscale(x), list(JITTER)
    base = torch.where(operation == names.index("contrast"), mean_luminance(luminance), 0.0)
    base = torch.where(operation == names.index("saturation"), luminance, base)
    hue = adjust_hue(x, amount)
    return torch.where(operation == names.index("hue"), hue, blend(x, base, amount)).to(torch.uint8)


def jitter_channels(x, operation, amounts):
    """Change brightness or contrast of each channel of crops [S, C, s, s] float, by amounts [S, C, 1, 1]."""
    base = torch.where(operation == list(JITTER).index("contrast"), x.mean(dim=(-2, -1), keepdim=True), 0.0)
    return ((x - base) * amounts + base).clamp_(0, 255)


def grayscale_crops(x, selected):
    return torch.where(selected > 0, to_grayscale(x.float()), x).to(torch.uint8)


def blur_crops(x, weights, dim):
    return box_blur(x.float(), weights, dim).round_().to(torch.uint8)


def solarize_crops(x, selected):
    return torch.where(selected > 0, solarize(x.float()), x).to(torch.uint8)
