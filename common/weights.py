"""Model files: save and load weights together with the description that rebuilds the model.

    save_model("teacher.safetensors", network.state_dict(), info)         # backbone and head; `info` in the metadata
    backbone, info = load_backbone("teacher.safetensors")                 # also .pth, timm and transformers names
    backbone, info = load_backbone("dino_vits16")                         # published weights; hf:USER/NAME, of the Hub

The metadata holds the arguments of the backbone, image size, normalization and training data, so no other command
needs flags for them. Loading unpickles nothing but tensors and plain values.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision import models

from augment import IMAGENET_MEAN, IMAGENET_STD
from backbones import BackboneError, HeadlessClassifier, build_backbone
from common import checkpoint
from common.checkpoint import CheckpointError
from common.convert import read_config, to_vit_names
from common.distributed import run_on_rank_zero_first
from common.files import atomic_write, check_file, hash_file
from common.hub import is_remote
from common.logger import log
from common.paths import find_model, weights_file
from common.precision import set_matmul_precision

# names of dicts in checkpoints that hold networks: DINO's, timm's, DeiT's, Lightning's, MAE's, DeepSpeed's
NESTING_KEYS = "teacher", "student", "state_dict_ema", "model_ema", "state_dict", "model", "module"
# a name that each network has once: DINO's and timm's, XCiT's, transformers', torchvision's
ANCHOR = r"(.*?)(patch_embed\.proj\.(0\.0\.)?weight|embeddings\.cls_token|layer1\.0\.conv1\.weight)"


# ---- saving and loading ----

def save_model(path: str | os.PathLike, state_dict: dict, info: dict):
    """Write weights and their description, atomically.

    Args:
        state_dict: `backbone.*` and `head.*` tensors.
        info: JSON values; load_backbone needs "backbone", the arguments of build_backbone.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_backbone(path: str | os.PathLike, key: str | None = None,
                  log: Callable[[str], object] = print) -> tuple[torch.nn.Module, dict]:
    """Load a backbone from a model file, on the CPU.

    Takes files of this repository, the released DINO .pth files (backbone or full checkpoint), vision transformers
    with the names of timm or transformers under any common prefix (`module.`, `backbone.`, ...), folders of
    transformers, ResNets with the names of torchvision, XCiTs, and the names of `is_remote`. The arguments of a vision
    transformer are inferred from the shapes of its weights; the number of heads is the file's or that of a config.json
    beside it, else 64 channels per head are assumed.

    Args:
        key: "teacher" or "student" of a file with both (lightly, solo-learn, MoCo too); None takes the teacher, which
            may be named momentum, target or EMA network, or the first network.
        log: called with lines about the network, the tensors that matched and those that were left out.

    Returns:
        the model in eval mode, and its description: "backbone", the arguments of build_backbone; "network", the key
        of the loaded network or None; and whatever `save_model` was given.

    Raises:
        CheckpointError: not a model file, corrupt, or not the weights of a backbone of vit.py or backbones.py.
    """
    path = weights_file(path, log)
    return build_from_content(read_content(path), path, key, log)


def build_from_content(content, path, key=None, log=print):
    """Second half of `load_backbone`, after `read_content`."""
    try:
        weights, info, network = choose_weights(content, path, key, log)
        inside, outside, arguments, network = match_weights(weights, info.get("backbone"), network, key, path, log)
        model, matched = build_with_weights(arguments, inside)
    except (CheckpointError, OSError, ModuleNotFoundError):  # the last: timm is not installed
        raise
    except Exception as error:  # a foreign file may hold anything under the expected names
        raise CheckpointError(f"{path}: not the weights of a backbone as built here: {error}") from None
    unused = [name for name in inside if name not in matched]
    for name in unused:
        if re.match(r"blocks\.|norm_pre|reg|storage", name):  # layer scale, registers: they would change the features
            raise CheckpointError(f"{path}: {name} has no place in vit.py, the features would be wrong without it")
    is_ours = "head" in info  # in such a file a head is expected
    left = [name for name in unused + outside if not (is_ours and name.startswith("head."))]
    log(f"{path}: all {len(matched)} backbone tensors matched"
        + (f", {len(left)} other{'s' * (len(left) > 1)} left out ({', '.join(left[:3])}{', ...' * (len(left) > 3)})"
           if left else ""))
    return model.eval(), info | {"backbone": arguments, "network": network}


