"""Image index: features of images in a file; an update extracts only what is new or has changed.

    features, indices = update_index("photos.safetensors", ImageFolder("/photos"), extract)

The file holds features [M, D] and, for each, the name, size and modification time of its image.
"""

import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Subset

from common import distributed
from common.files import atomic_write, check_file


def update_index(path, images, extract, log=print, save_every=10_000):
    """Update an index file; all ranks must call this.

    Args:
        path: index file, created if missing or corrupt. Rank 0 writes it every `save_every` new images, or every half
            as many as it holds; all ranks read it.
        images: dataset with `key` and `stat`, as ImageFolder and ShardDataset.
        extract: dataset -> (features [M, D], their indices there [M], messages on corrupt images), the same on all
            ranks.

    Returns:
        features [M, D] and the indices [M] of their images: those that can be read.
    """
    numbers = {images.key(i): i for i in range(len(images))}
    stamps = {name: images.stat(i) for name, i in numbers.items()}
    features, files, corrupt = load_index(path)
    valid = [row for row, (name, *stamp) in enumerate(files) if stamps.get(name) == stamp]
    features, files = features[valid], [files[row] for row in valid]
    corrupt = [[name, *stamp] for name, *stamp in corrupt if stamps.get(name) == stamp]
    known = {name for name, *_ in files + corrupt}
    new = [name for name in numbers if name not in known]
    distributed.check_same_on_all_ranks("new images:", len(new))
    log(f"{path}: {len(files)} of {len(numbers)} images indexed, {len(corrupt)} corrupt, {len(new)} new")
    while new:
        count = max(save_every, len(files) // 2)
        part, new = new[:count], new[count:]
        found, indices, messages = extract(Subset(images, [numbers[name] for name in part]))
        for message in messages:
            log(f"skipped corrupt image {message}")
        features = torch.cat((features, found))
        readable = set(indices.tolist())
        files += [[part[i], *stamps[part[i]]] for i in indices.tolist()]
        corrupt += [[name, *stamps[name]] for i, name in enumerate(part) if i not in readable]
        if distributed.is_rank_zero():
            save_index(path, features, files, corrupt)
    return features, [numbers[name] for name, *_ in files]


def save_index(path, features, files, corrupt):
    """Write features [M, D], their [name, size, modification time], and those of corrupt images."""
    text = torch.frombuffer(bytearray(json.dumps([files, corrupt]).encode()), dtype=torch.uint8)
    atomic_write(path, lambda temporary: save_file({"features": features, "files": text}, temporary))


def load_index(path):
    """Features, files and corrupt images of `save_index`; empty if the file is missing or corrupt."""
    try:
        with safe_open(check_file(path), "pt") as file:
            files, corrupt = json.loads(bytes(file.get_tensor("files").numpy()))
            return file.get_tensor("features"), files, corrupt
    except (OSError, SafetensorError, ValueError):
        return torch.empty(0), [], []  # torch.cat accepts it beside features of any width
