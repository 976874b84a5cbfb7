"""Evaluate the features of a backbone: k-NN, linear classification, fine-tuning.

    python evaluate.py knn                        # the newest run, on the data it was trained on
    python evaluate.py linear                     # linear classifiers on frozen features, the paper's protocol
    python evaluate.py linear --quick             # the same on features that are extracted once
    python evaluate.py finetune                   # backbone and classifier are trained with labels
    python evaluate.py knn --ckpt dino_deitsmall16_pretrain.pth --data_path /data/imagenet
    torchrun --nproc_per_node=8 evaluate.py linear --ckpt runs/vits16/teacher.safetensors --data_path /data/imagenet

Flags of a task: `python evaluate.py linear --help`. `--untrained` evaluates random weights as a baseline.

knn writes its accuracies beside the model file, as NAME.knn.json. linear and finetune write a folder, NAME.linear or
NAME.finetune, with result.json, classifier.safetensors, log.jsonl and checkpoint.pth. Interrupted runs resume
automatically, and `--test_only` evaluates classifier.safetensors again.
"""

import contextlib
import itertools
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

from augment import IMAGENET_MEAN, IMAGENET_STD
from common import cli, distributed
from common.checkpoint import CheckpointError, check_writable, write_json
from common.precision import DTYPES, autocast, resolve_precision
from common.weights import open_backbone, output_file, output_folder, read_weights, resolve_image_size, save_model
from data.datasets import DataError, open_data
from data.loaders import build_eval_loader
from evaluation import supervised
from evaluation.features import extract_features, load_features, save_features
from evaluation.knn import knn_classifier
from evaluation.linear import LRS, WEIGHT_DECAYS, fit_best_classifier, holdout_mask
from optim import build_optimizer

# ---- flags ----