def open_backbone(args, device=None, needs="", precision="fp32", rgb_only=True):
    """Load the backbone of --ckpt, --checkpoint_key and --untrained (see cli.add_model_flags), ready to run.

    Sets the matmul precision of the device for it, see `set_matmul_precision`.

    Args:
        device: where it goes, args.device if not given.
        needs: what only backbones of vit.py have: "attention", "patch tokens", "images of any size".
        precision: autocast dtype that it will run in.
        rgb_only: whether images of other channels cannot be read.

    Returns:
        the model in eval mode, its description (see `load_backbone` and `read_input`), and its origin, for outputs:
        {"ckpt": ..., "sha256": ..., "network": ..., "untrained": ..., "value_range": see `read_image`}.

    Raises:
        CheckpointError: the file cannot be loaded, takes other images than RGB, or lacks what is needed.
    """
    ckpt = find_model(args.ckpt)
    file = run_on_rank_zero_first(lambda: weights_file(ckpt, log)) if is_remote(ckpt) else weights_file(ckpt)
    backbone, info = load_backbone(file, args.checkpoint_key, log)
    info |= read_input(info, backbone.in_chans, ckpt)
    if rgb_only and info["channels"]:
        raise CheckpointError(f"{ckpt}: takes images of {info['channels']} channels, here they are RGB")
    if needs and "arch" in info["backbone"]:
        raise CheckpointError(f"{ckpt}: {info['backbone']['arch']} gives features only; {needs} need a model of vit.py")
    if args.untrained:
        backbone = build_untrained(info)
    set_matmul_precision(device or args.device, precision, backbone.embed_dim)
    origin = dict(ckpt=ckpt, sha256=hash_file(file), network=info["network"], untrained=args.untrained,
                  value_range=info.get("value_range"))
    return backbone.to(device or args.device), info, origin


def read_input(info, in_chans, path):
    """What the description of a model says about its input: {"channels", "mean", "std"}, each as for `MultiCrop`.

    RGB with the mean and std of ImageNet where it says nothing, or values in [-1, 1] of other numbers of channels.

    Raises:
        CheckpointError: not those of a model with `in_chans` channels.
    """
    is_rgb = in_chans == 3
    found = dict(channels=None if is_rgb else in_chans, mean=IMAGENET_MEAN if is_rgb else [0.5] * in_chans,
                 std=IMAGENET_STD if is_rgb else [0.5] * in_chans)
    found |= {name: info[name] for name in found if info.get(name)}
    with contextlib.suppress(TypeError):  # a file may hold anything
        is_finite = all(map(math.isfinite, [*found["mean"], *found["std"]])) and min(found["std"]) > 0
        if is_finite and found["channels"] in (None, in_chans) and len(found["mean"]) == len(found["std"]) == in_chans:
            return found
    raise CheckpointError(f"{path}: is not described as a model of {in_chans} channels: {str(found)[:200]}")


def build_untrained(info):
    """The same backbone with random weights, the same ones on every call."""
    torch.manual_seed(0)
    return build_backbone(info["backbone"]).eval()


# ---- reading and matching state dicts ----

def read_weights(path, key=None, log=lambda text: None):
    """Read one network of a file: {name: tensor}, its description ({} without one), its key (None if not known)."""
    return choose_weights(read_content(path), path, key, log)


def read_content(path):
    """What a model file holds: {name: tensor} or a nest of such, and the metadata of safetensors, None of other files.
    """
    if path.lower().endswith(".onnx"):
        raise CheckpointError(f"{path}: is an exported file, for export.py run (infer.py) and visualize.py attention; "
                              f"name the file it was made from, such as teacher.safetensors")
    try:
        check_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    if not path.endswith(".safetensors"):
        return checkpoint.load_checkpoint(path), None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors has exception types of its own
        raise CheckpointError(f"{path}: not a safetensors file, or corrupt ({error})") from None


