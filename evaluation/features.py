"""Extraction of frozen features over all processes, and the file that caches them.

    features, labels, indices, corrupt = extract_features(model, images, 224, args)
    save_model("features.safetensors", dict(train_features=..., ...), dict(backbone=...) | origin)
    load_features("features.safetensors", origin)          # raises CheckpointError if `origin` differs
"""

import torch

from common.checkpoint import CheckpointError
from common.distributed import all_gather_objects, all_gather_rows, get_rank, get_world_size, wait_for
from common.logger import progress_bar
from common.weights import read_weights
from data.loaders import build_eval_loader, center_crop_view

NO_INTEGERS = torch.empty(0, dtype=torch.int64)


class NoImagesError(OSError):
    """No image of a loader can be read."""


@torch.no_grad()
def extract_features(model, images, size, args, device="cpu", view=center_crop_view, loader=None,
                     allow_none=False):
    """Features of all images that can be read, in the order of their indices; each process of a group does a share.

    Args:
        model: views [B, C, H, W] -> features [B, D].
        images, size, view: see `build_eval_loader`.
        args: batch_size_per_gpu and num_workers.
        loader: of `build_eval_loader` on these images, if its workers are to be used again; size, view and args are
            then those of the loader.
        allow_none: return empty tensors if no image can be read.

    Returns:
        features [M, D] float32, labels [M], indices [M], list of messages on corrupt images; the same on every process.

    Raises:
        NoImagesError: no image can be read; on every process.
    """
    features, labels, indices, corrupt = [], [NO_INTEGERS], [NO_INTEGERS], []
    loader = loader or build_eval_loader(images, size, args.batch_size_per_gpu, args.num_workers, get_rank(),
                                         get_world_size(), view)

    def extract():
        with progress_bar(total=len(images), unit="img") as bar:
            for views, y, i, messages in loader:
                if len(views):
                    features.append(model(views.to(device, non_blocking=views.is_pinned())).float())
                    # copies, because each tensor of a loader worker keeps a file open
                    labels.append(y.clone())
                    indices.append(i.clone())
                corrupt.extend(messages)
                bar.update((len(i) + len(messages)) * get_world_size())
    wait_for(extract)
    features = features or [torch.empty(0)]  # of the model, which may leave `device`
    features, labels, indices = (all_gather_rows(torch.cat(parts)) for parts in (features, labels, indices))
    corrupt = sum(all_gather_objects(corrupt), [])
    if not len(features) and not allow_none:
        raise NoImagesError(f"no image can be read, the last: {corrupt[-1]}" if corrupt else "no images")
    indices, order = indices.sort()
    return features[order], labels[order], indices, corrupt


def load_features(path, origin):
    """Read a file of `save_model`: {name: tensor}, names as of `knn_classifier`.

    Raises:
        CheckpointError: not a features file, corrupt, or of another origin (the path of the checkpoint may differ).
    """
    features, found, _ = read_weights(str(path))
    if features.keys() != {"train_features", "train_labels", "test_features", "test_labels"}:
        raise CheckpointError(f"{path}: not a features file, choose another --features")
    for part in ("train", "test"):
        x, y = (features[f"{part}_{name}"] for name in ("features", "labels"))
        if x.dtype != torch.float32 or y.dtype != torch.int64 or x.ndim != 2 or y.shape != x.shape[:1]:
            raise CheckpointError(f"{path}: its {part} features are {x.dtype} {list(x.shape)} with labels {y.dtype} "
                                  f"{list(y.shape)}, not float32 [M, D] with int64 [M]: delete it")
    for name in sorted((origin.keys() | found.keys()) - {"ckpt", "backbone"}):
        if found.get(name) != origin.get(name):
            raise CheckpointError(f"{path}: holds features with {name} {found.get(name)}, not {origin.get(name)}: "
                                  f"delete it, or choose another --features")
    return features
