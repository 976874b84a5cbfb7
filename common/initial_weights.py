"""Weights to continue from: backbone, projection heads and center of a file, as far as it has them.

    weights = read_initial_weights("dino_deitsmall16_pretrain_full_checkpoint.pth")
    weights.head                                    # {"out_dim": 65536, ...}, None for a file with a backbone alone
    load_initial_weights(weights, student, teacher, dino_loss)

Takes whatever `load_backbone` does. Full checkpoints, of this repository and the reference, have student, teacher, both
heads and the center; the model files of a run have one network, which student and teacher then share.
"""

import argparse
import contextlib
import functools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import IMAGENET_MEAN, IMAGENET_STD
from common.checkpoint import CheckpointError, find_fault, iter_tensors
from common.paths import weights_file
from common.weights import build_from_content, choose_weights, read_content, read_input
from dino_loss import DINOHead
from vit import SIZES

CONTINUE = dict(lr=0.000125, momentum_teacher=0.99, teacher_temp=0.07, warmup_teacher_temp=0.07, centering="mean",
                schedule_epochs=0, freeze_last_layer=0, init_head_epochs=0, layer_decay=1.0)
CONTINUE_BACKBONE = dict(lr=0.00025, momentum_teacher=0.99, schedule_epochs=0, init_head_epochs=5, layer_decay=0.8)
# lr: with heads a quarter of the paper's, without half of it
HEAD_NAME = re.compile(r"(?:.*\.)?head\.((?:mlp|predictor|last_layer)\..*)")
HEAD_RENAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class InitialWeights(NamedTuple):
    """Weights of a file.

    Attributes:
        path: of the file.
        backbone: arguments of build_backbone.
        images: what the backbone takes: "channels", "mean", "std" (see `read_input`) and "value_range" (`read_image`).
        head: arguments of DINOHead after the first, without norm_last_layer; None without heads.
        student, teacher: {"backbone": state dict, "head": state dict, empty without heads}.
        center: [1, K], None if the file has none.
        flags: {name: value} of the flags that the heads belong to, as far as the file has them.
    """

    path: str
    backbone: dict
    images: dict
    head: dict | None
    student: dict[str, dict[str, Tensor]]
    teacher: dict[str, dict[str, Tensor]]
    center: Tensor | None
    flags: dict


def read_initial_weights(path: str, log: Callable[[str], object] = print) -> InitialWeights:
    """Read backbone, heads and center of a file; of the folder of a run, its checkpoint.

    They are kept until `load_initial_weights`, so that flags and networks of a run come from one reading.

    Args:
        log: called with lines about what was found, and what was left out.

    Raises:
        CheckpointError: see `load_backbone`, or the heads of student and teacher differ.
    """
    checkpoint = os.path.join(path, "checkpoint.pth")
    path = checkpoint if os.path.exists(checkpoint) else weights_file(path, log)
    weights, lines = read_file(path, os.path.exists(path) and os.stat(path).st_mtime_ns)
    for line in lines:
        log(line)
    return weights


@functools.lru_cache(maxsize=1)
def read_file(path, modified):
    """InitialWeights of a file that was modified at that time, and lines about what was found and left out."""
    content, lines = read_content(path), []
    state = content[0] if isinstance(content[0], dict) else {}
    keys = ("student", "teacher") if {"student", "teacher"} <= state.keys() else (None,)
    networks, arguments = [], []
    for key in keys:
        backbone, info = build_from_content(content, path, key, lines.append if key == keys[-1] else lambda text: None)
        head, head_arguments = read_head(choose_weights(content, path, key)[0], backbone.embed_dim, info)
        networks.append(dict(backbone=backbone.state_dict(), head=head))
        images = read_input(info, backbone.in_chans, path) | dict(value_range=info.get("value_range"))
        arguments.append((info["backbone"], images, head_arguments))
    if arguments[0] != arguments[-1]:
        raise CheckpointError(f"{path}: student and teacher differ in their sizes")
    center, flags = read_loss(state, head_arguments["out_dim"]) if len(keys) == 2 and head_arguments else (None, {})
    for name, tensor in iter_tensors([network["head"] for network in networks] + [center], "heads and center"):
        if fault := find_fault(tensor):
            raise CheckpointError(f"{path}: {name} {fault}")
    found = ["student and teacher" if len(keys) == 2 else "one network, for student and teacher",
             "with heads" if networks[0]["head"] else "without heads, which start at random",
             "the center" if center is not None else "no center, which starts at 0"]
    lines.append(f"{path}: {', '.join(found)}")
    return InitialWeights(path, *arguments[0], networks[0], networks[-1], center, flags), lines