def choose_weights(content, path, key=None, log=lambda text: None):
    """One network of what `read_content` returns, see `read_weights`."""
    state, metadata = content
    if metadata is not None:
        weights, heads = state, metadata.get("num_heads")  # the latter: of save_timm
        is_ours = metadata.get("backbone", metadata.get("vit", "")).startswith("{")
        try:
            info = {name: json.loads(value) for name, value in metadata.items()} if is_ours else {}
        except ValueError as error:
            raise CheckpointError(f"{path}: not a safetensors file, or corrupt ({error})") from None
        network = info.get("network")
    else:
        weights = state
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict")
        info, network = json.loads(json.dumps(state.get("info"))), None  # lists for tuples, as in safetensors metadata
        for _ in NESTING_KEYS:  # a level may hold another
            if levels := [level for level in NESTING_KEYS if isinstance(weights.get(level), dict)]:
                level, role = choose_network(levels, key, path, log)
                weights, network = weights[level], network or role
        args = state.get("args")  # a Namespace in the reference's, a dict in those of save_dino_full
        heads = args.get("num_heads") if isinstance(args, dict) else getattr(args, "num_heads", None)
        heads = heads or getattr(weights, "_metadata", {}).get("", {}).get("num_heads")  # the last: of save_dino
    weights = {re.sub(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.", "", str(name)): tensor
               for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    info = checkpoint.rename_old_keys(info) if isinstance(info, dict) else {}
    if not isinstance(info.get("backbone"), dict):
        info = {"backbone": {"num_heads": int(heads)}} if str(heads).isdecimal() else {}
    return weights, info, network


def choose_network(names, key, path, log):
    """Of names of networks, that of the teacher or of `key`, else the first, and its role: teacher, student or None."""
    teachers = [name for name in names if re.search(r"teacher|momentum|target|encoder_k|(^|[._])ema([._]|$)", name)]
    students = [name for name in names if name not in teachers and (teachers or "student" in name)]
    taken = ((students if key == "student" else teachers) or names)[0]
    if len({*names}) > 1:
        log(f"{path}: took {taken.strip('.')} of the networks {', '.join(name.strip('.') for name in names)}")
    return taken, "teacher" if taken in teachers else "student" if taken in students else None


def match_weights(weights, arguments, network, key, path, log):
    """Match the names of a file's weights, and the arguments in its description or None, to a backbone.

    Args:
        network: key of the network that the weights are of, None if they may be of several or it is not known.

    Returns:
        {name in our backbone: tensor}, the names of tensors of no network, the arguments of build_backbone, and the
        key of the network.
    """
    prefixes = [match[1] for name in weights if (match := re.fullmatch(ANCHOR, name))] or [""]
    is_headless = arguments and "arch" in arguments  # a file of this repository with the names of another library
    prefix = "backbone." if is_headless else prefixes[0]
    if prefixes != [""] and not network and not is_headless:
        prefix, network = choose_network(prefixes, key, path, log)
    if key and network != key:
        raise CheckpointError(f"{path}: holds no network named {key}, leave --checkpoint_key out")
    inside = {name[len(prefix):]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    outside = [name for name in weights if not name.startswith((prefix, *prefixes))]
    if is_headless:
        return inside, outside, arguments, network
    if "layer1.0.conv1.weight" in inside or "patch_embed.proj.0.0.weight" in inside:
        arch, ours = identify_classifier(inside)
        parts = {name.split(".")[1] for name in ours} | {"pos_embeder"}  # the last: of the released XCiT files
        outside += [name for name in inside if name.split(".")[0] not in parts]
        return ours, outside, dict(arch=arch), network
    ours = to_vit_names(inside)
    if "pos_embed" not in ours or "patch_embed.proj.weight" not in ours:
        raise CheckpointError(f"{path}: none of its {len(weights)} tensors is a ViT's (as named by DINO, timm or "
                              f"transformers), XCiT's or ResNet's; first: {', '.join(list(weights)[:3]) or 'none'}")
    inferred = infer_vit_arguments(ours)
    heads = {"num_heads": arguments.get("num_heads", 6)} if arguments else read_config(path, inferred["embed_dim"])
    if not heads:
        log(f"{path}: does not hold the number of heads, assuming {inferred['num_heads']} of 64 channels; "
            f'if it has others, write {{"num_heads": N}} to a config.json beside it')
    return ours, outside, inferred | heads, network


def identify_classifier(weights):
    """The torchvision ResNet or timm XCiT with tensors of these shapes: its name, and weights of a HeadlessClassifier.
    """
    archs = models.list_models(module=models, include=["resne*", "wide_resnet*"])
    if "patch_embed.proj.0.0.weight" in weights:
        from timm.models import xcit

        archs = [f"timm:{name}" for name in vars(xcit) if re.fullmatch(r"xcit_\w+_224", name)]
    for arch in archs:
        with torch.device("meta"):
            model = build_backbone(dict(arch=arch)).model
        theirs = model.state_dict()
        found = xcit.checkpoint_filter_fn(dict(weights), model) if arch.startswith("timm:") else weights
        parts = {name.split(".")[0] for name in theirs}  # without a head or projector
        counters = {name: torch.tensor(0) for name in theirs if name.endswith(".num_batches_tracked")}  # old files lack
        ours = counters | {name: tensor for name, tensor in found.items() if name.split(".")[0] in parts}
        if ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours):
            return arch, {f"model.{name}": tensor for name, tensor in ours.items()}
    raise ValueError("not the tensors of a ResNet of torchvision or an XCiT of timm")


def infer_vit_arguments(weights):
    """Arguments of VisionTransformer from the shapes of its weights, assuming 64 channels per head."""
    embed_dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
    stem = [name for name in weights if re.fullmatch(r"patch_embed\.stem\.\d+\.conv\.weight", name)]
    if stem:
        in_chans, patch_size = weights["patch_embed.stem.0.conv.weight"].shape[1], 2 ** len(stem)
    depth = len({match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))})
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return dict(img_size=side * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
                num_heads=embed_dim // 64, mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
                **{"conv_stem": True} if stem else {})


