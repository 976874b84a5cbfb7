import pytest
import torch
from sklearn.metrics import auc, precision_recall_curve

from evaluation.ranking import average_precision, mean_average_precision


def test_average_precision_by_hand_with_junk():
    # without junk 7 and 8: 3 (negative), 1 (positive), 5 (negative), 2 (positive); 0 is never retrieved
    ap, precisions = average_precision(torch.tensor([7, 3, 1, 8, 5, 2]), [0, 1, 2], [7, 8], ks=(1, 2, 4, 10))
    # trapezoids of width 1/3: from precision 0/1 to 1/2, from 1/3 to 2/4
    assert ap == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 3)
    assert precisions == [0, 1 / 2, 2 / 4, 2 / 4]
    assert average_precision(torch.tensor([1, 7, 2, 0, 3]), [0, 1, 2], [7])[0] == 1


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_area_under_curve_of_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(200, generator=generator)
    positives = torch.randperm(200, generator=generator)[:17]
    junk = [i for i in torch.randperm(200, generator=generator)[:30].tolist() if i not in positives.tolist()]
    ap, precisions = average_precision(score.argsort(descending=True), positives, junk)
    kept = torch.tensor([i for i in range(200) if i not in junk])
    truth = torch.isin(kept, positives)
    precision, recall, _ = precision_recall_curve(truth.numpy(), score[kept].numpy())
    assert ap == pytest.approx(auc(recall, precision), abs=1e-6)
    first = truth[score[kept].argsort(descending=True)]
    assert precisions == pytest.approx([first[:k].double().mean().item() for k in (1, 5, 10)])


def test_precision_beyond_the_last_positive():
    assert average_precision(torch.tensor([4, 3, 2, 1, 0]), [4, 3])[1] == [1, 1, 1]  # 2 of 2, not 2 of 5


def test_no_positives_and_none_retrieved():
    assert average_precision(torch.tensor([1, 2]), [], [1]) is None
    assert average_precision(torch.tensor([1, 2]), [5], [1]) == (0, [0, 0, 0])
    assert mean_average_precision([None, (0.5, [1, 0]), (1.0, [1, 1])]) == (0.75, [1, 0.5])
