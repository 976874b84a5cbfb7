"""Judge the features of a trained backbone.

    python evaluate.py knn                        # the newest run, on the pictures it was trained on
    python evaluate.py linear                     # linear classifiers on frozen features, the paper's protocol
    python evaluate.py linear --quick             # the same on features that are extracted once
    python evaluate.py finetune                   # the backbone is trained on, with labels
    python evaluate.py knn --ckpt dino_deitsmall16_pretrain.pth --data_path /data/imagenet
    torchrun --nproc_per_node=8 evaluate.py linear --ckpt runs/vits16/teacher.safetensors

Every task has flags of its own: `python evaluate.py linear --help`. With `--untrained` the same is done to random
weights. `knn` writes its figures beside the checkpoint, as NAME.knn.json; the others have a folder, NAME.linear and
so on, with result.json, classifier.safetensors, log.jsonl and checkpoint.pth, from which an interrupted command goes
on, and which `--test_only` judges again.
"""

import contextlib
import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from augment import IMAGENET_MEAN, IMAGENET_STD
from common import cli, distributed
from common.checkpoint import check_writable, write_json
from common.cli import (
    boolean,
    fraction,
    fraction_below_one,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from common.precision import autocast, resolve_precision, set_matmul_precision
from common.weights import (
    CheckpointError,
    load_backbone,
    open_backbone,
    output_file,
    output_folder,
    read_weights,
    resolve_image_size,
    save_model,
)
from data.datasets import DataError, open_data
from data.loaders import build_eval_loader
from evaluation.features import LABELS, extract_features, load_features, save_features
from evaluation.knn import knn_classifier
from evaluation.linear import LRS, WEIGHT_DECAYS, fit_classifiers, holdout_mask, select_hyperparameters
from evaluation.supervised import (
    Classifiers,
    FeatureExtractor,
    build_head_groups,
    build_layer_decay_groups,
    build_mixup,
    train_classifiers,
)
from optim import build_optimizer

# ---- flags ----

def parse_args(argv=None):
    parser = cli.build_parser("evaluate.py", __doc__)
    for name, task_parser in cli.add_subcommands(parser, TASKS).items():
        def add(flag, default, help, type=None, add_argument=task_parser.add_argument, **kwargs):
            shown = " ".join(map(str, default if isinstance(default, list) else [default]))
            kwargs |= {"type": type} if type else {}
            add_argument(flag, default=default, help=help + f" (default: {shown})" * (default is not None), **kwargs)

        cli.add_model_flags(task_parser)
        add("--data_path", None, "labelled pictures, named as for train.py (default: what the newest run was trained "
            "on; the built-in pictures if --ckpt says so)")
        add("--image_size", None, "side of the square that is judged (default: the size the model was trained at)",
            positive_int, metavar="PIXELS")
        add("--batch_size_per_gpu", 128, "pictures per process and pass", positive_int, metavar="B")
        add("--output_dir", None, "folder for what is written (default: " + (
            "that of the model file)" if name == "knn" else f"NAME.{name} beside the model file)"), metavar="DIR")
        FLAGS[name](add)
        cli.add_device_flags(task_parser)
    args = parser.parse_args(argv)
    if args.task != "knn":
        args.precision = resolve_precision(args.precision, args.device)
        if args.overwrite and args.resume != "none":
            parser.error("--overwrite deletes what was trained and starts anew: say --resume none as well")
        if args.task == "linear" and args.features and not args.quick:
            parser.error("--features keeps what --quick extracts: without it every picture is seen anew in each epoch")
        cli.check_range(parser, args, "crop_scale")
        if getattr(args, "warmup_epochs", 0) > args.epochs and not args.test_only:
            parser.error(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    return args


def knn_flags(add):
    add("--nb_knn", [10, 20, 100, 200], "numbers of neighbours; those beyond the data are clamped", positive_int,
        nargs="+", metavar="K")
    add("--temperature", 0.07, "of the vote", positive_float, metavar="T")
    add("--knn_memory_mb", 1024, "bound on the similarities held at once", positive_int, metavar="MB")
    add_features_flag(add)


def linear_flags(add):
    add("--n_last_blocks", 4, "CLS tokens of so many blocks side by side; in the paper 4 for small, 1 for base",
        positive_int, metavar="N")
    add("--avgpool_patchtokens", False, "the last block's mean patch token beside them, as for base", boolean,
        nargs="?", const=True, metavar="X")
    add("--lr", list(LRS), "one or several, for 256 pictures a step; scaled linearly "
        "with their number. Of several the best is taken, judged on a tenth of the training pictures that is held out",
        positive_float, nargs="+", metavar="LR")
    add("--weight_decay", None, "one or several (default: 0; with --quick 0 0.0001 0.001 0.01 0.1)", nonnegative_float,
        nargs="+", metavar="WD")
    add("--quick", False, "extract features of the centre view once, in fp32, and train on them all classifiers of "
        "the grid; flags of views, steps, saves and tests then mean nothing", action="store_true")
    add_features_flag(add)
    add_training_flags(add, epochs=100)


def finetune_flags(add):
    add("--lr", 0.0005, "peak, for 256 pictures a step; scaled linearly with their number", positive_float,
        metavar="LR")
    add("--warmup_epochs", 5, "epochs of linear learning-rate warm-up", nonnegative_int, metavar="N")
    add("--layer_decay", 0.75, "factor of the learning rate from each block to the one before", fraction, metavar="X")
    add("--weight_decay", 0.05, "on matrices only", nonnegative_float, metavar="WD")
    add("--drop_path_rate", None, "stochastic depth of a vision transformer (default: 0.1)", fraction_below_one, metavar="X")
    add("--label_smoothing", 0.1, "share of each label that is given to all classes", fraction, metavar="X")
    add("--mixup", 0.0, "its alpha, 0 for none; 0.8 for long runs", nonnegative_float, metavar="A")
    add("--cutmix", 0.0, "its alpha, 0 for none; 1 for long runs", nonnegative_float, metavar="A")
    add_training_flags(add, epochs=100)


def add_features_flag(add):
    add("--features", None, "safetensors file to keep the features in; if it is there they are taken from it",
        metavar="FILE")


def add_training_flags(add, epochs):
    add("--epochs", epochs, "passes over the pictures", positive_int, metavar="N")
    add("--crop_scale", [0.08, 1.0], "share of the area that a training view shows", fraction, nargs=2, metavar="X")
    add("--precision", "auto", "auto: bf16 where the device is fast at it, else fp32",
        choices=["auto", "bf16", "fp16", "fp32"])
    add("--val_freq", 10, "epochs between tests, 0 for none but the last", nonnegative_int, metavar="N")
    add("--resume", "auto", "auto goes on with what the folder holds, none starts anew", choices=["auto", "none"])
    add("--overwrite", False, "with --resume none: delete what the folder holds first", action="store_true")
    add("--test_only", False, "judge the classifier in the folder, train nothing", action="store_true")
    add("--save_every_minutes", 10.0, "between saves", positive_float, metavar="X")
    add("--log_every", 50, "steps between lines in the log", positive_int, metavar="N")
    add("--seed", 0, "of order, views and what is dropped", cli.seed, metavar="X")


# ---- what is judged ----

class Subject(NamedTuple):
    """A backbone, the pictures that it is judged on, and the process that does it."""

    backbone: nn.Module
    info: dict  # of the model file
    data: object  # see data.Data
    size: int  # pixels
    origin: dict  # what the features depend on, for people and files
    device: torch.device
    rank: int
    world_size: int
    unreadable: set  # messages on pictures

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)


def open_subject(args):
    rank, world_size, device = distributed.init_distributed(args.device)
    backbone, info, origin = open_backbone(args, device)
    size = resolve_image_size(args.image_size, backbone)
    data_path = args.data_path or info.get("data_path")
    if not (data_path and isinstance(data_path, str)):
        raise DataError(f"{origin['ckpt']} does not say what it was trained on: name labelled pictures with "
                        f"--data_path")
    if args.ckpt and not args.data_path and not re.fullmatch(r"shapes(:\d+)?", data_path):
        raise DataError(f"{origin['ckpt']} says that it was trained on {data_path}; what a file names is opened when "
                        f"you name it too: --data_path {data_path}")
    data = distributed.run_on_rank_zero_first(lambda: open_data(data_path, download=bool(args.data_path)))
    if data.val is None:
        raise DataError(f"{data_path}: no labels; expected one folder per class, best in train/ and val/")
    distributed.check_same_on_all_ranks("labelled pictures:", (len(data.train_labeled), len(data.val)))
    origin |= dict(data_path=data.path, pictures=[len(data.train_labeled), len(data.val)], image_size=size)
    if rank == 0:
        print(data.note)
    return Subject(backbone.to(device), info, data, size, origin, device, rank, world_size, set())


def class_names(data):
    """The names of the classes, no two the same; numbers where a set does not name them."""
    names = getattr(data.train, "classes", None)
    if not names:  # only the labels themselves tell how many there are
        labels = {0}
        for images in (data.train_labeled, data.val):
            for i in range(len(images)):
                with contextlib.suppress(OSError):
                    labels.add(images[i][1])
        names = range(max(labels) + 1)
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def extract(subject, model, images, args):
    """model(centre view) of each picture, once over all processes: [M, ...] float32 and labels [M]."""
    loader = build_eval_loader(images, subject.size, args.batch_size_per_gpu, args.num_workers, subject.rank,
                         subject.world_size)
    x, labels, unreadable = extract_features(model, loader, subject.device, total=len(images))
    for message in unreadable:
        if message not in subject.unreadable:
            subject.say(f"skipped unreadable picture {message}")
    subject.unreadable.update(unreadable)
    return x, labels


def features_of(subject, model, args, origin):
    """Features and labels of both parts by name (see LABELS), from --features if they are there."""
    kept = bool(args.features and os.path.exists(args.features))
    distributed.check_same_on_all_ranks("a file of features", kept)
    if args.features and not kept:
        check_writable(Path(args.features).parent)
    if kept:
        subject.say(f"features taken from {args.features}")
        return load_features(args.features, origin)
    features = {}
    for part, images in (("bank", subject.data.train_labeled), ("queries", subject.data.val)):
        features[part], features[LABELS[part]] = extract(subject, model, images, args)
    if args.features and subject.rank == 0:
        save_features(args.features, features, origin)
        subject.say(f"features written to {args.features}")
    return features


def write_result(path, subject, **result):
    write_json(path, subject.origin | result | {"unreadable": sorted(subject.unreadable)})
    subject.say(f"written to {path}")


# ---- k-NN ----

def knn(args):
    """A weighted vote of the nearest neighbours."""
    subject = open_subject(args)
    path = output_file(subject.origin, args, "knn.json")
    features = features_of(subject, subject.backbone, args, subject.origin)
    scores = knn_classifier(*features.values(), args.nb_knn, args.temperature, args.knn_memory_mb, subject.device)
    if subject.rank > 0:
        return
    bank, queries = len(features["bank"]), len(features["queries"])
    print(f"k-NN of {subject.origin['ckpt']}{' untrained' * args.untrained}: {queries} pictures among {bank}, "
          f"{subject.size} pixels, temperature {args.temperature}\n     k   top-1   top-5")
    for k, (top1, top5) in scores.items():
        print(f"{k:6d}  {top1:6.2f}  {top5:6.2f}")
    table = {k: dict(top1=top1, top5=top5) for k, (top1, top5) in scores.items()}
    write_result(path, subject, temperature=args.temperature, bank=bank,
                 queries=queries, knn=table)


# ---- classifiers ----

def linear(args):
    """Linear classifiers on frozen features: SGD, cosine, random crops and flips; or --quick, on features once."""
    subject = open_subject(args)
    classes = distributed.all_gather_objects(class_names(subject.data) if subject.rank == 0 else None)[0]
    if args.avgpool_patchtokens and not subject.backbone.blocks:
        raise CheckpointError(f"{subject.origin['ckpt']}: {subject.backbone.arch} gives features alone: "
                              f"leave --avgpool_patchtokens out")
    tokens = FeatureExtractor(subject.backbone, args.n_last_blocks, args.avgpool_patchtokens).eval()
    output = output_folder(subject.origin, args, "linear_quick" if args.quick else "linear")
    origin = subject.origin | dict(n_last_blocks=tokens.n_last_blocks, avgpool_patchtokens=tokens.avgpool)
    grid = list(itertools.product(args.lr, args.weight_decay or (WEIGHT_DECAYS if args.quick else [0])))
    if args.test_only:
        head, how = load_classifier(output, origin, classes, subject)
    elif args.quick:
        head, how, logits, labels = quick_classifier(tokens, grid, origin, classes, output, subject, args)
    else:
        head, how = trained_classifier(tokens, grid, origin, classes, output, subject, args)
    if head is None:  # stopped by a signal
        return
    if not args.test_only:
        save_classifier(output, head, {}, subject, origin, how, classes)
    if not args.quick or args.test_only:
        logits, labels = answers(tokens, head, subject, args)
    judge(logits, labels, classes, output, subject, **origin, **how)


def quick_classifier(tokens, grid, origin, classes, output, subject, args):
    """The best of the grid, trained again on all: nn.Linear, how it was found, and what it says of the test."""
    if (output / "checkpoint.pth").exists():
        raise CheckpointError(f"{output}: holds classifiers that were trained without --quick: name another "
                              f"--output_dir")
    if subject.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        check_writable(output)
    features = features_of(subject, tokens, args, origin)
    bank, labels = (features[name].to(subject.device) for name in ("bank", "bank_labels"))
    if len(bank) < 2:
        raise DataError(f"{subject.data.path}: one labelled picture is too few to choose by")
    batch = min(1024, len(bank))
    scaled = [(lr * batch / 256, weight_decay) for lr, weight_decay in grid]
    subject.say(f"{len(grid)} classifiers on {bank.shape[1]} features of {len(bank)} pictures; effective lr "
                + effective(args.lr, batch))
    with tqdm(total=2 * args.epochs * len(bank), unit="img", leave=False,
              disable=subject.rank > 0 or not sys.stderr.isatty()) as bar:
        how = dict(epochs=args.epochs, batch_size=batch, seed=args.seed, progress=bar.update)
        best, accuracies = select_hyperparameters(bank, labels, len(classes), scaled, **how)
        head = fit_classifiers(bank, labels, len(classes), [scaled[best]], **how).linear()
    if not (head.weight.isfinite().all() and head.bias.isfinite().all()):
        raise FloatingPointError("every classifier of the grid diverged: lower --lr")
    lr, weight_decay = grid[best]
    subject.say(f"best on a tenth held out ({accuracies[best]:.2f}%), then trained on all: lr {lr:g}, weight decay "
                f"{weight_decay:g}")
    how = dict(quick=True, epochs=args.epochs, lr=lr, weight_decay=weight_decay, held_out=accuracies[best])
    return head, how, head(features["queries"].to(subject.device)).cpu(), features["query_labels"]


def trained_classifier(tokens, grid, origin, classes, output, subject, args):
    """The best of the grid: nn.Linear, and how it was found; None, None if a signal ended the training."""
    images, judged = subject.data.train_labeled, subject.data.val
    if len(grid) > 1:
        mask = holdout_mask(len(images))
        images, judged = (torch.utils.data.Subset(images, m.nonzero().flatten().tolist()) for m in (~mask, mask))
    torch.manual_seed(args.seed)
    network = Classifiers(tokens, len(classes), len(grid)).to(subject.device)
    optimizer = build_optimizer("sgd", build_head_groups(network, grid))

    def accuracies():
        with autocast(subject.device, args.precision):
            said, labels = extract(subject, lambda x: network(x).argmax(dim=-1).T, judged, args)
        return (100 * (said == labels.view(-1, 1)).double().mean(dim=0)).tolist()

    def measure():
        top1 = accuracies()
        return {"test_top1": top1[0]} if len(grid) == 1 else {"held_out_top1": max(top1)}

    subject.say(f"{len(grid)} classifiers on {tokens.dim} features; effective lr "
                + effective(args.lr, args.batch_size_per_gpu * subject.world_size))
    fixed = fixed_part(origin) | {"grid": grid, "classes": classes}
    if not train_classifiers(network, optimizer, images, fixed, measure, output, args, *place(subject)):
        return None, None
    top1 = accuracies() if len(grid) > 1 else [0.0]
    best = top1.index(max(top1))
    (lr, weight_decay), how = grid[best], {}
    if len(grid) > 1:
        how = dict(held_out=top1[best], grid=[(*pair, accuracy) for pair, accuracy in zip(grid, top1)])
        subject.say(f"best on a tenth held out, which none was trained on ({top1[best]:.2f}%): lr {lr:g}, weight decay "
                    f"{weight_decay:g}")
    return network.heads[best], dict(epochs=args.epochs, lr=lr, weight_decay=weight_decay) | how


def finetune(args):
    """Backbone and classifier trained with labels: AdamW, layer-wise lr decay, label smoothing, mixup by flag."""
    subject = open_subject(args)
    classes = distributed.all_gather_objects(class_names(subject.data) if subject.rank == 0 else None)[0]
    output, tokens = output_folder(subject.origin, args, "finetune"), FeatureExtractor(subject.backbone)
    if args.test_only:
        head, how = load_classifier(output, subject.origin, classes, subject)
        tokens = FeatureExtractor(load_backbone(output / "classifier.safetensors", log=subject.say)[0].to(subject.device))
    else:
        if args.drop_path_rate and not tokens.backbone.blocks:
            raise CheckpointError(f"--drop_path_rate is of vision transformers, not of {tokens.backbone.arch}")
        if args.drop_path_rate is None:
            args.drop_path_rate = 0.1 if tokens.backbone.blocks else 0.0
        tokens.backbone.drop_path_rate = args.drop_path_rate
        torch.manual_seed(args.seed)
        network = Classifiers(tokens, len(classes), frozen=False).to(subject.device)
        head = network.heads[0]
        optimizer = build_optimizer("adamw", build_layer_decay_groups(network, args.lr, args.weight_decay, args.layer_decay))

        def measure():
            said, labels = answers(tokens, head, subject, args)
            return {"test_top1": 100 * (said.argmax(dim=-1) == labels).double().mean().item()}

        subject.say("effective lr " + effective([args.lr], args.batch_size_per_gpu * subject.world_size)
                    + f", at the embeddings {args.layer_decay ** (len(tokens.backbone.blocks) + 1):.2g} of it")
        names = ("lr", "warmup_epochs", "layer_decay", "weight_decay", "drop_path_rate", "label_smoothing", "mixup",
                 "cutmix")
        how = {name: getattr(args, name) for name in names}
        if not train_classifiers(network, optimizer, subject.data.train_labeled, fixed_part(subject.origin) | how | {"classes": classes},
                     measure, output, args, *place(subject), args.warmup_epochs,
                     build_mixup(len(classes), args.mixup, args.cutmix), args.label_smoothing):
            return
        how["epochs"] = args.epochs
        weights = {f"backbone.{name}": tensor for name, tensor in tokens.backbone.state_dict().items()}
        save_classifier(output, head, weights, subject, subject.origin, how, classes)
    logits, labels = answers(tokens.eval(), head, subject, args)
    judge(logits, labels, classes, output, subject, **how)


def answers(tokens, head, subject, args):
    """Logits [Q, K] on the held-out pictures, as in training: features by --precision, the classifier in float32."""
    set_matmul_precision(subject.device, args.precision, subject.backbone.embed_dim)

    def model(images):
        with autocast(subject.device, args.precision):
            features = tokens(images)
        with torch.autocast(subject.device.type, enabled=False):
            return head(features.float())
    return extract(subject, model, subject.data.val, args)


def fixed_part(origin):
    """What a classifier that is gone on with must have been trained on; a file may have moved."""
    return {name: value for name, value in origin.items() if name not in ("ckpt", "data_path")}


def place(subject):
    return subject.size, subject.device, subject.rank, subject.world_size


def effective(lrs, pictures):
    return ", ".join(f"{lr * pictures / 256:.3g}" for lr in lrs) + f" = lr * {pictures} / 256 (linear scaling rule)"


def save_classifier(output, head, weights, subject, origin, how, classes):
    """classifier.safetensors: the classifier, the backbone if it has learnt, what they are and were made from."""
    if subject.rank == 0:
        weights = weights | {f"classifier.{name}": tensor for name, tensor in head.state_dict().items()}
        info = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) | subject.info | origin | dict(how=how, classes=classes)
        save_model(output / "classifier.safetensors", weights, info)


