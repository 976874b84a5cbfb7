"""Linear classifiers of frozen or fine-tuned features, and classifier.safetensors, the file of one.

    network = Classifiers(FeatureExtractor(backbone, n_last_blocks=4), num_classes=1000, count=3)
    logits = network(images)                                    # [B, C, H, W] -> [3, B, 1000]

    save_classifier(network, grid, best, accuracies, hparams, setup)      # heads[0], the best of the grid
    network, info = load_classifier("teacher.linear.photos")              # classes, image size, ... in info
"""

import contextlib
import os

import torch
from torch import nn

from common.checkpoint import CheckpointError
from common.cli import image_side
from common.distributed import is_rank_zero
from common.files import first_line
from common.hub import is_remote
from common.logger import log
from common.weights import check_image_size, load_backbone, read_input, read_weights, save_model


class FeatureExtractor(nn.Module):
    """Input of a linear classifier: CLS tokens of the last blocks, optionally with the mean patch token.

    Args:
        n_last_blocks: 4 for ViT-S, 1 for ViT-B and for other backbones, which have one feature; 0: no CLS tokens.
        avgpool: append the mean of the last block's patch tokens, as for ViT-B.

    Raises:
        CheckpointError: more blocks than the backbone has, no features, or no patch tokens.
    """

    def __init__(self, backbone, n_last_blocks=1, avgpool=False):
        super().__init__()
        most = max(1, len(backbone.blocks))
        if not (n_last_blocks or avgpool):
            raise CheckpointError("--n_last_blocks 0 alone leaves no features: add --avgpool_patchtokens")
        if not 0 <= n_last_blocks <= most:
            raise CheckpointError(f"--n_last_blocks {n_last_blocks} is not from {1 - avgpool} to {most}, the model's "
                                  f"depth")
        if avgpool and not backbone.blocks:
            raise CheckpointError(f"{backbone.arch} has no patch tokens, leave --avgpool_patchtokens out")
        self.backbone, self.n_last_blocks, self.avgpool = backbone, n_last_blocks, avgpool
        self.dim = backbone.embed_dim * (self.n_last_blocks + avgpool)

    def forward(self, x):  # [B, C, H, W] -> [B, dim]
        if self.n_last_blocks == 1 and not self.avgpool:
            return self.backbone(x)  # equal, and with stochastic depth
        tokens = self.backbone.get_intermediate_layers(x, max(1, self.n_last_blocks))
        patches = [tokens[-1][:, 1:].mean(dim=1)] if self.avgpool else []
        return torch.cat([t[:, 0] for t in tokens][:self.n_last_blocks] + patches, dim=1)