def parse_args(argv=None):
    parser = cli.build_parser("evaluate.py", __doc__)
    for name, subparser in cli.add_subcommands(parser, TASKS).items():
        add = subparser.add_argument
        cli.add_model_flags(subparser)
        add("--data_path", help="labeled images, named as for train.py (default: the data of the newest run)")
        add("--image_size", type=cli.positive_int, metavar="PIXELS",
            help="side of the center crop (default: the size the model was trained at)")
        add("--batch_size_per_gpu", type=cli.positive_int, default=128, metavar="B", help="images per GPU")
        add("--output_dir", metavar="DIR", help="folder of the results (default: beside the model file)")
        FLAGS[name](add)
        cli.add_device_flags(subparser)
    args = parser.parse_args(argv)
    if args.task != "knn":
        quick = args.task == "linear" and args.quick
        args.precision = "fp32" if quick else resolve_precision(args.precision, args.device)
        cli.check_range(parser, args, "crop_scale")
        if args.overwrite and args.resume != "none":
            parser.error("--overwrite deletes a run and starts anew: add --resume none")
        if args.task == "linear" and args.features and not quick:
            parser.error("--features keeps what --quick extracts; without --quick features depend on random crops")
        if args.task == "finetune" and args.warmup_epochs > args.epochs and not args.test_only:
            parser.error(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    return args


def add_knn_flags(add):
    add("--nb_knn", type=cli.positive_int, default=[10, 20, 100, 200], nargs="+", metavar="K",
        help="numbers of neighbors, clamped to the number of train images")
    add("--temperature", type=cli.positive_float, default=0.07, metavar="T", help="temperature of the votes")
    add("--knn_memory_mb", type=cli.positive_int, default=1024, metavar="MB", help="memory for similarities")
    add_features_flag(add)


def add_linear_flags(add):
    add("--n_last_blocks", type=cli.positive_int, default=4, metavar="N",
        help="concatenate the CLS tokens of the last N blocks; 4 for ViT-S, 1 for ViT-B")
    add("--avgpool_patchtokens", type=cli.boolean, default=False, nargs="?", const=True, metavar="X",
        help="append the mean patch token of the last block; true for ViT-B")
    add("--lr", type=cli.positive_float, default=LRS, nargs="+", metavar="LR",
        help="peak for a global batch size of 256, scaled linearly; a held-out tenth selects the best")
    add("--weight_decay", type=cli.nonnegative_float, nargs="+", metavar="WD",
        help="one or several (default: 0; 0 0.0001 0.001 0.01 0.1 with --quick)")
    add("--quick", action="store_true", help="train on features extracted once, from center crops in fp32")
    add_features_flag(add)
    add_training_flags(add)


def add_finetune_flags(add):
    add("--lr", type=cli.positive_float, default=0.0005, metavar="LR",
        help="peak learning rate for a global batch size of 256, scaled linearly")
    add("--warmup_epochs", type=cli.nonnegative_int, default=5, metavar="N",
        help="epochs of linear learning-rate warm-up")
    add("--layer_decay", type=cli.fraction, default=0.75, metavar="X", help="lr factor per block, from the top down")
    add("--weight_decay", type=cli.nonnegative_float, default=0.05, metavar="WD", help="weight decay, of matrices only")
    add("--drop_path_rate", type=cli.fraction_below_one, metavar="X",
        help="stochastic depth (default: 0.1 for vit_*, else 0)")
    add("--label_smoothing", type=cli.fraction, default=0.1, metavar="X", help="label smoothing")
    add("--mixup", type=cli.nonnegative_float, default=0.0, metavar="A", help="alpha, 0 disables; 0.8 for long runs")
    add("--cutmix", type=cli.nonnegative_float, default=0.0, metavar="A", help="alpha, 0 disables; 1 for long runs")
    add_training_flags(add)


def add_features_flag(add):
    add("--features", metavar="FILE", help="safetensors file that caches the features, written if missing")


def add_training_flags(add):
    add("--epochs", type=cli.positive_int, default=100, metavar="N", help="training epochs")
    add("--crop_scale", type=cli.fraction, default=(0.08, 1.0), nargs=2, metavar="X",
        help="area of a random crop relative to the image")
    add("--precision", default="auto", choices=["auto", *DTYPES],
        help="autocast dtype; auto: bf16 where the device is fast at it")
    add("--val_freq", type=cli.nonnegative_int, default=10, metavar="N", help="epochs between evaluations, 0 for none")
    add("--resume", default="auto", choices=["auto", "none"],
        help="auto: continue the run in output_dir; none: start anew")
    add("--overwrite", action="store_true", help="with --resume none: delete the run in output_dir")
    add("--test_only", action="store_true", help="evaluate classifier.safetensors of an earlier run, train nothing")
    add("--save_every_minutes", type=cli.positive_float, default=10.0, metavar="X", help="minutes between checkpoints")
    add("--log_every", type=cli.positive_int, default=50, metavar="N", help="steps between log lines")
    add("--seed", type=cli.seed, default=0, metavar="X", help="of weights, order, crops and stochastic depth")


# ---- setup ----

class EvalSetup(NamedTuple):
    """Backbone, labeled images and process of an evaluation."""

    backbone: nn.Module
    info: dict  # description of the model file
    data: object  # see data.datasets.Data
    classes: list  # unique names; None for k-NN
    image_size: int
    origin: dict  # {name: plain value} that the features depend on, written to every output file
    device: torch.device
    rank: int
    world_size: int
    corrupt: set  # messages on corrupt images


def prepare_evaluation(args):
    rank, world_size, device = distributed.init_distributed(args.device)
    backbone, info, origin = open_backbone(args, device, precision="fp32" if args.task == "knn" else args.precision)
    image_size = resolve_image_size(args.image_size, backbone)
    trained_on = str(info.get("data_path", ""))
    # a path in somebody else's model file is opened only if the user passes it
    is_trusted = not args.ckpt or re.fullmatch(r"shapes(:\d+)?", trained_on)
    data_path = args.data_path or (trained_on if is_trusted else "")
    if not data_path:
        raise DataError(f"{origin['ckpt']}: trained on {trained_on or 'unknown data'}; name the labeled images with "
                        f"--data_path")
    data = distributed.run_on_rank_zero_first(lambda: open_data(data_path, download=bool(args.data_path)))
    if data.val is None:
        raise DataError(f"{data_path}: no labels; expected one folder per class, best in train/ and val/")
    sizes = [len(data.train_labeled), len(data.val)]
    distributed.check_same_on_all_ranks("numbers of labeled images", sizes)
    origin |= dict(data_path=data.path, dataset_sizes=sizes, image_size=image_size)
    log(data.note)
    classes = None if args.task == "knn" else list_class_names(data)
    return EvalSetup(backbone, info, data, classes, image_size, origin, device, rank, world_size, set())


def log(text):
    if distributed.is_rank_zero():
        tqdm.write(text)


def list_class_names(data):
    """Unique class names: the data set's, with the index where two are equal; indices where it has none (SVHN)."""
    names = getattr(data.train, "classes", None)
    if not names:
        labels, images = [], ConcatDataset([data.train_labeled, data.val])
        for i in range(len(images)):
            with contextlib.suppress(OSError):  # corrupt image
                labels.append(images[i][1])
        names = range(max(labels) + 1)
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


# ---- features ----

def extract(setup, model, images, args):
    """model(center crop) of each image, over all processes: [M, ...] float32 and labels [M]."""
    loader = build_eval_loader(images, setup.image_size, args.batch_size_per_gpu, args.num_workers, setup.rank,
                               setup.world_size)
    outputs, labels, corrupt = extract_features(model, loader, setup.device, total=len(images))
    for message in sorted(set(corrupt) - setup.corrupt):
        log(f"skipped corrupt image {message}")
    setup.corrupt.update(corrupt)
    return outputs, labels


def load_or_extract_features(setup, model, args):
    """Features and labels of train and test images: {name: tensor} as in evaluation.features.FEATURES."""
    cached = bool(args.features and os.path.exists(args.features))
    distributed.check_same_on_all_ranks("a features file:", cached)
    if cached:
        log(f"features loaded from {args.features}")
        return load_features(args.features, setup.origin)
    if args.features:
        check_writable(Path(args.features).parent)
    features = {}
    for part, images in (("train", setup.data.train_labeled), ("test", setup.data.val)):
        features[f"{part}_features"], features[f"{part}_labels"] = extract(setup, model, images, args)
    if args.features and setup.rank == 0:
        save_features(args.features, features, setup.origin)
        log(f"features written to {args.features}")
    return features


# ---- tasks ----

def knn(args):
    """Weighted k-NN classification of frozen features."""
    setup = prepare_evaluation(args)
    path = output_file(setup.origin, args, "knn.json")
    features = load_or_extract_features(setup, setup.backbone, args)
    accuracies = knn_classifier(**features, ks=args.nb_knn, temperature=args.temperature, memory_mb=args.knn_memory_mb,
                                device=setup.device)
    num_test, num_train = len(features["test_labels"]), len(features["train_labels"])
    log(f"k-NN of {setup.origin['ckpt']}{' untrained' * args.untrained}: {num_test} test images, {num_train} train "
        f"images, {setup.image_size} pixels, temperature {args.temperature}\n     k   top-1   top-5")
    for k, (top1, top5) in accuracies.items():
        log(f"{k:6d}  {top1:6.2f}  {top5:6.2f}")
    write_result(path, setup, temperature=args.temperature, num_images=num_test, num_train_images=num_train,
                 knn={k: dict(top1=top1, top5=top5) for k, (top1, top5) in accuracies.items()})


def linear(args):
    """Linear classifiers on frozen features: SGD on random crops and flips, or with --quick on features once."""
    setup = prepare_evaluation(args)
    if args.avgpool_patchtokens and not setup.backbone.blocks:
        raise CheckpointError(f"{setup.origin['ckpt']}: {setup.backbone.arch} has no patch tokens, leave "
                              f"--avgpool_patchtokens out")
    extractor = supervised.FeatureExtractor(setup.backbone, args.n_last_blocks, args.avgpool_patchtokens)
    setup.origin.update(n_last_blocks=extractor.n_last_blocks, avgpool_patchtokens=extractor.avgpool)
    output = output_folder(setup.origin, args, "linear_quick" if args.quick else "linear")
    grid = list(itertools.product(args.lr, args.weight_decay or (WEIGHT_DECAYS if args.quick else [0])))
    torch.manual_seed(args.seed)
    network = supervised.Classifiers(extractor, len(setup.classes), len(grid)).to(setup.device).eval()
    if args.test_only:
        hparams = load_classifier(network, output, setup)
    elif args.quick:
        train_on_features(network, grid, output, setup, args)
        return
    else:
        hparams = train_on_crops(network, grid, output, setup, args)
    if hparams:  # else stopped by a signal
        report_accuracy(*predict_logits(network, setup, args), output, setup, hparams)


def train_on_features(network, grid, output, setup, args):
    """Train and evaluate on features that are extracted once; heads[0] becomes the best classifier of the grid."""
    if (output / "checkpoint.pth").exists():
        raise CheckpointError(f"{output}: holds checkpoint.pth of a run without --quick; choose another --output_dir")
    if setup.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        check_writable(output)
    features = load_or_extract_features(setup, network.tokens, args)
    x, y, test_x = (features[name].to(setup.device) for name in ("train_features", "train_labels", "test_features"))
    log(f"{len(grid)} classifiers on {x.shape[1]} features of {len(x)} images; "
        + format_effective_lr(args.lr, min(1024, len(x))))
    with tqdm(total=2 * args.epochs * len(x), unit="img", leave=False,
              disable=setup.rank > 0 or not sys.stderr.isatty()) as bar:
        classifier, best, accuracies = fit_best_classifier(x, y, len(setup.classes), grid, epochs=args.epochs,
                                                           seed=args.seed, progress=bar.update)
    if not classifier.weight.isfinite().all():
        raise FloatingPointError("every classifier of the grid diverged: lower --lr")
    network.heads[0] = classifier.to_linear()
    hparams = dict(quick=True, epochs=args.epochs) | describe_selection(grid, best, accuracies)
    save_classifier(network, output, setup, hparams)
    report_accuracy(network.heads[0](test_x).cpu(), features["test_labels"], output, setup, hparams)


def train_on_crops(network, grid, output, setup, args):
    """Train on random crops; keep the best classifier of the grid. Returns hyperparameters, None after a signal."""
    train_images, val_images = setup.data.train_labeled, setup.data.val
    if len(grid) > 1:
        mask = holdout_mask(len(train_images))
        train_images, val_images = (Subset(train_images, m.nonzero().flatten().tolist()) for m in (~mask, mask))
    metric = "held_out_top1" if len(grid) > 1 else "test_top1"
    optimizer = build_optimizer("sgd", supervised.build_head_groups(network, grid))
    log(f"{len(grid)} classifiers on {network.tokens.dim} features; "
        + format_effective_lr(args.lr, args.batch_size_per_gpu * setup.world_size))
    completed = supervised.train_classifiers(
        network, optimizer, train_images, get_fixed_settings(setup) | {"grid": grid},
        lambda: {metric: max(measure_top1(network, val_images, setup, args))}, output, args, setup.image_size,
        setup.device, setup.rank, setup.world_size)
    if not completed:
        return None
    accuracies = measure_top1(network, val_images, setup, args) if len(grid) > 1 else [math.nan]
    best = accuracies.index(max(accuracies))
    network.heads = network.heads[best:best + 1]
    hparams = dict(epochs=args.epochs) | describe_selection(grid, best, accuracies)
    save_classifier(network, output, setup, hparams)
    return hparams


def describe_selection(grid, best, accuracies):
    """Hyperparameters of the best of the grid and, if there was a choice, the held-out accuracy of each."""
    lr, weight_decay = grid[best]
    if len(grid) == 1:
        return dict(lr=lr, weight_decay=weight_decay)
    log(f"best on a held-out tenth ({accuracies[best]:.2f}%): lr {lr:g}, weight decay {weight_decay:g}")
    return dict(lr=lr, weight_decay=weight_decay, held_out_top1=accuracies[best],
                grid=[(*pair, accuracy) for pair, accuracy in zip(grid, accuracies)])


def finetune(args):
    """Fine-tuning with labels: AdamW, layer-wise learning rate decay, label smoothing, optional mixup and CutMix."""
    setup = prepare_evaluation(args)
    output, backbone = output_folder(setup.origin, args, "finetune"), setup.backbone
    if args.drop_path_rate and not backbone.blocks:
        raise CheckpointError(f"--drop_path_rate is of vision transformers, not of {backbone.arch}")
    torch.manual_seed(args.seed)
    extractor = supervised.FeatureExtractor(backbone)
    network = supervised.Classifiers(extractor, len(setup.classes), frozen=False).to(setup.device).eval()
    if args.test_only:
        hparams = load_classifier(network, output, setup)
    else:
        hparams = train_backbone(network, output, setup, args)
    if hparams:  # else stopped by a signal
        report_accuracy(*predict_logits(network, setup, args), output, setup, hparams)


def train_backbone(network, output, setup, args):
    """Train backbone and classifier. Returns hyperparameters, None after a signal."""
    backbone = setup.backbone
    if args.drop_path_rate is None:
        args.drop_path_rate = 0.1 if backbone.blocks else 0.0
    backbone.drop_path_rate = args.drop_path_rate
    hparams = {name: getattr(args, name) for name in (
        "epochs", "lr", "warmup_epochs", "layer_decay", "weight_decay", "drop_path_rate", "label_smoothing", "mixup",
        "cutmix")}
    groups = supervised.build_layer_decay_groups(network, args.lr, args.weight_decay, args.layer_decay)
    log(f"{format_effective_lr([args.lr], args.batch_size_per_gpu * setup.world_size)}; embeddings: "
        f"{args.layer_decay ** (len(backbone.blocks) + 1):.2g} of it")
    completed = supervised.train_classifiers(
        network, build_optimizer("adamw", groups), setup.data.train_labeled, get_fixed_settings(setup) | hparams,
        lambda: {"test_top1": measure_top1(network, setup.data.val, setup, args)[0]}, output, args, setup.image_size,
        setup.device, setup.rank, setup.world_size, args.warmup_epochs,
        supervised.build_mixup(len(setup.classes), args.mixup, args.cutmix), args.label_smoothing)
    if not completed:
        return None
    save_classifier(network, output, setup, hparams)
    return hparams


# ---- classifiers and results ----

def measure_top1(network, images, setup, args):
    """Top-1 accuracy in percent of each classifier, from center crops."""
    with autocast(setup.device, args.precision):
        predictions, labels = extract(setup, lambda x: network(x).argmax(dim=-1).T, images, args)
    return (100 * (predictions == labels.view(-1, 1)).double().mean(dim=0)).tolist()


def predict_logits(network, setup, args):
    """Logits [Q, K] of the first classifier on the test images, and their labels [Q]."""
    with autocast(setup.device, args.precision):
        return extract(setup, lambda x: network(x)[0], setup.data.val, args)


def get_fixed_settings(setup):
    """What must not change when a classifier is resumed or tested; files may have moved."""
    origin = {name: value for name, value in setup.origin.items() if name not in ("ckpt", "data_path")}
    return origin | {"classes": setup.classes}


def format_effective_lr(lrs, batch_size):
    lrs = ", ".join(f"{lr * batch_size / 256:.3g}" for lr in lrs)
    return f"effective lr {lrs} = lr * {batch_size} / 256 (linear scaling rule)"


def get_trained_modules(network):
    """{prefix in classifier.safetensors: module}: the classifier, and the backbone if it is fine-tuned."""
    return {"classifier.": network.heads[0]} | ({} if network.frozen else {"backbone.": network.tokens.backbone})


def save_classifier(network, output, setup, hparams):
    """Write classifier.safetensors: trained weights, description of the backbone, origin, hyperparameters."""
    if setup.rank == 0:
        weights = {prefix + name: tensor for prefix, module in get_trained_modules(network).items()
                   for name, tensor in module.state_dict().items()}
        info = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) | setup.info | setup.origin
        save_model(output / "classifier.safetensors", weights, info | dict(hparams=hparams, classes=setup.classes))


