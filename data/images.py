"""Image decoding: any file -> upright RGB image, or ImageReadError.

    image = read_image("dog.jpg")
"""

import contextlib
import os
import warnings
from collections.abc import Callable

from PIL import Image, ImageOps

Image.init()
with contextlib.suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()  # HEIC, where it is installed
# Pillow's others may start programs
DECODERS = [name for name in "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 HEIF QOI".split() if name in Image.OPEN]
EXTENSIONS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in DECODERS)
MAX_ASPECT = 100  # resizing the shorter side to the crop would make the longer one of such an image huge
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # cameras have 108 million pixels


class ImageReadError(OSError):
    """A missing or corrupt image; the message names the file and the reason."""


def read_image(path: str, reduction: Callable[[int, int], int] | None = None, upright: bool = True) -> Image.Image:
    """Decode an image file: RGB, upright, transparency on white.

    Args:
        reduction: (width, height) -> power of two to downsample by; a JPEG is not decoded at a higher resolution.
        upright: apply the EXIF orientation.

    Raises:
        ImageReadError: the file is missing, corrupt or no image, or the image is too large or too elongated.
    """
    with wrap_decode_errors(path):
        if not os.path.isfile(path):  # opening a named pipe would block
            raise ValueError("not a file")
        with Image.open(path, formats=DECODERS) as image:
            width, height = check_aspect(image).size
            factor = reduction(width, height) if reduction else 1
            image.draft(None, (width // factor, height // factor))  # JPEG only, by 8 at most, to no smaller than this
            factor = factor * image.width // width
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
            return image.reduce(factor) if factor > 1 else image


def is_image(path: str) -> bool:
    """Whether read_image takes a file: by its ending or, if that is unknown, by its first bytes and header."""
    ending = os.path.splitext(path)[1].lower()
    if ending in EXTENSIONS or ending in (".txt", ".json", ".xml", ".csv") or not os.path.isfile(path):
        return ending in EXTENSIONS
    formats = [name for name in DECODERS if name != "TIFF" or not ending]  # raw files of cameras are TIFFs
    with contextlib.suppress(Exception), Image.open(path, formats=formats):  # raises nearly anything on corrupt files
        return True
    return False


def read_or_message(read, *args):
    """read(*args), or the message if it raises ImageReadError."""
    try:
        return read(*args)
    except ImageReadError as error:
        return str(error)


@contextlib.contextmanager
def wrap_decode_errors(name):
    """Raise ImageReadError for any error inside, and for images above twice Image.MAX_IMAGE_PIXELS."""
    try:
        yield
    except Exception as error:  # decoders raise nearly anything on corrupt files
        raise ImageReadError(f"{name}: {error or type(error).__name__}") from None


def check_aspect(image):
    """Return the image; raise ValueError if one side is more than MAX_ASPECT times the other."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, one side is more than {MAX_ASPECT} times the other")
    return image


def to_rgb(image):
    """PIL image of any mode -> RGB, transparency on white."""
    if image.mode[0] in "IF":  # grayscale of more than 8 bits, which Pillow's own conversion clips at 255
        gray = image.convert("F")
        ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((top for top in ranges if gray.getextrema()[1] <= top), 65535)
        return gray.point(lambda value: value * (255 / white) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
