"""Weights in and out: models that other programs can read, and theirs.

    save_model("teacher.safetensors", network.state_dict(), info)         # backbone, head, and what they are
    backbone, info = load_backbone("teacher.safetensors")                 # also .pth, timm and transformers names

A model file says in its metadata what it is (backbone, image size, normalisation, training data), so whoever loads
it needs no flags. Nothing here unpickles anything but tensors and plain values.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision import models

from backbones import BackboneError, HeadlessClassifier, build_backbone
from common.checkpoint import CheckpointError, atomic_write, check_writable, find_fault, first_line, load_checkpoint
from common.convert import read_num_heads, to_vit_names
from common.distributed import is_rank_zero
from common.precision import set_matmul_precision


def save_model(path, state_dict, info):
    """Write weights with their description: {"arch": ..., "patch_size": ...} and whatever else is plain.

    Args:
        state_dict: `backbone.*` and `head.*` tensors.
        info: a dict that JSON can hold; load_backbone needs "backbone", the arguments of build_backbone.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_backbone(path, key=None, log=print):
    """Build the backbone that a file holds.

    Takes this project's files, the released DINO .pth files (backbone alone or full checkpoint), vision transformers
    with the names of timm or transformers, under any common prefix (`module.`, `backbone.`, ...), folders that
    transformers wrote, and ResNets with the names of torchvision. The arch is read from the metadata or, where there
    is none, from the shapes of the weights (heads are then taken to be 64 wide). Says what it matched.

    Args:
        key: "teacher" or "student", the network that must be taken; None takes the teacher of a full
            checkpoint, or the only network there is.

    Returns:
        the model in eval mode, and its description: "backbone", the arguments that build it, "network", which one it
        is if the file says so, and what else a file of this project says.

    Raises:
        CheckpointError: not a checkpoint, damaged, or not the weights of a backbone as in vit.py or backbones.py.
    """
    path = weights_file(path)
    weights, info, found = read_weights(path, key)
    try:
        ours, outside, sizes = match_weights(weights, info.get("backbone"), path)
        model, matched = build_with_weights(sizes, ours)
    except (CheckpointError, ModuleNotFoundError):  # timm is not there
        raise
    except Exception as error:  # the description is as foreign as the weights
        raise CheckpointError(f"{path}: not the weights of a backbone as built here: "
                              f"{' '.join(str(error).split())[:300]}") from None
    unused = [name for name in ours if name not in matched]
    for name in unused:  # a layer scale, a register or a norm more is another architecture, not decoration
        if re.match(r"blocks\.|norm_pre|reg|storage", name):
            raise CheckpointError(f"{path}: {name} has no place in vit.py, so the features would be wrong")
    left = unused + outside
    log(f"{path}: all {len(matched)} backbone tensors matched"
        + (f", {len(left)} others left out ({', '.join(left[:3])}{', ...' * (len(left) > 3)})" if left else ""))
    return model.eval(), info | {"backbone": sizes, "network": found}


def open_backbone(args, device=None, needs="", precision="fp32"):
    """Load the backbone that --ckpt, --checkpoint_key and --untrained name (see cli.add_model_flags), ready to run.

    Sets the matmul precision of the device for it, see `set_matmul_precision`.

    Args:
        device: where it goes, args.device if not given.
        needs: what only backbones of vit.py have: "attention", "patch tokens", "images of any size".
        precision: autocast dtype that it will run in.

    Returns:
        the model in eval mode, its description (see `load_backbone`), and its origin, for output files:
        {"ckpt": ..., "sha256": ..., "network": ..., "untrained": ...}.

    Raises:
        CheckpointError: the file cannot be used, takes other than 3 channels, or lacks what is needed.
    """
    ckpt = (args.ckpt or find_newest_model()).rstrip("/")
    backbone, info = load_backbone(ckpt, args.checkpoint_key, print if is_rank_zero() else lambda text: None)
    if backbone.in_chans != 3:
        raise CheckpointError(f"{ckpt}: takes {backbone.in_chans} channels, images here have 3")
    if needs and "arch" in info["backbone"]:
        raise CheckpointError(f"{ckpt}: {info['backbone']['arch']} gives features only, {needs} need a vision "
                              f"transformer of vit.py")
    if args.untrained:
        backbone = build_untrained(info)
    device = device or args.device
    set_matmul_precision(device, precision, backbone.embed_dim)
    origin = dict(ckpt=ckpt, sha256=sha256(ckpt), network=info["network"], untrained=args.untrained)
    return backbone.to(device), info, origin


