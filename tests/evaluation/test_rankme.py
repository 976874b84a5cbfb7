import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from evaluation.rankme import effective_rank


@pytest.mark.parametrize("shape", [(500, 24), (10, 24), (1, 24), (24, 1)])
def test_equals_equation_1(shape):
    """exp(-sum p ln p), p = singular values / their sum + 1e-7, by scipy."""
    x = np.random.RandomState(0).randn(*shape).astype("float32") * 10.0 ** -np.arange(shape[1], dtype="float32") + 0.3
    values = scipy.linalg.svd(x.astype("float64"), compute_uv=False)
    p = values / values.sum() + 1e-7
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(np.exp(scipy.stats.entropy(values)), rel=1e-4)


def test_known_ranks():
    orthogonal = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0))).Q
    assert effective_rank(orthogonal) == pytest.approx(16, rel=1e-4)
    assert effective_rank(1000 * orthogonal) == pytest.approx(effective_rank(orthogonal), rel=1e-6)  # scale-invariant
    assert effective_rank(orthogonal.T) == pytest.approx(16, rel=1e-4)  # fewer images than dimensions
    weights = torch.tensor([8.0] * 2 + [4.0] * 4 + [0.0] * 10)  # of a sum of 32: 1/4 twice, 1/8 four times
    assert effective_rank(orthogonal * weights) == pytest.approx(math.exp(math.log(4) / 2 + math.log(8) / 2), rel=1e-4)


@pytest.mark.parametrize("features", [torch.ones(1, 192), torch.ones(50, 192), torch.rand(192).expand(50, 192),
                                      torch.zeros(50, 192)])
def test_one_image_and_equal_features_have_rank_1(features):
    assert effective_rank(features) == pytest.approx(1, abs=1e-3)


def test_features_that_overflow_have_no_rank():
    for value in (math.inf, math.nan):
        assert math.isnan(effective_rank(torch.tensor([[1.0, value], [0.0, 1.0]])))
    assert effective_rank(torch.full((3, 2), 3e38)) == pytest.approx(1, abs=1e-3)  # whose float32 norm overflows
