"""Model card for the Hugging Face Hub: what a model is, its data, flags and results, and how to load it.

    text = build_model_card(backbone, info, metadata, ckpt, weights_file(ckpt))     # README.md

Everything in it comes from the model file and from what train.py and evaluate.py wrote beside it. Paths of the machine
are left out: data are named as in result files.
"""

import contextlib
import glob
import json
import re
import shlex
from pathlib import Path

from common.files import read_json, read_text
from common.hub import is_remote
from common.paths import sibling_path
from data.datasets import SHAPES, data_name

PATHS = ("data_path", "val_path", "output_dir", "cache_dir", "init")  # flags that are not published
CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
{tags}
---

# {title}

{summary}

| file | what |
|---|---|
| `model.safetensors`, `config.json` | weights of the backbone for transformers |
| `teacher.safetensors` | {own} |
| `model.onnx` | ONNX, {precision}: {outputs} |

## Input

{images}

## Use

With transformers:

```python
{transformers}
```

With timm:

```python
{timm}
```

With ONNX Runtime:

```python
{onnx}
```

With the code that this model was exported by:

```
python evaluate.py knn --ckpt hf:USER/NAME --data_path /photos
python train.py --init hf:USER/NAME --data_path /photos
```

## Training

{training}

## Results

{results}
"""


def describe_publicly(info):
    """Description of a model with names of data in place of paths, except for built-in images."""
    info = {name: value for name, value in info.items() if name != "val_path"}
    if (path := info.get("data_path")) and not re.fullmatch(SHAPES, str(path)):
        info["data_path"] = data_name(path)
    return info


def is_model_card(text):
    """Whether a README.md is one of `build_model_card`, to which a license may have been added."""
    lines = text.splitlines()
    return {*CARD.splitlines()[:3]} <= {*lines} and any(line.startswith("| `teacher.safetensors` |") for line in lines)


def build_model_card(backbone, info, metadata, ckpt, file):
    """Text of a model card.

    Args:
        backbone: VisionTransformer.
        info: its description, see `load_backbone` and `describe_publicly`.
        metadata: of the ONNX file of `file`.
        ckpt: its --ckpt, beside which results are looked for.
        file: path of its weights, beside which the flags are looked for.
    """
    is_run = "head" in info
    size, p, C, D = backbone.grid[0] * backbone.patch_size, backbone.patch_size, backbone.in_chans, backbone.embed_dim
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return CARD.format(
        tags="\n".join(f"- {tag}" for tag in ["dino", "self-supervised-learning"] * is_run + ["vit", "onnx"]),
        title=f"ViT of width {D} with {len(backbone.blocks)} blocks and patches of {p} pixels"
              + ", self-supervised" * is_run,
        summary=f"Vision transformer of {parameters:,} parameters with {backbone.num_heads} attention heads: an image "
                f"of {size} x {size} pixels gives a feature of {D} numbers. It has no classifier."
                + " It was trained without labels by an implementation of DINO ([Caron et al. "
                "2021](https://arxiv.org/abs/2104.14294))." * is_run,
        own=f"backbone{' and projection head' * is_run} for the code that exported it"
            + f" (the {info['network']} of the run)" * bool(is_run and info.get("network")),
        precision=metadata["precision"],
        outputs="; ".join(f"`{output}`, {what}" for output, what in metadata["outputs"].items()),
        images=describe_input(metadata, C, size), transformers=write_transformers_code(C, size, D),
        timm=write_timm_code(backbone, size), onnx=write_onnx_code(metadata, C, size),
        training=describe_training(info, ckpt, file), results=describe_results(info, metadata, ckpt))


# ---- how to load it ----

def describe_input(metadata, channels, size):
    """The paragraph on the images that the model takes."""
    mean, std = (", ".join(f"{value:.6g}" for value in metadata[name]) for name in ("mean", "std"))
    values = "RGB values in [0, 1]"
    if metadata["channels"]:
        low_high = "{:g} to {:g} ".format(*metadata["value_range"]) if metadata["value_range"] else ""
        values = f"Values of {channels} channel(s), {low_high}scaled to [0, 1]"
    return (f"{values}, less the mean ({mean}), over the standard deviation ({std}): [B, {channels}, H, W]. Training "
            f"images were {size} x {size} pixels. For evaluation the shorter side is resized to 8/7 of that, and the "
            f"center is cropped.")


def write_transformers_code(channels, size, width):
    if channels == 3:
        lines = ["from PIL import Image", "from transformers import AutoImageProcessor, ViTModel", "",
                 'processor = AutoImageProcessor.from_pretrained("USER/NAME")',
                 'images = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]']
    else:
        lines = ["import torch", "from transformers import ViTModel", "",
                 f"images = torch.zeros(1, {channels}, {size}, {size})  # your images, normalized"]
    return "\n".join([*lines, 'model = ViTModel.from_pretrained("USER/NAME", add_pooling_layer=False)',
                      f"feature = model(images).last_hidden_state[:, 0]  # [1, {width}], the CLS token"])


def write_timm_code(backbone, size):
    arguments = dict(img_size=size, patch_size=backbone.patch_size, in_chans=backbone.in_chans,
                     embed_dim=backbone.embed_dim, depth=len(backbone.blocks), num_heads=backbone.num_heads,
                     mlp_ratio=backbone.blocks[0].mlp.fc1.out_features / backbone.embed_dim)
    flags = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return f"""import timm, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