def build_untrained(info):
    """Random weights of the same shapes, the same ones each time."""
    torch.manual_seed(0)
    return build_backbone(info["backbone"]).eval()


def output_file(origin, args, ending):
    """Path of a file about a model file: its name, what was judged of it, an ending; in --output_dir or beside it.

    Raises:
        OSError: nothing can be written there; said before hours are spent.
    """
    path = sibling_path(origin["ckpt"], args.checkpoint_key, ending, args.untrained)
    folder = Path(args.output_dir or path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    return folder / path.name


def output_folder(origin, args, ending):
    """Path of a folder about a model file: --output_dir, or beside it under its name, what was judged, an ending."""
    return Path(args.output_dir or sibling_path(origin["ckpt"], args.checkpoint_key, ending, args.untrained))


def sibling_path(ckpt, key, ending, untrained=False):
    """Path beside a model file: its name, the network that --checkpoint_key took if not the teacher, an ending."""
    file = Path(ckpt) if Path(ckpt).name not in ("", "..") else Path(ckpt).resolve()  # it may be a folder
    network = f".{key}" * (key not in (None, "teacher", file.stem))
    return file.with_name(f"{file.stem}{network}{'.untrained' * untrained}.{ending}")


def build_with_weights(sizes, weights):
    """The backbone of these sizes with these weights, and those of the weights that it took.

    Nothing is allocated before the sizes have proved to be those of weights that are there.
    """
    for name, value in sizes.items():
        if name not in ("mlp_ratio", "drop_path_rate", "arch") and not (type(value) is int and value > 0):
            raise ValueError(f"{name} is {value!r}")
    depth = sizes.get("depth", 0 if "arch" in sizes else 12)
    if depth > len(weights):
        raise ValueError(f"{depth} blocks of {len(weights)} tensors")
    with torch.device("meta"):
        model = build_backbone(sizes)
    expected = model.state_dict()
    matched = {name: weights[name] for name in expected if name in weights}
    for name, tensor in matched.items():
        if find_fault(tensor) or tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{name} {find_fault(tensor) or 'is made of another kind of number'}")
    shapes = tensor_shapes(expected)
    wrong = [name for name in shapes if name not in matched or matched[name].shape != shapes[name]]
    if wrong:
        found = list(matched[wrong[0]].shape) if wrong[0] in matched else "missing"
        raise ValueError(f"{len(wrong)} of {len(shapes)} tensors do not fit; {wrong[0]} is {found}, expected "
                         f"{list(shapes[wrong[0]])}")
    # other libraries have buffers that are in no file
    model = build_backbone(sizes) if "arch" in sizes else model.to_empty(device="cpu")
    model.load_state_dict(matched)
    return model, matched


def read_weights(path, key):
    """File -> {name: tensor} of one network, its description, and which network it is."""
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                ours = any(metadata.get(name, "").startswith("{") for name in ("backbone", "vit"))
                info = {name: json.loads(value) for name, value in metadata.items()} if ours else {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except Exception as error:  # the metadata may be anything
            raise CheckpointError(f"{path}: not a safetensors file, or damaged ({first_line(error)})") from None
        found = info.get("network")
    else:
        weights = state = load_checkpoint(path)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds {type(state).__name__}, expected named weights")
        try:
            info, found = json.loads(json.dumps(state.get("info"))), None  # plain values only
        except (TypeError, ValueError, RecursionError):
            raise CheckpointError(f"{path}: its description, \"info\", is not plain text and numbers") from None
        for level in (key or "teacher", "state_dict", "model"):
            if isinstance(weights.get(level), dict):
                weights, found = weights[level], found or level
    if key and found != key:
        raise CheckpointError(f"{path}: does not say that it holds a {key}")
    weights = {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    if isinstance(info, dict) and "vit" in info:  # as it was called before there were other backbones
        info["backbone"] = info.pop("vit")
    return weights, info if isinstance(info, dict) and isinstance(info.get("backbone"), dict) else {}, found


def match_weights(weights, sizes, path):
    """A file's weights and what it says of their backbone, None for nothing -> what `build` takes.

    Returns:
        {our name: tensor} of the backbone, the names of the other tensors, and the arguments of build_backbone.
    """
    anchor = r"(.*?)(patch_embed\.proj\.weight|embeddings\.cls_token|layer1\.0\.conv1\.weight)"
    anchors = (re.fullmatch(anchor, name) for name in weights)
    headless = sizes and "arch" in sizes  # a file of this project; the names are those of another library
    prefix = "backbone." if headless else next((anchor[1] for anchor in anchors if anchor), "")
    inside = {name[len(prefix):]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    outside = [name for name in weights if not name.startswith(prefix)]
    if headless:
        return inside, outside, sizes
    if "layer1.0.conv1.weight" in inside:
        arch, ours = identify_resnet(inside)
        return ours, [name for name in weights if f"model.{name.removeprefix(prefix)}" not in ours], dict(arch=arch)
    ours = to_vit_names(inside)
    if "pos_embed" not in ours or "patch_embed.proj.weight" not in ours:
        raise CheckpointError(f"{path}: none of its {len(weights)} tensors is a vision transformer's under the names "
                              f"of DINO, timm or transformers, or a ResNet's under those of torchvision (first: "
                              f"{', '.join(list(weights)[:3]) or 'none'})")
    return ours, outside, sizes or infer_vit_arguments(ours) | read_num_heads(path)


def identify_resnet(weights):
    """The name of the ResNet of torchvision that has these weights, and they under the names of a Headless."""
    inside = {name: tensor for name, tensor in weights.items() if re.match(r"(conv1|bn1|layer\d)\.", name)}
    for arch in models.list_models(module=models, include=["resne*", "wide_resnet*"]):
        with torch.device("meta"):
            theirs = {name: tensor for name, tensor in models.get_model(arch).state_dict().items() if name[:3] != "fc."}
        counters = {name: torch.tensor(0) for name in theirs if name.endswith(".num_batches_tracked")}  # old files lack
        if tensor_shapes(counters | inside) == tensor_shapes(theirs):
            return arch, {f"model.{name}": tensor for name, tensor in (counters | inside).items()}
    raise ValueError("not the tensors of a ResNet of torchvision")


def tensor_shapes(weights):
    return {name: tensor.shape for name, tensor in weights.items()}


def infer_vit_arguments(weights):
    """The arguments of VisionTransformer, read from the shapes of its weights."""
    embed_dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return dict(img_size=side * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
                num_heads=embed_dim // 64, mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim)


def sha256(path):
    """Checksum of a model file, or of the weights in a folder that transformers wrote."""
    with open(weights_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(path):
    return os.path.join(path, "model.safetensors") if os.path.isdir(path) else str(path)


def resolve_image_size(image_size, backbone):
    """Side of the square that is looked at, pixels: --image_size, or what the backbone was trained at.

    Raises:
        CheckpointError: patches do not fill it.
    """
    p = backbone.patch_size
    if image_size and image_size % p:
        raise CheckpointError(f"--image_size {image_size} is not a multiple of the model's patch size {p}")
    if image_size and isinstance(backbone, HeadlessClassifier):
        try:
            backbone.try_size(image_size, image_size)
        except BackboneError as error:
            raise CheckpointError(f"--image_size: {error}") from None
    return image_size or backbone.grid[0] * p


def find_newest_model(root="runs"):
    """The teacher of the run that was written last: runs/*/teacher.safetensors."""
    found = sorted(Path(root).glob("*/teacher.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no trained model below {root}/: train one (python train.py @recipes/demo.txt) or name "
                              f"a file with --ckpt")
    return str(found[-1])
