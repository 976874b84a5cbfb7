"""Weights in and out: a run's whole state, and models that other programs can read.

    save_state("checkpoint.pth", student=..., optimizer=..., step=...)    # everything needed to go on
    save_model("teacher.safetensors", network.state_dict(), info)         # backbone, head, and what they are
    backbone, info = load_backbone("teacher.safetensors")                 # also .pth, timm and transformers names

A model file says in its metadata what it is (arch, patch size, image size, normalisation, training
data), so whoever loads it needs no flags. Nothing here unpickles anything but tensors and plain values.
"""

import argparse
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vit import VisionTransformer


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it, what is wrong and what would be right."""


# ---- a run's state ----

def save_state(path, **state):
    """Write a run's state so that `path` is always whole: the old file or the new one."""
    write_whole(path, lambda temporary: torch.save(state, temporary))


def load_state(path):
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or holds anything but tensors and plain values.
    """
    try:
        # The reference implementation's checkpoints carry their flags as a Namespace, which is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # unpickling raises nearly anything on damaged files
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({first_line(error)})") from None


def write_whole(path, write):
    """Call `write` on a temporary file beside `path`, flush it to the disk and rename it to `path`."""
    temporary = f"{path}.tmp"
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- models ----

def save_model(path, state_dict, info):
    """Write weights with their description: {"arch": ..., "patch_size": ...} and whatever else is plain.

    Args:
        state_dict: `backbone.*` and `head.*` tensors.
        info: a dict that JSON can hold; load_backbone needs "vit", the arguments of VisionTransformer.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_backbone(path, key="teacher"):
    """Build the vision transformer that a file holds.

    Takes this project's files, the released DINO .pth files (backbone alone or full checkpoint), and
    files with the names of timm or transformers. The arch is read from the metadata or, where there is
    none, from the shapes of the weights (heads are then taken to be 64 wide). Prints what it matched.

    Args:
        key: the network to take from a full checkpoint, "teacher" or "student".

    Returns:
        the model in eval mode, and its description (empty for foreign files).

    Raises:
        CheckpointError: not a checkpoint, damaged, or not the weights of a vision transformer.
    """
    weights, info = read_weights(path, key)
    ours = standard_names(weights)
    if "pos_embed" not in ours or "patch_embed.proj.weight" not in ours:
        raise CheckpointError(f"{path}: none of its {len(weights)} tensors is a vision transformer's under the names "
                              f"of DINO, timm or transformers (first: {', '.join(list(weights)[:3]) or 'none'})")
    try:
        model = VisionTransformer(**(info.get("vit") or shapes_of(ours)))
        wanted = model.state_dict()
        matched = {name: ours[name] for name in wanted if name in ours and ours[name].shape == wanted[name].shape}
        model.load_state_dict(matched)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not the weights of a vision transformer as built here: "
                              f"{' '.join(str(error).split())[:300]}") from None
    left = [name for name in ours if name not in wanted]
    print(f"{path}: {len(matched)} of {len(wanted)} backbone tensors matched"
          + (f", {len(left)} others left out ({', '.join(left[:3])}{', ...' * (len(left) > 3)})" if left else ""))
    return model.eval(), info


def read_weights(path, key):
    """File -> {name: tensor} of one network without prefixes, and its description."""
    path = str(path)
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                info = {name: json.loads(value) for name, value in (file.metadata() or {}).items() if name != "format"}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a safetensors file, or damaged ({first_line(error)})") from None
    else:
        state = load_state(path)
        info = state.get("info", {}) if isinstance(state, dict) else {}
        weights = state
        for level in (key, "state_dict", "model"):
            if isinstance(weights, dict) and isinstance(weights.get(level), dict):
                weights = weights[level]
    if not isinstance(weights, dict) or not isinstance(info, dict):
        raise CheckpointError(f"{path}: holds {type(weights).__name__}, expected named weights")
    weights = {re.sub(r"^(module\.)?(backbone\.)?(vit\.)?", "", str(name)): tensor
               for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    return weights, info


TRANSFORMERS_NAMES = [  # their names -> ours; what is not listed is the same
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
]


def standard_names(weights):
    """Weights under the names of DINO, timm or transformers -> the same under the names of vit.py."""
    ours = {}
    for name, tensor in weights.items():
        for theirs, our in TRANSFORMERS_NAMES:
            name = re.sub(theirs, our, name)
        ours[name] = tensor
    for name in [name for name in ours if re.search(r"\.attn\.(query|q_proj)\.", name)]:  # separate q, k, v -> qkv
        others = [(name.replace("query", "key"), name.replace("query", "value")),
                  (name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj"))]["q_proj" in name]
        if all(other in ours for other in others):
            ours[re.sub(r"query|q_proj", "qkv", name)] = torch.cat([ours.pop(n) for n in (name, *others)])
    return ours


def shapes_of(weights):
    """The arguments of VisionTransformer, read from the shapes of its weights."""
    embed_dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return dict(img_size=side * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
                num_heads=embed_dim // 64, mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim)


def newest_model(root="runs"):
    """The teacher of the run that was written last: runs/*/teacher.safetensors."""
    found = sorted(Path(root).glob("*/teacher.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no trained model below {root}/: train one (python train.py @recipes/demo.txt) or name "
                              f"a file with --ckpt")
    return str(found[-1])
