import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import jaccard_score

from evaluation.masks import boundary_f, dilate, find_boundary, jaccard, summarize_over_time, threshold_attention


def square(top, left, side=20, height=60, width=80):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:top + side, left:left + side] = True
    return mask


def blobs(seed, shape=(61, 83)):
    return torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 4) > 0.02)


def test_threshold_keeps_the_fewest_patches_with_the_mass():
    attention = torch.tensor([[0.5, 0.1, 0.25, 0.15], [0.1, 0.1, 0.1, 0.7]])
    assert threshold_attention(attention, 0.6).tolist() == [[True, False, True, False], [False, False, False, True]]
    assert threshold_attention(attention, 0.85).tolist() == [[True, False, True, True], [False, True, True, True]]
    assert threshold_attention(attention, 1.0).all()
    x = torch.rand(5, 3, 50, generator=torch.Generator().manual_seed(0))
    kept = threshold_attention(x * 7, 0.6)
    assert kept.equal(threshold_attention(x, 0.6))
    share = (x * kept).sum(-1) / x.sum(-1)
    weakest = torch.where(kept, x, math.inf).amin(-1) / x.sum(-1)
    assert (share >= 0.6).all() and (share - weakest < 0.6).all()  # one patch fewer would not be enough
    assert (torch.where(kept, x, math.inf).amin(-1) >= torch.where(kept, 0, x).amax(-1)).all()


def test_jaccard_by_hand():
    truth = square(10, 10)
    assert jaccard(truth, truth) == 1
    assert jaccard(square(10, 15), truth) == pytest.approx(15 / 25)  # 5 of 20 columns beside it
    assert jaccard(square(10, 40), truth) == 0
    empty = torch.zeros_like(truth)
    assert jaccard(empty, truth) == 0 and jaccard(truth, empty) == 0 and jaccard(empty, empty) == 1
    void = square(10, 10, 5)  # an unlabeled corner
    assert jaccard(square(10, 15), truth, void) == pytest.approx((15 * 20) / (25 * 20 - 25))
    assert jaccard(torch.stack((truth, empty)), truth).tolist() == [1, 0]


def test_jaccard_equals_scikit_learn():
    for seed in range(4):
        a, b = blobs(seed), blobs(seed + 10)
        assert jaccard(a, b) == pytest.approx(jaccard_score(b.flatten(), a.flatten()), abs=1e-12)


def test_boundary_equals_davis():
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2:4, 2:5] = True
    mask[5, 6] = True  # at the corner
    expected = ["0000000", "0111100", "0100100", "0111100", "0000011", "0000010"]
    assert find_boundary(mask).int().tolist() == [[int(x) for x in row] for row in expected]


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 8])
def test_dilation_equals_scipy_with_a_disk(radius):
    y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1]
    sparse = torch.rand(2, 61, 83, generator=torch.Generator().manual_seed(radius)) > 0.98
    for mask, dilated in zip(sparse, dilate(sparse, radius)):
        assert (dilated.numpy() == ndimage.binary_dilation(mask.numpy(), x * x + y * y <= radius * radius)).all()


def f_by_definition(mask, truth, tolerance):
    """A boundary pixel counts if its Euclidean distance to the other boundary is within the tolerance."""
    a, b = find_boundary(mask).numpy(), find_boundary(truth).numpy()
    if not a.any() or not b.any():
        return float(not a.any() and not b.any())
    radius = math.ceil(tolerance * math.hypot(*a.shape))
    precision = (ndimage.distance_transform_edt(~b)[a] <= radius).mean()
    recall = (ndimage.distance_transform_edt(~a)[b] <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0.008, 0.03])
def test_f_equals_the_definition_by_distances(tolerance):
    cases = [(blobs(seed), blobs(seed + 10)) for seed in range(4)] + [(square(10, 10), square(12, 10))]
    for mask, truth in cases:
        assert boundary_f(mask, truth, tolerance=tolerance) == pytest.approx(f_by_definition(mask, truth, tolerance),
                                                                            abs=1e-12)
    stacked = boundary_f(*(torch.stack(x) for x in zip(*cases[:4])), tolerance=tolerance)
    assert stacked.tolist() == pytest.approx([f_by_definition(*case, tolerance) for case in cases[:4]])


def test_f_by_hand():
    truth = square(10, 10)
    empty = torch.zeros_like(truth)
    assert boundary_f(truth, truth) == 1 and boundary_f(empty, empty) == 1
    assert boundary_f(empty, truth) == 0 and boundary_f(truth, empty) == 0
    assert boundary_f(square(30, 50), truth) == 0  # nothing near: precision and recall 0
    assert boundary_f(square(10, 11), truth) == 1  # 100 pixels of diagonal allow one
    # three columns to the right: the vertical sides do not match, the horizontal ones do where they overlap
    shifted = boundary_f(square(10, 13), truth)
    assert shifted == pytest.approx(f_by_definition(square(10, 13), truth, 0.008)) and 0.4 < shifted < 0.7


def test_summary_over_time_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4, 0.1], dtype=torch.float64)
    # quarters of 8 frames are bounded by frames 1, 3, 5, 6 and 8, which count on both sides
    result = summarize_over_time(scores)
    assert result["mean"] == pytest.approx(0.575) and result["recall"] == pytest.approx(5 / 8)
    assert result["decay"] == pytest.approx((0.9 + 0.8 + 0.7) / 3 - (0.5 + 0.4 + 0.1) / 3)
    assert summarize_over_time(torch.ones(1, dtype=torch.float64)) == dict(mean=1, recall=1, decay=0)