def read_head(weights, embed_dim, info):
    """{name in DINOHead: tensor} of the weights of a network, and the arguments; {}, None without a DINOHead."""
    head = {match[1]: tensor for name, tensor in weights.items() if (match := HEAD_NAME.fullmatch(name))}
    for theirs, ours in HEAD_RENAMES.items():
        head = {name.replace(theirs, ours): tensor for name, tensor in head.items()}
    head.pop("last_layer.weight", None)  # computed from the other two, in some versions of torch
    with contextlib.suppress(KeyError, ValueError):  # tensors that it lacks, or of other dimensions
        arguments = infer_head_arguments(head)
        described = info.get("head") or {}
        if "l2_bottleneck" in described:  # which the weights do not show
            arguments["l2_bottleneck"] = described["l2_bottleneck"]
        with torch.device("meta"):
            expected = DINOHead(embed_dim, **arguments).state_dict()
        if all(head[name].shape == tensor.shape for name, tensor in expected.items()):
            return head, arguments
    return {}, None


def read_loss(state, out_dim):
    """Center [1, K] of a full checkpoint, None if it has none, and those of its flags that its heads belong to."""
    loss, flags = state.get("dino_loss"), state.get("flags", state.get("args"))
    center = loss.get("center") if isinstance(loss, dict) else None
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags or {}
    flags = {name: flags[name] for name in ("centering", "norm_last_layer", "teacher_temp") if name in flags}
    flags |= {"warmup_teacher_temp": flags["teacher_temp"]} if "teacher_temp" in flags else {}
    return center if getattr(center, "shape", None) == (1, out_dim) else None, flags


def infer_head_arguments(head):
    """Arguments of DINOHead, but for norm_last_layer and l2_bottleneck, from its weights."""
    layers = [tensor for name, tensor in head.items() if name.startswith("mlp.") and tensor.ndim == 2]
    out_dim, bottleneck_dim = head["last_layer.weight_v"].shape
    hidden = dict(hidden_dim=layers[0].shape[0]) if len(layers) > 1 else {}
    return dict(out_dim=out_dim, bottleneck_dim=bottleneck_dim, nlayers=len(layers),
                use_bn=any(name.endswith("running_mean") for name in head)) | hidden


# ---- loading ----

@torch.no_grad()
def load_initial_weights(weights: InitialWeights, student: nn.Module, teacher: nn.Module, dino_loss: nn.Module,
                         log: Callable[[str], object] = print) -> None:
    """Copy weights into student and teacher (MultiCropWrapper) and DINOLoss.

    Patch and position embeddings are resampled for another patch (without a convolutional stem) or image size, and the
    patch embedding is summed or repeated for another number of channels. Without heads, or for a predictor that the
    file does not have, what the networks hold stays.

    Raises:
        CheckpointError: tensors of other shapes.
    """
    for name, network, parts in (("student", student, weights.student), ("teacher", teacher, weights.teacher)):
        expected = network.backbone.state_dict()
        backbone = resample_embeddings(parts["backbone"], network.backbone, log if name == "student" else None)
        for key, tensor in [*backbone.items()]:
            if tensor.shape != expected[key].shape:
                raise CheckpointError(f"{weights.path}: {key} is {list(tensor.shape)}, not {list(expected[key].shape)}")
        network.backbone.load_state_dict(backbone)
        ours = network.head.state_dict()
        network.head.load_state_dict(ours | {key: tensor for key, tensor in parts["head"].items() if key in ours})
    if weights.center is not None:
        dino_loss.center.copy_(weights.center)
    read_file.cache_clear()


