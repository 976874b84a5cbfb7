"""Features of labelled pictures: extracted once, over all processes, and kept in a file.

    features, labels, unreadable = extract_features(model, loader)
    save_features("features.safetensors", dict(bank=..., bank_labels=..., queries=..., query_labels=...), origin)
    load_features("features.safetensors", origin)          # refused if they come from something else
"""

import json
import sys

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.checkpoint import CheckpointError, atomic_write

LABELS = {"bank": "bank_labels", "queries": "query_labels"}  # names of each part and of its labels


class NoImagesError(OSError):
    """No picture of a loader can be read; its messages on them are in `unreadable`."""

    def __init__(self, unreadable):
        super().__init__(f"no picture could be read, the last: {unreadable[-1]}" if unreadable else "no pictures")
        self.unreadable = unreadable


@torch.no_grad()
def extract_features(model, loader, device="cpu", total=None):
    """Features of all pictures of a loader, in the order of their index.

    Args:
        model: images [B, C, H, W] -> features [B, D].
        loader: yields (images, labels, indices, unreadable) per batch, each picture once. Under a process
            group every process brings its own share, of any length.
        total: pictures of all processes, for a bar on the first one's terminal; None for no bar.

    Returns:
        features [M, D] float32, labels [M] int64, unreadable (list of messages); the same on every process.

    Raises:
        NothingReadable: on every process.
    """
    features, unreadable = [], []
    labels, indices = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    grouped = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    with tqdm(total=total, unit="img", leave=False,
              disable=total is None or rank > 0 or not sys.stderr.isatty()) as bar:
        for images, y, i, bad in loader:
            if len(images):
                features.append(model(images.to(device, non_blocking=images.is_pinned())).float())
            labels.append(y)
            indices.append(i)
            unreadable += bad
            bar.update(min((len(i) + len(bad)) * world_size, (total or 0) - bar.n))
    part = (torch.cat(features).cpu() if features else None, torch.cat(labels), torch.cat(indices), unreadable)
    parts = [part]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, part)
    unreadable = [message for *_, bad in parts for message in bad]
    if all(f is None for f, *_ in parts):
        raise NoImagesError(unreadable)
    order = torch.cat([i for _, _, i, _ in parts]).argsort()
    features = torch.cat([f for f, *_ in parts if f is not None])
    return features[order], torch.cat([y for _, y, *_ in parts])[order], unreadable


def save_features(path, features, origin):
    """Write features and labels of both parts, and what they came from."""
    metadata = {name: json.dumps(value) for name, value in origin.items()}
    atomic_write(path, lambda temporary: save_file(features, temporary, metadata))


def load_features(path, origin):
    """Read what `save_features` wrote.

    Raises:
        CheckpointError: the file is damaged, or holds the features of something else.
    """
    try:
        with safe_open(path, "pt") as file:
            features = {name: file.get_tensor(name) for part in LABELS.items() for name in part}
            found = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: no features, or damaged ({error})") from None
    for name in sorted((origin.keys() | found.keys()) - {"ckpt"}):
        if found.get(name) != origin.get(name):
            raise CheckpointError(f"{path}: holds features with {name} {found.get(name)}, not {origin.get(name)}: name "
                                  f"another --features, or delete it")
    if features["bank"].shape[1:] != features["queries"].shape[1:]:
        raise CheckpointError(f"{path}: its two parts have features of unlike widths")
    for part, labels in LABELS.items():
        x, y = features[part], features[labels]
        if x.dim() != 2 or not x.is_floating_point() or y.shape != x.shape[:1] or y.dtype != torch.int64 or not len(x) \
                or not x.isfinite().all() or y.min() < 0:
            raise CheckpointError(f"{path}: its {part} are not features with labels")
    return features
