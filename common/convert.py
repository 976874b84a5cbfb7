"""The same weights under the names and in the layouts of others: timm, transformers, the released DINO files.

    ours = standard_names(theirs)                                   # names of any of them -> those of vit.py
    save_transformers("folder", backbone, info, ckpt)               # and back, as export.py --format does

timm has the names of vit.py, so it needs no table. Everything is written whole or not at all.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.checkpoint import CheckpointError, atomic_write, load_checkpoint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ---- in ----

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


def to_vit_names(weights):
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


def read_num_heads(path):
    """The number of heads that transformers wrote beside its weights, which their shapes do not tell."""
    config = os.path.join(os.path.dirname(path), "config.json")
    if os.path.basename(path) != "model.safetensors" or not os.path.isfile(config):
        return {}
    return {"num_heads": json.loads(Path(config).read_text())["num_attention_heads"]}


# ---- out ----

def plain_weights(backbone):
    weights = getattr(backbone, "model", backbone).state_dict()  # of a Headless those of the library's own model
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_timm(path, backbone, info, ckpt):
    """For timm.create_model("vit_small_patch16_224", num_classes=0, checkpoint_path=path) and the like."""
    atomic_write(path, lambda temporary: save_file(plain_weights(backbone), temporary, {"format": "pt"}))


def save_transformers(folder, backbone, info, ckpt):
    """For transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)."""
    theirs = {}
    for name, tensor in plain_weights(backbone).items():
        parts = {name: tensor}
        if ".attn.qkv." in name:
            parts = {name.replace("qkv", part): rows.clone()
                     for part, rows in zip(("query", "key", "value"), tensor.chunk(3))}
        for part, rows in parts.items():
            for pattern, replacement in NAMES_FOR_TRANSFORMERS:
                part = re.sub(pattern, replacement, part)
            theirs[part] = rows
    p, size, block = backbone.patch_size, backbone.grid[0] * backbone.patch_size, backbone.blocks[0]
    config = dict(architectures=["ViTModel"], model_type="vit", hidden_size=backbone.embed_dim, patch_size=p,
                  num_hidden_layers=len(backbone.blocks), num_attention_heads=backbone.num_heads, image_size=size,
                  intermediate_size=block.mlp.fc1.out_features, num_channels=backbone.in_chans, qkv_bias=True,
                  hidden_act="gelu", layer_norm_eps=block.norm1.eps, attention_probs_dropout_prob=0.0,
                  hidden_dropout_prob=0.0, dtype="float32")
    preparation = dict(image_processor_type="ViTImageProcessor", do_resize=True, do_rescale=True, do_normalize=True,
                       size=dict(shortest_edge=round(size / 0.875)), do_center_crop=True, resample=3,
                       crop_size=dict(height=size, width=size), rescale_factor=1 / 255,
                       image_mean=info.get("mean", IMAGENET_MEAN), image_std=info.get("std", IMAGENET_STD))
    os.makedirs(folder, exist_ok=True)
    files = [("config", config)] + [("preprocessor_config", preparation)] * (backbone.in_chans == 3)
    for name, values in files:
        text = json.dumps(values, indent=1)
        atomic_write(os.path.join(folder, f"{name}.json"), lambda path, text=text: Path(path).write_text(text))
    atomic_write(os.path.join(folder, "model.safetensors"), lambda path: save_file(theirs, path, {"format": "pt"}))


def save_dino(path, backbone, info, ckpt):
    """The released layout of a backbone alone."""
    atomic_write(path, lambda temporary: torch.save(plain_weights(backbone), temporary))


def save_dino_full(path, backbone, info, ckpt):
    """The released layout of a full checkpoint: student, teacher and centre, without optimizer and flags.

    Raises:
        CheckpointError: `ckpt` does not hold both networks, as checkpoint.pth of a run does.
    """
    state = {} if str(ckpt).endswith(".safetensors") else load_checkpoint(ckpt)
    if not all(isinstance(state.get(name), dict) for name in ("student", "teacher", "dino_loss")):
        raise CheckpointError(f"{ckpt}: holds one network; --format dino_full needs a run's --ckpt checkpoint.pth")
    full = {"student": {f"module.{name}": tensor for name, tensor in state["student"].items()},
            "teacher": state["teacher"], "dino_loss": state["dino_loss"]}
    atomic_write(path, lambda temporary: torch.save(full, temporary))


NAMES_FOR_TRANSFORMERS = [  # ours -> those of their files
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
]
FORMATS = {  # name -> what is appended to the model file's name, and (path, backbone, info, ckpt) -> None
    "timm": ("timm.safetensors", save_timm), "transformers": ("transformers", save_transformers),
    "dino": ("dino.pth", save_dino), "dino_full": ("dino_full.pth", save_dino_full)}
