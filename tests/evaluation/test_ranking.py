import pytest
import torch
from sklearn.metrics import auc, precision_recall_curve

from evaluation.ranking import average_precision, mean_average_precision


def test_by_hand_with_junk():
    # junk 7 and 8 pass; what is left: 3 (wrong), 1 (right), 5 (wrong), 2 (right); 0 is never found
    ap, precisions = average_precision(torch.tensor([7, 3, 1, 8, 5, 2]), [0, 1, 2], [7, 8], ks=(1, 2, 4, 10))
    # trapezoids of width 1/3: from precision 0/1 to 1/2, from 1/3 to 2/4
    assert ap == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 3)
    assert precisions == [0, 1 / 2, 2 / 4, 2 / 4]
    assert average_precision(torch.tensor([1, 7, 2, 0, 3]), [0, 1, 2], [7])[0] == 1


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns_area_below_the_curve(seed):
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


def test_precision_beyond_the_last_that_could_come():
    assert average_precision(torch.tensor([4, 3, 2, 1, 0]), [4, 3])[1] == [1, 1, 1]  # 2 of 2, not 2 of 5


def test_nothing_to_find_and_nothing_found():
    assert average_precision(torch.tensor([1, 2]), [], [1]) is None
    assert average_precision(torch.tensor([1, 2]), [5], [1]) == (0, [0, 0, 0])
    assert mean_average_precision([None, (0.5, [1, 0]), (1.0, [1, 1])]) == (0.75, [1, 0.5])
    with pytest.raises(ValueError, match="no query has a picture"):
        mean_average_precision([None])
