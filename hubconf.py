"""Entry points of torch.hub: the backbones of the paper with the authors' weights or yours, and any file of train.py.

    model = torch.hub.load("/path/of/this/folder", "dino_vits16", source="local")                # the authors' weights
    model = torch.hub.load(folder, "dino_vits16", weights="vits16.safetensors", source="local")  # or https://...
    model = torch.hub.load(folder, "backbone", weights="teacher.safetensors", source="local")    # of any size
    feature, attention = model.forward_with_attention(images)          # [B, 3, H, W] -> [B, D], [B, heads, N]

Every entry point returns a backbone in eval mode, on the CPU. Imports vit.py and backbones.py alone, since this folder
is first on the path of the program meanwhile, whose own modules may be named as the other folders are.
"""

import hashlib
import json
import math
import os
import urllib.parse

import torch

import backbones

dependencies = ["torch", "torchvision"]


def dino_vits16(pretrained=True, weights=None, **kwargs):
    """ViT-S/16.

    Args:
        pretrained: load the authors' published weights, from the cache of torch.hub or their server.
        weights: path or URL to load instead: a model file or checkpoint of this repository, or the authors'.
        kwargs: further arguments of the backbone: drop_path_rate and, with random weights, img_size. Vision
            transformers take images of any size whatever their img_size, which with weights is that of the weights.
    """
    return _build("dino_vits16", pretrained, weights, **kwargs)


def dino_vits8(pretrained=True, weights=None, **kwargs):
    """ViT-S/8; arguments of dino_vits16."""
    return _build("dino_vits8", pretrained, weights, **kwargs)


def dino_vitb16(pretrained=True, weights=None, **kwargs):
    """ViT-B/16; arguments of dino_vits16."""
    return _build("dino_vitb16", pretrained, weights, **kwargs)


def dino_vitb8(pretrained=True, weights=None, **kwargs):
    """ViT-B/8; arguments of dino_vits16."""
    return _build("dino_vitb8", pretrained, weights, **kwargs)


def dino_resnet50(pretrained=True, weights=None, **kwargs):
    """ResNet-50 of torchvision; arguments of dino_vits16. Features only, [B, 2048]."""
    return _build("dino_resnet50", pretrained, weights, **kwargs)


def dino_xcit_small_12_p16(pretrained=True, weights=None, **kwargs):
    """XCiT-S12/16 of timm; arguments of dino_vits16. Features only, [B, 384]."""
    return _build("dino_xcit_small_12_p16", pretrained, weights, **kwargs)


def dino_xcit_small_12_p8(pretrained=True, weights=None, **kwargs):
    """XCiT-S12/8 of timm; arguments of dino_vits16. Features only, [B, 384]."""
    return _build("dino_xcit_small_12_p8", pretrained, weights, **kwargs)


def dino_xcit_medium_24_p16(pretrained=True, weights=None, **kwargs):
    """XCiT-M24/16 of timm; arguments of dino_vits16. Features only, [B, 512]."""
    return _build("dino_xcit_medium_24_p16", pretrained, weights, **kwargs)


def dino_xcit_medium_24_p8(pretrained=True, weights=None, **kwargs):
    """XCiT-M24/8 of timm; arguments of dino_vits16. Features only, [B, 512]."""
    return _build("dino_xcit_medium_24_p8", pretrained, weights, **kwargs)


def backbone(weights):
    """The backbone of a model file of train.py or evaluate.py finetune, or of a checkpoint.pth, by path or URL."""
    tensors, described = _read_weights(_find_file(weights))
    if not described:
        raise ValueError(f"{weights}: does not describe its backbone; name its architecture, as dino_vits16(weights=)")
    return _load_weights(backbones.build_backbone(described), tensors)


def _build(name, pretrained, weights, drop_path_rate=0.0, **kwargs):
    """The backbone of an entry point, see dino_vits16."""
    arguments, tensors = backbones.PUBLISHED[name][0], None
    if weights or pretrained:
        file = _find_file(weights) if weights else backbones.download_published(name)
        tensors, described = _read_weights(file)
        for key, value in arguments.items() if described else ():
            if described.get(key) != value:
                raise ValueError(f"{file}: its {key} is {described.get(key)}, that of {name} is {value}: use the entry "
                                 f"point backbone")
        if "patch_size" in arguments and "pos_embed" in tensors:
            size = arguments["patch_size"] * math.isqrt(tensors["pos_embed"].shape[1] - 1)
            if kwargs.get("img_size", size) != size:
                raise ValueError(f"{name}: img_size={kwargs['img_size']} is for pretrained=False; these weights have "
                                 f"{size}, and the model takes images of any size: leave it out")
            described = described | dict(img_size=size)
        arguments = described | arguments
    model = backbones.build_backbone(arguments | kwargs, drop_path_rate)
    return _load_weights(model, tensors) if tensors else model.eval()


def _find_file(weights):
    """Path of a file, or of the copy of a URL in the cache of torch.hub; other URLs of the same name have others."""
    weights = os.fspath(weights)
    if "://" not in weights:
        return weights
    name = os.path.basename(urllib.parse.urlsplit(weights).path)
    return backbones.download(weights, f"{hashlib.sha256(weights.encode()).hexdigest()[:8]}-{name}")


def _read_weights(file):
    """{name: tensor} of the backbone, of a checkpoint that of the teacher, and the arguments of build_backbone.

    The latter are {} for a file that does not describe its backbone. Only tensors and plain values are unpickled.
    """
    if file.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            info = content.metadata() or {}
        described = json.loads(info.get("backbone") or info.get("vit") or "{}")
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights, info = state.get("teacher", state), state.get("info", {})
        described = info.get("backbone") or info.get("vit") or {}
    heads = ("head.", "classifier.", "fc.")
    return {name.removeprefix("backbone."): tensor for name, tensor in weights.items()
            if not name.startswith(heads)}, described


def _load_weights(model, weights):
    """Load all weights of a backbone; those of another library may have the library's own names."""
    if isinstance(model, backbones.HeadlessClassifier) and not any(name.startswith("model.") for name in weights):
        if model.arch.startswith("timm:xcit"):  # the authors' names are not timm's
            from timm.models.xcit import checkpoint_filter_fn

            weights = checkpoint_filter_fn(weights, model.model)
        counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
        weights = counters | {f"model.{name}": tensor for name, tensor in weights.items()}  # which old files lack
    model.load_state_dict(weights)
    return model.eval()
