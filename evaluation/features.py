"""Extraction of frozen features over all processes, and the file that caches them.

    features, labels, corrupt = extract_features(model, loader)
    save_features("features.safetensors", dict(train_features=..., train_labels=..., ...), origin)
    load_features("features.safetensors", origin)          # raises CheckpointError if `origin` differs
"""

import json
import sys

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.checkpoint import CheckpointError, atomic_write
from common.distributed import all_gather_objects, is_rank_zero

FEATURES = ("train_features", "train_labels", "test_features", "test_labels")  # as knn_classifier names them


class NoImagesError(OSError):
    """No image of a loader can be read; the messages on corrupt images are in `unreadable`."""

    def __init__(self, unreadable):
        super().__init__(f"no image can be read, the last: {unreadable[-1]}" if unreadable else "no images")
        self.unreadable = unreadable


@torch.no_grad()
def extract_features(model, loader, device="cpu", total=None):
    """Features of all images of a loader, in the order of their indices.

    Args:
        model: images [B, C, H, W] -> features [B, D].
        loader: yields (images, labels, indices, messages on corrupt images), see `build_eval_loader`. Under a process
            group each process has a loader over its own share, of any length.
        total: number of images of all processes, for a progress bar on rank 0; None for no bar.

    Returns:
        features [M, D] float32, labels [M] int64, list of messages on corrupt images; the same on every process.

    Raises:
        NoImagesError: on every process.
    """
    features, corrupt = [], []
    labels, indices = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    with tqdm(total=total, unit="img", leave=False,
              disable=total is None or not is_rank_zero() or not sys.stderr.isatty()) as bar:
        for images, y, i, messages in loader:
            if len(images):
                features.append(model(images.to(device, non_blocking=images.is_pinned())).float())
            labels.append(y)
            indices.append(i)
            corrupt += messages
            bar.update((len(i) + len(messages)) * world_size)
    features = torch.cat(features or [torch.empty(0)]).cpu()
    shares = all_gather_objects((features, torch.cat(labels), torch.cat(indices), corrupt))
    features, labels, indices = (torch.cat(parts) for parts in list(zip(*shares))[:3])
    corrupt = [message for *_, messages in shares for message in messages]
    if not len(indices):
        raise NoImagesError(corrupt)
    order = indices.argsort()
    return features[order], labels[order], corrupt


def save_features(path, features, origin):
    """Write {name: tensor} of FEATURES, and the origin {name: plain value} that `load_features` checks."""
    metadata = {name: json.dumps(value) for name, value in origin.items()}
    atomic_write(path, lambda temporary: save_file(features, temporary, metadata))


def load_features(path, origin):
    """Read what `save_features` wrote: {name: tensor}.

    Raises:
        CheckpointError: not a features file, corrupt, or of another origin (the path of the checkpoint may differ).
    """
    try:
        with safe_open(path, "pt") as file:
            features = {name: file.get_tensor(name) for name in FEATURES}
            found = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a features file, or corrupt ({error}); delete it") from None
    for name in sorted((origin.keys() | found.keys()) - {"ckpt"}):
        if found.get(name) != origin.get(name):
            raise CheckpointError(f"{path}: holds features with {name} {found.get(name)}, not {origin.get(name)}: "
                                  f"delete it, or choose another --features")
    return features
