"""How good a ranking is: average precision, and precision among the first, with junk left out.

    judge(order, positives, junk)                # one query: (average precision, [precision at 1, 5, 10])
    mean_judgement(judgements)                   # (mAP, [mP@1, mP@5, mP@10])

The definitions are those of Oxford, Paris, Holidays and Copydays, which sum trapezoids below the curve of precision
over recall (Philbin et al. 2007; Radenovic et al. 2018, section 4). This file needs torch and nothing else.
"""

import torch


def average_precision(order, positives, junk=(), ks=(1, 5, 10)):
    """What one query's ranking is worth.

    Args:
        order: int64 [M], pictures from the nearest on; those that it does not name count as never found.
        positives: numbers of the pictures that should come first.
        junk: numbers of those that are passed over wherever they come.
        ks: at which ranks precision is wanted. Beyond the last positive that was found none can come, so precision is
            taken there at the latest, as the benchmarks do.

    Returns:
        average precision and a list of precisions, from 0 to 1; None if nothing should be found.
    """
    positives, junk = (torch.as_tensor(x, dtype=torch.int64) for x in (positives, junk))
    if not len(positives):
        return None
    order = order[~torch.isin(order, junk)]
    places = torch.isin(order, positives).nonzero().flatten().double()  # from 0 on
    found = torch.arange(len(places), dtype=torch.float64)  # positives before each
    before = torch.where(places > 0, found / places.clamp(min=1), 1.0)
    after = (found + 1) / (places + 1)
    last = int(places[-1]) + 1 if len(places) else 1
    precisions = [(places < min(k, last)).sum().item() / min(k, last) for k in ks]
    return (before + after).sum().item() / 2 / len(positives), precisions


def mean_average_precision(judgements):
    """Means over the queries that have positives: mAP and a list of mean precisions.

    Raises:
        ValueError: no query has any.
    """
    judgements = [judgement for judgement in judgements if judgement]
    if not judgements:
        raise ValueError("no query has a picture that it should find")
    precisions = zip(*(precisions for _, precisions in judgements))
    return sum(ap for ap, _ in judgements) / len(judgements), [sum(x) / len(judgements) for x in precisions]


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    relevant, junk = list(range(10)), [10, 11]
    print("100 pictures, 10 to be found, ranked by a score with noise\n noise    AP   P@1   P@5  P@10")
    for noise in (0.0, 0.5, 1.0, 4.0):
        score = (torch.arange(100) < 10) + noise * torch.randn(100, generator=generator)
        ap, (p1, p5, p10) = average_precision(score.argsort(descending=True), relevant, junk)
        print(f"{noise:6.1f} {ap:5.2f} {p1:5.2f} {p5:5.2f} {p10:5.2f}")
