"""Evaluation during training: k-NN and linear accuracy and RankMe of the teacher, and detection of collapse.

    scores, of_pixels, held_out, corrupt = evaluate_online(teacher.backbone, data, args)  # {"knn_top1": ..., ...}
    warning = detect_collapse(stats, out_dim, previous)                                   # a sentence, or None
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from augment import IMAGENET_MEAN, IMAGENET_STD
from common.distributed import get_rank, get_world_size
from common.precision import autocast
from data.loaders import build_eval_loader, build_view, random_subset
from evaluation.features import extract_features
from evaluation.knn import knn_classifier
from evaluation.linear import linear_probe_accuracy
from evaluation.rankme import effective_rank


class HeldOut(NamedTuple):
    """Held-out images of which features were extracted.

    Attributes:
        images: dataset of them and of corrupt ones.
        features, labels, indices: [M, D], [M] and [M], the index of each in the dataset.
    """

    images: Dataset
    features: Tensor
    labels: Tensor
    indices: Tensor


def evaluate_online(model, data, args, mean=IMAGENET_MEAN, std=IMAGENET_STD, with_pixels=False):
    """Scores of a model's features on held-out images, and of raw pixels as a baseline.

    Args:
        model: images [B, C, H, W] -> features [B, D], in eval mode, with D as its embed_dim.
        data: see `open_data`. Without labels nothing is held out, and RankMe is that of training images.
        args: global_crops_size, the side of the center crop; knn_images, at most so many train images and a fifth as
            many held-out images; linear_probe, whether to train linear classifiers on the same features;
            batch_size_per_gpu, num_workers, timeout_minutes, device, precision.
        mean, std: see `EvalTransform`.
        with_pixels: whether to score raw pixels too, if there are labels; each image is read once for both.

    Returns:
        {"knn_top1", "knn_top5"} in percent, for k = 20, and with linear_probe "linear_top1" (see
        `linear_probe_accuracy`), if there are labels; "rankme" (see `effective_rank`).
        {"knn_top1", "knn_top5"} of raw pixels; without them {}.
        HeldOut. List of messages on corrupt images.
    """
    with_pixels = with_pixels and data.val is not None
    parts = [(data.train if data.val is None else data.val, max(1, args.knn_images // 5))]
    if data.val is not None:
        parts.insert(0, (data.train_labeled, args.knn_images))
    features, pixels, corrupt, scores, pixel_scores = [], [], [], {}, {}
    for images, max_images in parts:
        # the last batch is smaller, which would compile again
        with autocast(args.device, args.precision), torch.compiler.set_stance("force_eager"):
            images, loader = open_subset(images, max_images, args.global_crops_size, args.batch_size_per_gpu,
                                         args.num_workers, args.timeout_minutes, tuple(mean), tuple(std))
            x, labels, indices, messages = extract_features(append_pixels(model) if with_pixels else model, images,
                                                            args.global_crops_size, args, args.device, loader=loader)
        if with_pixels:
            x, raw = x[:, :model.embed_dim].contiguous(), x[:, model.embed_dim:]
            pixels += [raw, labels]
        features += [x, labels]
        corrupt += messages
    held_out = HeldOut(images, x, labels, indices)
    if data.val is not None:
        scores |= knn_scores(features, args.device)
    if with_pixels:
        pixel_scores |= knn_scores(pixels, args.device)
    if data.val is not None and args.linear_probe and len(features[0]) > 1:  # of one image, none can be held out
        epochs = max(20, 100_000 // len(features[0]))  # forty steps at least, of 1024 images at most
        scores["linear_top1"] = linear_probe_accuracy(*(x.to(args.device) for x in features), epochs=epochs)
    scores["rankme"] = effective_rank(x)
    return scores, pixel_scores, held_out, corrupt


@functools.lru_cache(maxsize=2)  # those of one run, whose workers are kept
def open_subset(images, max_images, size, batch_size, num_workers, timeout_minutes, mean, std):
    """The images of `random_subset`, and a DataLoader of this rank's share."""
    images = random_subset(images, max_images)
    return images, build_eval_loader(images, size, batch_size, num_workers, get_rank(), get_world_size(),
                                     build_view(dict(mean=mean, std=std)), timeout_minutes)


def append_pixels(model):
    """images [B, C, H, W] -> the model's features and raw pixels, averaged to 32 x 32: [B, D + C*32*32] on the CPU."""
    def extract(images):
        pixels = F.adaptive_avg_pool2d(images.cpu(), 32).flatten(1)
        return torch.cat((model(images).float().cpu(), pixels), dim=1)
    return extract


def knn_scores(features, device):
    """{"knn_top1", "knn_top5"} in percent of train features, their labels, test features and their labels, k = 20."""
    (top1, top5), = knn_classifier(*features, ks=(20,), device=device).values()
    return dict(knn_top1=top1, knn_top5=top5)


def detect_collapse(stats, out_dim, previous=()):
    """A sentence that names the collapse and what to change, None if there is none (sections 5.1 and 5.3, figure 7).

    Args:
        stats: of one epoch, in the order of time: (teacher entropy, entropy of the mean teacher output, KL divergence)
            in nats. KL is NaN if the loss is not cross-entropy; collapse to uniform is not detected then.
        out_dim: K, number of prototypes.
        previous: the stats of the epoch before.
    """
    ln_k, stats = math.log(out_dim), torch.tensor(stats)
    entropy, entropy_of_mean, kl = stats.nanmean(dim=0).tolist()
    e = torch.cat((torch.tensor([entropy for entropy, _, _ in previous]), stats[:, 0]))
    rise, fall = (e - e.cummin(0).values).max().item(), (e.cummax(0).values - e).max().item()
    if entropy_of_mean < 0.05 * ln_k:
        return (f"collapse to one prototype: the entropy of the mean teacher output is {entropy_of_mean:.3f} of ln K "
                f"{ln_k:.2f}; raise --teacher_temp or lower --lr")
    if entropy > 0.99 * ln_k and kl < 0.01 * ln_k:
        return (f"collapse to uniform: teacher entropy {entropy:.2f} of ln K {ln_k:.2f} and KL near zero; lower "
                f"--teacher_temp to 0.02-0.04, lower --lr or raise --freeze_last_layer")
    if min(rise, fall) > 0.2 * ln_k:
        return (f"unstable teacher: its entropy rose by {rise:.2f} and fell by {fall:.2f} (ln K {ln_k:.2f}) within two "
                f"epochs; raise --momentum_teacher or lower --lr")
