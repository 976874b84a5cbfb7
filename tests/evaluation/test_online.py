import math
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.neighbors import KNeighborsClassifier

from data.datasets import open_data
from data.loaders import center_crop_view, random_subset
from evaluation.linear import linear_probe_accuracy
from evaluation.online import append_pixels, detect_collapse, evaluate_online


class Colors(torch.nn.Module):
    """Mean and standard deviation of each channel in each quadrant: [B, 3, 32, 32] -> [B, 24]."""

    embed_dim = 24

    def forward(self, x):
        parts = x.unfold(2, 16, 16).unfold(3, 16, 16)
        return torch.cat((parts.mean(dim=(4, 5)).flatten(1), parts.std(dim=(4, 5)).flatten(1)), dim=1)


def evaluate(model, data=None, with_pixels=False, **more):
    args = dict(global_crops_size=32, knn_images=300, linear_probe=False, batch_size_per_gpu=64, num_workers=0,
                timeout_minutes=1, device=torch.device("cpu"), precision="fp32")
    return evaluate_online(model, data or open_data("shapes:32"), SimpleNamespace(**args | more),
                           with_pixels=with_pixels)


def fit_scikit_learn(train_features):
    """k-NN of the 300 train images, labels of these and of the 60 held-out images."""
    data = open_data("shapes:32")
    y, z = (np.array([images[i][1] for i in range(len(images))])
            for images in (random_subset(data.train_labeled, 300), random_subset(data.val, 60)))
    return KNeighborsClassifier(20, metric="cosine", algorithm="brute",
                                weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(train_features, y), y, z


def test_equals_scikit_learn():
    model, seen = Colors(), []
    model.register_forward_hook(lambda module, images, features: seen.append(features))
    scores, of_pixels, held_out, corrupt = evaluate(model, linear_probe=True)
    assert scores.keys() == {"knn_top1", "knn_top5", "linear_top1", "rankme"} and of_pixels == {} and corrupt == []
    x, q = torch.cat(seen).split([300, 60])  # 60 = 300 / 5
    neighbors, y, z = fit_scikit_learn(x)
    assert scores["knn_top1"] == pytest.approx(100 * neighbors.score(q, z), abs=1e-3)
    best = np.sort(neighbors.predict_proba(q), axis=1)[:, -5]
    of_truth = neighbors.predict_proba(q)[np.arange(60), z]
    assert scores["knn_top5"] == pytest.approx(100 * np.mean(of_truth >= best), abs=1e-3)
    assert scores["linear_top1"] == linear_probe_accuracy(x, torch.tensor(y), q, torch.tensor(z), epochs=333)
    assert torch.equal(held_out.features, q) and held_out.labels.tolist() == z.tolist()
    assert scores["rankme"] == pytest.approx(rank_of(q), rel=1e-4) and 1.5 < scores["rankme"] < 24


def rank_of(features):
    return np.exp(scipy.stats.entropy(scipy.linalg.svdvals(features.double().numpy())))


def test_without_labels_rankme_is_of_training_images():
    model, seen = Colors(), []
    model.register_forward_hook(lambda module, images, features: seen.append(features))
    data = open_data("shapes:32")
    scores, of_pixels, _, corrupt = evaluate(model, data._replace(train_labeled=None, val=None), with_pixels=True)
    assert of_pixels == {} and corrupt == [] and scores == {"rankme": pytest.approx(rank_of(torch.cat(seen)), rel=1e-4)}
    views = torch.stack([center_crop_view(image, 32) for image, _ in random_subset(data.train, 60)])
    torch.testing.assert_close(torch.cat(seen), model(views))


def test_raw_pixels_are_scored_in_the_same_pass():
    model, seen = Colors(), []
    model.register_forward_hook(lambda module, images, features: seen.append(images[0].flatten(1)))
    scores, of_pixels, held_out, _ = evaluate(model, with_pixels=True, linear_probe=True)
    alone, _, features, _ = evaluate(Colors(), linear_probe=True)
    assert scores == alone and torch.equal(held_out.features, features.features)
    x, q = torch.cat(seen).split([300, 60])
    neighbors, _, z = fit_scikit_learn(x)
    assert of_pixels == dict(knn_top1=pytest.approx(100 * neighbors.score(q, z), abs=1e-3), knn_top5=ANY)
    assert of_pixels["knn_top1"] > 25
    assert append_pixels(Colors())(torch.ones(2, 3, 32, 32)).shape == (2, 24 + 3 * 32 * 32)
    assert append_pixels(torch.nn.Flatten())(torch.ones(2, 3, 40, 48)).shape == (2, 3 * 40 * 48 + 3 * 32 * 32)


def test_one_train_image_has_no_linear_probe():
    scores, *_ = evaluate(Colors(), linear_probe=True, knn_images=1)
    assert scores.keys() == {"knn_top1", "knn_top5", "rankme"} and scores["rankme"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("entropy, of_mean, kl, expected", [
    (6.9, 6.93, 0.01, "collapse to uniform: teacher entropy 6.90 of ln K 6.93 and KL near zero"),
    (0.0, 0.01, 0.0, "collapse to one prototype: the entropy of the mean teacher output is 0.010 of ln K 6.93"),
    (3.0, 6.5, 1.0, None), (6.8, 6.9, 0.3, None), (6.9, 6.93, math.nan, None)])
def test_collapse(entropy, of_mean, kl, expected):
    sentence = detect_collapse([(entropy, of_mean, kl)] * 3, 1024)
    assert (expected is None) == (sentence is None) and (expected or "") in (sentence or "")


def test_unstable_teacher():
    def of(*entropies, previous=()):
        stats = [[(entropy, 6.0, 0.5) for entropy in epoch] for epoch in (entropies, previous)]
        return detect_collapse(stats[0], 1024, stats[1])
    assert "unstable teacher: its entropy rose by 4.90 and fell by 1.50 (ln K 6.93)" in of(0.1, 3.0, 5.0, 3.5)
    assert "unstable teacher" in of(5.0, 3.0, 4.5) and of(5.0, 3.0, 4.0) is None
    assert "rose by 3.00 and fell by 3.00" in of(5.0, previous=(5.0, 2.0)) and of(5.0, previous=(2.0, 3.0)) is None
    assert of(6.2, 5.0, 3.0, 2.0) is None and of(1.0, 5.0) is None and of(*[5.0, 5.3] * 50) is None
