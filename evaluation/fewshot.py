"""Few-shot classification of frozen features: logistic regression and nearest class mean on few labels.

    rows = draw_images(labels, 5, seed=0)                                # 5 of each class; 0.01: 1% of each class
    layer = fit_nearest_class_mean(features[rows], labels[rows], num_classes)
    accuracies = fewshot_classifier(train_features, train_labels, test_features, test_labels, [1, 5, 0.01])

Features are L2-normalized. C is not tuned, as there are no labels for it: 100 lies between the 1 of Tian et al. 2020,
"Rethinking few-shot image classification: a good embedding is all you need?", and the 4000 of Assran et al. 2022,
"Masked siamese networks" (logistic_eval.py). Nearest class mean on normalized features is that of Wang et al. 2019,
"SimpleShot". Caron et al. 2021, appendix, have 1% and 10% of the labels of ImageNet.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import all_gather_objects, get_rank, get_world_size
from evaluation.linear import fit_logistic_regression, measure_accuracy

SHOTS = (1, 2, 5, 10)  # images of each class


def draw_images(labels: Tensor, amount: int | float, seed: int) -> Tensor:
    """Indices of random images of each class, ascending; those of a smaller amount are among those of a larger one.

    Args:
        labels: [M].
        amount: an int: images of each class; a float: share of each class, rounded, but at least one image.

    Raises:
        ValueError: a class has fewer images.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # by class, and random within it
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(dim=0) - counts)[labels[order]]  # within its class
    shares = (amount * counts).round().long().clamp(min=1)
    wanted = torch.full_like(counts, amount) if isinstance(amount, int) else shares
    if (counts < wanted).any():
        raise ValueError(f"{amount} images of each class, of one with {counts.min().item()}")
    return order[place < wanted[labels[order]]].sort().values


def fit_nearest_class_mean(features: Tensor, labels: Tensor, num_classes: int) -> nn.Linear:
    """Nearest class mean by Euclidean distance, as a linear layer: features [M, D] -> logits [M, num_classes].

    -1/2 ||x - mean||^2 is x mean - 1/2 ||mean||^2 but for what is equal for all classes. Every class needs a feature.
    """
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    means = sums.index_add_(0, labels, features.double()) / labels.bincount(minlength=num_classes).view(-1, 1)
    layer = nn.Linear(features.shape[1], num_classes, dtype=torch.float64, device=features.device)
    layer.requires_grad_(False).load_state_dict({"weight": means, "bias": -0.5 * means.square().sum(dim=1)})
    return layer


def fewshot_classifier(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
                       amounts: Sequence[int | float], draws: int = 5, seed: int = 0, C: float = 100.0,
                       device: str | torch.device = "cpu") -> list[dict[str, list[float]]]:
    """Top-1 accuracy with few labels, for several amounts of them and random draws.

    Under a process group all processes must call this with the same features; each evaluates its share of the draws.

    Args:
        train_features, train_labels: [M, D] and [M]; every class of the test labels must be among them.
        test_features, test_labels: [Q, D] and [Q].
        amounts: see `draw_images`.
        draws: number of draws, which have the seeds `seed`, `seed` + 1, ...
        device: where classifiers are fitted; it must have float64.

    Returns:
        for each amount {"logistic": top-1 of each draw in percent, "nearest_class_mean": the same}.
    """
    num_classes, found = int(train_labels.max()) + 1, {}
    test_features, test_labels = F.normalize(test_features.to(device), dim=1), test_labels.to(device)
    jobs = [(i, draw) for i in range(len(amounts)) for draw in range(draws)]
    for i, draw in jobs[get_rank()::get_world_size()]:
        rows = draw_images(train_labels, amounts[i], seed + draw)
        x, y = F.normalize(train_features[rows].to(device), dim=1), train_labels[rows].to(device)
        layers = fit_logistic_regression(x, y, num_classes, C), fit_nearest_class_mean(x, y, num_classes)
        found[i, draw] = [measure_accuracy(layer, test_features, test_labels) for layer in layers]
    found = {job: accuracies for part in all_gather_objects(found) for job, accuracies in part.items()}
    return [dict(zip(("logistic", "nearest_class_mean"), map(list, zip(*(found[i, draw] for draw in range(draws))))))
            for i in range(len(amounts))]
