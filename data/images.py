"""Image decoding: any file -> upright RGB image, or ImageReadError.

    image = read_image("dog.jpg")
    image = read_image("ct.tif", value_range=(-1024, 3071))    # black and white of images of more than 8 bits
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from common.files import check_file

Image.init()
with contextlib.suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()  # HEIC, where it is installed
# Pillow's others may start programs
DECODERS = [name for name in "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 HEIF QOI".split() if name in Image.OPEN]
OTHER_ENDINGS = (".txt", ".json", ".xml", ".csv", ".tar", ".zip", ".parquet", ".gz", ".tgz")  # of files without pixels
EXTENSIONS = frozenset(ending for ending, name in Image.registered_extensions().items() if name in DECODERS)
MAX_ASPECT = 100  # resizing the shorter side to the crop would make the longer one of such an image huge
FULL_SCALES = (1, *(2**bits - 1 for bits in range(8, 17)))  # of floats, and of 8 to 16 bits
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # cameras have 108 million pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes; profiles and notes have megabytes


class ImageReadError(OSError):
    """A missing or corrupt image; the message names the file and the reason."""


def read_image(path: str, reduction: Callable[[int, int], int] | None = None, upright: bool = True,
               value_range: tuple[float, float] | None = None, content: bytes | None = None) -> Image.Image:
    """Decode an image file: RGB, upright, transparency on white.

    Args:
        path: of the file or, with `content`, its name for messages.
        reduction: (width, height) -> power of two to downsample by; a JPEG is not decoded at a higher resolution.
        upright: apply the EXIF orientation.
        value_range: black and white of grayscale of more than 8 bits; None for those of `find_value_range`.
        content: the bytes of the file, if it is inside of another.

    Raises:
        ImageReadError: the file is missing, corrupt or no image, or the image is too large or too elongated.
    """
    with wrap_decode_errors(path), open_image(path, content) as image:
        check_aspect(image)
        width, height = image.size
        factor = reduction(width, height) if reduction else 1
        image.draft(None, (width // factor, height // factor))  # JPEG only, by 8 at most, to no smaller than this
        factor = factor * image.width // width
        image.load()
        rgb = to_rgb(image, value_range)
        if upright:
            rgb.info = image.info
            with contextlib.suppress(Exception):  # broken EXIF raises nearly anything
                ImageOps.exif_transpose(rgb, in_place=True)
        return rgb.reduce(factor) if factor > 1 else rgb


def open_image(path, content=None):
    """Open an image file, or its bytes, without decoding it; raises nearly anything."""
    return Image.open(check_file(path) if content is None else io.BytesIO(content), formats=DECODERS)


def is_image(path: str) -> bool:
    """Whether read_image takes a file: by its ending or, if that is unknown, by its first bytes and header."""
    ending = os.path.splitext(path)[1].lower()
    if ending in EXTENSIONS or ending in OTHER_ENDINGS or not os.path.isfile(path):
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
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).partition(" <_io.BytesIO")[0]
        raise ImageReadError(f"{name}: {reason or type(error).__name__}") from None


def check_aspect(image):
    """Raise ValueError if one side of an image is more than MAX_ASPECT times the other."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, one side is more than {MAX_ASPECT} times the other")


def to_rgb(image, value_range=None):
    """PIL image of any mode -> RGB, transparency on white; for value_range see `read_image`."""
    check_aspect(image)
    if image.mode[0] in "IF":
        low, high = value_range or find_value_range(sample_values(image))
        values = np.nan_to_num(np.asarray(image, np.float32).clip(low, high), nan=low)
        return Image.fromarray(((values - low) * (255 / (high - low)) + 0.5).astype(np.uint8)).convert("RGB")
    # a fourth band of a TIFF is marked as alpha also where it is infrared
    if image.has_transparency_data and image.format != "TIFF":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def sample_values(image):
    """About 100,000 evenly spaced values of an image, without NaN, infinity and -3.4e38 for missing ones."""
    step = max(1, int((image.width * image.height / 100_000) ** 0.5))
    values = np.asarray(image, np.float32)[::step, ::step]
    return values[abs(values) < 1e30]


def find_value_range(values):
    """Black and white for values: 0 and the full scale if half of it is used, else the quantiles 0.1% and 99.9%."""
    low, high = np.quantile(values, (0.001, 0.999)).tolist() if values.size else (0.0, 0.0)
    full = next((full for full in FULL_SCALES if high <= full), high)
    if low >= 0 and (high - low >= full / 2 or high == low):
        return 0.0, float(full)
    return low, high if high > low else low + 1


def find_common_range(files, open_file=open_image, name=str, max_images=100, max_names=10_000):
    """One `find_value_range` for the grayscale of more than 8 bits among evenly spaced files; None without any.

    Args:
        files: sequence of paths, or of whatever the functions take.
        open_file: opens one of the files without decoding it.
        name: its name; files that are named as JPEGs are not opened.
    """
    files, values = files[::-(-len(files) // max_names) or 1], []
    files = [file for file in files if not name(file).lower().endswith((".jpg", ".jpeg"))]
    for file in files[::-(-len(files) // max_images) or 1]:
        with contextlib.suppress(Exception), open_file(file) as image:  # raises nearly anything
            if image.mode[0] in "IF":
                values.append(sample_values(image))
    return find_value_range(np.concatenate(values)) if values else None