def build_with_weights(arguments, weights):
    """Build a backbone and load its weights: the model, and the names of the tensors that it took.

    Memory is allocated only after the tensors have been checked.
    """
    if arguments.get("num_heads", 1) < 1:
        raise ValueError(f"num_heads is {arguments['num_heads']}")
    with torch.device("meta"):
        model = build_backbone(arguments)
    expected = model.state_dict()
    for name, ours in expected.items():
        shape, tensor = list(ours.shape), weights.get(name)
        if tensor is None or list(tensor.shape) != shape:
            raise ValueError(f"{name} is {'missing' if tensor is None else list(tensor.shape)}, expected {shape}")
        if checkpoint.find_fault(tensor) or tensor.is_floating_point() != ours.is_floating_point():
            raise ValueError(f"{name} {checkpoint.find_fault(tensor) or f'has dtype {tensor.dtype}'}")
    # the buffers of other libraries that are in no file are computed by their constructors
    model = build_backbone(arguments) if "arch" in arguments else model.to_empty(device="cpu")
    model.load_state_dict({name: weights[name] for name in expected})
    return model, list(expected)


# ---- image sizes ----

def resolve_image_size(image_size, backbone):
    """Side of the square crop in pixels: --image_size, or the size the backbone was trained at."""
    if image_size:
        check_image_size(backbone, image_size)
    return image_size or backbone.grid[0] * backbone.patch_size


def check_image_size(backbone, *sides):
    """Raise CheckpointError unless a backbone takes images of --image_size, a height and width or one side."""
    p = backbone.patch_size
    if any(side % p for side in sides):
        raise CheckpointError(f"--image_size {' '.join(map(str, sides))}: not multiples of the model's patch size {p}")
    if isinstance(backbone, HeadlessClassifier):
        try:
            backbone.try_size(sides[0], sides[-1])
        except BackboneError as error:
            raise CheckpointError(f"--image_size: {error}") from None