def load_classifier(output, origin, classes, subject):
    """The nn.Linear that `save_classifier` wrote and how it was made, if it is of the same backbone and classes."""
    path = output / "classifier.safetensors"
    weights, info, _ = read_weights(str(path), None)
    for name, value in (fixed_part(origin) | {"classes": classes}).items():
        if info.get(name) != value:
            raise CheckpointError(f"{path}: trained with {name} {str(info.get(name))[:200]}, not {str(value)[:200]}")
    weight, bias = (weights.get(f"classifier.{name}", torch.empty(0)) for name in ("weight", "bias"))
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or len(bias) != len(classes):
        raise CheckpointError(f"{path}: holds no classifier of {len(classes)} classes")
    head = nn.Linear(weight.shape[1], len(bias))
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.to(subject.device), info.get("how", {})


def judge(logits, labels, classes, output, subject, **about):
    """Say and write how well logits [Q, K] answer labels [Q]."""
    if subject.rank > 0:
        return
    said = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = said == labels.view(-1, 1)
    top1, top5 = (100 * x.double().mean().item() for x in (hits[:, 0], hits.any(dim=1)))
    per_class = {classes[c]: 100 * hits[labels == c, 0].double().mean().item() for c in labels.unique().tolist()}
    pairs = Counter((classes[true], classes[first]) for true, first in zip(labels.tolist(), said[:, 0].tolist())
                    if true != first)
    print(f"{len(labels)} pictures: top-1 {top1:.2f}, top-5 {top5:.2f}")
    print("weakest classes: " + ", ".join(f"{name} {accuracy:.1f}%"
                                          for name, accuracy in sorted(per_class.items(), key=lambda x: x[1])[:5]))
    print("most often taken for another: " + ", ".join(f"{true} for {first} ({count})"
                                                       for (true, first), count in pairs.most_common(5)))
    write_result(output / "result.json", subject, **about, top1=top1, top5=top5, judged=len(labels),
                 per_class=per_class, confused=[[*pair, count] for pair, count in pairs.most_common(50)])


TASKS = {"knn": knn, "linear": linear, "finetune": finetune}
FLAGS = {"knn": knn_flags, "linear": linear_flags, "finetune": finetune_flags}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, FloatingPointError)
