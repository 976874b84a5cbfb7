"""Masks from attention, and the Jaccard index (J) and boundary measure (F) of masks.

    masks = threshold_attention(attention, 0.6)              # [heads, N] -> bool, 60% of each head's attention
    J = jaccard(masks, truth)                                # region similarity
    F = boundary_f(masks, truth)                             # contour accuracy
    summarize_over_time(J)                                   # of one object in T frames: mean, recall, decay

J and F are those of DAVIS (Perazzi et al. 2016, section 4.2; Pont-Tuset et al. 2017, section 3), as computed by its
published evaluation. This file needs torch only.
"""

import math

import torch
import torch.nn.functional as F


def threshold_attention(attention: torch.Tensor, mass: float) -> torch.Tensor:
    """Mask of the patches with the most attention that together hold the share `mass` of it.

    Caron et al. 2021, section 4.2.2.

    Args:
        attention: [..., N], nonnegative.
        mass: 0 to 1. The weakest patches are dropped as long as their sum is at most 1 - mass of the total.

    Returns:
        bool [..., N].
    """
    values, order = attention.sort(dim=-1)
    kept = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True) > 1 - mass
    return torch.empty_like(kept).scatter_(-1, order, kept)


def mask_mean_and_heads(attention: torch.Tensor, mass: float) -> torch.Tensor:
    """Thresholded attention of the mean of the heads and of each head: [heads, h, w] -> bool [1 + heads, h, w]."""
    attention = torch.cat((attention.mean(dim=0, keepdim=True), attention))
    return threshold_attention(attention.flatten(1), mass).view(attention.shape)


def jaccard(masks: torch.Tensor, truth: torch.Tensor, void: torch.Tensor | None = None) -> torch.Tensor:
    """Jaccard index (IoU, region similarity J) of masks: bool [..., H, W] each -> float64 [...]; 1 if both are empty.

    Args:
        void: bool [..., H, W], unlabeled pixels, which are ignored.
    """
    if void is not None:
        masks, truth = masks & ~void, truth & ~void
    union = count_pixels(masks | truth)
    return torch.where(union > 0, count_pixels(masks & truth) / union.clamp(min=1), 1.0)


def boundary_f(masks: torch.Tensor, truth: torch.Tensor, tolerance: float = 0.008) -> torch.Tensor:
    """Contour accuracy F of masks: bool [..., H, W] each -> float64 [...].

    F is the harmonic mean of boundary precision and recall. A boundary pixel is matched if the other mask has one
    within a disk around it. F is 0 if one mask has no boundary, and 1 if neither has.

    Args:
        tolerance: radius of the disk relative to the image diagonal, rounded up to pixels.
    """
    edges, true_edges = find_boundary(masks), find_boundary(truth)
    radius = math.ceil(tolerance * math.hypot(*edges.shape[-2:]))
    precision = count_pixels(edges & dilate(true_edges, radius)) / count_pixels(edges).clamp(min=1)
    recall = count_pixels(true_edges & dilate(edges, radius)) / count_pixels(true_edges).clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where(count_pixels(edges | true_edges) > 0, score, 1.0)


def count_pixels(mask):
    return mask.sum(dim=(-2, -1), dtype=torch.float64)


def find_boundary(mask: torch.Tensor) -> torch.Tensor:
    """Pixels that differ from the one to the right, below, or both: bool [..., H, W] -> bool [..., H, W]."""
    padded = torch.cat((mask, mask[..., -1:, :]), dim=-2)  # the image border is no boundary
    padded = torch.cat((padded, padded[..., -1:]), dim=-1)
    return (mask != padded[..., :-1, 1:]) | (mask != padded[..., 1:, :-1]) | (mask != padded[..., 1:, 1:])


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Dilation by a disk: bool [..., H, W] -> bool [..., H, W], pixels at most `radius` from one of the mask."""
    H, W = mask.shape[-2:]
    counts = F.pad(mask, (radius + 1, radius, radius, radius)).cumsum(dim=-1, dtype=torch.int32)
    result = torch.zeros_like(mask)
    for dy in range(-radius, radius + 1):  # a row of the disk at a time: are there mask pixels in its window?
        half = math.isqrt(radius * radius - dy * dy)
        row = counts[..., radius + dy:radius + dy + H, :]
        result |= row[..., radius + 1 + half:][..., :W] > row[..., radius - half:][..., :W]
    return result


def summarize_over_time(scores: torch.Tensor) -> dict[str, float]:
    """Mean, recall and decay of an object's scores [T] in T frames (Perazzi et al. 2016, section 4.2).

    Recall is the share of frames above 0.5, decay the mean of the first quarter minus that of the last. As in the
    published evaluation, a frame between two quarters counts in both, and a limit between two frames is rounded up.
    """
    ends = (torch.linspace(1, len(scores), 5, dtype=torch.float64) + 1e-10).round().int() - 1
    first, last = scores[:ends[1] + 1], scores[ends[3]:]
    return dict(mean=scores.mean().item(), recall=(scores > 0.5).double().mean().item(),
                decay=(first.mean() - last.mean()).item())
