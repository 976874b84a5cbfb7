import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation.knn import knn_classifier, largest, nearest


def parts(g):
    return g["train_features"], g["train_labels"], g["test_features"], g["test_labels"]


def test_equals_the_reference(golden):
    g = golden("knn")
    for k, expected in golden("knn.json")["k -> [top1 %, top5 %]"].items():
        assert knn_classifier(*parts(g), ks=[int(k)])[int(k)] == pytest.approx(expected, abs=1e-4)


def test_equals_scikit_learn(golden):
    g = golden("knn")
    unit = [torch.nn.functional.normalize(g[f"{part}_features"]).numpy() for part in ("train", "test")]
    for k in (3, 20, 200):
        theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
        expected = 100 * theirs.fit(unit[0], g["train_labels"]).score(unit[1], g["test_labels"])
        assert knn_classifier(*parts(g), ks=[k])[k][0] == pytest.approx(expected, abs=0.01)


def test_blocks_of_the_bank_change_nothing():
    torch.manual_seed(0)
    queries, bank = torch.randn(7, 5), torch.randn(50, 5)
    similarity, indices = nearest(queries, bank, 6, torch.empty(len(queries), 50))
    for columns in (6, 7, 49):
        s, i = nearest(queries, bank, 6, torch.empty(len(queries), columns))
        assert torch.equal(i, indices) and torch.allclose(s, similarity)
    expected = (queries @ bank.T).sort(dim=1, descending=True)
    assert torch.equal(indices, expected.indices[:, :6])


@pytest.mark.parametrize("rows, columns, k", [(5, 1000, 7), (3, 4097, 200), (4, 50, 50), (2, 9, 2), (1, 8, 1)])
def test_largest_is_topk(rows, columns, k):
    x = torch.randn(rows, columns, generator=torch.manual_seed(0))
    values, indices = largest(x, k)
    expected = x.topk(k, dim=1)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)


def test_small_sets_and_few_classes():
    bank, labels = torch.eye(4), torch.tensor([0, 1, 2, 7])
    scores = knn_classifier(bank, labels, bank[:2], labels[:2], ks=(1, 10, 20), memory_mb=1)
    assert scores == {1: (100.0, 100.0), 4: (100.0, 100.0)}
    unknown = torch.tensor([9])  # a class that the bank lacks
    assert knn_classifier(bank, labels, bank[:1], unknown, ks=(4,)) == {4: (0.0, 0.0)}


def test_low_temperatures_do_not_overflow():
    bank = torch.nn.functional.normalize(torch.ones(40, 8) + 0.01 * torch.randn(40, 8, generator=torch.manual_seed(0)))
    labels = torch.ones(40, dtype=torch.int64)
    labels[0] = 0
    assert knn_classifier(bank, labels, bank[1:], labels[1:], ks=(40,), temperature=0.005)[40][0] == 100