def load_classifier(network, output, setup):
    """Load what `save_classifier` wrote; returns the hyperparameters.

    Raises:
        CheckpointError: no such file, or trained on another backbone, data set or image size.
    """
    path = output / "classifier.safetensors"
    weights, info, _ = read_weights(str(path), None)
    for name, value in get_fixed_settings(setup).items():
        if info.get(name) != value:
            raise CheckpointError(f"{path}: trained with {name} {str(info.get(name))[:200]}, not {str(value)[:200]}")
    for prefix, module in get_trained_modules(network).items():
        module.load_state_dict({name: weights[prefix + name] for name in module.state_dict()})
    return info["hparams"]


def report_accuracy(logits, labels, output, setup, hparams):
    """Log and write top-1, top-5, per-class accuracy and confusions of logits [Q, K] with labels [Q]."""
    classes, top5_classes = setup.classes, logits.topk(min(5, logits.shape[1]), dim=1).indices
    correct = top5_classes == labels.view(-1, 1)
    top1, top5 = (100 * x.double().mean().item() for x in (correct[:, 0], correct.any(dim=1)))
    per_class = {classes[c]: 100 * correct[labels == c, 0].double().mean().item() for c in labels.unique().tolist()}
    lowest = sorted(per_class.items(), key=lambda item: item[1])[:5]
    confusions = Counter((classes[label], classes[predicted]) for label, predicted in zip(
        labels.tolist(), top5_classes[:, 0].tolist()) if label != predicted)
    log(f"{len(labels)} test images: top-1 {top1:.2f}, top-5 {top5:.2f}")
    log("lowest per-class accuracy: " + ", ".join(f"{name} {accuracy:.1f}%" for name, accuracy in lowest))
    log("most frequent confusions: " + ", ".join(f"{label} as {predicted} ({count})"
                                                 for (label, predicted), count in confusions.most_common(5)))
    write_result(output / "result.json", setup, **hparams, top1=top1, top5=top5, num_images=len(labels),
                 per_class=per_class, confusions=[[*pair, count] for pair, count in confusions.most_common(50)])


def write_result(path, setup, **result):
    if setup.rank == 0:
        write_json(path, setup.origin | result | {"corrupt": sorted(setup.corrupt)})
        log(f"written to {path}")


TASKS = {"knn": knn, "linear": linear, "finetune": finetune}
FLAGS = {"knn": add_knn_flags, "linear": add_linear_flags, "finetune": add_finetune_flags}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, FloatingPointError)
