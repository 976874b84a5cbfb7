"""Features and attention of pictures from an exported file: ONNX Runtime, numpy and Pillow, nothing else.

    python infer.py teacher.onnx dog.jpg cat.jpg       # prints the features' shape, writes dog.jpg.attention.png

    session, about = open_model("teacher.onnx")
    features, attention = infer(session, about, picture)            # [D], [heads, H/p, W/p] or [H/p, W/p]

The file says itself what it takes; what a picture goes through before is `prepare`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MAX_PATCHES = 4096  # attention takes heads * MAX_PATCHES**2 * 4 bytes


def open_model(path, provider="CPUExecutionProvider"):
    """Session and metadata of an exported file; RuntimeError if ONNX Runtime would run it elsewhere."""
    session = onnxruntime.InferenceSession(path, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime took {session.get_providers()[0]}, not {provider}")
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    return session, about


def prepare(picture, about):
    """PIL picture -> the RGB crop that the model sees: shorter side to 8/7 of the crop's, bicubic, then the centre.

    A model for any size sees the whole picture, cut to multiples of its patch size, and made smaller if that were more
    than MAX_PATCHES.
    """
    picture, p = to_rgb(ImageOps.exif_transpose(picture)), about["patch_size"]
    if not about["image_size"]:
        shrink = (picture.width * picture.height / (p * p * MAX_PATCHES)) ** 0.5
        if shrink > 1:
            picture = picture.resize([int(side / shrink) for side in picture.size], Image.Resampling.BICUBIC)
    height, width = about["image_size"] or (picture.height // p * p, picture.width // p * p)
    if not (height and width):
        raise ValueError(f"{picture.width} x {picture.height} pixels are less than a patch, {p} x {p}")
    if picture.size != (width, height) and about["image_size"]:
        shorter = round(min(picture.size) * max(width / picture.width, height / picture.height) / 0.875)
        sides = [int(shorter * side / min(picture.size)) for side in picture.size]
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def to_rgb(picture):
    """Transparency on white, 16 bits to 8."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype("uint8"))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def infer(session, about, picture):
    """Feature and attention of one prepared picture, as numpy arrays; None for attention of a file that has none."""
    image, takes = np.asarray(picture), session.get_inputs()[0]
    if takes.type != "tensor(uint8)":
        image = (image / 255 - about["mean"]) / about["std"]
    if about["layout"] == "nchw":
        image = image.transpose(2, 0, 1)
    dtype = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}[takes.type]
    image = np.stack([image] * (about["batch_size"] or 1)).astype(dtype)
    outputs = [output for output in ("features", "attention") if output in about["outputs"]]
    features, attention = (*session.run(outputs, {takes.name: image}), [None])[:2]
    return features[0], attention[0]


def draw(picture, attention):
    """The picture with its attention maps beside it, each from black to white."""
    maps = attention.reshape(-1, *attention.shape[-2:]).astype("float32")
    maps = maps / maps.max(axis=(1, 2), keepdims=True).clip(1e-12)
    sheet = Image.new("RGB", (picture.width * (1 + len(maps)), picture.height))
    sheet.paste(picture, (0, 0))
    for i, values in enumerate(maps):
        grey = Image.fromarray((values * 255).astype("uint8")).resize(picture.size, Image.Resampling.NEAREST)
        sheet.paste(grey, (picture.width * (i + 1), 0))
    return sheet


def main(argv):
    """Exit status: 0, or 2 after one line for what could not be used."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) < 2:
        return complain("takes FILE.onnx PICTURE [PICTURE ...]")
    status = 0
    try:
        session, about = open_model(argv[0])
    except Exception as error:  # of ONNX Runtime's own kinds
        return complain(f"{argv[0]}: not a file of export.py that can be run here ({error})")
    for path in argv[1:]:
        output = Path(f"{path}.attention.png")
        try:
            with Image.open(path) as image:
                picture = prepare(image, about)
            features, attention = infer(session, about, picture)
            if attention is not None:
                draw(picture, attention).save(output)
        except Exception as error:
            status = complain(f"{path}: {error}")
        else:
            print(f"{path}: features {list(features.shape)}"
                  + ("" if attention is None else f", attention {list(attention.shape)} -> {output}"))
    return status


def complain(text):
    print("infer.py: " + " ".join(text.split())[:500], file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
