import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation.knn import find_neighbors, knn_classifier


@pytest.fixture
def features(golden):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    return {name: golden("knn")[name] for name in names}


def test_equals_the_reference(golden, features):
    for k, expected in golden("knn.json")["k -> [top1 %, top5 %]"].items():
        assert knn_classifier(**features, ks=[int(k)])[int(k)] == pytest.approx(expected, abs=1e-4)


def test_equals_scikit_learn(features):
    train, test = (torch.nn.functional.normalize(features[f"{part}_features"]).numpy() for part in ("train", "test"))
    for k in (3, 20, 200):
        classifier = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
        expected = 100 * classifier.fit(train, features["train_labels"]).score(test, features["test_labels"])
        accuracies, predicted = knn_classifier(**features, ks=[k], return_predictions=True)
        assert accuracies[k][0] == pytest.approx(expected, abs=0.01)
        assert (predicted[k].numpy() == classifier.predict(test)).mean() > 0.999


def test_neighbors_do_not_depend_on_the_chunk_size():
    torch.manual_seed(0)
    x, train = torch.randn(7, 5), torch.randn(50, 5)
    similarity, indices = find_neighbors(x, train, 6, torch.empty(len(x), 50))
    for columns in (6, 7, 49):
        s, i = find_neighbors(x, train, 6, torch.empty(len(x), columns))
        assert torch.equal(i, indices) and torch.allclose(s, similarity)
    expected = (x @ train.T).sort(dim=1, descending=True)
    assert torch.equal(indices, expected.indices[:, :6])


def test_k_is_clamped_and_classes_may_be_few_or_unknown():
    features, labels = torch.eye(4), torch.tensor([0, 1, 2, 7])
    accuracies = knn_classifier(features, labels, features[:2], labels[:2], ks=(1, 10, 20), memory_mb=1)
    assert accuracies == {1: (100.0, 100.0), 4: (100.0, 100.0)}
    unknown = torch.tensor([9])  # a class that no train feature has
    assert knn_classifier(features, labels, features[:1], unknown, ks=(4,)) == {4: (0.0, 0.0)}


def test_low_temperatures_do_not_overflow():
    x = torch.nn.functional.normalize(torch.ones(40, 8) + 0.01 * torch.randn(40, 8, generator=torch.manual_seed(0)))
    labels = torch.ones(40, dtype=torch.int64)
    labels[0] = 0
    assert knn_classifier(x, labels, x[1:], labels[1:], ks=(40,), temperature=0.005)[40][0] == 100
