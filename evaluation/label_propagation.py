"""Label propagation: segment a video by passing the first frame's mask on through similar patch features.

    labels = mask_to_labels(mask, num_classes, rows, cols)               # first frame, [C, h, w]
    for labels in propagate_labels(features, labels):                    # features of each frame, [h, w, D]
        mask = labels_to_mask(labels, height, width)

Nothing is trained: a patch takes the labels of the most similar patches near its position in the first frame and in
the last few (Jabri et al. 2020, section 4.1; Caron et al. 2021, section 4.2.2). This file needs torch only.
"""

import collections
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F


@torch.no_grad()
def propagate_labels(features: Iterable[torch.Tensor], labels: torch.Tensor, n_last: int = 7, topk: int = 5,
                     radius: int = 12, temperature: float = 0.1) -> Iterator[torch.Tensor]:
    """Propagate the labels of the first frame through all others.

    Args:
        features: of each frame, [h, w, D]. At most n_last + 2 frames are in memory, and one copy of them.
        labels: of the first frame, [C, h, w], class probabilities.
        n_last: context frames besides the first.
        topk, radius, temperature: see `propagate_to_frame`.

    Yields:
        labels [C, h, w] of each frame after the first.
    """
    frames = (F.normalize(frame.float(), dim=-1) for frame in features)
    first, last = (next(frames), labels), collections.deque(maxlen=n_last)
    for frame in frames:
        context = (torch.stack(x) for x in zip(first, *last))  # features and labels
        labels = propagate_to_frame(frame, *context, topk, radius, temperature)
        last.append((frame, labels))
        yield labels


def propagate_to_frame(frame: torch.Tensor, context: torch.Tensor, context_labels: torch.Tensor, topk: int = 5,
                       radius: int = 12, temperature: float = 0.1, tile: tuple[int, int] = (8, 16)) -> torch.Tensor:
    """Labels of one frame from those of its context frames: top-k attention within a neighborhood.

    Args:
        frame: features [h, w, D], L2-normalized.
        context, context_labels: features [T, h, w, D] and labels [T, C, h, w] of other frames.
        topk: similar patches per patch, over all frames, weighted by the softmax of cosine / temperature.
        radius: neighborhood in rows and columns of patches; 0 for the whole frame.
        tile: rows and columns of patches compared at a time. It bounds the memory to tile * T * (tile + 2 * radius)
            similarities, whatever the size of the frame.

    Returns:
        labels [C, h, w].
    """
    h, w, D = frame.shape
    T, C = context_labels.shape[:2]
    radius = radius or max(h, w)
    rows, cols = (torch.arange(n, device=frame.device) for n in (h, w))
    result = context_labels.new_empty(C, h, w)
    for y, near_y in iter_tiles(h, tile[0], radius):
        for x, near_x in iter_tiles(w, tile[1], radius):
            queries = frame[y, x].reshape(-1, D)
            keys = context[:, near_y, near_x].reshape(-1, D)
            far = (rows[y, None] - rows[near_y]).abs()[:, None, None, :, None] > radius  # [y, 1, 1, near_y, 1]
            far = far | ((cols[x, None] - cols[near_x]).abs()[:, None, None, :] > radius)  # [y, x, 1, near_y, near_x]
            cosine = (queries @ keys.T).view(*far.shape[:2], T, *far.shape[3:]).masked_fill_(far, -math.inf)
            cosine = cosine.view(len(queries), -1)
            values, indices = cosine.topk(min(topk, cosine.shape[1]))
            labels = context_labels[:, :, near_y, near_x].permute(1, 0, 2, 3).reshape(C, -1)[:, indices]
            weights = (values / temperature).softmax(dim=-1)  # [queries, topk]; labels [C, queries, topk]
            result[:, y, x] = (labels * weights).sum(dim=-1).view(C, *far.shape[:2])
    return result


def iter_tiles(length, step, radius):
    """Yield slices of `step` that cover a length, each with the slice of what lies within `radius` of it."""
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), slice(max(0, start - radius), min(length, stop + radius))


def mask_to_labels(mask: torch.Tensor, num_classes: int, rows: int, cols: int) -> torch.Tensor:
    """Mask [H, W] of class indices -> one-hot labels [C, rows, cols], by the pixel at the center of each patch."""
    small = F.interpolate(mask[None, None].float(), size=(rows, cols), mode="nearest-exact")[0, 0].long()
    return F.one_hot(small, num_classes).permute(2, 0, 1).float()


def labels_to_mask(labels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Labels [C, h, w] -> class index of each pixel, int64 [height, width].

    Labels are interpolated, and those of each class rescaled to [0, 1] as in the published evaluation: otherwise the
    background would win over an object whose labels have become weak.
    """
    labels = F.interpolate(labels[None], size=(height, width), mode="bilinear")[0]
    low, high = labels.amin(dim=(1, 2), keepdim=True), labels.amax(dim=(1, 2), keepdim=True)
    labels = torch.where(high > 0, (labels - low) / (high - low).clamp(min=1e-12), labels)
    return labels.max(dim=0).indices
