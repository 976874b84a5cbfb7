"""How a run is doing: k-NN and linear accuracy of its features so far, and whether its teacher has collapsed.

    accuracies, unreadable = judge(teacher.backbone, data, args, rank, world_size)    # {"top1": ..., "top5": ...}
    trouble = collapse(stats, out_dim, before)                                        # a sentence, or None
"""

import math

import torch
import torch.nn.functional as F

from common.precision import autocast
from data.loaders import build_eval_loader, random_subset
from evaluation.features import extract_features
from evaluation.knn import knn_classifier
from evaluation.linear import linear_probe_accuracy


def evaluate_online(model, data, args, rank=0, world_size=1):
    """Accuracy of a model's features on the held-out labelled pictures, in percent, and messages on unreadable ones.

    Args:
        model: images [B, 3, H, W] -> features [B, D], in eval mode.
        data: see `open_data`.
        args: global_crops_size, the side of the centre views; knn_images, how many of the training pictures are
            neighbours at most, with a fifth of it for the others; linear_probe, whether linear classifiers are
            trained on the same features; batch_size_per_gpu, num_workers, device, precision.

    Returns:
        {"top1", "top5"} of k-NN with 20 neighbours, and if asked for "linear", top-1 of the best of a grid of
        classifiers.
    """
    features, messages = [], []
    for images in (random_subset(data.train_labeled, args.knn_images), random_subset(data.val, max(1, args.knn_images // 5))):
        loader = build_eval_loader(images, args.global_crops_size, args.batch_size_per_gpu, args.num_workers, rank,
                             world_size)
        with autocast(args.device, args.precision), torch.compiler.set_stance("force_eager"):  # batches of any length
            x, labels, unreadable = extract_features(model, loader, args.device)
        features += [x, labels]
        messages += unreadable
    top1, top5 = knn_classifier(*features, ks=(20,), device=args.device).popitem()[1]
    scores = dict(knn_top1=top1, knn_top5=top5)
    if args.linear_probe and model is not pixel_features and len(features[0]) > 1:  # thousands of pixels take minutes
        epochs = max(20, 100_000 // len(features[0]))  # a hundred steps or more
        scores["linear_top1"] = linear_probe_accuracy(*(x.to(args.device) for x in features), epochs=epochs)
    return scores, messages


def pixel_features(images):
    """The baseline that looks at nothing but pixels, brought to 32 x 32: [B, 3, H, W] -> [B, 3*32*32]."""
    return F.adaptive_avg_pool2d(images.cpu(), 32).flatten(1)


def detect_collapse(stats, out_dim, before=()):
    """A sentence if an epoch's figures show that training has collapsed, else None (sections 5.1 and 5.3, figure 7).

    Args:
        stats: several of the teacher's entropy, the entropy of its mean output, and the KL divergence (NaN where the
            loss is none, then a collapse to uniform is not told), nats, in the order of time.
        before: the same of the epoch before.
    """
    top, stats = math.log(out_dim), torch.tensor(stats)
    entropy, entropy_of_mean, kl = stats.nanmean(dim=0).tolist()
    e = torch.cat((torch.tensor([entropy for entropy, _, _ in before]), stats[:, 0]))
    rise, fall = (e - e.cummin(0).values).max().item(), (e.cummax(0).values - e).max().item()
    if entropy_of_mean < 0.05 * top:
        return (f"collapse to one prototype: the teacher gives every image the same answer (entropy of its mean "
                f"output {entropy_of_mean:.3f} of ln K = {top:.2f}); try a higher --teacher_temp or a lower --lr")
    if entropy > 0.99 * top and kl < 0.01 * top:
        return (f"collapse to uniform: the teacher answers nothing (entropy {entropy:.3f} of ln K = {top:.2f}) and "
                f"the loss stays at ln K; try a --teacher_temp of 0.02 to 0.04, a lower --lr, more --freeze_last_layer")
    if min(rise, fall) > 0.2 * top:
        return (f"unstable teacher: the entropy of its answers rose by {rise:.2f} and fell by {fall:.2f} "
                f"(ln K = {top:.2f}) within two epochs; it needs a higher --momentum_teacher, or a lower --lr")
    return None
