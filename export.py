"""Ship a trained backbone: as ONNX with features and attention, or under the names that other libraries load.

    python export.py                                               # the newest run -> teacher.onnx beside it
    python export.py --precision mixed --normalize nhwc            # half inside, takes uint8 pixels
    python export.py --ckpt dino_deitsmall16_pretrain.pth --image_size 480 320 --output vits16_480x320.onnx
    python export.py --dynamic size                                # height and width vary too
    python export.py --check teacher.onnx --benchmark              # compare and time an existing file
    python export.py run teacher.onnx dog.jpg                      # use it: infer.py, which needs no torch
    python export.py --format transformers                         # a folder for ViTModel.from_pretrained

The ONNX file takes `image`, [B, 3, H, W] normalised with the mean and std in its metadata or, with --normalize, uint8
pixels. It gives `features` [B, D] and `attention` [B, heads, H/p, W/p], what CLS gives to each patch in the last
block. Before success is reported the file is run in ONNX Runtime on noise and on pictures, several batches and
sizes, and compared with torch; if they differ there is no file. A backbone of torchvision or timm gives `features`
alone, and its graph is made by torch's exporter.
"""

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["run"]:  # before torch is imported
    import infer

    sys.exit(infer.main(sys.argv[2:]))

import contextlib
import io
import itertools
import json
import os
import statistics
import time
import warnings
from collections import Counter

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

import infer
from backbones import BackboneError, HeadlessClassifier
from common import cli
from common.cli import nonnegative_int, positive_int
from common.convert import FORMATS, IMAGENET_MEAN, IMAGENET_STD
from common.precision import DTYPES
from common.weights import CheckpointError, find_newest_model, load_backbone, save_model, sha256, sibling_path
from data.datasets import DataError, ImageFolder
from data.shapes import Shapes
from onnx_graph import build_graph

# precision -> largest difference, absolute in fp32 and of the largest value in half, and least cosine
LIMITS = {"fp32": (1e-4, 0.99999), "fp16": (0.02, 0.9999), "mixed": (0.02, 0.9999)}


def save_backbone(path, backbone, info, ckpt):
    """This project's own file without the head: it says itself what it is."""
    save_model(path, {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}, info)


FORMATS = {"safetensors": ("backbone.safetensors", save_backbone)} | FORMATS


class ExportError(RuntimeError):
    """The exported file does not compute what the model computes."""


def parse_args(argv=None):
    parser = cli.build_parser("export.py", __doc__)
    parser.add_argument("--ckpt", nargs="?", help="model file (default: teacher.safetensors of the newest run)")
    parser.add_argument("--checkpoint_key", choices=["teacher", "student"],
                        help="network to take from a full checkpoint (default: teacher)")
    parser.add_argument("--format", choices=["onnx", *FORMATS], default="onnx", help="(default: onnx)")
    parser.add_argument("--output", metavar="FILE", help="(default: the model file's name with the format's ending)")
    graph = parser.add_argument_group("ONNX")
    graph.add_argument("--image_size", type=positive_int, nargs="+", metavar="PIXELS",
                       help="height and width, or the side of a square (default: the size the model was trained at)")
    graph.add_argument("--dynamic", choices=["batch", "size", "none"], default="batch",
                       help="what may vary: the batch; batch, height and width; nothing (default: batch)")
    graph.add_argument("--batch_size", type=positive_int, default=1, metavar="B",
                       help="of --dynamic none and --benchmark (default: 1)")
    graph.add_argument("--precision", choices=list(LIMITS), default="fp32",
                       help="fp16: all in half; mixed: products in half, norms, softmax, input and outputs in float32 "
                            "(default: fp32)")
    graph.add_argument("--opset", type=opset, default=18, metavar="N",
                       help="17 to what the installed onnx knows; from 20 Gelu, from 23 Attention is one node; "
                            "TensorRT is safest with 18 to 20 (default: 18)")
    graph.add_argument("--heads", choices=["each", "mean"], default="each",
                       help="attention of each head or their mean (default: each)")
    graph.add_argument("--patch_tokens", action="store_true", help="also give patch_tokens [B, N, D]")
    graph.add_argument("--last_layers", type=nonnegative_int, default=0, metavar="N",
                       help="also give all tokens after each of the last N blocks (default: 0)")
    graph.add_argument("--normalize", choices=["nhwc", "nchw"],
                       help="take uint8 pixels of this layout and normalise them in the graph")
    graph.add_argument("--pictures", metavar="DIR", help="pictures to compare on, besides drawn ones: the first five")
    graph.add_argument("--check", metavar="FILE", help="compare an existing file with its model, write nothing")
    graph.add_argument("--benchmark", action="store_true", help="time the file beside torch")
    args = parser.parse_args(argv)
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image_size takes H [W], not {len(args.image_size)} numbers")
    if args.image_size and args.dynamic == "size":
        parser.error("--dynamic size takes any size: leave --image_size out")
    if args.check and (args.output or args.image_size):
        parser.error("--check takes a file as it is: leave --output and --image_size out")
    if args.format == "dino_full" and args.checkpoint_key:
        parser.error("--format dino_full writes both networks: leave --checkpoint_key out")
    if args.format != "onnx" and (args.check or args.benchmark):
        parser.error(f"--format {args.format}: only ONNX files are checked and timed")
    return args


