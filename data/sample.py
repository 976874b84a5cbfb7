"""What a few images of a data set show: their size, mean and standard deviation, whether they are nearly black.

    side = typical_side(sample_images(images))    # of eight images
    mean, std = measure_normalization(images)
"""

import contextlib
import statistics

import torch
from torchvision.transforms import functional as TF

from data.folders import DataError


def sample_images(images, samples=8):
    """Yield at most so many images, evenly spaced, without those that cannot be read."""
    for i in range(0, len(images), -(-len(images) // samples) or 1):
        with contextlib.suppress(OSError):
            yield images[i][0]


def typical_side(images):
    """Median shorter side of images in pixels; None for no images."""
    sizes = [image.shape[1:] if isinstance(image, torch.Tensor) else image.size for image in images]
    return statistics.median(map(min, sizes)) if sizes else None


def is_nearly_black(image):
    """Whether 99% of the pixels of an RGB image are below 16 of 255."""
    return sum(image.convert("L").histogram()[:16]) > 0.99 * image.width * image.height


def measure_normalization(images, max_images=1000):
    """Mean and standard deviation of each channel, of values in [0, 1], from evenly spaced images: two tuples."""
    moments = []
    for image in sample_images(images, max_images):
        x = (image if isinstance(image, torch.Tensor) else TF.to_tensor(image)).flatten(1).double()
        moments.append(torch.stack([x.mean(dim=1), x.square().mean(dim=1)]))
    if not moments:
        raise DataError("none of a thousand images can be read: --normalization measure needs some")
    mean, square = torch.stack(moments).mean(dim=0)
    std = (square - mean**2).clamp(min=0).sqrt()
    std = std.clamp(min=1e-3).masked_fill(std < 1e-6, 1.0)  # a channel may be constant, but for the color jitter
    return tuple(round(x, 6) for x in mean.tolist()), tuple(round(x, 6) for x in std.tolist())
