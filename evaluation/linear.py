"""A linear probe: many linear classifiers on the same frozen features, trained at once.

    grid = [(lr, weight_decay) for lr in (0.01, 0.1, 1) for weight_decay in (0, 1e-4)]
    classifiers = fit(features, labels, num_classes, grid)
    best, accuracies = choose(features, labels, num_classes, grid)     # judged on a tenth that it holds out
    top1 = probe(features, labels, others, their_labels)               # all of it, with the usual grid

Softmax regression by SGD with momentum and a cosine schedule, as Caron et al. 2021 (section 4) train it on top of a
frozen backbone, but on features extracted once, all classifiers of the grid in one batched product. Features are
standardised, so that one grid suits all. This file needs torch and nothing else.
"""

import math

import torch

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # for 256 pictures a step
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


class LinearClassifiers:
    """G linear classifiers: features [B, D] -> logits [G, B, C]."""

    def __init__(self, mean, std, weight, bias):
        self.mean, self.std, self.weight, self.bias = mean, std, weight, bias  # [D], [D], [G, D, C], [G, 1, C]

    def __call__(self, x):
        return torch.baddbmm(self.bias, ((x - self.mean) / self.std).expand(len(self.weight), -1, -1), self.weight)

    def linear(self, g=0):
        """Classifier g as a torch.nn.Linear on features as they are, not standardised."""
        D, C = self.weight.shape[1:]
        layer = torch.nn.Linear(D, C, device=self.weight.device)
        weight = (self.weight[g] / self.std.view(-1, 1)).T  # [C, D]
        layer.load_state_dict({"weight": weight, "bias": self.bias[g, 0] - weight @ self.mean})
        return layer.requires_grad_(False)


def fit_classifiers(features, labels, num_classes, grid, epochs=100, batch_size=1024, momentum=0.9, seed=0, progress=None):
    """Train one classifier for each (learning rate, weight decay).

    Args:
        features [M, D], labels [M]: on the device that is to train.
        grid: G pairs (lr, weight_decay); lr is the peak for this batch size.
        progress: called with the number of pictures of each batch.

    Returns:
        LinearClassifiers of G; one whose training diverged answers NaN.
    """
    (M, D), G, C, device = features.shape, len(grid), num_classes, features.device
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)  # a constant feature tells nothing
    lr, weight_decay = (torch.tensor(values, device=device).view(G, 1, 1) for values in zip(*grid))
    weight, bias = torch.zeros(G, D, C, device=device), torch.zeros(G, 1, C, device=device)
    momentum_of_weight, momentum_of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    generator, batch_size = torch.Generator().manual_seed(seed), min(batch_size, M)
    steps = epochs * (M // batch_size)
    for step in range(steps):
        place = step % (M // batch_size)
        if place == 0:
            order = torch.randperm(M, generator=generator).to(device)
        batch = order[place * batch_size:(place + 1) * batch_size]
        x = ((features[batch] - mean) / std).expand(G, -1, -1)  # [G, B, D]
        gradient = torch.baddbmm(bias, x, weight).softmax(dim=-1)
        gradient[:, torch.arange(len(batch), device=device), labels[batch]] -= 1  # of the cross-entropy by the logits
        gradient /= len(batch)
        momentum_of_weight.mul_(momentum).baddbmm_(x.mT, gradient).add_(weight * weight_decay)
        momentum_of_bias.mul_(momentum).add_(gradient.sum(dim=1, keepdim=True))
        now = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        weight -= now * momentum_of_weight
        bias -= now * momentum_of_bias
        if progress:
            progress(len(batch))
    return LinearClassifiers(mean, std, weight, bias)


def holdout_mask(count):
    """A mask [count] of a tenth of so many pictures, always the same: labels may come in turns."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order < max(1, round(count / 10))


@torch.no_grad()
def predict_topk(classifiers, features, k=5, batch_size=8192):
    """The k best classes of each picture by each classifier: [G, M, k]."""
    k = min(k, classifiers.weight.shape[2])
    return torch.cat([classifiers(part).topk(k, dim=-1).indices for part in features.split(batch_size)], dim=1)


def select_hyperparameters(features, labels, num_classes, grid, **how):
    """Which of the grid classifies a tenth of the pictures best after training on the others.

    Returns:
        index into the grid, and the accuracies of all of it on those pictures, in percent.
    """
    held_out = holdout_mask(len(features)).to(features.device)
    classifiers = fit_classifiers(features[~held_out], labels[~held_out], num_classes, grid, **how)
    correct = predict_topk(classifiers, features[held_out], 1)[..., 0] == labels[held_out]
    accuracies = 100 * correct.sum(dim=1) / correct.shape[1]
    accuracies[~classifiers.weight.flatten(1).isfinite().all(dim=1)] = 0
    return accuracies.argmax().item(), accuracies.tolist()


def linear_probe_accuracy(features, labels, queries, query_labels, batch_size=1024, **how):
    """Top-1 on the queries, in percent, of the classifier of LRS x WEIGHT_DECAYS that `choose` takes, fitted to all.

    Args:
        features [M, D], labels [M], queries [Q, D], query_labels [Q]: on one device.
    """
    num_classes, batch_size = int(max(labels.max(), query_labels.max())) + 1, min(batch_size, len(features))
    grid = [(lr * batch_size / 256, weight_decay) for lr in LRS for weight_decay in WEIGHT_DECAYS]
    how |= dict(batch_size=batch_size)
    best, _ = select_hyperparameters(features, labels, num_classes, grid, **how)
    classifier = fit_classifiers(features, labels, num_classes, [grid[best]], **how)
    return 100 * (predict_topk(classifier, queries, 1)[0, :, 0] == query_labels).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = torch.randn(10, 64)
    labels = torch.arange(4000) % 10
    features = centres[labels] + 2.5 * torch.randn(4000, 64)
    grid = [(lr, weight_decay) for lr in (0.01, 0.1, 1.0) for weight_decay in (0.0, 1e-3, 1e-1)]
    best, accuracies = select_hyperparameters(features[1000:], labels[1000:], 10, grid, epochs=20)
    classifier = fit_classifiers(features[1000:], labels[1000:], 10, [grid[best]], epochs=20)
    top1 = (predict_topk(classifier, features[:1000])[0, :, 0] == labels[:1000]).float().mean()
    print(f"lr and weight decay {grid[best]}: top-1 {top1:.1%}  (ten noisy clusters, chance 10%)")