def opset(text):
    """An argparse type: a version of ONNX's operators that the graph can be written in."""
    return cli.bounded_number(int, lambda n: 17 <= n <= onnx.defs.onnx_opset_version(),
                      f"a whole number from 17 to {onnx.defs.onnx_opset_version()}")(text)


# ---- the file ----

def describe(backbone, info, ckpt, args):
    """What the file says about itself: {name: plain value}."""
    p = backbone.patch_size
    size = args.image_size or [side * p for side in backbone.grid]
    height, width = size[0], size[-1]
    if height % p or width % p:
        raise CheckpointError(f"--image_size {height} {width} must be multiples of the model's patch size {p}")
    if args.normalize and backbone.in_chans != 3:
        raise CheckpointError(f"{ckpt}: takes {backbone.in_chans} channels, --normalize is for RGB")
    is_vit = not isinstance(backbone, HeadlessClassifier)
    for flag, asked in (("precision", args.precision != "fp32"), ("dynamic size", args.dynamic == "size"), (
            "patch_tokens", args.patch_tokens), ("last_layers", args.last_layers), ("heads", args.heads != "each"), (
            "opset 17", args.opset == 17)):
        if asked and not is_vit:
            raise CheckpointError(f"--{flag} is for vision transformers of vit.py, not for {backbone.arch}")
    if not is_vit:
        try:
            backbone.try_size(height, width)
        except BackboneError as error:
            raise CheckpointError(f"--image_size: {error}") from None
    if args.last_layers > len(backbone.blocks):
        raise CheckpointError(f"--last_layers {args.last_layers}: the model has {len(backbone.blocks)} blocks")
    outputs = {"features": "CLS after the final norm, [B, D]" if is_vit else "before the classifier, [B, D]"}
    if is_vit:
        outputs["attention"] = "of the last block, what CLS gives to each patch, " + (
            "one map per head, [B, heads, H/p, W/p]" if args.heads == "each" else "mean over the heads, [B, H/p, W/p]")
    if args.patch_tokens:
        outputs["patch_tokens"] = "patches after the final norm, rows first, [B, N, D]"
    depth = len(backbone.blocks)
    for i in range(args.last_layers):
        outputs[f"layer_{i + 1}"] = (f"CLS and patches after block {depth - args.last_layers + i + 1} of {depth}, the "
                                     f"final norm applied, [B, 1+N, D]")
    is_rgb = backbone.in_chans == 3
    return dict(arch=info.get("arch", getattr(backbone, "arch", "vision transformer")), patch_size=p,
                trained_size=backbone.grid[0] * p, image_size=None if args.dynamic == "size" else [height, width],
                batch_size=args.batch_size if args.dynamic == "none" else None,
                mean=info.get("mean", IMAGENET_MEAN) if is_rgb else None,
                std=info.get("std", IMAGENET_STD) if is_rgb else None, layout=args.normalize or "nchw",
                input="uint8 RGB" if args.normalize else "RGB in [0, 1] less mean over std" if is_rgb else "as trained",
                interpolation=None if args.dynamic == "size" else
                "bicubic: shorter side to 8/7 of the crop's, then the centre",
                precision=args.precision, opset=args.opset, heads=args.heads, last_layers=args.last_layers,
                checkpoint=os.path.abspath(ckpt), checkpoint_key=args.checkpoint_key, sha256=sha256(ckpt),
                outputs=outputs)


