"""Linear segmentation of frozen patch tokens: batch norm and a 1x1 convolution, as for DINOv2, and mIoU.

    features = PatchFeatures(backbone, n_last_blocks=4)              # [B, 3, H, W] -> [B, 4 * D, H/p, W/p]
    head = SegmentationHead(features.dim, num_classes=21)
    logits = head(features(images))                                  # [B, 21, H/p, W/p]
    pixel_cross_entropy(logits, labels).backward()                   # labels uint8 [B, H, W], 255 where unlabeled

    matrix += count_confusions(predict_pixels(logits, labels.shape[1:])[0], labels[0], 21)    # over the whole set
    miou, accuracy, mean_accuracy, iou, class_accuracy = summarize_confusions(matrix).values()

Oquab et al. 2023 (DINOv2), section 7.4. This file needs torch only.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class PatchFeatures(nn.Module):
    """Patch tokens of the last blocks as a map: images [B, C, H, W] -> [B, dim, H/p, W/p].

    Args:
        n_last_blocks: blocks whose tokens are concatenated.
    """

    def __init__(self, backbone, n_last_blocks=1):
        super().__init__()
        self.backbone, self.n_last_blocks = backbone, n_last_blocks
        self.dim = backbone.embed_dim * n_last_blocks

    def forward(self, x):
        tokens = torch.cat(self.backbone.get_intermediate_layers(x, self.n_last_blocks), dim=2)[:, 1:]  # [B, N, dim]
        return tokens.transpose(1, 2).unflatten(2, (x.shape[2] // self.backbone.patch_size, -1))


class FrozenFeatureNorm(nn.BatchNorm2d):
    """Batch norm of features without gradient, with statistics over the batches of all processes, on any device."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = sum_over_processes(x.new_tensor(x.numel() / x.shape[1]))
            mean = sum_over_processes(x.sum((0, 2, 3))) / count
            var = sum_over_processes((x - mean.view(-1, 1, 1)).square().sum((0, 2, 3))) / count
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


def sum_over_processes(x):
    """Sum of a tensor over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


class SegmentationHead(nn.Conv2d):
    """Batch norm and a linear classifier of each patch: features [B, dim, h, w] -> logits [B, K, h, w]."""

    def __init__(self, dim, num_classes):
        super().__init__(dim, num_classes, kernel_size=1)
        self.norm = FrozenFeatureNorm(dim)

    def forward(self, x):
        return super().forward(self.norm(x))


def pixel_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0,
                        ignore_index: int = 255) -> Tensor:
    """Cross-entropy of the upsampled logits, in nats.

    Its mean is over all pixels, those without a label included, which add 0: so the mean of several processes is that
    of one, and a batch without labels is no division by zero.

    Args:
        logits: [B, K, h, w], upsampled (bilinear) to the labels.
        labels: uint8 [B, H, W], `ignore_index` where unlabeled.
    """
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, label_smoothing=label_smoothing,
                            reduction="sum")
    return total / labels.numel()


def predict_pixels(logits: Tensor, size: tuple[int, int], chunk: int = 16) -> Tensor:
    """Class of each pixel: logits [B, K, h, w], upsampled (bilinear) to `size` -> int64 [B, H, W].

    Args:
        chunk: classes that are upsampled at a time, which bounds the memory.
    """
    best = None
    for first in range(0, logits.shape[1], chunk):
        values, classes = F.interpolate(logits[:, first:first + chunk], size, mode="bilinear").max(dim=1)
        if best is None:
            best, predicted = values, classes
        else:
            predicted = torch.where(values > best, first + classes, predicted)
            best = torch.maximum(best, values)
    return predicted


def count_confusions(predicted: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Confusion matrix of pixels, int64 [K, K], [true][predicted]; those with the label `ignore_index` do not count."""
    labeled = labels != ignore_index
    pairs = labels[labeled].long() * num_classes + predicted[labeled]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def summarize_confusions(matrix: Tensor) -> dict:
    """Confusion matrix [K, K] of a whole set -> {"miou", "accuracy", "mean_accuracy", "iou", "class_accuracy"}.

    "iou" and "class_accuracy" are float64 [K], NaN for classes without such pixels, and the means are over the others.
    IoU = TP / (TP + FP + FN) (Everingham et al. 2015, section 3.2); "accuracy" is that of all pixels.
    """
    matrix = matrix.double()
    hits, true, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, class_accuracy = hits / (true + predicted - hits), hits / true
    return dict(miou=iou.nanmean().item(), accuracy=(hits.sum() / matrix.sum()).item(),
                mean_accuracy=class_accuracy.nanmean().item(), iou=iou, class_accuracy=class_accuracy)
