"""Multi-crop augmentation: 2 global and n local crops of an image, each with its own color jitter, blur and so on.

    multicrop = MultiCrop()                                 # the paper's recipe, for data loader workers
    crops = multicrop(image)                                # PIL image -> 2 x [3, 224, 224] + 8 x [3, 96, 96]
    crops = multicrop(image, key=(seed, epoch, index))      # equal keys give equal crops, in any process

    multicrop = BatchMultiCrop()                            # the same crops for a whole batch, on any device
    pixels, params = zip(*(multicrop.prepare(image) for image in images))
    crops = multicrop([p.cuda() for p in pixels], torch.stack(params))    # 2 x [B, 3, 224, 224] + 8 x [B, 3, 96, 96]

Caron et al. 2021, section 3.1 and appendix C; color augmentation of BYOL (Grill et al. 2020, appendix B). `sample`
draws all crop parameters from the key, the rest is a function of image and parameters. The operations are Pillow's, on
whole numbers from 0 to 255: resize, hue and blur are equal up to rounding, the others to the bit. Needs torch only.
"""

import functools
import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHUNK_BYTES = 2**30  # memory for padded images and intermediate results of BatchMultiCrop

Range = tuple[float, float]


class View(NamedTuple):
    """Crop parameters: all that is random about one crop."""

    size: int  # side of the crop after resizing, pixels
    box: tuple  # (left, top, right, bottom) in the image, pixels
    flip: bool
    jitter: tuple  # (name, amount) in order of application, empty for none
    grayscale: bool
    blur: float  # standard deviation of the Gaussian after resizing, pixels; 0 for none
    solarize: bool


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
    """

    def __init__(self, global_size: int = 224, global_scale: Range = (0.4, 1.0), local_size: int = 96,
                 local_scale: Range = (0.05, 0.4), local_number: int = 8, ratio: Range = (3 / 4, 4 / 3),
                 flip: float = 0.5, jitter: float = 0.8, brightness: float = 0.4, contrast: float = 0.4,
                 saturation: float = 0.2, hue: float = 0.1, grayscale: float = 0.2,
                 blur: tuple[float, float, float] = (1.0, 0.1, 0.5), blur_radius: Range = (0.1, 2.0),
                 solarize: float = 0.2, mean=IMAGENET_MEAN, std=IMAGENET_STD, global_number: int = 2):
        first = global_size, global_scale, blur[0], 0.0  # (size, scale, blur probability, solarize probability)
        second = global_size, global_scale, blur[1], solarize
        self.kinds = [first, second][:global_number] + [(local_size, local_scale, blur[2], 0.0)] * local_number
        self.crop_sizes = [size for size, _, _, _ in self.kinds]
        self.ratio, self.flip, self.jitter = ratio, flip, jitter
        self.grayscale, self.blur_radius = grayscale, blur_radius
        self.amounts = [("brightness", 1, brightness), ("contrast", 1, contrast), ("saturation", 1, saturation),
                        ("hue", 0, hue)]  # (name, center and half width of the amount's range)
        self.mean, self.std = 255 * torch.tensor(mean).view(3, 1, 1), 255 * torch.tensor(std).view(3, 1, 1)

    def __call__(self, image, key=None) -> list[Tensor]:
        """RGB image -> V normalized tensors [3, s, s]; without a key the crops are new each time."""
        pixels = to_pixels(image).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
        return [self.normalize(render(pixels, view))[0] for view in self.sample(image.width, image.height, key)]

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
            solarize=rng.random() < solarize) for size, scale, blur, solarize in self.kinds]

    def sample_jitter(self, rng):
        jitter = [(name, center + rng.uniform(-width, width)) for name, center, width in self.amounts]
        rng.shuffle(jitter)
        return tuple(jitter)

    def normalize(self, x):
        """[..., 3, s, s] in 0 to 255 -> normalized."""
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


# ---- one crop of one image ----

def to_pixels(image):
    """RGB image -> [H, W, 3] uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def render(pixels, view):
    """Image [1, 3, H, W] uint8 -> crop [1, 3, s, s] float32, whole numbers in 0 to 255."""
    left, top, right, bottom = view.box
    x = F.interpolate(pixels[..., top:bottom, left:right], (view.size, view.size), mode="bicubic", antialias=True)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    if view.flip:
        x = x.flip(-1)
    for name, amount in view.jitter:
        x = JITTER[name](x, amount)
    if view.grayscale:
        x = to_grayscale(x)
    if view.blur:
        x = gaussian_blur(x, torch.tensor(box_weights(view.blur)))
    if view.solarize:
        x = solarize(x)
    return x.expand(1, 3, view.size, view.size)


