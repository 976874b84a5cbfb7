"""ONNX Runtime inference of an exported model: features, attention maps and classes of images, without torch.

    python infer.py teacher.onnx dog.jpg cat.jpg       # prints output shapes, writes ./dog.jpg.attention.png
    python infer.py teacher.onnx photos/*.jpg --output maps    # writes maps/*.attention.png
    python infer.py teacher.onnx photos/*.jpg --output features.npy    # [images, D], or .csv; no attention maps
    python infer.py classifier.onnx dog.jpg            # also prints classes with their probabilities

    session, metadata = open_model("teacher.onnx")
    features, attention = infer(session, metadata, prepare(image, metadata))    # [D], [heads, H/p, W/p] or [H/p, W/p]
    outputs = run_model(session, metadata, prepare(image, metadata))            # {"features": [D], "logits": [K], ...}

Image size, layout and normalization come from the metadata of the file. For a model of other channels than RGB, images
are .npy arrays, TIFFs (by tifffile) or others with these channels. This file needs onnxruntime, numpy and Pillow.
"""

import contextlib
import csv
import json
import os
import re
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

Image.init()
with contextlib.suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()  # HEIC, where it is installed
# Pillow's others may start programs
DECODERS = [name for name in "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 HEIF QOI".split() if name in Image.OPEN]
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}  # of inputs
FULL_SCALES = (1, *(2**bits - 1 for bits in range(8, 17)))  # of floats, and of 8 to 16 bits
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # cameras have 108 million pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes; profiles and notes have megabytes
MAX_PATCHES = 4096  # attention takes heads * MAX_PATCHES**2 * 4 bytes

SIZE, NUMBER, TEXT = r"[1-9]\d{0,3}", r"\d{1,5}(\.\d+)?(e-\d+)?", r'"(\\.|[^"\\])*"'
ABOVE_0 = rf"(?=[\d.]*[1-9]){NUMBER}"
SCHEMA = {  # key of the metadata -> pattern of the JSON that export.py writes
    "patch_size": SIZE, "trained_size": SIZE, "image_size": rf"null|\[{SIZE}, {SIZE}\]", "batch_size": f"null|{SIZE}",
    "mean": rf"null|\[-?{NUMBER}(, -?{NUMBER})*\]", "channels": f"null|{SIZE}", "layout": '"nchw"|"nhwc"',
    "precision": '"(fp32|fp16|mixed|int8)"',
    "std": rf"null|\[{ABOVE_0}(, {ABOVE_0})*\]", "classes": rf"null|\[({TEXT}(, {TEXT})*)?\]",
    "outputs": rf'(?=.*"features": )\{{{TEXT}: {TEXT}(, {TEXT}: {TEXT})*\}}', "heads": '"each"|"mean"',
    "last_layers": r"\d{1,3}", "checkpoint": TEXT,
    "value_range": r"null|\[-?[\d.]+(e[+-]?\d+)?, -?[\d.]+(e[+-]?\d+)?\]"}


