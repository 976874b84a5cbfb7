"""Weighted k-NN classification of frozen features.

    accuracies = knn_classifier(train_features, train_labels, test_features, test_labels)    # {10: (top-1, top-5), ...}

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
                   device: str | torch.device = "cpu", return_predictions: bool = False):
    """Weighted k-NN accuracy: each neighbor votes for its class with weight exp(cosine similarity / temperature).

    Under a process group all processes must call this with the same features; each classifies its share of the test
    features.

    Args:
        train_features, train_labels: [M, D] and [M], the possible neighbors and their classes.
        test_features, test_labels: [Q, D] and [Q], the features to classify and their true classes.
        ks: numbers of neighbors, clamped to M.
        memory_mb: bound on the similarities held at once; a normalized copy of the train features comes on top.
        device: where similarities are computed, in float32.
        return_predictions: also return {k: class of each test feature [Q], on the CPU}.

    Returns:
        {k: (top-1, top-5)} in percent. Classes without a vote rank behind the others, in the order of their indices;
        for k < 5, top-5 counts the first k classes only.
    """
    train_features = F.normalize(train_features.float(), dim=1).to(device)
    train_labels = train_labels.to(device)
    num_classes, num_test = int(max(train_labels.max(), test_labels.max())) + 1, len(test_labels)
    distributed = dist.is_available() and dist.is_initialized()
    share = slice(dist.get_rank(), None, dist.get_world_size()) if distributed else slice(None)
    ks = sorted({min(k, len(train_features)) for k in ks})
    correct = {k: torch.zeros(2, dtype=torch.int64, device=device) for k in ks}
    predicted = {k: torch.zeros(num_test, dtype=torch.int64, device=device) for k in ks}
    # a block of similarities [rows, columns] takes about three times its size: itself, and the copies of its top k
    rows = min(len(test_features), 1024)
    columns = min(max(ks[-1], memory_mb * 2**20 // (12 * rows)), len(train_features))
    buffer = torch.empty(rows, columns, device=device)  # allocated once, which saves time
    parts = (x[share].split(rows) for x in (test_features, test_labels, torch.arange(num_test, device=device)))
    for features, labels, indices in zip(*parts):
        features, labels = F.normalize(features.float(), dim=1).to(device), labels.to(device).view(-1, 1)
        with disable_tf32() if features.is_cuda else contextlib.nullcontext():
            similarity, neighbors = find_neighbors(features, train_features, ks[-1], buffer[:len(features)])
        # relative to the nearest neighbor, so that no temperature overflows
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # [rows, k]
        for k in ks:
            votes = torch.zeros(len(features), num_classes, device=device)
            votes.scatter_add_(1, train_labels[neighbors[:, :k]], weights[:, :k])
            predictions = votes.argsort(dim=1, descending=True, stable=True)[:, :min(5, k)]
            predicted[k][indices] = predictions[:, 0]
            correct[k] += torch.stack(((predictions[:, :1] == labels).sum(), (predictions == labels).sum()))
    if distributed:
        for sums in (*correct.values(), *predicted.values()):
            dist.all_reduce(sums)
    accuracies = {k: tuple((100 * counts / num_test).tolist()) for k, counts in correct.items()}
    return (accuracies, {k: x.cpu() for k, x in predicted.items()}) if return_predictions else accuracies


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