# ---- operations on whole numbers in 0 to 255, [S, 3, H, W], possibly in place; amounts are floats or [S, 1, 1, 1] ----

def adjust_brightness(x, factor):
    return x.mul_(factor).clamp_(0, 255).floor_()


def adjust_contrast(x, factor):
    mean = to_grayscale(x).mean(dim=(-2, -1), keepdim=True).add_(0.5).floor_()
    return x.sub_(mean).mul_(factor).add_(mean).clamp_(0, 255).floor_()


def adjust_saturation(x, factor):
    luminance = to_grayscale(x)
    return x.sub_(luminance).mul_(factor).add_(luminance).clamp_(0, 255).floor_()


def to_grayscale(x):
    """Luminance [S, 1, H, W]: ITU-R 601-2 in 16 bits, which float32 holds exactly."""
    r, g, b = x.split(1, dim=-3)
    return (r * (19595 / 65536)).add_(g, alpha=38470 / 65536).add_(b, alpha=7471 / 65536).add_(0.5).floor_()


def adjust_hue(x, turn):
    """Shift the hue by `turn` turns, through an HSV of 256 steps as Pillow's."""
    r, g, b = x.split(1, dim=-3)
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
    hue.mul_(6 / 255)
    for channel, opposite in ((r, 3), (g, 5), (b, 1)):
        torch.sub(hue, opposite, out=channel)
    fall = x.abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(value + chroma, fall, chroma, value=-1).round_()


def solarize(x):
    return x.sub_(127.5).abs_().neg_().add_(127.5)


def gaussian_blur(x, weights):
    """Blur by three box filters with `box_weights`, [T] or [S, T], replicating the edges each time."""
    weights = weights.view(-1, weights.shape[-1], 1, 1, 1).unbind(1)  # T of [1 or S, 1, 1, 1]
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


# ---- all crops of a batch ----

compile_operation = functools.cache(functools.partial(torch.compile, dynamic=True))


