"""Weighted k-NN classification of frozen features.

    accuracies = knn_classifier(train_features, train_labels, test_features, test_labels)    # {10: (top-1, top-5), ...}
    classes, probabilities = knn_predict(train_features, train_labels, features, k=20)

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4; Caron et al.
2021, section 4. Nothing is trained and nothing is tuned, so the accuracy measures the features alone. Needs torch only.
"""

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_classifier(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
                   ks: Iterable[int] = (10, 20, 100, 200), temperature: float = 0.07, memory_mb: int = 1024,
                   device: str | torch.device = "cpu") -> dict[int, tuple[float, float]]:
    """Weighted k-NN accuracy: each neighbor votes for its class with weight exp(cosine similarity / temperature).

    Under a process group all processes must call this with the same features; each classifies its share of the test
    features.

    Args:
        train_features, train_labels: [M, D] and [M], the possible neighbors and their classes.
        test_features, test_labels: [Q, D] and [Q], the features to classify and their true classes.
        ks: numbers of neighbors, clamped to M.
        memory_mb: bound on the similarities held at once; a normalized copy of the train features comes on top.
        device: where similarities are computed, in float32.

    Returns:
        {k: (top-1, top-5)} in percent. Classes without a vote rank behind the others, in the order of their indices;
        for k < 5, top-5 counts the first k classes only.
    """
    distributed = dist.is_available() and dist.is_initialized()
    share = slice(dist.get_rank(), None, dist.get_world_size()) if distributed else slice(None)
    num_classes, num_test = int(max(train_labels.max(), test_labels.max())) + 1, len(test_labels)
    ks, labels = sorted({min(k, len(train_features)) for k in ks}), test_labels[share].to(device).view(-1, 1)
    correct = {k: torch.zeros(2, dtype=torch.int64, device=device) for k in ks}
    for rows, k, votes in iter_votes(train_features, train_labels, test_features[share], ks, num_classes, temperature,
                                     memory_mb, device):
        hits = votes.argsort(dim=1, descending=True, stable=True)[:, :min(5, k)] == labels[rows]
        correct[k] += torch.stack((hits[:, 0].sum(), hits.sum()))
    if distributed:
        for counts in correct.values():
            dist.all_reduce(counts)
    return {k: tuple((100 * counts / num_test).tolist()) for k, counts in correct.items()}


@torch.no_grad()
def knn_predict(train_features: Tensor, train_labels: Tensor, features: Tensor, k: int = 20, temperature: float = 0.07,
                memory_mb: int = 1024, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Weighted k-NN predictions for features [Q, D]: classes [Q], and the share of the votes of each class [Q, C].

    The other arguments are those of `knn_classifier`; C is the largest train label + 1.
    """
    blocks = iter_votes(train_features, train_labels, features, [min(k, len(train_features))],
                        int(train_labels.max()) + 1, temperature, memory_mb, device)
    shares = torch.cat([(votes / votes.sum(dim=1, keepdim=True)).cpu() for _, _, votes in blocks])
    return shares.argmax(dim=1), shares


def iter_votes(train_features, train_labels, features, ks, num_classes, temperature, memory_mb, device):
    """Yield (slice of the features, k, their votes for each class [rows, C]), for ascending ks of at most M."""
    train_features = F.normalize(train_features.float(), dim=1).to(device)
    train_labels = train_labels.to(device)
    # a block of similarities [rows, columns] takes about three times its size: itself, and the copies of its top k
    block = min(max(1, len(features)), 1024)
    columns = min(max(ks[-1], memory_mb * 2**20 // (12 * block)), len(train_features))
    buffer = torch.empty(block, columns, device=device)  # allocated once, which saves time
    for start in range(0, len(features), block):
        rows = slice(start, start + block)
        x = F.normalize(features[rows].float(), dim=1).to(device)
        with disable_tf32() if x.is_cuda else contextlib.nullcontext():
            similarity, neighbors = find_neighbors(x, train_features, ks[-1], buffer[:len(x)])
        # relative to the nearest neighbor, so that no temperature overflows
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # [rows, k]
        for k in ks:
            votes = torch.zeros(len(x), num_classes, device=device)
            yield rows, k, votes.scatter_add_(1, train_labels[neighbors[:, :k]], weights[:, :k])


@contextlib.contextmanager
def disable_tf32():
    """Products in full float32 on CUDA: TF32 gives other neighbors."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def find_neighbors(features: Tensor, train_features: Tensor, k: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The k most similar train features [M, D] of each feature [R, D], in chunks that fit `buffer` [R, columns >= k].

    Returns similarities [R, k], descending, and indices [R, k].
    """
    similarity = indices = None
    for start in range(0, len(train_features), buffer.shape[1]):
        chunk = train_features[start:start + buffer.shape[1]]
        block = torch.mm(features, chunk.T, out=buffer[:, :len(chunk)])
        s, i = block.topk(min(k, len(chunk)), dim=1)
        i += start
        if start:
            s, order = torch.cat((similarity, s), dim=1).topk(k, dim=1)
            i = torch.cat((indices, i), dim=1).gather(1, order)
        similarity, indices = s, i
    return similarity, indices
