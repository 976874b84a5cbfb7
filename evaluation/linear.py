"""Linear probe: many linear classifiers on the same frozen features, trained at once.

    grid = [(lr, weight_decay) for lr in (0.01, 0.1, 1) for weight_decay in (0, 1e-4)]
    classifiers = fit_classifiers(features, labels, num_classes, grid)                     # one per pair
    classifier, best, accuracies = fit_best_classifier(features, labels, num_classes, grid)
    top1 = linear_probe_accuracy(train_features, train_labels, test_features, test_labels)
    layer = fit_logistic_regression(features, labels, num_classes, C=1.0)                  # without learning rates
    layer, best, accuracies = fit_best_logistic_regression(features, labels, num_classes)

Softmax regression by SGD with momentum and a cosine schedule, as in Caron et al. 2021 (section 4), but on features that
are extracted once, with all classifiers of the grid in one batched matmul. Features are standardized, so that one grid
suits all backbones. Or logistic regression: the same model, with an L2 penalty, to convergence. Needs torch only.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # for batch size 256
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
COSTS = tuple(10.0**power for power in range(-4, 4))  # C of logistic regression


class LinearClassifiers:
    """G linear classifiers: features [B, D] -> logits [G, B, C].

    Args:
        mean, std: [D], which standardize the features.
        weight, bias: [G, D, C] and [G, 1, C].
    """

    def __init__(self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor):
        self.mean, self.std, self.weight, self.bias = mean, std, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, ((x - self.mean) / self.std).expand(len(self.weight), -1, -1), self.weight)

    def to_linear(self, g: int = 0) -> torch.nn.Linear:
        """Classifier g as a torch.nn.Linear on features that are not standardized."""
        layer = torch.nn.Linear(*self.weight.shape[1:], device=self.weight.device)  # D, C
        weight = (self.weight[g] / self.std.view(-1, 1)).T  # [C, D]
        layer.load_state_dict({"weight": weight, "bias": self.bias[g, 0] - weight @ self.mean})
        return layer.requires_grad_(False)


def fit_classifiers(features: Tensor, labels: Tensor, num_classes: int, grid: list[tuple[float, float]],
                    epochs: int = 100, batch_size: int = 1024, momentum: float = 0.9, seed: int = 0,
                    progress: Callable[[int], object] = lambda count: None) -> LinearClassifiers:
    """Train one classifier per (learning rate, weight decay).

    Args:
        features, labels: [M, D] and [M], on the device to train on.
        grid: G pairs (lr, weight_decay); lr is the peak, for this batch size.
        progress: called with the number of images of each batch.

    Returns:
        G classifiers; those that diverged are not finite.
    """
    (M, D), G, C, device = features.shape, len(grid), num_classes, features.device
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)  # constant features
    lr, weight_decay = (torch.tensor(values, device=device).view(G, 1, 1) for values in zip(*grid))
    weight, bias = torch.zeros(G, D, C, device=device), torch.zeros(G, 1, C, device=device)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    generator, batch_size = torch.Generator().manual_seed(seed), min(batch_size, M)
    steps_per_epoch = M // batch_size
    total_steps = epochs * steps_per_epoch
    for step in range(total_steps):
        start = step % steps_per_epoch * batch_size
        if start == 0:
            order = torch.randperm(M, generator=generator).to(device)
        batch = order[start:start + batch_size]
        x = ((features[batch] - mean) / std).expand(G, -1, -1)  # [G, B, D]
        grad = torch.baddbmm(bias, x, weight).softmax(dim=-1)
        grad[:, torch.arange(len(batch), device=device), labels[batch]] -= 1  # cross-entropy with respect to the logits
        grad /= len(batch)
        weight_momentum.mul_(momentum).baddbmm_(x.mT, grad).add_(weight * weight_decay)
        bias_momentum.mul_(momentum).add_(grad.sum(dim=1, keepdim=True))
        scheduled_lr = lr * (0.5 + 0.5 * math.cos(math.pi * step / total_steps))
        weight -= scheduled_lr * weight_momentum
        bias -= scheduled_lr * bias_momentum
        progress(len(batch))
    return LinearClassifiers(mean, std, weight, bias)


def holdout_mask(count: int) -> Tensor:
    """Boolean mask [count] of a random tenth, always the same one; random because labels may be in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order < max(1, round(count / 10))


@torch.no_grad()
def predict_classes(classifiers: LinearClassifiers, features: Tensor, batch_size: int = 8192) -> Tensor:
    """Classes of features [M, D] by each of G classifiers: [G, M]."""
    return torch.cat([classifiers(part).argmax(dim=-1) for part in features.split(batch_size)], dim=1)


