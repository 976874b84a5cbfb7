"""Export a backbone to ONNX, or its weights under the names of timm, transformers or the released DINO files.

    python export.py                                               # newest run -> teacher.onnx beside its model file
    python export.py --precision mixed --normalize nhwc            # mixed precision, uint8 input
    python export.py --precision int8                              # for CPUs; calibrated on the training images
    python export.py --ckpt dino_deitsmall16_pretrain.pth --image_size 480 320 --output vits16_480x320.onnx
    python export.py --dynamic size                                # height and width may vary too
    python export.py --check teacher.onnx --benchmark              # verify and time an existing file
    python export.py run teacher.onnx dog.jpg                      # inference: infer.py, which needs no torch
    python export.py --format transformers                         # a folder for ViTModel.from_pretrained
    python export.py --format hub                                  # a folder for the Hugging Face Hub

The ONNX file takes `image`, [B, C, H, W] normalized with the mean and std in its metadata or, with --normalize, uint8
pixels. Its outputs are `features` [B, D] and `attention` [B, heads, H/p, W/p], CLS over patches in the last block, and
of a classifier.safetensors of evaluate.py also `logits` [B, K], with the names of the K classes in the metadata.
Every file is verified before it is written: ONNX Runtime against torch, on noise and on images, at several batch and
image sizes. Backbones of torchvision and timm go through torch's exporter and have `features` only.
"""

import common  # noqa: F401 (first: it checks the version of Python)

# isort: split
import sys

if __name__ == "__main__" and sys.argv[1:2] == ["run"]:  # before torch is imported
    import infer

    sys.exit(infer.main(sys.argv[2:]))

import argparse
import itertools
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path

import onnx
import torch

import infer
from backbones import HeadlessClassifier
from common import cli
from common.checkpoint import CheckpointError
from common.cli import nonnegative_int, positive_int
from common.convert import FORMATS, save_transformers
from common.files import atomic_write, check_file, create_folder, hash_file, read_text, write_text
from common.hub import absolute_path
from common.paths import find_model, sibling_path, weights_file
from common.weights import check_image_size, load_backbone, read_input, read_weights, save_model
from data.datasets import DataError, ImageFolder, open_data_of_model
from evaluation.classifiers import load_classifier
from evaluation.model_card import build_model_card, describe_publicly, is_model_card
from evaluation.onnx_parity import LIMITS, ExportError, build_inputs, verify, wrap_errors
from evaluation.onnx_speed import print_speed
from evaluation.quantization import check_accuracy, quantize
from onnx_graph import build_graph

# values of flags that torch's exporter supports, for backbones of torchvision and timm
TRACEABLE = dict(precision=["fp32"], dynamic=["batch", "none"], heads=["each"], patch_tokens=[False], last_layers=[0])
HUB_FILES = ("README.md", "config.json", "preprocessor_config.json", "model.safetensors", "teacher.safetensors",
             "model.onnx")  # of --format hub


def save_backbone(path, backbone, info, ckpt):
    """This repository's model file, without head and classifier."""
    info = {name: value for name, value in info.items() if name not in ("head", "classes")}
    save_model(path, {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}, info)


FORMATS = {"safetensors": ("backbone.safetensors", save_backbone)} | FORMATS


def parse_args(argv=None):
    parser = cli.build_parser("export.py", __doc__)
    add = parser.add_argument
    add("--ckpt", nargs="?", help="model file, folder of a run, dino_vits16 or hf:USER/NAME (default: newest run)")
    add("--checkpoint_key", choices=["teacher", "student"], help="network of a full checkpoint (default: teacher)")
    add("--format", choices=["onnx", "hub", *FORMATS], default="onnx",
        help="ONNX, a folder for the Hugging Face Hub, or weights under another library's names")
    add("--output", metavar="FILE", help="output path (default: the model file's name with the format's ending)")
    add = parser.add_argument_group("ONNX").add_argument
    add("--image_size", type=cli.image_side, nargs="+", help="H W, or side of a square (default: that of training)")
    add("--dynamic", choices=["batch", "size", "none"], default="batch", help="dynamic axes; size: batch, H and W")
    add("--batch_size", type=positive_int, default=1, help="batch size of --dynamic none and of timing")
    add("--precision", choices=list(LIMITS), default="fp32",
        help="mixed: matrix products in fp16, the rest in fp32; int8: products with weights, for CPUs")
    add("--opset", type=int, choices=range(18, onnx.defs.onnx_opset_version() + 1), default=18,
        help="ONNX opset; from 20 Gelu, from 23 Attention is one node; 18 to 20 for TensorRT")
    add("--heads", choices=["each", "mean"], default="each", help="attention of each head, or their mean")
    add("--patch_tokens", action="store_true", help="add the output patch_tokens [B, N, D]")
    add("--last_layers", type=nonnegative_int, default=0, help="add the normalized tokens of each of the last N blocks")
    add("--normalize", choices=["nhwc", "nchw"], help="take uint8 pixels of this layout and normalize in the graph")
    add("--images", metavar="DIR", help="also compare on the first five images of a folder")
    add("--check", metavar="FILE", help="verify an existing file against its model; writes nothing")
    add("--benchmark", action="store_true", help="time ONNX Runtime against torch")
    cli.add_data_flags(parser.add_argument_group("--precision int8"), None,
                       "images to calibrate and compare on, as for train.py (default: the data of the newest run)")
    args = parser.parse_args(argv)
    if args.image_size and (len(args.image_size) > 2 or args.check or args.dynamic == "size"):
        parser.error("--image_size takes H [W]; leave it out with --check, and with --dynamic size, which is any")
    if args.check and args.output or args.format == "dino_full" and args.checkpoint_key:
        parser.error("leave out --output with --check, which writes nothing, and --checkpoint_key with dino_full")
    if args.format != "onnx" and (args.check or args.benchmark):
        parser.error(f"--format {args.format}: only ONNX files are checked and timed")
    if args.precision != "fp32" and args.format in FORMATS:
        parser.error(f"--format {args.format}: --precision is of ONNX files")
    if (args.data_path or args.val_path) and not (args.precision == "int8" or args.check):
        parser.error("--data_path is for --precision int8; --images compares on images too")
    return args


