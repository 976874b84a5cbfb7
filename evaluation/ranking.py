"""Retrieval metrics: average precision and precision at k, with junk images ignored.

    average_precision(order, positives, junk)    # one query: (AP, [P@1, P@5, P@10])
    mean_average_precision(results)              # over queries: (mAP, [mP@1, mP@5, mP@10])

As defined by Oxford, Paris, Holidays and Copydays: the area under the precision-recall curve by trapezoids (Philbin et
al. 2007; Radenovic et al. 2018, section 4). This file needs torch only.
"""

from collections.abc import Iterable, Sequence

import torch

KS = (1, 5, 10)


def average_precision(order: torch.Tensor, positives: Sequence[int], junk: Sequence[int] = (),
                      ks: Sequence[int] = KS) -> tuple[float, list[float]] | None:
    """Average precision and precision at k of one query.

    Args:
        order: int64 [M], images from the nearest to the farthest; images that are not in it count as never retrieved.
        positives: images that should be retrieved.
        junk: images that are removed from the ranking.
        ks: ranks for precision. As in the benchmarks, a rank beyond the last positive is lowered to that.

    Returns:
        average precision and a list of precisions, from 0 to 1; None if there are no positives.
    """
    positives, junk = (torch.as_tensor(x, dtype=torch.int64) for x in (positives, junk))
    if not len(positives):
        return None
    order = order[~torch.isin(order, junk)]
    ranks = torch.isin(order, positives).nonzero().flatten().double()  # from 0 on
    hits = torch.arange(len(ranks), dtype=torch.float64)  # positives before each
    before = torch.where(ranks > 0, hits / ranks.clamp(min=1), 1.0)
    after = (hits + 1) / (ranks + 1)
    last = int(ranks[-1]) + 1 if len(ranks) else 1
    precisions = [(ranks < min(k, last)).sum().item() / min(k, last) for k in ks]
    return (before + after).sum().item() / 2 / len(positives), precisions


def mean_average_precision(results: Iterable[tuple[float, list[float]] | None]) -> tuple[float, list[float]]:
    """mAP and mean precisions at k, over the queries that have positives.

    Args:
        results: what `average_precision` returned for each query; at least one has positives.
    """
    results = [result for result in results if result]
    precisions = zip(*(precisions for _, precisions in results))
    return sum(ap for ap, _ in results) / len(results), [sum(x) / len(results) for x in precisions]
