"""LOST and TokenCut beside dense computations in float64, written from the formulas of the papers."""

import numpy as np
import scipy.linalg
import torch

from evaluation.discovery import discover_lost, discover_tokencut, extract_keys, find_component_boxes


def flood(mask, place):
    """Pixels of a mask that are reached from one of it in steps to the four neighbors."""
    reached, open_places = set(), [place]
    while open_places:
        y, x = open_places.pop()
        if (y, x) not in reached and 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
            reached.add((y, x))
            open_places += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    result = np.zeros(mask.shape, bool)
    result[tuple(zip(*reached))] = True
    return result


def lost_by_definition(keys, k):
    """Siméoni et al. 2021, section 3.2: degrees (eq. 1), seed, expansion, mask."""
    h, w, dim = keys.shape
    f = keys.reshape(-1, dim).astype(np.float64)
    products = f @ f.T
    degrees = [sum(1 for q in range(h * w) if products[p, q] >= 0) for p in range(h * w)]
    ranked = sorted(range(h * w), key=lambda p: degrees[p])
    seed = ranked[0]
    expanded = [q for q in ranked[:k] if products[q, seed] >= 0]
    mask = np.array([sum(products[q, s] for s in expanded) >= 0 for q in range(h * w)]).reshape(h, w)
    return flood(mask, divmod(seed, w)), len(expanded)


def tokencut_by_definition(keys, tau, eps):
    """Wang et al. 2022, sections 3.1 and 3.2: the generalized eigenproblem as it is written."""
    h, w, dim = keys.shape
    f = keys.reshape(-1, dim).astype(np.float64)
    cosines = f @ f.T / np.outer(np.linalg.norm(f, axis=1), np.linalg.norm(f, axis=1))
    edges = np.where(cosines > tau, 1.0, eps)
    degrees = np.diag(edges.sum(axis=1))
    values, vectors = scipy.linalg.eigh(degrees - edges, degrees)
    y = vectors[:, 1]
    seed = (np.abs(y) > np.abs(y).max() * (1 - 1e-8)).argmax()  # the first of those with the same neighbors
    side = (y > y.mean()) == (y[seed] > y.mean())
    return flood(side.reshape(h, w), divmod(seed, w)), values


def draw_keys(h, w, seed, noise):
    """Keys of two regions on a background, [h, w, 24]."""
    rng = np.random.default_rng(seed)
    kinds = np.zeros((h, w), int)
    kinds[1:h // 2, 1:w // 2], kinds[h // 2 + 1:, w // 2 + 2:] = 1, 2
    return rng.standard_normal((3, 24))[kinds] + noise * rng.standard_normal((h, w, 24))


CASES = [(h, w, seed, noise) for h, w in ((9, 14), (12, 7), (5, 6)) for seed in range(3) for noise in (0.5, 1.0, 2.0)]
CASES += [(30, 25, 0, 1.0)]  # more patches than are computed at a time


def test_lost_equals_the_paper():
    found = set()
    for i, case in enumerate(CASES):
        keys, k = draw_keys(*case).astype(np.float32), (100, 20)[i % 2]
        expected, expanded = lost_by_definition(keys, k)
        assert (discover_lost(torch.from_numpy(keys), k).numpy() == expected).all(), case
        found.add((expanded, expected.sum()))
    assert len(found) > 15


def test_tokencut_equals_the_paper():
    areas, unique = set(), 0
    for case in CASES:
        keys = draw_keys(*case).astype(np.float32)
        expected, values = tokencut_by_definition(keys, 0.2, 1e-5)
        if values[2] - values[1] > 1e-6:  # else the eigenvector is not unique
            assert (discover_tokencut(torch.from_numpy(keys)).numpy() == expected).all(), case
            areas.add(expected.sum())
            unique += 1
    assert len(areas) > 10 and unique > 20


def test_tokencut_of_two_patches():
    """Opposite keys are cut: one patch each, and the first is the object; alike, they are one."""
    for h, w in ((1, 2), (2, 1)):
        keys = torch.tensor([1.0, -1.0]).view(h, w, 1) * torch.ones(4)
        expected = tokencut_by_definition(keys.numpy(), 0.2, 1e-5)[0]
        assert expected.sum() == 1 and (discover_tokencut(keys).numpy() == expected).all()
        assert discover_tokencut(keys.abs()).all()


def test_tau_and_eps_are_those_of_the_graph():
    keys, flags = draw_keys(10, 10, 0, 2.0), [(0.4, 1e-5), (0.2, 1e-5), (0.2, 0.3)]
    found = [discover_tokencut(torch.from_numpy(keys), *pair).numpy() for pair in flags]
    for mask, pair in zip(found, flags):
        assert (mask == tokencut_by_definition(keys, *pair)[0]).all()
    assert len({mask.tobytes() for mask in found}) == 3


def test_without_a_cut_the_image_is_the_object():
    """As of an untrained backbone on a blank image; one patch is a graph too."""
    assert discover_tokencut(torch.ones(5, 7, 4)).all() and discover_tokencut(torch.ones(1, 1, 4)).all()
    assert discover_lost(torch.ones(5, 7, 4)).all()


def test_keys_are_those_of_the_last_block(model):
    network, seen = model[0], []
    image = torch.randn(1, 3, 16, 40, generator=torch.Generator().manual_seed(0))
    hook = network.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network.get_intermediate_layers(image)
    hook.remove()
    keys = extract_keys(network, image)
    assert keys.shape == (2, 5, 32) and keys.dtype == torch.float64
    torch.testing.assert_close(keys.flatten(0, 1).float(), seen[0][0, 1:, 32:64])  # q, k, v; heads one after another


def test_boxes_of_components():
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[1:3, 2:6], mask[3, 6], mask[5:, 0] = True, True, True  # diagonal neighbors are not connected
    assert find_component_boxes(mask).tolist() == [[2, 1, 6, 3], [6, 3, 7, 4], [0, 5, 1, 8]]
    assert find_component_boxes(torch.zeros(3, 3, dtype=torch.bool)).shape == (0, 4)