def resample_embeddings(weights, backbone, log=None):
    """State dict of a vision transformer, for channels, patch size and grid of another; others as they are."""
    if "pos_embed" not in weights:
        return weights
    weights, p, log = dict(weights), backbone.patch_size, log or (lambda text: None)
    first = "patch_embed.stem.0.conv.weight" if backbone.conv_stem else "patch_embed.proj.weight"
    kernel, pos_embed = weights[first], weights["pos_embed"]
    if (channels := kernel.shape[1]) != backbone.in_chans:
        how = "repeated" if channels < backbone.in_chans else "summed"
        log(f"patch embedding of {channels} channels {how} to {backbone.in_chans}")
        kernel = weights[first] = convert_channels(kernel, backbone.in_chans)
    if kernel.shape[-1] != p and not backbone.conv_stem:
        log(f"patch embedding resampled from {kernel.shape[-1]} to {p} pixels")
        weights[first] = resample_patch_embedding(kernel, p)
    rows, side = backbone.grid[0], round((pos_embed.shape[1] - 1) ** 0.5)
    if side != rows:
        log(f"position embedding resampled from {side} x {side} to {rows} x {rows} patches")
        patches = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches.float(), (rows, rows), mode="bicubic", antialias=True)
        patches = patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)
        weights["pos_embed"] = torch.cat((pos_embed[:, :1], patches), dim=1)
    return weights


def convert_channels(kernel: Tensor, channels: int) -> Tensor:
    """Kernel [D, I, p, p] -> [D, channels, p, p] with about the same products, as timm's adapt_input_conv.

    For more channels it is repeated, in order, and scaled by I / channels. For fewer, channels i, i + channels ... are
    summed, so that an image whose channels are equal has the same products.
    """
    num_channels = kernel.shape[1]
    if channels > num_channels:
        return kernel[:, torch.arange(channels) % num_channels] * (num_channels / channels)
    return torch.stack([kernel[:, i::channels].sum(dim=1) for i in range(channels)], dim=1)


def resample_patch_embedding(kernel: Tensor, size: int) -> Tensor:
    """Kernel [D, C, p, p] -> [D, C, size, size] with about the same products with resized images.

    The pseudoinverse of resizing, here bicubic (Beyer et al. 2023, "FlexiViT", section 3.4): exact for size >= p.
    """
    p = kernel.shape[-1]
    basis = torch.eye(p * p, dtype=torch.float64).view(p * p, 1, p, p)
    resize = F.interpolate(basis, (size, size), mode="bicubic", antialias=True).flatten(1).T  # [size^2, p^2]
    flat = kernel.double().flatten(2) @ torch.linalg.pinv(resize)
    return flat.view(*kernel.shape[:2], size, size).to(kernel.dtype)


# ---- flags ----

def follow_initial_weights(parser, args, given):
    """Set what the weights of --init determine, and the defaults of runs that continue; the given flags stay.

    Ends with a parser error if a given flag is of other weights.
    """
    # the other lines follow when the run starts
    weights = read_initial_weights(args.init, lambda text: print(text) if text.startswith("downloading") else None)
    backbone, head = dict(weights.backbone), weights.head or {}
    if (mlp_ratio := backbone.pop("mlp_ratio", 4)) != 4:
        parser.error(f"--init {args.init}: its mlp_ratio is {mlp_ratio:g}, networks here have 4")
    for name in ("img_size", "in_chans"):
        backbone.pop(name, None)
    sizes = {name: backbone.get(name) for name in SIZES["vit_small"]}
    names = {"nlayers": "head_layers", "use_bn": "use_bn_in_head"}
    found = {"arch": next((arch for arch in SIZES if SIZES[arch] == sizes), args.arch if args.arch in SIZES else
                          "vit_small")} | backbone | {names.get(name, name): value for name, value in head.items()}
    if found["arch"] in SIZES:
        found = {"conv_stem": False} | found
    for name, value in found.items():
        if name not in given:
            setattr(args, name, value)
        elif getattr(args, name) != value and (name != "patch_size" or backbone.get("conv_stem")):
            parser.error(f"--{name} {getattr(args, name)}: --init {args.init} has {value}, leave the flag out")
    continuing = CONTINUE | weights.flags if head else CONTINUE_BACKBONE
    for name, value in continuing.items():
        if name not in given:
            setattr(args, name, value)
    if "init_head_epochs" not in given:
        args.init_head_epochs = min(args.init_head_epochs, -(-args.epochs // 8), args.epochs - 1)
    args.auto = tuple(name for name in args.auto if name not in found | continuing)
    images = weights.images
    args.channels = args.channels or images["channels"]
    if args.channels == images["channels"]:
        values = [*images["mean"], *images["std"]]
        is_imagenet = values == [*IMAGENET_MEAN, *IMAGENET_STD]
        args.normalization = args.normalization or (["imagenet"] if is_imagenet else values)
        args.value_range = args.value_range or images["value_range"]