# ---- building ----

def load_network(ckpt, key):
    """Backbone of a model file, its description, and its Classifiers, None if it is not of evaluate.py."""
    backbone, info = load_backbone(ckpt, key)
    network, info = load_classifier(ckpt) if "classes" in info else (None, info)
    return backbone, info, network


def build_metadata(backbone, info, ckpt, file, args):
    """Metadata of the ONNX file: {name: JSON value}.

    Raises:
        CheckpointError: the model cannot be exported with these flags.
    """
    p, depth, given = backbone.patch_size, len(backbone.blocks), read_input(info, backbone.in_chans, ckpt)
    trained_size = [info["image_size"]] if "classes" in info else [side * p for side in backbone.grid]
    size = args.image_size or trained_size
    check_image_size(backbone, *size)
    if args.normalize and given["channels"]:
        raise CheckpointError(f"{ckpt}: takes {backbone.in_chans} channels of any depth, --normalize is for RGB")
    if isinstance(backbone, HeadlessClassifier):
        for name, supported in TRACEABLE.items():
            if getattr(args, name) not in supported:
                flag = f"--{name} {getattr(args, name)}".removesuffix(" True")
                raise CheckpointError(f"{flag} is for vision transformers of vit.py, not for {backbone.arch}")
        outputs = {"features": "before the classifier, [B, D]"}
    else:
        if args.last_layers > depth:
            raise CheckpointError(f"--last_layers {args.last_layers}: the model has {depth} blocks")
        maps = "mean over heads, [B, H/p, W/p]" if args.heads == "mean" else "[B, heads, H/p, W/p]"
        outputs = {"features": "CLS after the final norm, [B, D]", "attention": f"CLS over patches, last block, {maps}"}
    if args.patch_tokens:
        outputs["patch_tokens"] = "patches after the final norm, rows first, [B, N, D]"
    for i in range(1, args.last_layers + 1):
        outputs[f"layer_{i}"] = f"tokens after block {depth - args.last_layers + i} and the final norm, [B, 1+N, D]"
    if "classes" in info:
        outputs["logits"] = "of the classes, [B, K]"
    is_dynamic = args.dynamic == "size"
    return dict(
        classes=info.get("classes"), arch=info.get("arch", getattr(backbone, "arch", "vision transformer")),
        patch_size=p, trained_size=backbone.grid[0] * p, image_size=None if is_dynamic else [size[0], size[-1]],
        batch_size=args.batch_size if args.dynamic == "none" else None,
        **given, layout=args.normalize or "nchw", input="uint8 RGB" if args.normalize else
        f"{'value_range' if given['channels'] else 'RGB'} in [0, 1] less mean over std",
        value_range=info.get("value_range"),
        interpolation=None if is_dynamic else "bicubic: shorter side to 8/7 of the crop's, then the center",
        precision=args.precision, opset=args.opset, heads=args.heads, last_layers=args.last_layers,
        checkpoint=absolute_path(ckpt), checkpoint_key=args.checkpoint_key, sha256=hash_file(file), outputs=outputs)


