"""State-dict conversion between vit.py, timm, transformers and the released DINO files.

    ours = to_vit_names(weights)                                    # names of any of them -> names of vit.py
    save_transformers("folder", backbone, info, ckpt)               # export.py --format transformers

timm uses the names of vit.py, so it needs no table. Files are written atomically.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from augment import IMAGENET_MEAN, IMAGENET_STD
from common.checkpoint import CheckpointError, atomic_write, load_checkpoint, write_json

TRANSFORMERS_NAMES = [  # parts of names, (vit.py, transformers), replaced in this order in either direction
    ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("blocks.", "encoder.layer."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),  # the last: query, key, value
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."), ("norm.", "layernorm.")]
TRANSFORMERS_5_NAMES = [  # the modules of version 5, where they are named differently from its files
    ("blocks.", "layers."), (".attn.proj.", ".attention.o_proj."), (".attn.", ".attention."),
    (".query.", ".q_proj."), (".key.", ".k_proj."), (".value.", ".v_proj.")]


# ---- reading ----

def to_vit_names(weights):
    """Weights named as in DINO, timm or transformers -> named as in vit.py, with q, k and v in one tensor."""
    ours = {}
    for name, tensor in weights.items():
        for our, their in TRANSFORMERS_NAMES + TRANSFORMERS_5_NAMES:
            name = name.replace(their, our)
        ours[name] = tensor
    for name in [name for name in ours if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        ours[name.replace("query", "qkv")] = torch.cat([ours.pop(part) for part in parts])
    return ours


def read_num_heads(path):
    """{"num_heads": N} from the config.json of a transformers folder, {} elsewhere; weights do not determine it."""
    config = Path(path).with_name("config.json")
    is_folder = os.path.basename(path) == "model.safetensors" and config.is_file()
    num_heads = json.loads(config.read_text()).get("num_attention_heads") if is_folder else None  # timm's has none
    return {"num_heads": num_heads} if num_heads else {}


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
    atomic_write(path, lambda temporary: save_file(plain_weights(backbone), temporary, {"format": "pt"}))


def save_transformers(folder, backbone, info, ckpt):
    """For transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)."""
    if not backbone.blocks:
        raise CheckpointError(f"--format transformers: {backbone.arch} has no such names")
    weights = {}
    for name, tensor in plain_weights(backbone).items():
        for our, their in TRANSFORMERS_NAMES:
            name = name.replace(our, their)
        parts = ("query", "key", "value") if ".qkv." in name else ("",)
        for part, rows in zip(parts, tensor.chunk(len(parts))):
            weights[name.replace("qkv", part)] = rows.clone()  # safetensors refuses tensors that share memory
    size, block = backbone.grid[0] * backbone.patch_size, backbone.blocks[0]
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "config.json"), dict(
        architectures=["ViTModel"], model_type="vit", hidden_size=backbone.embed_dim, patch_size=backbone.patch_size,
        num_hidden_layers=len(backbone.blocks), num_attention_heads=backbone.num_heads, image_size=size,
        intermediate_size=block.mlp.fc1.out_features, num_channels=backbone.in_chans, layer_norm_eps=block.norm1.eps))
    if backbone.in_chans == 3:
        write_json(os.path.join(folder, "preprocessor_config.json"), dict(
            image_processor_type="ViTImageProcessor", size=dict(shortest_edge=round(size / 0.875)), resample=3,
            do_center_crop=True, crop_size=dict(height=size, width=size),
            image_mean=info.get("mean", IMAGENET_MEAN), image_std=info.get("std", IMAGENET_STD)))
    atomic_write(os.path.join(folder, "model.safetensors"), lambda path: save_file(weights, path, {"format": "pt"}))


def save_dino(path, backbone, info, ckpt):
    """The released layout of a backbone alone (dino_deitsmall16_pretrain.pth)."""
    atomic_write(path, lambda temporary: torch.save(plain_weights(backbone), temporary))


def save_dino_full(path, backbone, info, ckpt):
    """The released layout of a full checkpoint: student, teacher and center, without optimizer and flags.

    Raises:
        CheckpointError: `ckpt` is not the checkpoint.pth of a run.
    """
    state = {} if str(ckpt).endswith(".safetensors") else load_checkpoint(ckpt)
    if not {"student", "teacher", "dino_loss"} <= state.keys():
        raise CheckpointError(f"{ckpt}: holds one network; --format dino_full needs a run's --ckpt checkpoint.pth")
    student = {f"module.{name}": tensor for name, tensor in state["student"].items()}
    full = {"student": student, "teacher": state["teacher"], "dino_loss": state["dino_loss"]}
    atomic_write(path, lambda temporary: torch.save(full, temporary))


FORMATS = {  # --format -> suffix of the file name, writer(path, backbone, info, ckpt)
    "timm": ("timm.safetensors", save_timm), "transformers": ("transformers", save_transformers),
    "dino": ("dino.pth", save_dino), "dino_full": ("dino_full.pth", save_dino_full)}