def open_model(file: str | bytes, provider: str = "CPUExecutionProvider") -> tuple[onnxruntime.InferenceSession, dict]:
    """Open an exported file, by its path or content: session and metadata.

    Raises:
        RuntimeError: ONNX Runtime falls back to another provider.
        ValueError: the metadata or the inputs are not those of export.py.
    """
    if not isinstance(file, bytes):
        check_file(file)
    if provider != "CPUExecutionProvider":
        onnxruntime.preload_dlls()  # CUDA and cuDNN from their pip packages, which importing torch would load too
    session = onnxruntime.InferenceSession(file, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime runs it on {session.get_providers()[0]}, not {provider}")
    metadata = read_metadata(session.get_modelmeta().custom_metadata_map)
    missing = metadata["outputs"].keys() - {output.name for output in session.get_outputs()}
    if missing or [value.type for value in session.get_inputs()] not in [[name] for name in DTYPES]:
        raise ValueError(f"not one input of pixels, or no output {', '.join(missing)}")
    return session, metadata


def check_file(path: str) -> str:
    """Return the path of a file; raises OSError for another, such as a named pipe, whose opening would block."""
    if not os.path.isfile(path):
        raise OSError("is a folder: name its files" if os.path.isdir(path) else "no such file, or a pipe or device")
    return path


def read_metadata(texts: dict[str, str]) -> dict:
    """Values of the metadata of an exported file; raises ValueError if they are not as SCHEMA demands."""
    for key, pattern in SCHEMA.items():
        if not re.fullmatch(pattern, text := texts.get(key, "null")):
            raise ValueError(f"its metadata has {key} {text:.80}")
    metadata = {key: json.loads(text) for key, text in texts.items()}
    for key in ("mean", "std"):
        if metadata.get(key) and len(metadata[key]) != (metadata.get("channels") or 3):
            raise ValueError(f"its metadata has {key} {texts[key]:.80}")
    return metadata


def read_channels(path: str, metadata: dict) -> np.ndarray:
    """Read an image for a model of other channels than RGB: float32 [C, H, W], value_range mapped to [0, 1]."""
    channels, ending = metadata["channels"], os.path.splitext(check_file(path))[1].lower()
    if ending == ".npy":
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    elif ending in (".tif", ".tiff") and channels > 1:
        import tifffile

        values = tifffile.imread(path)
    else:
        with Image.open(path, formats=DECODERS) as image:
            mode = image.tile[0][3] if image.format == "PNG" else None
            if mode == "LA;16B":
                raise ValueError("grayscale with alpha of 16 bits: convert it to TIFF or .npy")
            image = image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}.get(image.mode, image.mode))
            with contextlib.suppress(Exception):  # broken EXIF raises nearly anything
                image = ImageOps.exif_transpose(image)
            values = np.asarray(image)
        if mode in ("RGB;16B", "RGBA;16B"):  # the upper 8 bits; read in the other byte order, it gives the lower
            with Image.open(path, formats=DECODERS) as image:
                image.tile = [(*image.tile[0][:3], mode.replace(";16B", ";16L"))]
                values = 256 * values.astype(np.uint16) + np.asarray(image)
    shape, values = values.shape, np.squeeze(values) if values.ndim > 3 else values
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or channels not in values.shape[::2] or values.dtype.kind not in "buif":
        raise ValueError(f"{values.dtype} values of shape {list(shape)}, expected {channels} channels, first or last")
    values = values if len(values) == channels else values.transpose(2, 0, 1)
    value_range = metadata.get("value_range") or ((0, 255) if values.dtype == np.uint8 else None)
    values = values.astype(np.float32, order="C")
    low, high = value_range or find_value_range(values)
    return (np.nan_to_num(values.clip(low, high), nan=low) - low) / np.float32(high - low)


def prepare(image: Image.Image | np.ndarray, metadata: dict) -> Image.Image | np.ndarray:
    """Resize and crop an image for a model: bicubic, shorter side to 8/7 of the crop's, center crop, in RGB.

    A model for any size (--dynamic size) takes the whole image, cropped to multiples of its patch size, and reduced
    if it has more than MAX_PATCHES patches. An array of `read_channels` remains one, [C, height, width].

    Raises:
        ValueError: the image is smaller than a patch.
    """
    if isinstance(image, np.ndarray):
        bands = [resize_and_crop(Image.fromarray(band), metadata) for band in image]
        return np.stack([np.asarray(band) for band in bands]).clip(0, 1)
    original, image = image, to_rgb(image, metadata.get("value_range"))
    image.info = dict(original.info)
    with contextlib.suppress(Exception):  # broken EXIF raises nearly anything
        ImageOps.exif_transpose(image, in_place=True)
    return resize_and_crop(image, metadata)