class Classifiers(nn.Module):
    """G linear classifiers on the same features: images [B, C, H, W] -> logits [G, B, K].

    Args:
        extractor: FeatureExtractor of a backbone.
        num_classes: K.
        count: G.
        frozen: whether the backbone gets no gradient and stays in eval mode.
        build_head: (dim, K) -> classifier with a weight and a bias; of a SegmentationHead, logits are [G, B, K, h, w].
    """

    def __init__(self, extractor, num_classes, count=1, frozen=True, build_head=nn.Linear):
        super().__init__()
        self.tokens, self.frozen = extractor.requires_grad_(not frozen), frozen  # "tokens" is in checkpoints
        self.heads = nn.ModuleList(build_head(extractor.dim, num_classes) for _ in range(count))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, x):
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            features = self.tokens(x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([head(features.float()) for head in self.heads])

    def train(self, mode=True):
        super().train(mode)
        self.tokens.train(mode and not self.frozen)
        return self


# ---- files ----


def load_classifier(path):
    """Load classifier.safetensors of evaluate.py, or the one in a folder: Classifiers in eval mode, on the CPU.

    Returns:
        the network with one head, and the description in the file: "classes", "image_size", ...

    Raises:
        CheckpointError: no such file, or not a classifier and its backbone.
    """
    if is_remote(path):
        raise CheckpointError(f"{path}: is a backbone; predict needs classifier.safetensors of evaluate.py linear, "
                              f"logistic or finetune")
    path = os.path.join(path, "classifier.safetensors") if os.path.isdir(path) else str(path)
    weights, info, _ = read_weights(path)
    if not {"classes", "image_size"} <= info.keys() or "classifier.weight" not in weights:
        raise CheckpointError(f"{path}: not classifier.safetensors of evaluate.py linear, logistic or finetune")
    if "classifier.norm.weight" in weights:
        raise CheckpointError(f"{path}: classifies patches, here images are; see SegmentationHead")
    if not any(name.startswith("backbone.") for name in weights):
        raise CheckpointError(f"{path}: holds no backbone, as those of earlier versions: run evaluate.py linear again")
    backbone, info = load_backbone(path, log=lambda text: None)
    try:
        extractor = FeatureExtractor(backbone, info.get("n_last_blocks", 1), info.get("avgpool_patchtokens", False))
        info |= dict(classes=[str(name) for name in info["classes"]], image_size=image_side(info["image_size"]))
        network = Classifiers(extractor, len(info["classes"]))
        network.heads[0].load_state_dict({name: weights[f"classifier.{name}"] for name in ("weight", "bias")})
        check_image_size(backbone, info["image_size"])
        info |= read_input(info, backbone.in_chans, path)
    except Exception as error:  # the description may hold anything
        raise CheckpointError(f"{path}: not a classifier for its backbone and classes: {error}") from None
    return network.eval(), info


def get_fixed_settings(setup):
    """What must not change when a classifier is resumed or tested; files may have moved."""
    origin = {name: value for name, value in setup.origin.items() if name not in ("ckpt", "data_path", "val_path")}
    return origin | {"classes": setup.classes}


def get_saved_modules(network):
    """What classifier.safetensors holds: the first classifier, and the backbone."""
    return nn.ModuleDict({"classifier": network.heads[0], "backbone": network.tokens.backbone})


def save_classifier(network, grid, best, accuracies, hparams, setup, names=("lr", "weight_decay")):
    """Write classifier.safetensors: classifier and backbone, description of the backbone, origin, hyperparameters.

    Args:
        accuracies: held-out accuracy of each member of the grid, used if there are several.
        names: of the hyperparameters in the grid.

    Returns:
        the hyperparameters, with those of the best of the grid.
    """
    chosen = dict(zip(names, grid[best]))
    hparams = hparams | chosen
    if len(grid) > 1:
        log(f"best on a held-out tenth ({accuracies[best]:.2f}%): "
            + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items()))
        hparams |= dict(held_out_top1=accuracies[best], grid=[(*pair, top1) for pair, top1 in zip(grid, accuracies)])
    if is_rank_zero():
        tokens = network.tokens  # described by its own values, not by those of a classifier that it began with
        save_model(setup.output / "classifier.safetensors", get_saved_modules(network).state_dict(),
                   setup.info | setup.origin | dict(
                       hparams=hparams, classes=setup.classes, n_last_blocks=tokens.n_last_blocks,
                       avgpool_patchtokens=getattr(tokens, "avgpool", False)))
    return hparams


def restore_classifier(network, setup):
    """Load what `save_classifier` wrote; returns the hyperparameters.

    Raises:
        CheckpointError: no such file, or trained on another backbone, data set or image size.
    """
    path = setup.output / "classifier.safetensors"
    weights, info, _ = read_weights(str(path))
    for name, value in get_fixed_settings(setup).items():
        if info.get(name) != value:
            raise CheckpointError(f"{path}: trained with {name} {str(info.get(name))[:200]}, not {str(value)[:200]}")
    try:
        # earlier versions did not save a frozen backbone
        get_saved_modules(network).load_state_dict(weights, strict=not network.frozen)
        return dict(info["hparams"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the classifier of this task ({first_line(error)})") from None
