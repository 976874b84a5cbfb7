import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation.knn import find_neighbors, knn_classifier, knn_predict


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
        assert knn_classifier(**features, ks=[k])[k][0] == pytest.approx(expected, abs=0.01)


def test_predictions_equal_scikit_learn(features):
    """More than one block of 1024; the shares of the votes are its probabilities."""
    train, test = (torch.nn.functional.normalize(features[f"{part}_features"]) for part in ("train", "test"))
    test = test.repeat(1 + 1500 // len(test), 1)
    classifier = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    expected = classifier.fit(train.numpy(), features["train_labels"]).predict_proba(test.numpy())
    classes, shares = knn_predict(features["train_features"], features["train_labels"], 3 * test, k=20)
    np.testing.assert_allclose(shares[:, classifier.classes_], expected, atol=1e-4)
    assert shares.sum(dim=1).allclose(torch.ones(len(test))) and torch.equal(classes, shares.argmax(dim=1))
    top1 = 100 * (classes[:len(features["test_labels"])] == features["test_labels"]).double().mean().item()
    assert top1 == pytest.approx(knn_classifier(**features, ks=[20])[20][0], abs=1e-4)


def test_of_tied_classes_the_first_is_predicted():
    classes, shares = knn_predict(torch.ones(4, 2), torch.tensor([3, 1, 3, 1]), torch.ones(1, 2), k=100)
    assert classes.tolist() == [1] and shares.tolist() == [[0, 0.5, 0, 0.5]]


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
