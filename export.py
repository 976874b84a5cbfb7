"""Ship a trained backbone as ONNX, with features and attention.

    python export.py                                               # the newest run -> teacher.onnx beside it
    python export.py --ckpt dino_deitsmall16_pretrain.pth --image_size 480 320 --output vits16_480x320.onnx

The file takes `image` [B, 3, H, W], float32, RGB in [0, 1] normalised with the mean and std in its metadata, any
B, the H and W it was exported for. It gives `features` [B, D] and `attention` [B, heads, H/p, W/p], what CLS gives
to each patch in the last block. Before success is reported the file is run in ONNX Runtime and compared with
torch; if they differ there is no file.
"""

import copy
import json
import os
import warnings

import torch
from torch import nn

import cli
from checkpoint import CheckpointError, load_backbone, newest_model
from cli import positive

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ExportError(RuntimeError):
    """The exported file does not compute what the model computes."""


class FeaturesAndAttention(nn.Module):
    """A backbone at one image size: the position embedding is a constant, attention has the grid's shape."""

    def __init__(self, backbone, height, width):
        super().__init__()
        self.grid = (height // backbone.patch_size, width // backbone.patch_size)
        self.backbone = copy.deepcopy(backbone)
        with torch.no_grad():
            self.backbone.pos_embed = nn.Parameter(backbone.interpolate_pos_encoding(*self.grid))
        self.backbone.grid = self.grid

    def forward(self, image):
        features, attention = self.backbone.forward_with_attention(image)
        return features, attention.unflatten(2, self.grid)


def export_onnx(backbone, height, width, path, metadata):
    """Write the backbone at one size to `path`, with its metadata as strings."""
    import onnx

    model = FeaturesAndAttention(backbone, height, width).eval()
    example = torch.randn(2, backbone.in_chans, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=18, input_names=["image"], verbose=False,
            output_names=["features", "attention"], dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)


def differences(backbone, path, images, provider):
    """Largest absolute difference between the backbone and the file on images [B, C, H, W], per output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=[provider])
    if session.get_providers()[0] != provider:
        raise ExportError(f"ONNX Runtime did not take {provider} but {session.get_providers()[0]}")
    names = [output.name for output in session.get_outputs()]
    with torch.no_grad():
        features, attention = backbone.forward_with_attention(images)
    grid = [side // backbone.patch_size for side in images.shape[2:]]
    expected = {"features": features, "attention": attention.unflatten(2, grid)}
    if set(names) != set(expected):
        raise ExportError(f"outputs {names} instead of {list(expected)}")
    outputs = dict(zip(names, map(torch.from_numpy, session.run(names, {"image": images.numpy()}))))
    for name, output in outputs.items():
        if output.shape != expected[name].shape:
            raise ExportError(f"{name} is {list(output.shape)} instead of {list(expected[name].shape)}")
    return {name: (outputs[name] - expected[name]).abs().max().item() for name in names}


def check(backbone, path, height, width, tolerance):
    """Compare torch and ONNX Runtime on batches of 1, 2 and 7; returns the largest difference per output.

    Raises:
        ExportError: they differ by more than the tolerance, or by NaN.
    """
    import onnxruntime

    provider = "CPUExecutionProvider"
    worst = {}
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 7):
        images = torch.randn(batch, backbone.in_chans, height, width, generator=generator)
        for name, difference in differences(backbone, path, images, provider).items():
            worst[name] = max(worst.get(name, 0.0), difference)
            if not difference <= tolerance:
                raise ExportError(f"{name} differs from torch by {difference:.2g} at batch {batch}, more than "
                                  f"{tolerance:g} (ONNX Runtime {onnxruntime.__version__}, {provider})")
    return worst


def parse_args(argv=None):
    parser = cli.parser("export.py", __doc__)
    parser.add_argument("--ckpt", nargs="?", help="model file (default: teacher.safetensors of the newest run)")
    parser.add_argument("--checkpoint_key", choices=["teacher", "student"],
                        help="network to take from a full checkpoint (default: teacher)")
    parser.add_argument("--image_size", type=positive, nargs="+", metavar="PIXELS",
                        help="height and width, or the side of a square (default: the size the model was trained at)")
    parser.add_argument("--output", metavar="FILE", help="(default: the model file's name with .onnx)")
    args = parser.parse_args(argv)
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image_size takes H [W], not {len(args.image_size)} numbers")
    return args


def main(args):
    ckpt = args.ckpt or newest_model()
    backbone, info = load_backbone(ckpt, args.checkpoint_key)
    p = backbone.patch_size
    size = args.image_size or [side * p for side in backbone.grid]
    height, width = size[0], size[-1]
    if height % p or width % p:
        raise CheckpointError(f"--image_size {height} {width} must be multiples of the model's patch size {p}")
    output = args.output or os.path.splitext(ckpt)[0] + ".onnx"
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise CheckpointError(f"--output {output}: its folder does not exist")
    temporary = output + ".tmp"
    metadata = dict(arch=info.get("arch", "vision transformer"), patch_size=p, image_size=[height, width],
                    features="CLS after the final norm", attention="last block, CLS over patches, one map per head")
    if backbone.in_chans == 3:
        metadata |= dict(mean=info.get("mean", IMAGENET_MEAN), std=info.get("std", IMAGENET_STD), color="RGB in [0, 1]")
    try:
        export_onnx(backbone, height, width, temporary, metadata)
        worst = check(backbone, temporary, height, width, tolerance=1e-4)
        os.replace(temporary, output)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    print(f"{output}: image [B, {backbone.in_chans}, {height}, {width}] -> features [B, {backbone.embed_dim}], "
          f"attention [B, {backbone.num_heads}, {height // p}, {width // p}]")
    print("largest difference from torch in ONNX Runtime: "
          + ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items()))


if __name__ == "__main__":
    cli.run(main, parse_args, CheckpointError, ExportError)