def fit_best_classifier(features: Tensor, labels: Tensor, num_classes: int, grid: list[tuple[float, float]],
                        batch_size: int = 1024, **kwargs) -> tuple[LinearClassifiers, int, list[float]]:
    """Select a pair of the grid on the held-out tenth of `holdout_mask`, then train with it on all features.

    Args:
        grid: pairs (lr, weight_decay); lr is for batch size 256 and scaled linearly with the batch size.
        kwargs: see `fit_classifiers`.

    Returns:
        the classifier (G = 1), the index of its pair, and the held-out accuracy of each pair in percent, 0 if it
        diverged.
    """
    kwargs["batch_size"] = min(batch_size, len(features))
    grid = [(lr * kwargs["batch_size"] / 256, weight_decay) for lr, weight_decay in grid]
    held_out = holdout_mask(len(features)).to(features.device)
    classifiers = fit_classifiers(features[~held_out], labels[~held_out], num_classes, grid, **kwargs)
    correct = predict_classes(classifiers, features[held_out]) == labels[held_out]
    accuracies = 100 * correct.sum(dim=1) / correct.shape[1]
    accuracies[~classifiers.weight.flatten(1).isfinite().all(dim=1)] = 0
    best = accuracies.argmax().item()
    return fit_classifiers(features, labels, num_classes, [grid[best]], **kwargs), best, accuracies.tolist()


def linear_probe_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
                          **kwargs) -> float:
    """Top-1 accuracy in percent of the best classifier of LRS x WEIGHT_DECAYS, see `fit_best_classifier`.

    Args:
        train_features, train_labels, test_features, test_labels: [M, D], [M], [Q, D], [Q], on one device.
    """
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    grid = [(lr, weight_decay) for lr in LRS for weight_decay in WEIGHT_DECAYS]
    classifier, _, _ = fit_best_classifier(train_features, train_labels, num_classes, grid, **kwargs)
    return 100 * (predict_classes(classifier, test_features)[0] == test_labels).float().mean().item()


# ---- logistic regression ----

def fit_logistic_regression(features: Tensor, labels: Tensor, num_classes: int, C: float = 1.0, max_iter: int = 1000,
                            chunk: int = 8192) -> nn.Linear:
    """L2-regularized multinomial logistic regression by L-BFGS, in float64: features [M, D] -> logits [M, num_classes].

    Minimizes 1/2 ||weight||^2 + C * sum of the M cross-entropies, as LogisticRegression of scikit-learn does; of
    two classes it has one weight vector, which makes it the same with 2 * C. The same minimum is found faster in terms
    of features that are centered and have a mean square norm of 1.

    Args:
        features, labels: [M, D] and [M], on the device to compute on, which must have float64.
        max_iter: L-BFGS iterations at most.
        chunk: rows that are converted to float64 at a time, which bounds the memory beside the features.
    """
    (M, D), device = features.shape, features.device
    mean = features.mean(dim=0, dtype=torch.float64)
    scale = features.var(dim=0, correction=0).sum().double().sqrt()
    scale = torch.where(scale < 1e-6, 1.0, scale)  # equal features
    weight = torch.zeros(num_classes, D, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, history_size=10, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-7, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = (weight / scale).square().sum() / (2 * C * M)
        loss.backward()
        for x, y in zip(features.split(chunk), labels.split(chunk)):
            logits = F.linear(x.double(), weight / scale, bias - weight @ mean / scale)
            part = F.cross_entropy(logits, y, reduction="sum") / M
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    layer = nn.Linear(D, num_classes, device=device, dtype=torch.float64).requires_grad_(False)
    layer.load_state_dict({"weight": weight / scale, "bias": bias - weight @ mean / scale})
    return layer


def fit_best_logistic_regression(features: Tensor, labels: Tensor, num_classes: int, costs: Sequence[float] = COSTS,
                                 progress: Callable[[int], object] = lambda count: None
                                 ) -> tuple[nn.Linear, int, list[float]]:
    """Select C on the held-out tenth of `holdout_mask`, then fit with it to all features.

    The protocol of DINOv2 (Oquab et al. 2023, dinov2/eval/log_regression.py: 45 values from 1e-6 to 1e5, a random tenth
    held out); Caron et al. 2021 (appendix) use logistic regression on frozen features for few labels. Under a process
    group all processes must call this with the same features; each fits its share of the values.

    Args:
        features, labels, num_classes: see `fit_logistic_regression`.
        costs: values of C.
        progress: called with 1 after each value of this process.

    Returns:
        the layer, the index of its C, and the held-out accuracy of each in percent; of equal ones the smallest C.
    """
    held_out = holdout_mask(len(features)).to(features.device)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    accuracies = torch.zeros(len(costs), dtype=torch.float64)
    for i in range(rank, len(costs), world_size) if len(costs) > 1 else ():
        layer = fit_logistic_regression(features[~held_out], labels[~held_out], num_classes, costs[i])
        accuracies[i] = measure_accuracy(layer, features[held_out], labels[held_out])
        progress(1)
    if distributed:
        dist.all_reduce(accuracies)
    best = accuracies.argmax().item()
    return fit_logistic_regression(features, labels, num_classes, costs[best]), best, accuracies.tolist()


@torch.no_grad()
def measure_accuracy(layer: nn.Linear, features: Tensor, labels: Tensor, chunk: int = 8192) -> float:
    """Top-1 accuracy of a linear classifier in percent."""
    correct = sum((layer(x.to(layer.weight.dtype)).argmax(dim=1) == y).sum().item()
                  for x, y in zip(features.split(chunk), labels.split(chunk)))
    return 100 * correct / len(labels)
