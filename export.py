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

import contextlib
import itertools
import json
import os
import shlex
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torchvision.transforms import functional as TF

import infer
from backbones import HeadlessClassifier
from common import cli
from common.checkpoint import CheckpointError
from common.cli import nonnegative_int, positive_int
from common.convert import FORMATS, save_transformers
from common.files import atomic_write, check_file, create_folder, read_text, write_text
from common.hub import absolute_path, is_remote
from common.precision import DTYPES
from common.weights import (
    check_image_size,
    find_model,
    load_backbone,
    read_input,
    read_weights,
    save_model,
    sha256,
    sibling_path,
    weights_file,
)
from data.datasets import DataError, ImageFolder, open_data_of_model
from data.shapes import Shapes
from evaluation.classifiers import load_classifier
from evaluation.model_card import build_model_card, describe_publicly, is_model_card
from evaluation.quantization import QuantizationError, check_accuracy, open_session, quantize
from onnx_graph import build_graph

# precision -> largest difference, absolute in fp32 and relative to the largest value in half, and least cosine
LIMITS = {"fp32": (1e-4, 0.99999), "fp16": (0.02, 0.9999), "mixed": (0.02, 0.9999)}
LIMITS["int8"] = LIMITS["fp32"]  # before quantization, which has limits of its own
# values of flags that torch's exporter supports, for backbones of torchvision and timm
TRACEABLE = dict(precision=["fp32"], dynamic=["batch", "none"], heads=["each"], patch_tokens=[False], last_layers=[0])
HUB_FILES = ("README.md", "config.json", "preprocessor_config.json", "model.safetensors", "teacher.safetensors",
             "model.onnx")  # of --format hub


def save_backbone(path, backbone, info, ckpt):
    """This repository's model file, without head and classifier."""
    info = {name: value for name, value in info.items() if name not in ("head", "classes")}
    save_model(path, {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}, info)


FORMATS = {"safetensors": ("backbone.safetensors", save_backbone)} | FORMATS


class ExportError(RuntimeError):
    """The exported file does not compute what the model computes."""


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
    return args


# ---- building ----

def load_network(ckpt, key):
    """Backbone of a model file, its description, and its Classifiers, None if it is not of evaluate.py."""
    backbone, info = load_backbone(ckpt, key)
    network, info = load_classifier(ckpt) if "classes" in info else (None, info)
    return backbone, info, network


def build_metadata(backbone, info, ckpt, args):
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
                raise CheckpointError(f"--{name} is for vision transformers of vit.py, not for {backbone.arch}")
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
        checkpoint=absolute_path(ckpt), checkpoint_key=args.checkpoint_key, sha256=sha256(ckpt), outputs=outputs)


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


# ---- verification ----

