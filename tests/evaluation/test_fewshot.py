import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from evaluation.fewshot import draw_images, fewshot_classifier, fit_nearest_class_mean

LABELS = torch.arange(400) % 7 % 5  # 58 or 57 images of classes 2 to 4, 115 and 114 of classes 0 and 1


def clusters(labels, seed):
    """Overlapping classes in features that are not centered."""
    centers = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    return centers[labels] + torch.randn(len(labels), 12, generator=torch.Generator().manual_seed(seed)) + 2


def test_draws_have_so_many_images_of_each_class():
    sizes = LABELS.bincount()
    assert sizes.tolist() == [115, 114, 57, 57, 57]
    for amount, expected in ((1, [1] * 5), (57, [57] * 5), (0.001, [1] * 5), (0.1, [12, 11, 6, 6, 6]),
                             (1.0, sizes.tolist())):
        rows = draw_images(LABELS, amount, seed=3)
        assert LABELS[rows].bincount().tolist() == expected
        assert rows.unique().equal(rows)  # ascending, each once
    assert set(draw_images(LABELS, 2, seed=3).tolist()) < set(draw_images(LABELS, 10, seed=3).tolist())
    with pytest.raises(ValueError, match="58 images of each class, of one with 57"):
        draw_images(LABELS, 58, seed=3)


def test_every_image_is_drawn_equally_often():
    counts = sum(torch.zeros(400).index_fill(0, draw_images(LABELS, 19, seed), 1) for seed in range(600))
    expected = 600 * 19 / LABELS.bincount()[LABELS]  # binomial, at most 4.5 standard deviations
    assert ((counts - expected).abs() < 4.5 * (expected * (1 - expected / 600)).sqrt()).all()


def test_nearest_class_mean_equals_scikit_learn():
    x, queries = clusters(LABELS, 1), clusters(LABELS, 2)
    layer = fit_nearest_class_mean(x, LABELS, 5)
    theirs = NearestCentroid().fit(x.double(), LABELS)
    torch.testing.assert_close(layer.weight, torch.from_numpy(theirs.centroids_))
    assert layer(queries.double()).argmax(dim=1).tolist() == theirs.predict(queries.double()).tolist()


def test_accuracies_equal_scikit_learn_on_the_same_draws():
    x, queries, test_labels = clusters(LABELS, 1), clusters(LABELS[:250], 2), LABELS[:250]
    amounts = [2, 10, 0.1]
    results = fewshot_classifier(x, LABELS, queries, test_labels, amounts, draws=3, seed=5)
    test_x = normalize(queries.double())
    for amount, found in zip(amounts, results, strict=True):
        for draw in range(3):
            rows = draw_images(LABELS, amount, 5 + draw)
            labeled = normalize(x[rows].double()), LABELS[rows]
            for name, theirs in (("logistic", LogisticRegression(C=100, tol=1e-6, max_iter=1000)),
                                 ("nearest_class_mean", NearestCentroid())):
                expected = 100 * theirs.fit(*labeled).score(test_x, test_labels)
                assert found[name][draw] == pytest.approx(expected, abs=0.2) and len(found[name]) == 3
    assert max(results[0]["logistic"]) < min(results[1]["logistic"])  # 2 and 10 images of each class
