"""Features of a folder of pictures, kept in a file: only what is new or has changed is looked at again.

    features, names = bring_up_to_date("photos.safetensors", "/photos", names, look)
"""

import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import distributed
from common.checkpoint import atomic_write


def update_index(path, root, names, look, say=print, save_every=10_000):
    """Features of the pictures of a folder, from a file as far as it has them.

    Args:
        path: the file; it is written again after each `save_every` new pictures, or half as many as it has.
        names: of the pictures, below root.
        look: paths -> (features [M, D], their places among the paths [M], messages on the others). Under a process
            group all processes take part; process 0 writes the file, which all can see.

    Returns:
        features [M, D], and the names they belong to: those of `names` that can be read.
    """
    stamps = {name: file_stamp(os.path.join(root, name)) for name in names}
    features, files, unreadable = load_index(path)
    still = [row for row, (name, *found) in enumerate(files) if stamps.get(name) == found]
    features, files = features[still], [files[row] for row in still]
    unreadable = [[name, *found] for name, *found in unreadable if stamps.get(name) == found]
    known = {name for name, *_ in files + unreadable}
    new = [name for name in names if name not in known]
    distributed.check_same_on_all_ranks("new pictures:", len(new))
    say(f"{path} has {len(files)} of {len(names)} pictures" + f"; {len(unreadable)} cannot be read" * bool(unreadable)
        + f"; looking at {len(new)}" * bool(new))
    while new:
        count = max(save_every, len(files) // 2)
        part, new = new[:count], new[count:]
        found, places, messages = look([os.path.join(root, name) for name in part])
        for message in messages:
            say(f"skipped unreadable picture {message}")
        readable = set(places.tolist())
        if readable:
            features = torch.cat((features, found)) if files else found
        files += [[part[place], *stamps[part[place]]] for place in places.tolist()]
        unreadable += [[name, *stamps[name]] for i, name in enumerate(part) if i not in readable]
        if distributed.is_rank_zero():
            save_index(path, features, files, unreadable)
    return features, [name for name, *_ in files]


def file_stamp(path):
    """[bytes, time of the last change in ns] of a file; [] if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def save_index(path, features, files, unreadable):
    """Write features [M, D] and, for each, [name, bytes, time of the last change]; the same of unreadable ones."""
    text = torch.frombuffer(bytearray(json.dumps([files, unreadable]).encode()), dtype=torch.uint8)
    atomic_write(path, lambda temporary: save_file({"features": features, "files": text}, temporary))


def load_index(path):
    """What `save_gallery` wrote; nothing where there is none or it is damaged, so that it is made anew."""
    try:
        with safe_open(path, "pt") as file:
            features, text = file.get_tensor("features"), bytes(file.get_tensor("files").numpy())
        files, unreadable = json.loads(text)
        if len(features) == len(files) and features.isfinite().all() and all(map(len, files + unreadable)):
            return features, files, unreadable
    except (OSError, SafetensorError, ValueError, TypeError):
        pass
    return torch.empty(0), [], []
