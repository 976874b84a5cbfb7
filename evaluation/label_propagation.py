"""Labels from frame to frame: what is drawn on a video's first frame follows the patches that look alike.

    labels = one_hot(mask, classes, rows, cols)                  # of the first frame, [C, h, w]
    for labels in follow(features, labels):                      # features of each frame [h, w, D], one by one
        mask = decide(labels, height, width)

Nothing is learnt: a patch takes the labels of the patches that are most like it, near its place, in the first frame
and the last few (Jabri et al. 2020, section 4.1; Caron et al. 2021, section 4.2.2). This file needs torch and nothing
else.
"""

import collections
import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def propagate_labels(features, labels, n_last=7, topk=5, radius=12, temperature=0.1):
    """Carry the labels of the first frame through all others.

    Args:
        features: iterable of frames, [h, w, D] each. Held at once are n_last + 2 of them, and a copy of the sources
            while they are compared.
        labels: of the first, [C, h, w], shares of each class.
        n_last: frames that labels come from, besides the first.
        topk, radius, temperature: see `transfer`.

    Yields:
        labels [C, h, w] of each frame but the first.
    """
    frames = (F.normalize(frame.float(), dim=-1) for frame in features)
    first, last = (next(frames), labels), collections.deque(maxlen=n_last)
    for frame in frames:
        sources, known = (torch.stack(x) for x in zip(first, *last))
        labels = propagate_to_frame(frame, sources, known, topk, radius, temperature)
        del sources, known
        last.append((frame, labels))
        yield labels


def propagate_to_frame(frame, sources, known, topk=5, radius=12, temperature=0.1, tile=(8, 16)):
    """Each patch takes the labels of the patches in other frames that are most like it and near its place.

    Args:
        frame: features [h, w, D] of length 1.
        sources, known: features [T, h, w, D] and labels [T, C, h, w] of other frames.
        topk: how many patches, over all frames, weighted by the softmax of their cosine / temperature.
        radius: rows and columns that they may be away; 0 for any.
        tile: rows and columns of patches that are compared at once with what is near any of them: it bounds the memory
            to tile * T * (tile + 2 * radius) numbers, whatever the size of the frame.

    Returns:
        labels [C, h, w].
    """
    h, w, D = frame.shape
    T, C = known.shape[:2]
    radius = radius or max(h, w)
    result = known.new_empty(C, h, w)
    for y, near_y in tiles(h, tile[0], radius):
        for x, near_x in tiles(w, tile[1], radius):
            queries = frame[y, x].reshape(-1, D)
            keys = sources[:, near_y, near_x].reshape(-1, D)
            cosine = (queries @ keys.T).view(y.stop - y.start, x.stop - x.start, T, near_y.stop - near_y.start, -1)
            cosine.masked_fill_(too_far(y, near_y, radius, frame.device)[:, None, None, :, None], -math.inf)
            cosine.masked_fill_(too_far(x, near_x, radius, frame.device)[None, :, None, None, :], -math.inf)
            values, places = largest(cosine.view(len(queries), -1), topk)
            labels = known[:, :, near_y, near_x].permute(1, 0, 2, 3).reshape(C, -1)[:, places]  # [C, queries, topk]
            weights = (values / temperature).softmax(dim=-1)
            result[:, y, x] = (labels * weights).sum(dim=-1).view(C, y.stop - y.start, -1)
    return result


def tiles(length, step, radius):
    """Slices that cut a length into steps, and those of what is within a radius of each."""
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), slice(max(0, start - radius), min(length, stop + radius))


def too_far(here, near, radius, device):
    """Which places of one slice are more than a radius from those of another: bool [here, near]."""
    here, near = (torch.arange(x.start, x.stop, device=device) for x in (here, near))
    return (here.view(-1, 1) - near).abs() > radius


def largest(x, k, run=32):
    """The k largest of each row and where they are: [Q, M] -> values and places, [Q, k] both.

    They lie in the k runs of neighbours with the largest maxima, so that only those are searched.
    """
    Q, M = x.shape
    k = min(k, M)
    if 2 * k * run > M:
        return x.topk(k)
    whole = M - M % run
    runs = x[:, :whole].view(Q, -1, run).amax(dim=-1).topk(k).indices
    places = (runs.unsqueeze(-1) * run + torch.arange(run, device=x.device)).flatten(1)  # [Q, k * run]
    rest = torch.arange(whole, M, device=x.device).expand(Q, -1)
    places = torch.cat((places, rest), dim=1)
    values, found = x.gather(1, places).topk(k)
    return values, places.gather(1, found)


def mask_to_labels(mask, classes, rows, cols):
    """Labels [C, rows, cols] of a mask [H, W] of class numbers below C: the pixel in the middle of each patch."""
    small = F.interpolate(mask[None, None].float(), size=(rows, cols), mode="nearest-exact")[0, 0].long()
    return F.one_hot(small, classes).permute(2, 0, 1).float()


def labels_to_mask(labels, height, width):
    """Labels [C, h, w] -> the class of each pixel, int64 [height, width].

    Shares are interpolated, and each class's stretched from 0 to 1, as in the published evaluation: else an object
    whose labels have spread thin would be lost to the ground.
    """
    labels = F.interpolate(labels[None], size=(height, width), mode="bilinear")[0]
    low = labels.amin(dim=(1, 2), keepdim=True)
    high = labels.amax(dim=(1, 2), keepdim=True)
    labels = torch.where(high > 0, (labels - low) / (high - low).clamp(min=1e-12), labels)
    return labels.max(dim=0).indices


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(24, 64, 48, generator=generator)
    mask = torch.zeros(24, 32, dtype=torch.long)
    mask[8:16, 8:16] = 1  # moves to the left by one patch a frame
    frames = (scene[:, t:t + 32] + 0.3 * torch.randn(24, 32, 48, generator=generator) for t in range(7))
    for t, labels in enumerate(propagate_labels(frames, mask_to_labels(mask, 2, 24, 32)), start=1):
        found = labels_to_mask(labels, 24, 32)
        columns = found.amax(dim=0).nonzero()
        print(f"frame {t}: object at columns {columns.min()} to {columns.max()}, "
              f"{(found == mask.roll(-t, dims=1)).float().mean():.1%} of the patches right")