model = timm.create_model("vit_small_patch16_224", num_classes=0, {flags})
weights = load_file(hf_hub_download("USER/NAME", "teacher.safetensors"))
model.load_state_dict({{name.removeprefix("backbone."): tensor for name, tensor in weights.items()
                       if name.startswith("backbone.")}})
images = torch.zeros(1, {backbone.in_chans}, {size}, {size})  # your images, normalized
feature = model.eval()(images)  # [1, {backbone.embed_dim}]"""


def write_onnx_code(metadata, channels, size):
    height, width = metadata["image_size"] or (size, size)
    shape = [metadata["batch_size"] or 1, channels, height, width]
    if metadata["layout"] == "nhwc":
        shape = [shape[0], height, width, channels]
    dtype, what = "float32", "your images, normalized"
    if metadata["input"] == "uint8 RGB":
        dtype, what = "uint8", "pixels of your images, which the file normalizes"
    elif metadata["precision"] == "fp16":
        dtype = "float16"
    return f"""import numpy, onnxruntime
from huggingface_hub import hf_hub_download

session = onnxruntime.InferenceSession(hf_hub_download("USER/NAME", "model.onnx"))
images = numpy.zeros({tuple(shape)}, "{dtype}")  # {what}
feature, attention = session.run(["features", "attention"], {{"image": images}})"""


# ---- what is known of it ----

def describe_training(info, ckpt, file):
    """The data, the flags of the run, and its evaluations, of files beside the model file."""
    if "head" not in info:
        source = str(ckpt) if is_remote(ckpt) else Path(ckpt).resolve().name
        return f"The weights are those of `{source}`. How they were trained is not in that file."
    text = f"Data: {info['data_path']}." if info.get("data_path") else "The data are not named in the model file."
    folder = Path(file).parent
    lines = read_text(folder / "flags.txt").splitlines() if (folder / "flags.txt").exists() else []
    flags = {line: shlex.split(line) for line in lines if line.startswith("--")}
    for name, *values in flags.values():
        if name == "--init":
            text += f" Training continued from `{values[0] if is_remote(values[0]) else Path(values[0]).name}`."
    if flags:
        kept = [line for line, (name, *_) in flags.items() if name[2:] not in PATHS]
        text += "\n\nFlags of the run:\n\n```\n" + "\n".join(kept) + "\n```"
    scores = []
    for line in read_text(folder / "log.jsonl").splitlines() if (folder / "log.jsonl").exists() else []:
        with contextlib.suppress(ValueError):  # cut off while the run writes
            scores += [record for record in [json.loads(line)] if "eval" in record]
    names = {"knn_top1": "k-NN top-1 %", "knn_top5": "k-NN top-5 %", "linear_top1": "linear top-1 %",
             "rankme": "RankMe"}
    names = {key: name for key, name in names.items() if any(record.get(key) is not None for record in scores)}
    if scores:
        text += "\n\nEvaluations during the run, on a part of the data:\n\n" + format_markdown_table(
            ["features", *names.values()],
            [[record["eval"], *(format_score(record.get(key)) for key in names)] for record in scores])
    return text


def describe_results(info, metadata, ckpt):
    """A table of the results of evaluate.py that are of exactly this model file and network."""
    start, rows = sibling_path(ckpt, metadata["checkpoint_key"], ""), []  # teacher. or checkpoint.student.
    origin = {"sha256": metadata["sha256"], "network": info["network"], "untrained": False}
    pattern = glob.escape(start.name)
    for path in sorted([*start.parent.glob(f"{pattern}*.json"), *start.parent.glob(f"{pattern}*/result.json")]):
        result = read_json(path)
        if not origin.items() <= result.items():
            continue
        task = (path.parent.name if path.name == "result.json" else path.name).removeprefix(start.name)
        data = [data_name(result["data_path"]), result.get("num_images", ""), result.get("image_size", "")]
        if isinstance(result.get("knn"), dict):
            rows += [[f"k-NN, k = {k}", *data, format_score(score["top1"]), format_score(score["top5"])]
                     for k, score in result["knn"].items()]
        elif isinstance(result.get("top1"), float):
            rows.append([task.partition(".")[0], *data, format_score(result["top1"]), format_score(result["top5"])])
    if not rows:
        return "None were found beside the model file."
    return format_markdown_table(["evaluation", "data", "test images", "pixels", "top-1 %", "top-5 %"], rows)


def format_score(value):
    return "" if value is None else f"{value:.2f}"


def format_markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
