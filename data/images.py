"""Image decoding: any file -> an upright RGB image, or ImageReadError.

    image = read_image("dog.jpg")

This file needs torchvision and Pillow.
"""

import contextlib
import os
import warnings

import torchvision
from PIL import Image, ImageOps

EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoders that a file's content may select
MAX_ASPECT = 100  # longer side over shorter: the shorter is resized to the crop, and the longer grows with it


class ImageReadError(OSError):
    """One picture that cannot be decoded; the message names it and says why."""


def read_image(path, reduction=None, upright=True):
    """Decode a file as a person would see it: upright, in RGB, transparency on white.

    Args:
        reduction: (width, height) -> by what power of two the picture may be reduced; a JPEG is not decoded further.
        upright: False leaves it as it lies in the file, whatever EXIF says.

    Raises:
        Unreadable: the file is missing, damaged, not a picture, or too large or too long to be one.
    """
    with wrap_decode_errors(path):
        if not os.path.isfile(path):  # a pipe of that name would be waited for
            raise ValueError("not a file")
        with Image.open(path, formats=FORMATS) as image:
            width, height = check_aspect(image).size
            factor = reduction(width, height) if reduction else 1
            image.draft(None, (width // factor, height // factor))  # a JPEG: to 1/8 at most, and never below these
            factor = factor * image.width // width
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
            return image.reduce(factor) if factor > 1 else image


@contextlib.contextmanager
def wrap_decode_errors(name):
    """Whatever goes wrong within becomes Unreadable, and so does a picture above twice Image.MAX_IMAGE_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # cameras have 108 million pixels
            yield
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ImageReadError(f"{name}: {error or type(error).__name__}") from None


def check_aspect(image):
    """The image, if it has the form of a picture; raises ValueError if it is more of a line."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels is more of a line than a picture")
    return image


def to_rgb(image):
    """PIL image of any mode -> RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # deep grey, which Pillow's own conversion would clip at 255
        grey = image.convert("F")
        ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((top for top in ranges if grey.getextrema()[1] <= top), 65535)
        return grey.point(lambda value: value * (255 / white) + 0.5).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
