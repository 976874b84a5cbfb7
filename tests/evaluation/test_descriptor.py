import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch.testing import assert_close

from evaluation.descriptor import cls_and_gem_features, fit_whitening, multi_scale_features
from vit import VisionTransformer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4).eval()


def resize_bilinear(image, scale):
    """Bilinear by its definition: pixel i of the result lies at (i + 0.5) / scale - 0.5 of the image."""
    x = image.double().numpy()
    for axis in (2, 3):
        length = x.shape[axis]
        positions = ((np.arange(int(length * scale)) + 0.5) / scale - 0.5).clip(0, length - 1)
        left = np.floor(positions).astype(int)
        share = (positions - left).reshape([-1 if i == axis else 1 for i in range(4)])
        x = x.take(left, axis) * (1 - share) + x.take((left + 1).clip(max=length - 1), axis) * share
    return torch.from_numpy(x).float()


@torch.no_grad()
def test_multi_scale_equals_the_sum_over_scales(model):
    image = torch.randn(1, 3, 70, 101, generator=torch.Generator().manual_seed(1))
    whole = model(image[..., :64, :96])
    smaller = model(resize_bilinear(image, 0.5 ** 0.5)[..., :48, :64])
    half = model(resize_bilinear(image, 0.5)[..., :32, :48])
    assert_close(multi_scale_features(model, image), F.normalize(whole + smaller + half), atol=1e-4, rtol=0)
    assert_close(multi_scale_features(model, image, (1.0,)), F.normalize(whole))
    assert_close(multi_scale_features(model, image, (1.0, 0.5)), F.normalize(whole + half))
    assert multi_scale_features(model, image[..., :9, :70]).isfinite().all()  # half of it is less than a patch


@torch.no_grad()
def test_cls_and_gem_by_formula(model):
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    tokens = model.get_intermediate_layers(images)[0].double().numpy()
    pooled = (np.maximum(tokens[:, 1:], 1e-6) ** 4).mean(axis=1) ** 0.25
    expected = torch.from_numpy(np.hstack((tokens[:, 0], pooled)))
    assert_close(cls_and_gem_features(model, images).double(), expected, atol=1e-5, rtol=1e-5)
    assert_close(cls_and_gem_features(model, images)[:, :32], model(images))


def correlated(count, offset=0.0):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((count, 6)) @ rng.standard_normal((6, 6)) + offset).float()


def test_whitening_equals_scikit_learn_for_zero_mean():
    features = correlated(500)
    features -= features.mean(dim=0)
    pca = PCA(whiten=True).fit(features.numpy())
    theirs = torch.from_numpy(pca.transform(features.numpy())) * (500 / 499) ** 0.5
    mine = fit_whitening(features)(features)
    assert_close(mine @ mine.T, (theirs @ theirs.T).float(), atol=1e-3, rtol=1e-4)  # equal up to a rotation
    assert mine.dtype == torch.float32


def test_whitening_subtracts_the_mean_and_uses_moments_about_zero():
    features = correlated(500, offset=3.0)
    x = features.double().numpy()
    moments, axes = np.linalg.eigh(x.T @ x / 500)
    expected = (x - x.mean(axis=0)) @ axes / np.sqrt(moments)
    mine = fit_whitening(features)(features).double().numpy()
    assert np.allclose(mine @ mine.T, expected @ expected.T, atol=1e-4)


def test_whitening_without_variance_stays_finite():
    features = torch.cat((correlated(50), torch.zeros(50, 3)), dim=1)
    white = fit_whitening(features)(torch.randn(10, 9, generator=torch.Generator().manual_seed(0)))
    assert white.isfinite().all() and white.abs().max() < 1e4
