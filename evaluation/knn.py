"""The judge: weighted k-nearest-neighbour classification of frozen features.

    scores = knn_classifier(bank, bank_labels, queries, query_labels)    # {10: (top-1, top-5), ...}

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4;
Caron et al. 2021, section 4. There is nothing to tune and nothing to train, so it shows what the features
hold. This file needs torch and nothing else.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F


@torch.no_grad()
def knn_classifier(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200), temperature=0.07, memory_mb=1024,
                   device="cpu"):
    """Weighted k-NN accuracy: each neighbour votes for its class with weight exp(cosine / temperature).

    Under a process group all processes must call this with the same features; each asks about its share.

    Args:
        bank [M, D], bank_labels [M]: features to look neighbours up in, and their classes.
        queries [Q, D], query_labels [Q]: features to classify, and their true classes.
        ks: numbers of neighbours; those beyond the bank are clamped to it.
        memory_mb: bound on the similarities held at once; the bank is held once more, normalised.
        device: on CUDA the bank is held in float16.

    Returns:
        {k: (top-1, top-5)} in percent. Classes without a vote rank behind the others, by their number;
        with fewer than five neighbours only the first k classes count.
    """
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    bank = F.normalize(bank.float(), dim=1).to(device, dtype)
    bank_labels = bank_labels.to(device)
    num_classes, num_queries = int(max(bank_labels.max(), query_labels.max())) + 1, len(queries)
    together = dist.is_available() and dist.is_initialized()
    if together:
        share = slice(dist.get_rank(), None, dist.get_world_size())
        queries, query_labels = queries[share], query_labels[share]
    ks = sorted({min(k, len(bank)) for k in ks})
    correct = {k: torch.zeros(2, dtype=torch.int64, device=device) for k in ks}
    # A block of similarities, rows x columns, is held about three times: itself, and its sorted part twice.
    rows = min(max(len(queries), 1), 1024)
    columns = min(max(ks[-1], memory_mb * 2**20 // (12 * rows)), len(bank))
    memory = torch.empty(rows, columns, dtype=dtype, device=device)  # once: fresh memory costs more than it holds
    for first in range(0, len(queries), rows):
        block = F.normalize(queries[first:first + rows].float(), dim=1).to(device, dtype)
        similarity, neighbours = nearest(block, bank, ks[-1], memory[:len(block)])
        # Votes are relative, so the nearest one is given weight 1: no temperature overflows.
        weights = ((similarity - similarity[:, :1]).float() / temperature).exp()  # [rows, k]
        truth = query_labels[first:first + rows].to(device).view(-1, 1)
        for k in ks:
            votes = torch.zeros(len(block), num_classes, device=device)
            votes.scatter_add_(1, bank_labels[neighbours[:, :k]], weights[:, :k])
            best = votes.argsort(dim=1, descending=True, stable=True)[:, :min(5, k)]
            correct[k] += torch.stack(((best[:, :1] == truth).sum(), (best == truth).sum()))
    if together:
        for hits in correct.values():
            dist.all_reduce(hits)
    return {k: tuple((100 * hits / num_queries).tolist()) for k, hits in correct.items()}


def nearest(queries, bank, k, memory):
    """The k bank rows most similar to each query, as many at a time as `memory` [R, columns] has columns.

    queries [R, D], bank [M, D] -> similarities [R, k], descending, and indices [R, k].
    """
    similarity = indices = None
    for first in range(0, len(bank), memory.shape[1]):
        part = bank[first:first + memory.shape[1]]
        block = torch.mm(queries, part.T, out=memory[:, :len(part)])
        s, i = largest(block, min(k, block.shape[1]))
        i += first
        if similarity is not None:
            s, i = torch.cat((similarity, s), dim=1), torch.cat((indices, i), dim=1)
            s, order = s.topk(min(k, s.shape[1]), dim=1)
            i = i.gather(1, order)
        similarity, indices = s, i
    return similarity, indices


def largest(x, k):
    """torch.topk of the rows of x [R, N], in less time: groups of columns are judged by their largest first.

    A group whose largest is not among the k largest of the groups' holds none of the k largest of all.
    """
    size = math.isqrt(x.shape[1] // k)
    count = x.shape[1] // max(size, 1)
    if size < 2:
        return x.topk(k, dim=1)
    # group j is made of columns j, j + count, j + 2 count ...; those beyond size * count belong to none
    best = x[:, :size * count].unflatten(1, (size, count)).amax(dim=1)
    groups = best.topk(k, dim=1, sorted=False).indices.unsqueeze(1)  # [R, 1, k]
    columns = (groups + count * torch.arange(size, device=x.device).view(-1, 1)).flatten(1)
    rest = torch.arange(size * count, x.shape[1], device=x.device).expand(len(x), -1)
    columns = torch.cat((columns, rest), dim=1)
    values, places = x.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = torch.randn(10, 64)
    labels = torch.arange(2000) % 10
    features = centres[labels] + 2.5 * torch.randn(2000, 64)
    for k, (top1, top5) in knn_classifier(features[500:], labels[500:], features[:500], labels[:500]).items():
        print(f"k {k:3d}  top-1 {top1:5.1f}%  top-5 {top5:5.1f}%  (ten noisy clusters, chance 10%)")
