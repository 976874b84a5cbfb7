"""State-dict conversion between vit.py, timm, transformers and the released DINO files.

    ours = to_vit_names(weights)                                    # names of any of them -> names of vit.py
    save_transformers("folder", backbone, info, ckpt)               # export.py --format transformers

timm uses the names of vit.py, so it needs no table. Files are written atomically.
"""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from augment import IMAGENET_MEAN, IMAGENET_STD
from common.checkpoint import CheckpointError, load_checkpoint
from common.files import atomic_write, read_json, write_json

TRANSFORMERS_NAMES = [  # parts of names, (vit.py, transformers), replaced in this order in either direction
    ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("blocks.", "encoder.layer."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),  # the last: query, key, value
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."), ("norm.", "layernorm.")]
TRANSFORMERS_5_NAMES = [  # the modules of version 5, where they are named differently from its files
    ("blocks.", "layers."), (".attn.proj.", ".attention.o_proj."), (".attn.", ".attention."),
    (".query.", ".q_proj."), (".key.", ".k_proj."), (".value.", ".v_proj.")]

SUPPORTED = {"hidden_act": ("gelu",), "act_layer": ("gelu", "GELU", None),  # of config.json: what vit.py computes
             "global_pool": ("token", "", None), "use_mean_pooling": (False, None)}


# ---- reading ----

def to_vit_names(weights):
    """Weights named as in DINO, timm or transformers -> named as in vit.py, with q, k and v in one tensor."""
    ours = {}
    for name, tensor in weights.items():
        for our, their in TRANSFORMERS_NAMES + TRANSFORMERS_5_NAMES:
            name = name.replace(their, our)
        ours[re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name)] = tensor  # DINOv2's chunks of blocks
    for name in [name for name in ours if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        ours[name.replace("query", "qkv")] = torch.cat([ours.pop(part) for part in parts])
    return ours


def read_config(path, embed_dim):
    """{"num_heads": N} from a config.json beside a file of weights, which do not determine it; {} without one.

    Reads those of transformers and timm, whose "model_args" are in the hub's files, for this width.

    Raises:
        CheckpointError: the model has another activation than GELU, or its feature is not the CLS token.
    """
    file = Path(path).with_name("config.json")
    config = read_json(file)
    config |= config.get("model_args") or {}
    if config.get("hidden_size", config.get("embed_dim", embed_dim)) != embed_dim:  # of another model
        return {}
    for name, supported in SUPPORTED.items():
        if config.get(name, supported[0]) not in supported:
            raise CheckpointError(f"{path}: {file} has {name} {config[name]}, vit.py computes {supported[0]} alone")
    return {"num_heads": heads} if (heads := config.get("num_attention_heads", config.get("num_heads"))) else {}


# ---- writing ----

def plain_weights(backbone):
    """State dict; that of the library's own model for a HeadlessClassifier."""
    return getattr(backbone, "model", backbone).state_dict()


def save_timm(path, backbone, info, ckpt):
    """For timm.create_model("vit_small_patch16_224", num_classes=0, checkpoint_path=path) and the like.

    Raises:
        CheckpointError: a torchvision model, whose names timm does not have.
    """
    if not getattr(backbone, "arch", "timm:").startswith("timm:"):
        raise CheckpointError(f"--format timm: {backbone.arch} is no timm model, use --format safetensors or dino")
    heads = {"num_heads": str(backbone.num_heads)} if backbone.blocks else {}  # for load_backbone
    atomic_write(path, lambda temporary: save_file(plain_weights(backbone), temporary, {"format": "pt"} | heads))


def save_transformers(folder, backbone, info, ckpt):
    """For transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).

    Raises:
        CheckpointError: not a vision transformer of vit.py, or the folder holds another model.
    """
    if not backbone.blocks:
        raise CheckpointError(f"{backbone.arch} has no names in transformers, use --format safetensors or dino")
    weights = {}
    for name, tensor in plain_weights(backbone).items():
        for our, their in TRANSFORMERS_NAMES:
            name = name.replace(our, their)
        parts = ("query", "key", "value") if ".qkv." in name else ("",)
        for part, rows in zip(parts, tensor.chunk(len(parts))):
            weights[name.replace("qkv", part)] = rows.clone()  # safetensors refuses tensors that share memory
    size, block = backbone.grid[0] * backbone.patch_size, backbone.blocks[0]
    config = dict(
        architectures=["ViTModel"], model_type="vit", hidden_size=backbone.embed_dim, patch_size=backbone.patch_size,
        num_hidden_layers=len(backbone.blocks), num_attention_heads=backbone.num_heads, image_size=size,
        intermediate_size=block.mlp.fc1.out_features, num_channels=backbone.in_chans, layer_norm_eps=block.norm1.eps)
    if os.path.exists(path := os.path.join(folder, "config.json")) and read_json(path) != config:
        raise CheckpointError(f"{path}: is of another model, name another --output")
    os.makedirs(folder, exist_ok=True)
    write_json(path, config)
    if backbone.in_chans == 3:
        write_json(os.path.join(folder, "preprocessor_config.json"), dict(
            image_processor_type="ViTImageProcessor", size=dict(shortest_edge=round(size / 0.875)), resample=3,
            do_center_crop=True, crop_size=dict(height=size, width=size),
            image_mean=info.get("mean", IMAGENET_MEAN), image_std=info.get("std", IMAGENET_STD)))
    atomic_write(os.path.join(folder, "model.safetensors"), lambda path: save_file(weights, path, {"format": "pt"}))


def save_dino(path, backbone, info, ckpt):
    """The released layout of a backbone alone (dino_deitsmall16_pretrain.pth)."""
    weights = plain_weights(backbone)
    if backbone.blocks:  # for load_backbone, in torch's own metadata of a state dict, which load_state_dict ignores
        weights._metadata[""]["num_heads"] = backbone.num_heads
    atomic_write(path, lambda temporary: torch.save(weights, temporary))


def save_dino_full(path, backbone, info, ckpt):
    """The released layout of a full checkpoint without optimizer: student, teacher, center, and flags as "args".

    The flags are a dict, since torch.load refuses the reference's Namespace by default.

    Raises:
        CheckpointError: `ckpt` is not the checkpoint.pth of a run.
    """
    state = {} if str(ckpt).endswith(".safetensors") else load_checkpoint(ckpt)
    if not {"student", "teacher", "dino_loss"} <= state.keys():
        raise CheckpointError(f"{ckpt}: holds one network; --format dino_full needs a run's --ckpt checkpoint.pth")
    student = {f"module.{name}": tensor for name, tensor in state["student"].items()}
    full = {"student": student, "teacher": state["teacher"], "dino_loss": state["dino_loss"],
            "args": state.get("flags", {}) | ({"num_heads": backbone.num_heads} if backbone.blocks else {})}
    atomic_write(path, lambda temporary: torch.save(full, temporary))


FORMATS = {  # --format -> suffix of the file name, writer(path, backbone, info, ckpt)
    "timm": ("timm.safetensors", save_timm), "transformers": ("transformers", save_transformers),
    "dino": ("dino.pth", save_dino), "dino_full": ("dino_full.pth", save_dino_full)}