class BatchMultiCrop(MultiCrop):
    """All crops of a batch of images, on any device: those of MultiCrop, up to rounding.

    Crop, resize and flip are two matrix products per image, in float32 (or in TF32 if that is allowed: it holds the
    pixels exactly and the weights to 10 bits). The operations run on all crops of a size at once. Memory beyond the
    crops themselves stays below CHUNK_BYTES, or what a single image needs.

    Args:
        args, kwargs: as for MultiCrop.
        compile: fuse each operation with torch.compile.
    """

    def __init__(self, *args, compile: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.compile, self.max_weights = compile, len(box_weights(self.blur_radius[1]))

    def prepare(self, image, key=None) -> tuple[Tensor, Tensor]:
        """RGB image -> pixels [H, W, 3] uint8 and crop parameters [V, P], the worker's part."""
        return to_pixels(image), torch.tensor([self.pack_view(view) for view in self.sample(*image.size, key)])

    def pack_view(self, view):
        """View -> P floats: 0-4 box and flip, 5-8 jitter operations, 9-12 amounts, 13, 14, from 15 blur weights."""
        operations = [list(JITTER).index(name) for name, _ in view.jitter] or [-1.0] * 4
        amounts = [amount for _, amount in view.jitter] or [0.0] * 4
        weights = box_weights(view.blur) if view.blur else []
        return [*view.box, view.flip, *operations, *amounts, view.grayscale, view.solarize,
                *weights, *[0.0] * (self.max_weights - len(weights))]

    @torch.no_grad()
    def __call__(self, pixels: list[Tensor], params: Tensor) -> list[Tensor]:
        """B images [H, W, 3] uint8 on one device and crop parameters [B, V, P] -> V normalized tensors [B, 3, s, s].

        Args:
            params: on the CPU, where choosing the crops for each operation needs no device sync.
        """
        device = pixels[0].device
        crops = [torch.empty(len(pixels), 3, size, size, device=device) for size in self.crop_sizes]
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        for chunk in self.iter_chunks([p.shape[:2] for p in pixels]):
            images, index = pad_images([pixels[i] for i in chunk]), torch.tensor(chunk, device=device)
            for size in set(self.crop_sizes):
                views = [v for v, s in enumerate(self.crop_sizes) if s == size]
                chosen = params[chunk][:, views].flatten(0, 1)
                values = chosen.to(device)
                with torch.autocast(device.type, enabled=False):
                    x = crop_and_resize(images, values[:, :5].view(len(chunk), len(views), 5), size)  # [b, v, 3, s, s]
                    result = self.normalize(self.apply_operations(x.flatten(0, 1), chosen, values)).view(x.shape)
                for i, v in enumerate(views):
                    crops[v][index] = result[:, i]
        return crops

    def iter_chunks(self, sizes):
        """Yield lists of indices of a batch; the images of each, padded to the largest of them, fit CHUNK_BYTES."""
        rows = max(size * self.crop_sizes.count(size) for size in self.crop_sizes)
        area = sum(size**2 for size in self.crop_sizes)
        chunk = []
        for i in sorted(range(len(sizes)), key=lambda i: math.prod(sizes[i])):
            height, width = map(max, zip(*(sizes[j] for j in (*chunk, i))))
            floats = 3 * height * width + (8 * height + 8 * width) * rows + 8 * area  # per image, as measured
            if chunk and 4 * floats * (len(chunk) + 1) > CHUNK_BYTES:
                yield chunk
                chunk = []
            chunk.append(i)
        yield chunk

    def apply_operations(self, x, params, values):
        """Color jitter, grayscale, blur and solarization of crops [S, 3, s, s], by parameters [S, P].

        Args:
            params, values: the same parameters on the CPU and on the device of x.
        """
        amounts, weights = values[:, 9:13].view(-1, 4, 1, 1, 1).unbind(1), values[:, 15:]
        # (operation, which crops it applies to, its arguments for all crops) in order of application
        steps = [(op, names == i, [amount])
                 for names, amount in zip(params[:, 5:9].T, amounts) for i, op in enumerate(JITTER.values())]
        steps += [(to_grayscale, params[:, 13], []), (gaussian_blur, params[:, 15], [weights]),
                  (solarize, params[:, 14], [])]
        indices = [selected.nonzero().flatten() for _, selected, _ in steps]
        indices = torch.cat(indices).to(x.device).split([len(index) for index in indices])  # one transfer for all
        for (op, _, arguments), index in zip(steps, indices):
            if len(index):
                x[index] = (compile_operation(op) if self.compile else op)(x[index], *(a[index] for a in arguments))
        return x


def pad_images(pixels):
    """B images [H, W, 3] uint8 of several sizes -> [B, 3, H, W] float32, zero-padded."""
    height, width = (max(p.shape[side] for p in pixels) for side in (0, 1))
    padded = [F.pad(p.permute(2, 0, 1), (0, width - p.shape[1], 0, height - p.shape[0])) for p in pixels]
    return torch.stack(padded).float()


def crop_and_resize(images, boxes, size):
    """[B, 3, H, W] and (left, top, right, bottom, flip) [B, V, 5] -> crops [B, V, 3, size, size], flipped."""
    left, top, right, bottom, flip = boxes.unbind(-1)
    columns = bicubic_weights(left, right, size, images.shape[3])  # [B, V, size, W]
    columns = torch.where(flip.view(*flip.shape, 1, 1) > 0, columns.flip(-2), columns)
    rows = bicubic_weights(top, bottom, size, images.shape[2])
    x = torch.einsum("bchw,bvxw->bvhcx", images, columns).round_().clamp_(0, 255)  # Pillow rounds after each direction
    return torch.einsum("bvyh,bvhcx->bvcyx", rows, x).round_().clamp_(0, 255).contiguous()


def bicubic_weights(start, end, size, length):
    """Weights of the antialiased bicubic filter (Keys 1981, a = -0.5), from [start, end) of `length` pixels to `size`.

    Args:
        start, end: [...] float, pixels.

    Returns:
        [..., size, length]; each row sums to 1 and is 0 outside of [start, end).
    """
    start, end = start.view(*start.shape, 1, 1), end.view(*end.shape, 1, 1)
    scale = (end - start) / size
    center = (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * scale
    position = torch.arange(length, device=start.device) + 0.5 - start  # relative to start, for float32 precision
    x = ((position - center) / scale.clamp(min=1)).abs_()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0)) * ((position > 0) & (position < end - start))
    return weights / weights.sum(dim=-1, keepdim=True)
