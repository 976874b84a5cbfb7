import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from evaluation.label_propagation import (
    labels_to_mask,
    mask_to_labels,
    propagate_labels,
    propagate_to_frame,
)


def by_definition(frame, sources, known, topk, radius, temperature):
    """All pairs in float64, as Jabri et al. 2020 write it: exp(cosine / T), within the radius, top k, normalized."""
    frame, sources, known = (x.double().numpy() for x in (frame, sources, known))
    h, w, _ = frame.shape
    T, C = known.shape[:2]
    result = np.zeros((C, h, w))
    for y in range(h):
        for x in range(w):
            weights = np.exp(sources @ frame[y, x] / temperature)  # [T, h, w]
            rows, cols = np.ogrid[:h, :w]
            weights = weights * ((abs(rows - y) <= radius) & (abs(cols - x) <= radius))
            weights[weights < np.sort(weights.ravel())[-topk]] = 0
            result[:, y, x] = np.einsum("thw,tchw->c", weights / weights.sum(), known)
    return torch.from_numpy(result)


def random_frames(T, h, w, D=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(T + 1, h, w, D, generator=generator), dim=-1)
    labels = torch.rand(T, 3, h, w, generator=generator)
    return features[0], features[1:], labels / labels.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("h, w, T, topk, radius", [(9, 13, 3, 5, 2), (20, 37, 2, 5, 12), (7, 5, 1, 3, 1),
                                                   (1, 40, 4, 5, 3)])
def test_equals_the_definition_over_all_pairs(h, w, T, topk, radius):
    frame, sources, known = random_frames(T, h, w)
    expected = by_definition(frame, sources, known, topk, radius, 0.1)
    for tile in ((8, 16), (3, 4), (1, 1), (64, 64)):  # the tile size does not matter
        result = propagate_to_frame(frame, sources, known, topk, radius, 0.1, tile)
        assert_close(result.double(), expected, atol=1e-5, rtol=0)
    assert_close(result.sum(dim=0), torch.ones(h, w))


def test_no_radius_and_topk_above_the_number_of_patches():
    frame, sources, known = random_frames(2, 4, 6)
    unbounded = propagate_to_frame(frame, sources, known, 5, 0)
    assert_close(unbounded.double(), by_definition(frame, sources, known, 5, 99, 0.1), atol=1e-5, rtol=0)
    everything = propagate_to_frame(frame, sources, known, 1000, 0)
    assert_close(everything.double(), by_definition(frame, sources, known, 48, 99, 0.1), atol=1e-5, rtol=0)


def test_each_frame_is_read_once():
    """Every patch has a feature of its own and stays in place, and so does its label."""
    h, w, frames = 4, 4, 6
    patches = F.one_hot(torch.arange(h * w), 16).float().view(h, w, 16)
    seen = []

    def features():
        for t in range(frames):
            seen.append(t)
            yield patches
    first = mask_to_labels(torch.eye(4).long(), 2, h, w)
    counts = []
    for n_last in (0, 1, 3):
        result = list(propagate_labels(features(), first, n_last, topk=1, radius=0))
        assert len(result) == frames - 1
        for labels in result:
            assert_close(labels, first)
        counts.append(len(seen))
    assert counts == [6, 12, 18]


def test_labels_come_from_the_first_frame_and_the_last_ones():
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(5, 5, 8, generator=generator) for _ in range(6)]
    labels = mask_to_labels(torch.ones(5, 5).long().tril(), 2, 5, 5)

    def reference(n_last):
        known = [(F.normalize(frames[0], dim=-1), labels)]
        for frame in frames[1:]:
            frame = F.normalize(frame, dim=-1)
            context = known[:1] + (known[1:][-n_last:] if n_last else [])
            sources, given = (torch.stack(x) for x in zip(*context))
            known.append((frame, by_definition(frame, sources, given, 5, 2, 0.1).float()))
        return [given for _, given in known[1:]]
    for n_last in (0, 2, 7):
        for mine, theirs in zip(propagate_labels(frames, labels, n_last, radius=2), reference(n_last), strict=True):
            assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_mask_to_labels_equals_nearest_of_pillow():
    generator = np.random.default_rng(0)
    mask = generator.integers(0, 4, (61, 97)).astype(np.uint8)
    for rows, cols in ((7, 12), (30, 52), (61, 97)):
        expected = np.asarray(Image.fromarray(mask).resize((cols, rows), Image.Resampling.NEAREST))
        labels = mask_to_labels(torch.from_numpy(mask), 5, rows, cols)
        assert labels.shape == (5, rows, cols) and labels.sum() == rows * cols
        assert (labels.argmax(dim=0).numpy() == expected).all()


def test_labels_to_mask_rescales_each_class():
    labels = torch.tensor([[[0.9, 0.6, 0.9]], [[0.1, 0.4, 0.1]], [[0.0, 0.0, 0.0]]])  # background, weak, absent
    assert labels_to_mask(labels, 1, 3).tolist() == [[0, 1, 0]]
    wide = labels_to_mask(torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)), 48, 40)
    assert wide.shape == (48, 40) and set(wide.unique().tolist()) == {0, 1}