def write(backbone, path, about):
    """Write the file, with its description as JSON in its metadata."""
    height, width = about["image_size"] or (None, None)
    size = sum(p.numel() for p in backbone.parameters()) * (4 if about["precision"] == "fp32" else 2)
    if size > 2**31 - 2**26:  # what one protobuf holds
        raise ExportError(f"the weights take {size / 2**30:.1f} GiB, more than the 2 that one ONNX file holds"
                          + ": try --precision mixed" * (about["precision"] == "fp32"))
    if isinstance(backbone, HeadlessClassifier):
        with running(path):
            proto = traced(backbone, height, width, about)
    else:
        proto = build_graph(backbone, height, width, about["batch_size"], about["precision"], about["opset"],
                            about["heads"], "patch_tokens" in about["outputs"], about["last_layers"],
                            about["layout"] if about["input"].startswith("uint8") else None, about["mean"],
                            about["std"])
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in about.items()})
    onnx.save(proto, path)


class FromPixels(torch.nn.Module):
    """uint8 pixels in the layout of the file -> the backbone's features."""

    def __init__(self, backbone, about):
        super().__init__()
        self.backbone, self.is_nhwc = backbone, about["layout"] == "nhwc"
        self.register_buffer("mean", 255 * torch.tensor(about["mean"]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(about["std"]).view(3, 1, 1))

    def forward(self, image):
        image = image.permute(0, 3, 1, 2) if self.is_nhwc else image
        return self.backbone((image.float() - self.mean) / self.std)


def traced(backbone, height, width, about):
    """The graph of a Headless, by torch's exporter."""
    image = torch.zeros(about["batch_size"] or 2, 3, height, width)
    if about["input"].startswith("uint8"):
        backbone, image = FromPixels(backbone, about).eval(), image.byte()
        image = image.permute(0, 2, 3, 1).contiguous() if about["layout"] == "nhwc" else image
    shapes = None if about["batch_size"] else ({0: torch.export.Dim("batch")},)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it speaks of its own concerns
        warnings.simplefilter("ignore")
        program = torch.onnx.export(backbone, (image,), dynamo=True, input_names=["image"], output_names=["features"],
                                    dynamic_shapes=shapes, opset_version=about["opset"], verbose=False)
    return program.model_proto


# ---- the gate ----

def gate(backbone, path, about, pictures=(), provider="CPUExecutionProvider"):
    """Compare a file with the model on noise and pictures, on several batches and sizes.

    Args:
        pictures: RGB images to look at besides those that data.py draws.

    Returns:
        lines that say what is in the file, and how far it is from the model.

    Raises:
        ExportError: it is no valid file, runs elsewhere, or gives something else.
    """
    with running(path):
        onnx.checker.check_model(path, full_check=True)
        proto = onnx.load(path)
    session = open_session(path, provider, about)
    found = {item.domain: item.version for item in proto.opset_import}
    if found != {"": about["opset"]}:
        raise ExportError(f"{path}: written in {found}, not in opset {about['opset']}")
    names = [output.name for output in session.get_outputs()]
    if sorted(names) != sorted(about["outputs"]):
        raise ExportError(f"{path}: outputs {names} instead of {list(about['outputs'])}")
    p, (rows, cols) = backbone.patch_size, backbone.grid
    sizes = [about["image_size"]] if about["image_size"] else [
        (rows * p, cols * p), (rows * p // 2 // p * p + p, cols * p), ((rows + 3) * p, (cols + 1) * p)]
    worst = {name: [0.0, 1.0] for name in names}
    half = half_precision_session(proto)
    kind, batches = session.get_inputs()[0].type, [about["batch_size"]] if about["batch_size"] else (1, 2, 7)
    for batch, (height, width) in itertools.product(batches, sizes):
        for images, feed in samples(batch, height, width, about, backbone.in_chans, kind, pictures):
            expected = compute(backbone, images, about)
            with running(path):
                outputs = session.run(names, {"image": feed})
            if half:
                require_range(half, feed)
            for name, output in zip(names, outputs):
                output = torch.from_numpy(output).float()
                if output.shape != expected[name].shape:
                    raise ExportError(f"{path}: {name} is {list(output.shape)} instead of "
                                      f"{list(expected[name].shape)}")
                difference = (output - expected[name]).abs().max().item()
                cosine = F.cosine_similarity(output.flatten(1), expected[name].flatten(1)).min().item()
                most, least = LIMITS[about["precision"]]
                most *= 1 if about["precision"] == "fp32" else expected[name].abs().max().item()
                if not (difference <= most and cosine >= least):
                    raise ExportError(f"{name} differs from torch by {difference:.2g}, cosine {cosine:.6f}, at {batch} "
                                      f"x {height} x {width}; allowed in {about['precision']}: {most:.2g}, {least:g} "
                                      f"(ONNX Runtime {onnxruntime.__version__}, {provider})")
                worst[name] = [max(worst[name][0], difference), min(worst[name][1], cosine)]
    counts = Counter(node.op_type for node in proto.graph.node)
    return [f"opset {about['opset']}, {about['precision']}, {provider}; {len(proto.graph.node)} nodes: "
            + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()),
            *(f"{value.name} {value.type[7:-1]} {value.shape}" for value in session.get_inputs()),
            *("{} {} {}, at most {:.1e} from torch, cosine at least {:.6f}".format(
                value.name, value.type[7:-1], value.shape, *worst[value.name]) for value in session.get_outputs())]


def half_precision_session(proto):
    """A session that gives every sum and product of a file in half precision; None for one without such.

    ONNX Runtime on a CPU computes much of such a file in float32; but what is an output is half.
    """
    if all(constant.data_type != onnx.TensorProto.FLOAT16 for constant in proto.graph.initializer):
        return None
    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    names = [node.output[0] for node in proto.graph.node if node.op_type in ("Add", "MatMul")
             and not node.output[0].startswith(("image.", "grid."))]
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None)
                               for name in names)
    return onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])