def build_onnx(backbone, metadata, args, classifier=None):
    """The ONNX file as bytes, with each value of its metadata as JSON."""
    if isinstance(backbone, HeadlessClassifier):
        proto = trace_classifier(backbone, metadata, args, classifier)
    else:
        head = (classifier.heads[0], classifier.tokens.n_last_blocks, classifier.tokens.avgpool) if classifier else ()
        proto = build_graph(
            backbone, *(metadata["image_size"] or (None, None)), metadata["batch_size"],
            args.precision.replace("int8", "fp32"), args.opset,
            args.heads, args.patch_tokens, args.last_layers, args.normalize, metadata["mean"], metadata["std"],
            *head)
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    with wrap_errors("an ONNX file holds at most 2 GiB, try --precision mixed"):
        return proto.SerializeToString()


class PixelInput(torch.nn.Module):
    """Normalization of uint8 pixels, "nhwc" or "nchw", in front of a network."""

    def __init__(self, network, layout, mean, std):
        super().__init__()
        self.network, self.layout = network, layout
        self.mean, self.std = (255 * torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def forward(self, x):
        x = x.permute(0, 3, 1, 2) if self.layout == "nhwc" else x
        return self.network((x.float() - self.mean) / self.std)


class FeaturesAndLogits(torch.nn.Sequential):
    """A backbone and the linear layer behind it: images -> both their outputs."""

    def forward(self, x):
        features = self[0](x)
        return features, self[1](features)


def trace_classifier(backbone, metadata, args, classifier):
    """The ONNX model of a HeadlessClassifier, by torch's exporter."""
    batch = metadata["batch_size"]
    _, feed = next(build_inputs(backbone, batch or 2, *metadata["image_size"], metadata))
    network = FeaturesAndLogits(backbone, classifier.heads[0]) if classifier else backbone
    if args.normalize:
        network = PixelInput(network, args.normalize, metadata["mean"], metadata["std"])
    with wrap_errors("torch.onnx.export failed"):
        return torch.onnx.export(
            network.eval(), (torch.from_numpy(feed),), input_names=["image"], output_names=list(metadata["outputs"]),
            verbose=False, dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
            opset_version=args.opset).model_proto


# ---- commands ----

def open_calibration_images(ckpt, info, in_chans, args):
    """Images to calibrate and compare a quantized file on, those that its model was trained on if none are named."""
    info = info | read_input(info, in_chans, ckpt)
    args = argparse.Namespace(**vars(args) | dict(ckpt=args.ckpt or args.check))  # whose paths are not to be trusted
    data = open_data_of_model(args, info, f"--precision int8: {ckpt}", "images to calibrate and compare on")
    print(data.note)
    return data


def read_images(args, channels, value_range):
    """The first images of --images, as the model takes them."""
    options = dict(channels=channels, value_range=value_range) if channels else {}
    return [image for image, _ in itertools.islice(ImageFolder(args.images, **options), 5)] if args.images else []


def main(args):
    if args.check:
        backbone, model, metadata = check_exported(args)
    else:
        ckpt = find_model(args.ckpt)
        file = weights_file(ckpt, print)
        backbone, info, classifier = load_network(file, args.checkpoint_key)
        if backbone.conv_stem and args.format not in ("onnx", "safetensors"):
            raise CheckpointError(f"--format {args.format}: the model has a convolutional stem, those of timm, "
                                  f"transformers and the reference have none: use --format onnx or safetensors")
        ending, save = FORMATS.get(args.format, (args.format, None))
        output = args.output or str(sibling_path(ckpt, args.checkpoint_key, ending))
        if os.path.exists(output) and any(os.path.samefile(output, path) for path in (ckpt, file)
                                          if os.path.exists(path)):
            raise CheckpointError(f"--output {output}: is the model itself")
        if save:
            create_folder(Path(output).parent)
            save(output, backbone, info, file)
            assumed = backbone.embed_dim // 64  # heads, by the models that other libraries build
            if args.format in ("timm", "dino", "dino_full") and getattr(backbone, "num_heads", assumed) != assumed:
                print(f"NOTE: load_backbone reads the number of heads from the file, others need to be given "
                      f"num_heads={backbone.num_heads}: their models of this width have {assumed}")
            return print(f"written to {output}")
        metadata = build_metadata(backbone, info, ckpt, file, args)
        data = open_calibration_images(ckpt, info, backbone.in_chans, args) if args.precision == "int8" else None
        create_folder(Path(output).parent)
        if args.format == "hub":
            return save_hub(output, backbone, info, metadata, ckpt, file, args, data)
        model, report = make_onnx(backbone, metadata, args, classifier, data)
        save_onnx(output, model, report)
    if args.benchmark:
        print_speed(backbone, model, metadata, metadata["batch_size"] or args.batch_size)


def check_exported(args):
    """Compare the file of --check with its model, and print the lines about it: the model, the file as bytes, metadata.
    """
    model, metadata, (backbone, info, classifier) = load_exported(args.check, args)
    is_int8 = metadata["precision"] == "int8"
    data = open_calibration_images(args.check, info, backbone.in_chans, args) if is_int8 else None
    images = read_images(args, metadata.get("channels"), metadata.get("value_range"))
    with wrap_errors(f"{args.check}: its metadata does not fit its model"):
        report = check_accuracy(backbone, model, metadata, data, classifier) if is_int8 else verify(
            backbone, model, metadata, images, classifier)
    print(f"{args.check}: " + "\n  ".join(report))
    return backbone, model, metadata


def make_onnx(backbone, metadata, args, classifier=None, data=None):
    """Build an ONNX file that computes what the model does: the file as bytes, and lines about it.

    With data it is quantized, see `quantize`.

    Raises:
        ExportError: it does not.
    """
    images = read_images(args, metadata["channels"], metadata["value_range"])
    model = build_onnx(backbone, metadata, args, classifier)
    report = verify(backbone, model, metadata, images, classifier)
    return quantize(backbone, model, metadata, data, args.batch_size, classifier) if data else (model, report)


def save_onnx(path, model, report):
    """Write a file of `make_onnx` and print the lines about it."""
    atomic_write(path, lambda temporary: Path(temporary).write_bytes(model))
    print(f"{path}: " + "\n  ".join(report))


def save_hub(folder, backbone, info, metadata, ckpt, file, args, data=None):
    """Write a folder for the Hugging Face Hub, and print how to publish it.

    It holds the weights for transformers, the model file of this repository with its head, ONNX and a model card. A
    card that is there stays.

    Raises:
        CheckpointError: no vision transformer of vit.py, a classifier, or a folder that holds other files.
        ExportError: the ONNX file does not compute what the model computes.
    """
    if "classes" in info:
        raise CheckpointError(f"--format hub: {ckpt} is a classifier; name a backbone, such as teacher.safetensors")
    check_hub_folder(folder, file)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    if "head" in info:
        weights |= {name: tensor for name, tensor in read_weights(file, args.checkpoint_key)[0].items()
                    if name.startswith("head.")}
    info = describe_publicly(info)
    with tempfile.TemporaryDirectory() as temporary:
        save_model(own := os.path.join(temporary, "teacher.safetensors"), weights, info)
        of_own = dict(checkpoint="teacher.safetensors", sha256=hash_file(own))
        made = make_onnx(backbone, metadata | of_own, args, data=data)  # before anything is written to the folder
        save_transformers(folder, backbone, info, ckpt)
        shutil.copy(own, folder)
    save_onnx(os.path.join(folder, "model.onnx"), *made)
    if os.path.exists(card := os.path.join(folder, "README.md")):
        print(f"kept {card} of an earlier export, to which you may have added; for a new one name another --output")
    else:
        write_text(card, build_model_card(backbone, info, metadata, ckpt, file))
    print(f"written to {folder}; publish it after adding a license to {card} and replacing USER/NAME there and here:\n"
          f"hf upload USER/NAME {shlex.quote(folder)}")


def check_hub_folder(folder, file):
    """Raise CheckpointError if `save_hub` would write into a folder with other content than its own."""
    if os.path.realpath(folder) == os.path.realpath(os.path.dirname(file)):
        raise CheckpointError(f"--output {folder}: holds the model itself, name another folder")
    held = {*os.listdir(folder)} if os.path.exists(folder) else set()
    is_ours = "README.md" in held and is_model_card(read_text(os.path.join(folder, "README.md")))
    for name in ("checkpoint.pth", "flags.txt", *([] if is_ours else HUB_FILES)):
        if name in held:
            raise CheckpointError(f"--output {folder}: holds {name}, no folder of --format hub: name another")


def load_exported(path, args):
    """An exported file as bytes, its metadata, and the result of load_network on its model, or on --ckpt."""
    model = Path(check_file(path)).read_bytes()
    try:
        metadata = infer.read_metadata({item.key: item.value for item in onnx.load_from_string(model).metadata_props})
        ckpt, key, expected = (metadata[name] for name in ("checkpoint", "checkpoint_key", "sha256"))
    except Exception as error:  # protobuf raises nearly anything on other files
        raise CheckpointError(f"{path}: not a file of export.py, or corrupt ({error})") from None
    ckpt = args.ckpt or os.path.join(os.path.dirname(path), ckpt)
    if not (args.ckpt or os.path.exists(ckpt)) or hash_file(file := weights_file(ckpt)) != expected:
        raise CheckpointError(f"{path}: was not exported from {ckpt} as it is now: name its model with --ckpt")
    return model, metadata, load_network(file, args.checkpoint_key or key)


if __name__ == "__main__":
    cli.run_command(main, parse_args, CheckpointError, ExportError, DataError)
