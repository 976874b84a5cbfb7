"""Image decoding: any file -> upright RGB image, or tensor of any channels and depth, or ImageReadError.

    image = read_image("dog.jpg")
    image = read_image("ct.tif", value_range=(-1024, 3071))    # black and white of images of more than 8 bits
    tensor = read_image("cells.tif", value_range=(0, 65535), channels=5)    # float [5, H, W] in [0, 1]
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
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
               value_range: tuple[float, float] | None = None, content: bytes | None = None,
               channels: int | None = None) -> Image.Image | torch.Tensor:
    """Decode an image file: RGB, upright, transparency on white; or with all its channels and depth.

    Args:
        path: of the file or, with `content`, its name for messages.
        reduction: (width, height) -> power of two to downsample by; a JPEG is not decoded at a higher resolution.
        upright: apply the EXIF orientation.
        value_range: black and white of grayscale of more than 8 bits; None for those of `find_value_range`.
        content: the bytes of the file, if it is inside of another.
        channels: C for a float32 tensor [C, H, W] with the value_range mapped to [0, 1], see `read_values`; None: RGB.

    Raises:
        ImageReadError: the file is missing, corrupt or no image, or the image is too large or too elongated.
    """
    if channels:
        with wrap_decode_errors(path):
            x = scale_values(read_values(path, channels, content), value_range)
            factor = reduction(x.shape[2], x.shape[1]) if reduction else 1
            return F.avg_pool2d(x, factor, ceil_mode=True) if factor > 1 else x
    with wrap_decode_errors(path), open_image(path, content) as image:
        check_aspect(image.size)
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


def is_image(path: str, channels: int | None = None) -> bool:
    """Whether read_image takes a file: by its ending or, if that is unknown, by its first bytes and header."""
    ending = os.path.splitext(path)[1].lower()
    if channels and ending == ".npy":
        return True
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
    """Raise ImageReadError for any error but a missing package, and for images above twice Image.MAX_IMAGE_PIXELS."""
    try:
        yield
    except ModuleNotFoundError:  # of a package that the file needs
        raise
    except Exception as error:  # decoders raise nearly anything on corrupt files
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).partition(" <_io.BytesIO")[0]
        raise ImageReadError(f"{name}: {reason or type(error).__name__}") from None


def check_aspect(size):
    """Raise ValueError if one side of an image, (width, height), is more than MAX_ASPECT times the other."""
    if max(size) > MAX_ASPECT * min(size) or not min(size):  # .npy arrays may be empty
        raise ValueError(f"{size[0]} x {size[1]} pixels, one side is more than {MAX_ASPECT} times the other")


def to_rgb(image, value_range=None):
    """PIL image of any mode -> RGB, transparency on white; for value_range see `read_image`."""
    check_aspect(image.size)
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
    """Values of an image or array [C, H, W] at about 100,000 pixels, without NaN, infinity and -3.4e38 for missing."""
    values = np.asarray(image, np.float32)
    step = max(1, int((values.shape[-2] * values.shape[-1] / 100_000) ** 0.5))
    values = values[..., ::step, ::step]
    return values[abs(values) < 1e30]


def find_value_range(values):
    """Black and white for values: 0 and the full scale if half of it is used, else the quantiles 0.1% and 99.9%."""
    low, high = np.quantile(values, (0.001, 0.999)).tolist() if values.size else (0.0, 0.0)
    full = next((full for full in FULL_SCALES if high <= full), high)
    if low >= 0 and (high - low >= full / 2 or high == low):
        return 0.0, float(full)
    return low, high if high > low else low + 1


def find_common_range(files, open_file=open_image, name=str, channels=None, max_images=100, max_names=10_000):
    """One `find_value_range` for the grayscale of more than 8 bits among evenly spaced files; None without any.

    With channels, for all files but JPEGs; without any, that of JPEGs.

    Args:
        files: sequence of paths, or of whatever the functions take.
        open_file: opens one of the files without decoding it.
        name: its name; files that are named as JPEGs are not opened.
        channels: see `read_image`; all channels and depths then share the range, and open_file returns a path or bytes.
    """
    files, values = files[::-(-len(files) // max_names) or 1], []
    files = [file for file in files if not name(file).lower().endswith((".jpg", ".jpeg"))]
    for file in files[::-(-len(files) // max_images) or 1]:
        with contextlib.suppress(Exception):  # raises nearly anything
            if channels:
                values.append(sample_values(read_values(name(file), channels, open_file(file))))
                continue
            with open_file(file) as image:
                if image.mode[0] in "IF":
                    values.append(sample_values(image))
    if channels and not values:  # JPEGs
        return 0.0, 255.0
    return find_value_range(np.concatenate(values)) if values else None


# ---- any number of channels ----

def read_values(path, channels, content=None):
    """Decode an image without loss of depth: array [channels, H, W], of 8 or 16 bits or float.

    .npy arrays and TIFFs (by tifffile) have the channels first or last, or in one page each; PNG, JPEG and so on those
    of their mode.

    Raises:
        ModuleNotFoundError: a TIFF of several channels without tifffile.
    """
    file, ending = check_file(path) if content is None else io.BytesIO(content), os.path.splitext(path)[1].lower()
    if ending == ".npy":
        values = np.load(file, mmap_mode="r" if content is None else None, allow_pickle=False)
    elif ending in (".tif", ".tiff") and channels > 1:
        import tifffile

        with tifffile.TiffFile(file) as tiff:
            values = tiff.series[0]
            if np.prod(values.shape, dtype=float) > 2 * channels * Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{' x '.join(map(str, values.shape))} values are too many for {channels} channels")
            values = values.asarray()
    else:
        values = read_bands(file)
    shape, values = values.shape, np.squeeze(values) if values.ndim > 3 else values
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or channels not in values.shape[::2] or values.dtype.kind not in "buif":
        raise ValueError(f"{values.dtype} values of shape {list(shape)}, expected {channels} channels, first or last")
    values = values if len(values) == channels else values.transpose(2, 0, 1)
    check_aspect(values.shape[:0:-1])
    return values


def read_bands(file):
    """Array [H, W] or [H, W, bands] of an image file that Pillow opens."""
    with Image.open(file, formats=DECODERS) as image:
        check_aspect(image.size)
        mode = image.tile[0][3] if image.format == "PNG" else None
        if mode == "LA;16B":
            raise ValueError("grayscale with alpha of 16 bits: convert it to TIFF or .npy")
        if mode in ("RGB;16B", "RGBA;16B"):
            upper = np.asarray(image, np.uint16)  # of big-endian values; the other byte order gives the lower 8 bits
            with Image.open(file, formats=DECODERS) as image:
                image.tile = [(*image.tile[0][:3], mode.replace(";16B", ";16L"))]
                return 256 * upper + np.asarray(image)
        image = image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}.get(image.mode, image.mode))
        with contextlib.suppress(Exception):  # broken EXIF raises nearly anything
            image = ImageOps.exif_transpose(image)
        return np.asarray(image)


def scale_values(values, value_range=None):
    """Array [C, H, W] -> float32 tensor with the range at [0, 1]; None for that of 8 bits, or `find_value_range`."""
    low, high = value_range or ((0, 255) if values.dtype == np.uint8 else find_value_range(sample_values(values)))
    values = np.nan_to_num(np.asarray(values, np.float32, order="C").clip(low, high), nan=low)
    return torch.from_numpy((values - low) / np.float32(high - low))


def show_channels(image, shown=None):
    """RGB image of a tensor [C, H, W], for drawing: three channels, or one as grayscale, with stretched contrast.

    Args:
        image: of `read_image`; a PIL image is returned as it is.
        shown: the channels, from 0; None for the first three, or the first of two.

    Raises:
        ImageReadError: the image does not have them.
    """
    if not isinstance(image, torch.Tensor):
        return image
    shown = list(shown or range(3 if len(image) > 2 else 1))
    if max(shown) >= len(image):
        raise ImageReadError(f"--show_channels {max(shown)}: the images have channels 0 to {len(image) - 1}")
    chosen = image[shown].expand(3, -1, -1)
    pixels = (255 * chosen).round().byte().permute(1, 2, 0).contiguous().numpy()
    return ImageOps.autocontrast(Image.fromarray(pixels), cutoff=0.1)
