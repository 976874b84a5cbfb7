"""Masks: from attention, and how well they agree with others.

    masks = keep_mass(attention, 0.6)                        # [heads, N] -> bool, 60% of each head's attention
    jaccard(masks, truth)                                    # region similarity, J
    boundary_f(masks, truth)                                 # contour accuracy, F

J and F are those of DAVIS (Perazzi et al. 2016, section 4.2; Pont-Tuset et al. 2017, section 3), as its published
evaluation computes them. This file needs torch and nothing else.
"""

import math

import torch
import torch.nn.functional as F


def threshold_attention(attention, mass):
    """The patches with most of the attention, which together have this share of it (Caron et al. 2021, section 4.2.2).

    Args:
        attention: [..., N], 0 or more.
        mass: 0 to 1. The weakest patches are left out as long as together they have no more than the rest of it.

    Returns:
        bool [..., N].
    """
    values, order = attention.sort(dim=-1)
    kept = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True) > 1 - mass
    return torch.empty_like(kept).scatter_(-1, order, kept)


def jaccard(masks, truth, void=None):
    """Region similarity J, intersection over union: bool [..., H, W] twice -> float64 [...]; 1 where both are empty.

    Args:
        void: bool [..., H, W], pixels that do not count.
    """
    masks, truth = without(void, masks, truth)
    both, either = (x.sum(dim=(-2, -1), dtype=torch.float64) for x in (masks & truth, masks | truth))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def boundary_f(masks, truth, void=None, tolerance=0.008):
    """Contour accuracy F: bool [..., H, W] twice -> float64 [...].

    It is the harmonic mean of the boundaries' precision and recall. A boundary pixel is right if the other mask has
    one within a disk around it. Where one mask has no boundary F is 0, where neither has F is 1.

    Args:
        void: bool [..., H, W], pixels that are taken as ground in both.
        tolerance: the disk's radius as a share of the picture's diagonal, rounded up to pixels.
    """
    edges, true_edges = (boundary(x) for x in without(void, masks, truth))
    radius = math.ceil(tolerance * math.hypot(*edges.shape[-2:]))
    precision = share(edges & dilate(true_edges, radius), edges)
    recall = share(true_edges & dilate(edges, radius), true_edges)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    empty, truly_empty = (~x.flatten(-2).any(dim=-1) for x in (edges, true_edges))
    return torch.where(empty & truly_empty, 1.0, torch.where(empty | truly_empty, 0.0, score))


def share(part, whole):
    """How much of a mask another is: bool [..., H, W] twice -> float64 [...]; 0 of an empty one."""
    part, whole = (x.sum(dim=(-2, -1), dtype=torch.float64) for x in (part, whole))
    return part / whole.clamp(min=1)


def without(void, *masks):
    return masks if void is None else tuple(mask & ~void for mask in masks)


def boundary(mask):
    """Pixels that differ from the one to the right, below, or both: bool [..., H, W] -> bool [..., H, W]."""
    padded = torch.cat((mask, mask[..., -1:, :]), dim=-2)  # the border is no boundary
    padded = torch.cat((padded, padded[..., -1:]), dim=-1)
    return (mask != padded[..., :-1, 1:]) | (mask != padded[..., 1:, :-1]) | (mask != padded[..., 1:, 1:])


def dilate(mask, radius):
    """Pixels within a disk of `radius` pixels around one of the mask: bool [..., H, W] -> bool [..., H, W]."""
    H, W = mask.shape[-2:]
    counts = F.pad(mask, (radius + 1, radius, radius, radius)).cumsum(dim=-1, dtype=torch.int32)  # pixels so far
    result = torch.zeros_like(mask)
    for dy in range(-radius, radius + 1):  # a disk is a pile of rows
        half = math.isqrt(radius * radius - dy * dy)
        row = counts[..., radius + dy:radius + dy + H, :]
        result |= row[..., radius + 1 + half:][..., :W] > row[..., radius - half:][..., :W]
    return result


def summarize_over_time(scores):
    """What DAVIS says of an object's scores in T frames [T]: their mean, recall and decay.

    Recall is the share above 0.5, decay the mean of the first quarter minus that of the last; a frame on the border
    of two quarters counts in both, and a border between two frames is moved to the later one, as published.
    """
    ends = (torch.linspace(1, len(scores), 5, dtype=torch.float64) + 1e-10).round().int() - 1
    first, last = scores[:ends[1] + 1], scores[ends[3]:]
    return dict(mean=scores.mean().item(), recall=(scores > 0.5).double().mean().item(),
                decay=(first.mean() - last.mean()).item())


if __name__ == "__main__":
    y, x = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    truth = (x - 80).square() + (y - 60).square() < 40 ** 2
    print("a disc of 40 pixels, shifted to the right\n pixels     J      F")
    for shift in (0, 1, 2, 5, 20):
        shifted = truth.roll(shift, dims=1)
        print(f"{shift:7d} {jaccard(shifted, truth):6.3f} {boundary_f(shifted, truth):6.3f}")