def require_range(session, feed):
    """Raise ExportError if a node of half_precision_session leaves the range of half precision."""
    names = [output.name for output in session.get_outputs()]
    for name, value in zip(names, session.run(names, {"image": feed})):
        if not torch.from_numpy(value).isfinite().all():
            raise ExportError(f"{name} leaves the range of half precision: export --precision fp32")


def open_session(path, provider, about, settings=None, options=None):
    """An ONNX Runtime session of a file, on this provider or not at all."""
    with running(path, f"; if ONNX Runtime {onnxruntime.__version__} does not know opset {about['opset']}, lower "
                       f"--opset"):
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings or {})])
    if session.get_providers()[0] != provider:
        raise ExportError(f"{path}: ONNX Runtime took {session.get_providers()[0]}, not {provider}")
    return session


@contextlib.contextmanager
def running(path, hint=""):
    """What ONNX and its runtime raise, which is of many kinds, becomes ExportError."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ExportError(f"{path}: no ONNX file that can be run: {text}{hint}") from None


def samples(batch, height, width, about, channels, kind, pictures=()):
    """(normalised images [B, C, H, W] for torch, the same as the file takes them), of noise and of pictures."""
    mean, std = (torch.tensor(about[name] or [0.5] * channels).view(1, -1, 1, 1) for name in ("mean", "std"))
    noise = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(0))
    kinds = [noise.byte()]
    if channels == 3:
        drawn = Shapes("test", batch, max(height, width, 16))
        several = [[drawn[i][0] for i in range(batch)], *([picture] * batch for picture in pictures)]
        place = {"image_size": [height, width], "patch_size": about["patch_size"]}
        kinds += [torch.stack([TF.pil_to_tensor(infer.prepare(picture, place)) for picture in alike])
                  for alike in several]
    for pixels in kinds:
        images = (pixels / 255 - mean) / std
        feed = pixels if kind == "tensor(uint8)" else images.half() if kind == "tensor(float16)" else images
        yield images, (feed.permute(0, 2, 3, 1) if about["layout"] == "nhwc" else feed).contiguous().numpy()


@torch.no_grad()
def compute(backbone, images, about):
    """What the model itself gives: {name of output: tensor}."""
    if isinstance(backbone, HeadlessClassifier):
        return {"features": backbone(images)}
    features, attention = backbone.forward_with_attention(images)
    attention = attention.unflatten(2, [side // backbone.patch_size for side in images.shape[2:]])
    layers = backbone.get_intermediate_layers(images, max(1, about["last_layers"]))
    return {"features": features, "attention": attention.mean(dim=1) if about["heads"] == "mean" else attention,
            "patch_tokens": layers[-1][:, 1:]} | {f"layer_{i + 1}": layer for i, layer in enumerate(layers)}


# ---- how fast ----

def benchmark(backbone, path, about, batch, turns=15):
    """Images a second of the file in ONNX Runtime and of the model in torch, turn and turn about, for the median."""
    on_cuda = torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    device, provider = ("cuda", "CUDAExecutionProvider") if on_cuda else ("cpu", "CPUExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow torch's turns
    settings = {"use_tf32": 0} if on_cuda else {}  # as torch in float32
    session = open_session(path, provider, about, settings, options)
    height, width = about["image_size"] or [side * backbone.patch_size for side in backbone.grid]
    images, feed = next(samples(batch, height, width, about, backbone.in_chans, session.get_inputs()[0].type))
    precision = "fp16" if on_cuda and about["precision"] != "fp32" else "fp32"
    model, images = (thing.to(device, DTYPES[precision]) for thing in (backbone, images))
    eager = model if isinstance(backbone, HeadlessClassifier) else model.forward_with_attention
    compiled = torch.compile(eager)

    def in_torch(call):
        with torch.no_grad():
            call(images)
        if on_cuda:
            torch.cuda.synchronize()

    binding = session.io_binding()  # input and outputs stay on the device
    binding.bind_ortvalue_input("image", onnxruntime.OrtValue.ortvalue_from_numpy(feed, device))
    for name in about["outputs"]:
        binding.bind_output(name, device)

    def in_onnxruntime():
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    rows = {f"ONNX Runtime, {provider}, {about['precision']}": in_onnxruntime,
            f"torch {device}, {precision}": lambda: in_torch(eager),
            f"torch {device}, {precision}, compiled": lambda: in_torch(compiled)}
    try:
        in_torch(compiled)
    except Exception as error:  # of the compiler's kinds, where there is none
        print(f"torch cannot compile here ({' '.join(str(error).split())[:100]})")
        rows.popitem()
    seconds = {name: [] for name in rows}
    for turn, (name, call) in itertools.product(range(turns + 3), rows.items()):
        start = time.perf_counter()
        call()
        seconds[name] += [time.perf_counter() - start] * (turn >= 3)
    ours = next(iter(seconds.values()))
    print(f"{batch} x {height} x {width}, {turns} turns")
    for name, values in seconds.items():
        ratio = statistics.median(other / mine for other, mine in zip(values, ours))
        print(f"  {name}: {batch / statistics.median(values):.1f} img/s, ONNX Runtime is {ratio:.2f}x as fast")


def main(args):
    if args.check:
        return check(args)
    ckpt = (args.ckpt or find_newest_model()).rstrip("/")
    backbone, info = load_backbone(ckpt, args.checkpoint_key)
    ending, save = FORMATS.get(args.format, ("onnx", None))
    layouts = ["onnx", "safetensors", "dino"] + ["timm"] * getattr(backbone, "arch", "").startswith("timm:")
    if isinstance(backbone, HeadlessClassifier) and args.format not in layouts:
        raise CheckpointError(f"--format {args.format}: {backbone.arch} has no such names; it has {', '.join(layouts)}")
    output = (args.output or str(sibling_path(ckpt, args.checkpoint_key, ending))).rstrip("/")
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise CheckpointError(f"--output {output}: its folder does not exist")
    if os.path.isdir(output) and args.format != "transformers":
        raise CheckpointError(f"--output {output}: is a folder")
    if os.path.exists(output) and os.path.samefile(output, ckpt):
        raise CheckpointError(f"--output {output}: is the model itself")
    if save:
        save(output, backbone, info, ckpt)
        print(f"written to {output}")
        return
    temporary = f"{output}.{os.getpid()}.tmp"
    about, pictures = describe(backbone, info, ckpt, args), pictures_in(args.pictures)
    try:
        write(backbone, temporary, about)
        found = gate(backbone, temporary, about, pictures)
        os.replace(temporary, output)
    except ExportError as error:
        raise ExportError(str(error).replace(temporary, output)) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    tell(output, found, backbone, about, args)


def pictures_in(folder):
    """The first five pictures below a folder."""
    images = ImageFolder(folder) if folder else []
    return [images[i][0] for i in range(min(5, len(images)))]


def tell(path, found, backbone, about, args):
    """Say what the gate found and, if it is asked for, how fast the file is."""
    print(f"{path}: " + "\n  ".join(found))
    if args.benchmark:
        benchmark(backbone, path, about, about["batch_size"] or args.batch_size)


def check(args):
    """The gate for an existing file; its model is the one it was made from, or --ckpt."""
    try:
        proto = onnx.load(args.check, load_external_data=False)
        about = {item.key: json.loads(item.value) for item in proto.metadata_props}
        ckpt, expected = args.ckpt or about["checkpoint"], about["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{args.check}: no such file") from None
    except Exception as error:  # anything may be in a file
        raise CheckpointError(f"{args.check}: not a file of export.py ({' '.join(str(error).split())[:200]})") from None
    if not os.path.exists(ckpt):
        raise CheckpointError(f"{args.check}: was made from {ckpt}, which is not there; name its model with --ckpt")
    backbone, info = load_backbone(ckpt, args.checkpoint_key or about.get("checkpoint_key"))
    if sha256(ckpt) != expected:
        raise CheckpointError(f"{args.check}: was not made from {ckpt}, whose checksum is another; name its model with "
                              f"--ckpt")
    for name, ours in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        if backbone.in_chans == 3 and about.get(name) != list(info.get(name, ours)):
            raise ExportError(f"{args.check}: says {name} {about.get(name)}, the model {list(info.get(name, ours))}")
    try:
        found = gate(backbone, args.check, about, pictures_in(args.pictures))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{args.check}: its description is not one ({type(error).__name__}: {error})") from None
    tell(args.check, found, backbone, about, args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, CheckpointError, ExportError, DataError)