def verify(backbone, model, metadata, images=(), classifier=None):
    """Compare a file in ONNX Runtime on the CPU with the model in torch, at several batch sizes and image sizes.

    Args:
        model: the file as bytes.
        images: images to compare on, besides noise and the built-in shapes.
        classifier: Classifiers, if the file has logits.

    Returns:
        the report, lines on nodes, inputs, outputs and the largest differences.

    Raises:
        ExportError: the file is invalid, or an output differs by more than LIMITS.
    """
    opset, precision, names = metadata["opset"], metadata["precision"], list(metadata["outputs"])
    failure = f"ONNX Runtime {onnxruntime.__version__} cannot run this file of opset {opset}"
    with wrap_errors(failure):
        onnx.checker.check_model(model, full_check=True)
        proto = onnx.load_from_string(model)
        session, _ = infer.open_model(model)
    opsets = {item.domain: item.version for item in proto.opset_import}
    if opsets != {"": opset}:
        raise ExportError(f"written in opset {opsets}, not {opset}")
    counts = Counter(node.op_type for node in proto.graph.node).most_common()
    half = open_half_session(proto) if precision in ("fp16", "mixed") else None
    p, (rows, cols) = backbone.patch_size, backbone.grid
    sizes = [metadata["image_size"]] if metadata["image_size"] else [
        (p * h, p * w) for h, w in ((rows, cols), (rows // 2 + 1, cols), (rows + 3, cols + 1))]
    batch_sizes = [metadata["batch_size"]] if metadata["batch_size"] else (1, 2, 7)
    worst = dict.fromkeys(names, (0.0, 1.0))
    for batch, (height, width) in itertools.product(batch_sizes, sizes):
        for x, feed in build_inputs(backbone, batch, height, width, metadata, images):
            with wrap_errors(failure):
                outputs = session.run(names, {"image": feed})
            if half:
                check_half_range(half, feed)
            expected = compute_expected(backbone, x, metadata)
            if classifier:
                expected["logits"] = classifier(x)[0].detach()
            for name, output in zip(names, outputs):
                output, target = torch.from_numpy(output).float(), expected[name]
                difference = (output - target).abs().max().item()
                cosine = F.cosine_similarity(output.flatten(1), target.flatten(1)).min().item()
                most, least = LIMITS[precision]
                scale = target.abs().max().item() if half else 1
                if name == "logits":  # the weights multiply what features differ by, and may cancel the rest
                    scale, least = max(scale, 0.1 * classifier.heads[0].weight.norm(dim=1).max().item()), -1
                most *= scale
                if not (difference <= most and cosine >= least):
                    raise ExportError(f"{name} differs from torch by {difference:.2g}, cosine {cosine:.6f}, at {batch} "
                                      f"x {height} x {width}; {precision} allows {most:.2g}, {least:g}")
                worst[name] = max(worst[name][0], difference), min(worst[name][1], cosine)
    return [f"opset {opset}, {precision}, CPUExecutionProvider; {len(proto.graph.node)} nodes: "
            + ", ".join(f"{count} {kind}" for kind, count in counts),
            *(f"{value.name} {value.type[7:-1]} {value.shape}" for value in session.get_inputs()),
            *("{} {} {}, at most {:.1e} from torch, cosine at least {:.6f}".format(
                value.name, value.type[7:-1], value.shape, *worst[value.name]) for value in session.get_outputs())]


@contextlib.contextmanager
def wrap_errors(message):
    """Turn the many exception types of ONNX, its runtime and torch's exporter into ExportError."""
    try:
        yield
    except (ExportError, QuantizationError):
        raise
    except Exception as error:
        raise ExportError(f"{message}: {error}") from None


def open_half_session(proto):
    """A session of a half-precision model with every sum and product as an output too.

    ONNX Runtime's CPU provider computes most of such a file in float32, which would hide an overflow.
    """
    names = [node.output[0] for node in proto.graph.node if node.op_type in ("Add", "MatMul")
             and not node.output[0].startswith(("image.", "grid.", "logits"))]  # these are in float32, or outputs
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None)
                              for name in names)
    return infer.open_model(proto.SerializeToString())[0]


def check_half_range(session, feed):
    """Raise ExportError if an output of open_half_session is not finite."""
    for output, value in zip(session.get_outputs(), session.run(None, {"image": feed})):
        if not torch.from_numpy(value).isfinite().all():
            raise ExportError(f"{output.name} leaves the range of half precision: export --precision fp32")


def build_inputs(backbone, batch, height, width, metadata, images=()):
    """Yield (normalized [B, C, H, W] for torch, the same input for the file): noise, shapes, each of the images."""
    mean, std = (torch.tensor(metadata[name] or [0.5]).view(1, -1, 1, 1) for name in ("mean", "std"))
    crop = metadata | {"image_size": [height, width]}
    shape = batch, backbone.in_chans, height, width
    batches = [torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()]
    if metadata.get("channels"):
        batches += [255 * torch.from_numpy(infer.prepare(image.numpy(), crop)).expand(shape) for image in images]
    elif backbone.in_chans == 3:
        shapes = Shapes("test", batch, max(height, width, 16))
        batches += [torch.stack([TF.pil_to_tensor(infer.prepare(image, crop)) for image in group])
                    for group in ([shapes[i][0] for i in range(batch)], *([image] * batch for image in images))]
    for pixels in batches:
        x = (pixels / 255 - mean) / std
        feed = pixels if metadata["input"] == "uint8 RGB" else x.half() if metadata["precision"] == "fp16" else x
        yield x, (feed.permute(0, 2, 3, 1) if metadata["layout"] == "nhwc" else feed).contiguous().numpy()


@torch.no_grad()
def compute_expected(backbone, x, metadata):
    """Outputs of the model in torch, {name: tensor}."""
    if isinstance(backbone, HeadlessClassifier):
        return {"features": backbone(x)}
    features, attention = backbone.forward_with_attention(x)
    attention = attention.unflatten(2, [side // backbone.patch_size for side in x.shape[2:]])
    layers = backbone.get_intermediate_layers(x, max(1, metadata["last_layers"]))
    return {"features": features, "attention": attention.mean(dim=1) if metadata["heads"] == "mean" else attention,
            "patch_tokens": layers[-1][:, 1:]} | {f"layer_{i}": layer for i, layer in enumerate(layers, start=1)}


# ---- speed ----

@torch.no_grad()
def benchmark(backbone, model, metadata, batch, rounds=15):
    """Print images per second of ONNX Runtime, torch and torch.compile: medians of alternating rounds."""
    providers = [("CUDAExecutionProvider", {"use_tf32": 0})] if torch.cuda.is_available() else []  # as torch in fp32
    session = open_session(model, providers)
    provider = session.get_providers()[0]
    if providers and provider == "CPUExecutionProvider":
        print("ONNX Runtime has no CUDA provider here: timed on the CPU")
    device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
    precision = "fp16" if device == "cuda" and metadata["precision"] != "fp32" else "fp32"
    height, width = metadata["image_size"] or [side * backbone.patch_size for side in backbone.grid]
    x, feed = next(build_inputs(backbone, batch, height, width, metadata))
    network, x = (thing.to(device, DTYPES[precision]) for thing in (backbone, x))
    eager = network if isinstance(backbone, HeadlessClassifier) else network.forward_with_attention
    compiled = torch.compile(eager)
    binding = session.io_binding()  # input and outputs stay on the device
    binding.bind_ortvalue_input("image", onnxruntime.OrtValue.ortvalue_from_numpy(feed, device))
    for name in metadata["outputs"]:
        binding.bind_output(name, device)
    functions = {f"ONNX Runtime, {provider}, {metadata['precision']}": lambda: session.run_with_iobinding(binding),
                 f"torch {device}, {precision}": lambda: eager(x)}
    try:
        compiled(x)
        functions[f"torch {device}, {precision}, compiled"] = lambda: compiled(x)
    except Exception as error:  # no C++ compiler or no Triton
        print(f"torch.compile failed here: {str(error).strip().splitlines()[0]}")
    timers = [Timer("run()", globals={"run": function}, num_threads=torch.get_num_threads())
              for function in functions.values()]
    seconds = torch.tensor([[timer.timeit(1).median for timer in timers] for _ in range(rounds)])
    medians, ratios = (values.median(dim=0).values for values in (seconds, seconds / seconds[:, :1]))
    print(f"{batch} x {height} x {width}, {rounds} rounds")
    for name, median, ratio in zip(functions, medians, ratios):
        print(f"  {name}: {batch / median:.1f} img/s, ONNX Runtime is {ratio:.2f}x as fast")


# ---- commands ----

def open_images(ckpt, info, in_chans, args):
    """Images to calibrate and compare a quantized file on, those that its model was trained on if none are named."""
    info = info | read_input(info, in_chans, ckpt)
    data = open_data_of_model(args, info, f"--precision int8: {ckpt}", "images to calibrate and compare on")
    print(data.note)
    return data


def read_images(args, channels, value_range):
    """The first images of --images, as the model takes them."""
    options = dict(channels=channels, value_range=value_range) if channels else {}
    return [image for image, _ in itertools.islice(ImageFolder(args.images, **options), 5)] if args.images else []


def main(args):
    if args.check:
        output = args.check
        model, metadata, (backbone, info, classifier) = load_exported(output, args)
        images = read_images(args, metadata.get("channels"), metadata.get("value_range"))
        is_int8 = metadata["precision"] == "int8"
        data = open_images(output, info, backbone.in_chans, args) if is_int8 else None
        with wrap_errors(f"{output}: its metadata does not fit its model"):
            report = [check_accuracy(backbone, model, metadata, data)] if is_int8 else verify(
                backbone, model, metadata, images, classifier)
        print(f"{output}: " + "\n  ".join(report))
    else:
        ckpt = find_model(args.ckpt)
        file = weights_file(ckpt, print)
        backbone, info, classifier = load_network(file, args.checkpoint_key)
        ending, save = FORMATS.get(args.format, (args.format, None))
        output = args.output or str(sibling_path(ckpt, args.checkpoint_key, ending))
        if os.path.exists(output) and not is_remote(ckpt) and os.path.samefile(output, ckpt):
            raise CheckpointError(f"--output {output}: is the model itself")
        create_folder(Path(output).parent)
        data = open_images(ckpt, info, backbone.in_chans, args) if args.precision == "int8" and not save else None
        if args.format == "hub":
            return save_hub(output, backbone, info, ckpt, file, args, data)
        if save:
            save(output, backbone, info, file)
            assumed = backbone.embed_dim // 64  # heads, by the models that other libraries build
            if args.format in ("timm", "dino", "dino_full") and getattr(backbone, "num_heads", assumed) != assumed:
                print(f"NOTE: load_backbone reads the number of heads from the file, others need to be given "
                      f"num_heads={backbone.num_heads}: their models of this width have {assumed}")
            return print(f"written to {output}")
        metadata = build_metadata(backbone, info, file, args) | dict(checkpoint=absolute_path(ckpt))
        model = save_onnx(output, backbone, metadata, args, classifier, data)
    if args.benchmark:
        benchmark(backbone, model, metadata, metadata["batch_size"] or args.batch_size)


def save_onnx(path, backbone, metadata, args, classifier=None, data=None):
    """Build the ONNX file, write it if it computes what the model does, and print the report; returns it as bytes.

    With data it is quantized, see `quantize`.
    """
    images = read_images(args, metadata["channels"], metadata["value_range"])
    model = build_onnx(backbone, metadata, args, classifier)
    report = verify(backbone, model, metadata, images, classifier)
    if data:
        model, lines = quantize(backbone, model, metadata, data, args.batch_size)
        report += lines
    atomic_write(path, lambda temporary: Path(temporary).write_bytes(model))
    print(f"{path}: " + "\n  ".join(report))
    return model


def save_hub(folder, backbone, info, ckpt, file, args, data=None):
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
    metadata = build_metadata(backbone, info, file, args)
    save_transformers(folder, backbone, info, ckpt)
    if os.path.exists(card := os.path.join(folder, "README.md")):
        print(f"kept {card} of an earlier export, to which you may have added; for a new one name another --output")
    else:
        write_text(card, build_model_card(backbone, info, metadata, ckpt, file))
    save_model(own := os.path.join(folder, "teacher.safetensors"), weights, info)
    metadata |= dict(checkpoint="teacher.safetensors", sha256=sha256(own))
    save_onnx(os.path.join(folder, "model.onnx"), backbone, metadata, args, data=data)
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
    if not (args.ckpt or os.path.exists(ckpt)) or sha256(file := weights_file(ckpt)) != expected:
        raise CheckpointError(f"{path}: was not exported from {ckpt} as it is now: name its model with --ckpt")
    return model, metadata, load_network(file, args.checkpoint_key or key)


if __name__ == "__main__":
    cli.run_command(main, parse_args, CheckpointError, ExportError, QuantizationError, DataError)