def resize_and_crop(image: Image.Image, metadata: dict) -> Image.Image:
    """The part of `prepare` that depends on the image size only."""
    p = metadata["patch_size"]
    sides = image.size
    if not metadata["image_size"]:
        shrink = max(1, (image.width * image.height / (p * p * MAX_PATCHES)) ** 0.5)
        sides = [int(side / shrink) for side in sides]
    height, width = metadata["image_size"] or (sides[1] // p * p, sides[0] // p * p)
    if not (height and width):
        raise ValueError(f"{image.width} x {image.height} pixels are less than a patch, {p} x {p}")
    if metadata["image_size"] and image.size != (width, height):
        shorter = round(min(sides) * (max(width / image.width, height / image.height) / 0.875))
        sides = [int(shorter * side / min(image.size)) for side in sides]
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
    """Image of any mode -> RGB, transparency on white.

    Args:
        value_range: black and white of grayscale of more than 8 bits; None for those of `find_value_range`.
    """
    if image.mode[0] in "IF":
        values = np.asarray(image, np.float32)
        low, high = value_range or find_value_range(values)
        values = np.nan_to_num(values.clip(low, high), nan=low)
        image = Image.fromarray(((values - low) * (255 / (high - low)) + 0.5).astype(np.uint8))
    # a fourth band of a TIFF is marked as alpha also where it is infrared
    elif image.has_transparency_data and image.format != "TIFF":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_value_range(values: np.ndarray) -> tuple[float, float]:
    """Black and white for values: 0 and the full scale if half of it is used, else the quantiles 0.1% and 99.9%.

    NaN, infinity and -3.4e38 for missing values do not count; of large images every n-th row and column does.
    """
    step = max(1, int((values.shape[-2] * values.shape[-1] / 100_000) ** 0.5))
    values = values[..., ::step, ::step]
    values = values[abs(values) < 1e30]
    low, high = np.quantile(values, (0.001, 0.999)).tolist() if values.size else (0.0, 0.0)
    full = next((full for full in FULL_SCALES if high <= full), high)
    if low >= 0 and (high - low >= full / 2 or high == low):
        return 0.0, float(full)
    return low, high if high > low else low + 1


def infer(session, metadata: dict, image: Image.Image | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Features and attention of one prepared image; attention is None for a model that has no such output."""
    outputs = run_model(session, metadata, image)
    return outputs["features"], outputs.get("attention")


def run_model(session, metadata: dict, image: Image.Image | np.ndarray) -> dict[str, np.ndarray]:
    """Features, attention and logits of one prepared image, as far as the model has them: {name: output}."""
    pixels, takes = np.asarray(image), session.get_inputs()[0]
    dtype = DTYPES[takes.type]
    if not metadata["mean"]:
        raise ValueError("the model does not take RGB images")
    if metadata.get("channels"):
        mean, std = (np.reshape(metadata[name], (-1, 1, 1)) for name in ("mean", "std"))
        pixels = (pixels - mean) / std
    elif dtype != "uint8":
        pixels = (pixels / 255 - metadata["mean"]) / metadata["std"]
    if metadata["layout"] == "nchw" and not metadata.get("channels"):
        pixels = pixels.transpose(2, 0, 1)
    batch = np.stack([pixels] * (metadata["batch_size"] or 1)).astype(dtype)
    names = [name for name in ("features", "attention", "logits") if name in metadata["outputs"]]
    return {name: output[0] for name, output in zip(names, session.run(names, {takes.name: batch}))}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [K] -> probabilities [K]."""
    exponentials = np.exp(logits.astype("float64") - logits.max())
    return exponentials / exponentials.sum()


def write_features(path: str, images: list[str], rows: list[np.ndarray | None], classes: list[str]):
    """Write features as .npy [M, D] or, with names, classes and probabilities, as .csv.

    Args:
        images: M names.
        rows: K probabilities and D features of each; None for one that cannot be read, which is NaN in .npy.
        classes: K names; none for a model without logits.
    """
    K, width = len(classes), max(len(row) for row in rows if row is not None)
    if path.lower().endswith(".npy"):
        table = np.stack([np.full(width, np.nan) if row is None else row for row in rows])
        with open(path, "wb") as file:
            return np.save(file, table[:, K:].astype("float32"))
    header = ["file", *(["class"] if K else []), *(f"probability_{name}" for name in classes),
              *(f"feature_{i}" for i in range(width - K))]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for name, row in zip(images, rows):
            if row is not None:
                best = [classes[row[:K].argmax()]] if K else []
                writer.writerow([name, *best, *(f"{number:.9g}" for number in row)])


def draw_attention(image: Image.Image | np.ndarray, attention: np.ndarray) -> Image.Image:
    """Grid of the image and its attention maps, each from black (0) to light yellow (the maximum in its caption).

    Of an array, the first three channels are drawn, or one of fewer, with stretched contrast.
    """
    if isinstance(image, np.ndarray):
        pixels = (255 * image[:3 if len(image) > 2 else 1] + 0.5).astype(np.uint8)
        image = ImageOps.autocontrast(Image.fromarray(pixels.repeat(3 // len(pixels), 0).transpose(1, 2, 0)), 0.1)
    maps = attention.reshape(-1, *attention.shape[-2:]).astype("float32")
    levels = maps / maps.max(axis=(1, 2), keepdims=True).clip(1e-12)
    channels = zip((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # anchors of "inferno"
    colors = np.stack([np.interp(levels, np.linspace(0, 1, 5), anchors) for anchors in channels], axis=-1).round()
    patch = -(-240 // max(maps.shape[1:]))  # pixels of a patch; cells have 240 or a little more
    height, width = (side * patch for side in maps.shape[1:])
    cells = [("image", image.resize((width, height)))]
    for i, (values, color) in enumerate(zip(maps, colors.astype("uint8")), start=1):
        drawn = Image.fromarray(color).resize((width, height), Image.Resampling.NEAREST)
        name = f"head {i}" if attention.ndim == 3 else "mean of heads"
        cells.append((f"{name}, max {values.max():.1%}", drawn))
    columns, step_x, step_y = int(np.ceil(len(cells) ** 0.5)), max(width, 180) + 8, height + 24
    sheet = Image.new("RGB", (columns * step_x - 8, -(-len(cells) // columns) * step_y), "white")
    for i, (caption, cell) in enumerate(cells):
        left, top = i % columns * step_x, i // columns * step_y
        sheet.paste(cell, (left, top))
        ImageDraw.Draw(sheet).text((left, top + height + 3), caption, "black", ImageFont.load_default(14))
    return sheet


def main(argv: list[str]) -> int:
    """Run inference on every image; returns the exit status, 2 if the model or any image failed."""
    parser = ArgumentParser("infer.py", SUPPRESS, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FILE.onnx", help="exported file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="images of any size")
    parser.add_argument("--output", default=".", help="folder for attention maps (default: current), or FILE.npy or "
                        "FILE.csv for features")
    args = parser.parse_intermixed_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names may hold characters that a terminal cannot show
        if hasattr(stream, "reconfigure"):  # not in notebooks
            stream.reconfigure(errors="backslashreplace")
    try:
        session, metadata = open_model(args.model)
    except Exception as error:  # ONNX Runtime has exception types of its own
        return print_error(f"{args.model}: not a file of export.py that can be run here ({error})")
    status, taken, rows, classes = 0, [], [], metadata.get("classes") or []
    is_table = args.output.lower().endswith((".npy", ".csv"))
    for path in args.images:
        rows.append(None)
        try:
            if metadata.get("channels"):
                image = prepare(read_channels(path, metadata), metadata)
            else:
                with Image.open(check_file(path), formats=DECODERS) as image:
                    image = prepare(image, metadata)
            outputs = run_model(session, metadata, image)
            features, attention = outputs["features"], outputs.get("attention")
            print(f"{path}: features {list(features.shape)}")
            probabilities = softmax(outputs["logits"]) if classes else []
            if classes:
                best = sorted(zip(probabilities, classes), reverse=True)[:5]
                print("  " + ", ".join(f"{name} {probability:.1%}" for probability, name in best))
            if is_table:
                rows[-1] = np.append(probabilities, features)
            elif attention is not None:
                name = os.path.basename(path)[-60:]  # in bytes, within what file systems allow
                taken.append(f"{name}.{len(taken) + 1}" if name in taken else name)
                os.makedirs(args.output, exist_ok=True)
                file = os.path.join(args.output, f"{taken[-1]}.attention.png")
                draw_attention(image, attention).save(file)
                print(f"  attention {list(attention.shape)} -> {file}")
        except Exception as error:  # decoders raise nearly anything on corrupt files
            status = print_error(f"{path}: {error}")
    if any(row is not None for row in rows):
        try:
            os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
            write_features(args.output, args.images, rows, classes)
            print(f"written to {args.output}")
        except OSError as error:
            status = print_error(f"--output {args.output}: {error}")
    return status


def print_error(message: str) -> int:
    print("infer.py: " + " ".join(message.split())[:500], file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)
