"""Evaluate the features of a backbone: k-NN, linear, few labels, fine-tuning, segmentation; classify or embed images.

    python evaluate.py knn                        # the newest run, on the data it was trained on
    python evaluate.py fewshot                    # 1, 2, 5, 10 images of each class, 1% and 10% of the labels
    python evaluate.py logistic                   # logistic regression on features that are extracted once
    python evaluate.py linear                     # linear classifiers on frozen features, the paper's protocol
    python evaluate.py linear --quick             # the same on features that are extracted once
    python evaluate.py finetune                   # backbone and classifier are trained with labels
    python evaluate.py segmentation               # linear segmentation of frozen patch tokens, on the built-in shapes
    python evaluate.py knn --ckpt dino_deitsmall16_pretrain.pth --data_path /data/imagenet
    torchrun --nproc_per_node=8 evaluate.py linear --ckpt runs/vits16/teacher.safetensors --data_path /data/imagenet
    python evaluate.py predict --ckpt runs/demo/teacher.linear.photos/classifier.safetensors /more_photos dog.jpg
    python evaluate.py embed /photos --output features.parquet

Flags of a task: `python evaluate.py linear --help`. `--untrained` evaluates random weights as a baseline.

knn and fewshot write their accuracies beside the model file, as NAME.knn.DATA.json. linear, logistic, finetune and
segmentation write a folder, as NAME.linear.DATA, with result.json and classifier.safetensors, and if they train on
images log.jsonl and checkpoint.pth. Interrupted runs resume automatically, and `--test_only` evaluates
classifier.safetensors again. predict writes the class of each image to predictions.csv, embed its features to a file.
"""

import common  # noqa: F401 (first: it checks the version of Python)

# isort: split
import csv
import io
import os
import shlex
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

from common import cli, distributed
from common.checkpoint import MODEL_FILES, CheckpointError
from common.cli import fraction, nonnegative_float, nonnegative_int, percentage, positive_float, positive_int
from common.distributed import get_rank, get_world_size, is_rank_zero
from common.files import create_folder, first_line, write_json, write_text
from common.logger import progress_bar
from common.precision import autocast, set_matmul_precision
from common.weights import open_backbone, output_folder, read_weights, resolve_image_size, result_file, save_model
from data.datasets import (
    ConcatImages,
    DataError,
    data_name,
    describe_paths,
    group_shards,
    is_source,
    make_absolute,
    name_image,
    open_data,
    open_images,
    trained_data_path,
    trained_val_path,
)
from data.loaders import build_eval_loader, build_view, default_attention_size, normalize, resize_to_patches
from data.retrieval import ImageFiles
from data.segmentation import build_loader
from data.semantic import SemanticCrop, open_semantic
from evaluation import supervised
from evaluation.embed import WRITERS, write_features
from evaluation.features import extract_features, load_features
from evaluation.fewshot import SHOTS, fewshot_classifier
from evaluation.knn import knn_classifier, knn_predict
from evaluation.linear import (
    COSTS,
    LRS,
    WEIGHT_DECAYS,
    fit_best_classifier,
    fit_best_logistic_regression,
    holdout_mask,
)
from evaluation.segmentation import (
    PatchFeatures,
    SegmentationHead,
    count_confusions,
    pixel_cross_entropy,
    predict_classes,
    summarize_confusions,
)
from optim import build_optimizer

# ---- flags ----

def parse_args(argv=None):
    parser = cli.build_parser("evaluate.py", __doc__)
    knn, fewshot, linear, logistic, finetune, segmentation, predict, embed = cli.add_subcommands(parser, TASKS).values()
    add = cli.add_flag
    for task in (knn, fewshot, linear, logistic, finetune):
        cli.add_model_flags(task)
        cli.add_data_flags(task, None, "labeled images, named as for train.py (default: the data of the newest run)")
        add(task, "--image_size", None, "side of the center crop (default: the size in training)", cli.image_side)
        add(task, "--batch_size_per_gpu", 128, "images per GPU", positive_int)
    for task in (knn, linear, logistic, finetune):
        task.add_argument("--save_predictions", action="store_true",
                          help="add the class of each image and the confusion matrix to the result")
    for task in (knn, fewshot, linear, logistic):
        add(task, "--features", None, "safetensors file that caches the features; linear: with --quick", metavar="FILE")

    add(knn, "--nb_knn", [10, 20, 100, 200], "numbers of neighbors", positive_int, nargs="+")
    add(knn, "--temperature", 0.07, "temperature of the votes", positive_float)
    add(knn, "--knn_memory_mb", 1024, "memory for similarities", positive_int)

    add(fewshot, "--shots", None, "images of each class (default: of 1 2 5 10 what every class has)", positive_int,
        nargs="+")
    add(fewshot, "--percent", [1.0, 10.0], "shares of the labels, of each class", percentage, nargs="+")
    add(fewshot, "--draws", 5, "random draws, the first with --seed, then the following", positive_int)
    add(fewshot, "--C", 100.0, "inverse L2 penalty of the logistic regression, on normalized features", positive_float)
    add(fewshot, "--seed", 0, "of the first draw", cli.seed)

    add(logistic, "--C", COSTS, "inverse L2 penalty; of several a held-out tenth selects the best", positive_float,
        nargs="+")

    add(linear, "--n_last_blocks", None, "blocks whose CLS tokens to concatenate; ViT-B: 1 (default: 4, or all)",
        positive_int)
    add(linear, "--avgpool_patchtokens", False, "append the last block's mean patch token; true for ViT-B", cli.boolean,
        nargs="?", const=True)
    add(linear, "--lr", LRS, "peak for batch size 256; a held-out tenth selects the best", positive_float, nargs="+")
    add(linear, "--weight_decay", None, "one or several (default: 0; five with --quick)", nonnegative_float, nargs="+")
    linear.add_argument("--quick", action="store_true", help="train on features extracted once: center crops, fp32")

    add(finetune, "--lr", 0.0005, "peak for a global batch size of 256, scaled linearly", positive_float)
    add(finetune, "--warmup_epochs", None, "epochs of linear learning-rate warm-up (default: 5, less below 100)",
        nonnegative_int)
    add(finetune, "--layer_decay", 0.75, "lr factor per block, from the top down", fraction)
    add(finetune, "--weight_decay", 0.05, "weight decay, of matrices only", nonnegative_float)
    add(finetune, "--drop_path_rate", None, "stochastic depth (default: 0.1 for vit_*, else 0)", cli.fraction_below_one)
    add(finetune, "--label_smoothing", 0.1, "label smoothing", fraction)
    add(finetune, "--mixup", 0.0, "alpha, 0 disables; 0.8 for long runs", nonnegative_float)
    add(finetune, "--cutmix", 0.0, "alpha, 0 disables; 1 for long runs", nonnegative_float)

    cli.add_model_flags(segmentation)
    add(segmentation, "--data_path", "shapes", "shapes[:PIXELS], VOC2012, ADE20K, or a folder with images/ and masks/",
        metavar="PATH")
    add(segmentation, "--image_size", None, "side of a crop, shorter side in the test (default: 480/224 of that as "
        "trained)", cli.image_side)
    add(segmentation, "--batch_size_per_gpu", 16, "crops per GPU", positive_int)
    add(segmentation, "--n_last_blocks", 1, "blocks whose patch tokens to concatenate, 1 or 4", positive_int)
    add(segmentation, "--lr", 0.016, "peak for batch size 256, scaled linearly: 0.001 for 16", positive_float)
    add(segmentation, "--weight_decay", 0.0001, "weight decay", nonnegative_float)

    for task, epochs, scale in ((linear, 100, (0.08, 1.0)), (finetune, 100, (0.08, 1.0)),
                                (segmentation, 30, (0.25, 1.0))):
        add(task, "--epochs", epochs, "training epochs", positive_int)
        add(task, "--crop_scale", scale, "crop area relative to the image", fraction, nargs=2)
        add(task, "--val_freq", 10, "epochs between evaluations, 0 for none", nonnegative_int)
        task.add_argument("--test_only", action="store_true", help="evaluate classifier.safetensors of an earlier run")
        cli.add_run_flags(task)

    predict.add_argument("images", nargs="+", metavar="PATH", help="images, folders of images, or shards")
    predict.add_argument("--ckpt", required=True, help="classifier.safetensors of linear, logistic or finetune")
    predict.add_argument("--output", default="predictions.csv", metavar="FILE.csv", help="file, class, probability")
    add(predict, "--topk", 1, "classes of each image, the most probable first", positive_int)
    add(predict, "--batch_size_per_gpu", 128, "images per GPU", positive_int)
    cli.add_cache_flag(predict)
    cli.add_device_flags(predict)

    embed.add_argument("images", nargs="+", metavar="PATH", help="images, folders, shards, or sets as for train.py")
    add(embed, "--output", "features.npy", "file that ends in " + ", ".join(WRITERS), metavar="FILE")
    cli.add_model_flags(embed, output_dir=False)
    cli.add_cache_flag(embed)
    add(embed, "--image_size", None, "side of the center crop (default: the size in training)", cli.image_side)
    add(embed, "--batch_size_per_gpu", 128, "images per GPU", positive_int)
    add(embed, "--n_last_blocks", 1, "blocks whose CLS tokens to concatenate, 0 for none", nonnegative_int)
    add(embed, "--avgpool_patchtokens", False, "append the last block's mean patch token", cli.boolean, nargs="?",
        const=True)

    # the tasks that lack one of these flags need its value
    parser.set_defaults(features=None, quick=False, save_predictions=False, warmup_epochs=0, label_smoothing=0.0,
                        mixup=0.0, cutmix=0.0, val_path=None, cache_dir=None)
    args = parser.parse_args(argv)
    if args.task == "predict":
        if not args.output.lower().endswith(".csv"):
            parser.error(f"--output {args.output} does not end in .csv")
        return args
    if args.task == "embed":
        if Path(args.output).suffix.lower() not in WRITERS:
            parser.error(f"--output {args.output} does not end in {', '.join(WRITERS)}")
        return args
    if args.save_predictions and args.features:
        parser.error("--features holds no file names, leave it out with --save_predictions")
    if args.features and not args.features.endswith(".safetensors"):
        parser.error(f"--features {args.features} does not end in .safetensors")
    if args.task in ("knn", "fewshot", "logistic"):
        args.precision = "fp32"
        return args
    cli.check_range(parser, args, "crop_scale")
    cli.check_run_flags(parser, args, warmup_epochs=5)
    if args.quick:
        args.precision = "fp32"
    if args.features and not args.quick:
        parser.error("--features keeps what --quick extracts; without --quick features depend on random crops")
    return args


# ---- setup ----

class EvalSetup:
    """Backbone, labeled images and output of an evaluation.

    Attributes:
        backbone, info: see `load_backbone`.
        origin: {name: plain value} that the features depend on, written to every output file.
        data, name: see data.datasets.Data and data_name.
        output: Path of the folder of a classifier.
        classes: unique names, None for k-NN without --save_predictions and for few-shot.
        images: indices of the images that `extract` read last.
        corrupt: set of messages on corrupt images.
        fit_device: for fits in float64.
    """

    def __init__(self, args):
        self.args, self.corrupt = args, set()
        self.device = distributed.init_distributed(args.device)[2]
        self.fit_device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        is_dense = args.task == "segmentation"
        self.backbone, self.info, self.origin = open_backbone(
            args, self.device, needs="patch tokens" * is_dense, precision=args.precision, rgb_only=is_dense)
        if is_dense:
            trained_size, p = self.backbone.grid[0] * self.backbone.patch_size, self.backbone.patch_size
            args.image_size = args.image_size or default_attention_size(trained_size, p)
        args.image_size = resolve_image_size(args.image_size, self.backbone)
        val_path = trained_val_path(args, self.info)
        self.data = distributed.run_on_rank_zero_first(
            lambda: open_semantic(args.data_path) if is_dense else self.open_labeled(val_path))
        sizes = [len(self.data.train_labeled), len(self.data.val)]
        distributed.check_same_on_all_ranks("numbers of labeled images", sizes)
        log(self.data.note)
        value_range = list(getattr(self.data.train, "value_range", None) or ()) or None
        self.origin |= dict(data_path=self.data.path, dataset_sizes=sizes, image_size=args.image_size,
                            value_range=value_range) | ({"val_path": make_absolute(val_path)} if val_path else {})
        self.name = data_name(self.data.path)
        self.output = output_folder(self.origin, args, f"{args.task}{'_quick' * args.quick}.{self.name}")
        self.classes = self.images = None
        # on rank 0: datasets without class names are decoded
        if args.task not in ("knn", "fewshot") or args.save_predictions:
            self.classes = distributed.all_gather_objects(list_class_names(self.data) if is_rank_zero() else None)[0]

    def log_corrupt(self, messages):
        """Log messages on corrupt images, each once."""
        for message in sorted(set(messages) - self.corrupt):
            log(f"skipped corrupt image {message}")
        self.corrupt.update(messages)


    def open_labeled(self, val_path):
        """Data of the labeled images that the flags name, or that the newest run was trained on."""
        args, data_path = self.args, self.args.data_path or trained_data_path(self.args, self.info)
        if not data_path:
            raise DataError(f"{self.origin['ckpt']}: trained on {self.info.get('data_path') or 'unknown data'}; name "
                            f"the labeled images with --data_path")
        data = open_data(data_path, download=bool(args.data_path), value_range=self.info.get("value_range"),
                         val_path=val_path, cache_dir=args.cache_dir, channels=self.info["channels"])
        if data.val is None:
            raise DataError(f"{describe_paths(data_path)}: no labels; expected one folder per class, best in train/ "
                            f"and val/")
        return data


def log(text):
    if is_rank_zero():
        tqdm.write(text)


def list_class_names(data):
    """Unique class names: the data set's, with the index where two are equal; indices where it has none (SVHN)."""
    names = getattr(data.train, "classes", None)
    if not names:
        loader = build_eval_loader(ConcatDataset([data.train_labeled, data.val]), size=32, batch_size=256)
        names = range(1 + max(label for _, labels, _, _ in loader for label in labels.tolist()))
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


# ---- features ----

def extract(setup, model, images):
    """model(center crop) of each image, over all processes: [M, ...] float32 and labels [M]."""
    args = setup.args
    with autocast(setup.device, args.precision):
        outputs, labels, setup.images, corrupt = extract_features(model, images, args.image_size, args, setup.device,
                                                                    build_view(setup.info))
    setup.log_corrupt(corrupt)
    return outputs, labels


def load_or_extract_features(setup, model):
    """Features and labels of train and test images: {name: tensor} as for `knn_classifier`."""
    path = setup.args.features
    cached = bool(path and Path(path).exists())
    distributed.check_same_on_all_ranks("a features file:", cached)
    if cached:
        log(f"features loaded from {path}")
        return load_features(path, setup.origin)
    if path:
        create_folder(Path(path).parent)
    features = {}
    for part, images in (("train", setup.data.train_labeled), ("test", setup.data.val)):
        features[f"{part}_features"], features[f"{part}_labels"] = extract(setup, model, images)
    if path and is_rank_zero():
        save_model(path, features, {"backbone": setup.info["backbone"]} | setup.origin)
        log(f"features written to {path}")
    return features


# ---- tasks ----

def knn(args):
    """Weighted k-NN classification of frozen features."""
    setup = EvalSetup(args)
    settings = dict(temperature=args.temperature, nb_knn=args.nb_knn, save_predictions=args.save_predictions)
    path = result_file(setup.origin | settings, args, f"knn.{setup.name}")
    features = load_or_extract_features(setup, setup.backbone)
    flags = dict(temperature=args.temperature, memory_mb=args.knn_memory_mb, device=setup.device)
    accuracies = knn_classifier(**features, ks=args.nb_knn, **flags)
    results = {k: dict(top1=top1, top5=top5) for k, (top1, top5) in accuracies.items()}
    if args.save_predictions:
        for k in results:
            predicted, _ = knn_predict(features["train_features"], features["train_labels"], features["test_features"],
                                       k, **flags)
            results[k] |= list_predictions(setup, features["test_labels"], predicted)
    num_test, num_train = len(features["test_labels"]), len(features["train_labels"])
    log(f"k-NN of {setup.origin['ckpt']}{' untrained' * args.untrained}: {num_test} test images, {num_train} train "
        f"images, {args.image_size} pixels, temperature {args.temperature}\n     k   top-1   top-5")
    for k, (top1, top5) in accuracies.items():
        log(f"{k:6d}  {top1:6.2f}  {top5:6.2f}")
    write_result(path, setup, settings | dict(num_images=num_test, num_train_images=num_train, knn=results))


def fewshot(args):
    """Classification with few labels: logistic regression and nearest class mean on random draws of images."""
    setup = EvalSetup(args)
    settings = {name: getattr(args, name) for name in ("shots", "percent", "draws", "C", "seed")}
    path = result_file(setup.origin | settings, args, f"fewshot.{setup.name}")
    features = load_or_extract_features(setup, setup.backbone)
    counts = features["train_labels"].bincount(minlength=int(features["test_labels"].max()) + 1).tolist()
    shots = args.shots or [n for n in SHOTS if n <= min(counts)] or SHOTS[:1]
    if max(shots) > min(counts):
        name = list_class_names(setup.data)[counts.index(min(counts))]
        raise DataError(f"--shots {max(shots)}: class {name} has {min(counts)} training images, lower --shots or leave "
                        f"the class out")
    amounts = {f"{n}-shot": n for n in shots} | {f"{percent:g}%": percent / 100 for percent in args.percent}
    accuracies = fewshot_classifier(**features, amounts=[*amounts.values()], draws=args.draws, seed=args.seed, C=args.C,
                                    device=setup.fit_device)
    results = {name: {method: dict(mean=statistics.mean(top1), top1=top1,
                                   std=statistics.stdev(top1) if args.draws > 1 else 0.0)
                      for method, top1 in methods.items()} for name, methods in zip(amounts, accuracies)}
    num_test, num_train = len(features["test_labels"]), len(features["train_labels"])
    log(f"few-shot accuracy of {setup.origin['ckpt']}{' untrained' * args.untrained}: {num_test} test images, "
        f"{num_train} train images of {len(counts)} classes, {args.image_size} pixels; top-1, mean and standard "
        f"deviation of {args.draws} draws\n  labels       logistic  nearest class mean")
    for name, methods in results.items():
        log(f"{name:>8}" + "".join(f"{x['mean']:8.2f} ± {x['std']:5.2f}" for x in methods.values()))
    write_result(path, setup, settings | dict(num_images=num_test, num_train_images=num_train, fewshot=results))


def logistic(args):
    """Logistic regression with an L2 penalty on frozen features; writes a classifier as linear does."""
    setup = EvalSetup(args)
    network = supervised.Classifiers(supervised.FeatureExtractor(setup.backbone), len(setup.classes)).eval()

    def fit(x, y):
        count = -(-len(args.C) // get_world_size())
        with progress_bar(total=count, unit="C") as bar:
            layer, *rest = fit_best_logistic_regression(x.to(setup.fit_device), y.to(setup.fit_device),
                                                        len(setup.classes), args.C, bar.update)
        return layer.float().to(setup.device), *rest

    train_on_features(network, fit, [(C,) for C in args.C], ["C"], {}, setup)


def linear(args):
    """Linear classifiers on frozen features: SGD on random crops and flips, or with --quick on features once."""
    setup = EvalSetup(args)
    n_last_blocks = args.n_last_blocks or max(1, min(4, len(setup.backbone.blocks)))
    extractor = supervised.FeatureExtractor(setup.backbone, n_last_blocks, args.avgpool_patchtokens)
    setup.origin.update(n_last_blocks=extractor.n_last_blocks, avgpool_patchtokens=extractor.avgpool)
    weight_decays = args.weight_decay or (WEIGHT_DECAYS if args.quick else [0])
    grid = [(lr, weight_decay) for lr in args.lr for weight_decay in weight_decays]
    torch.manual_seed(args.seed)
    network = supervised.Classifiers(extractor, len(setup.classes), len(grid)).to(setup.device).eval()
    if args.quick and not args.test_only:
        train_on_features(network, lambda x, y: fit_quick(network, grid, x, y, args), grid, ["lr", "weight_decay"],
                          dict(quick=True, epochs=args.epochs), setup)
    else:
        optimizer = build_optimizer("sgd", supervised.build_head_groups(network, grid))
        crops = supervised.build_crops(args, setup.info, setup.device)
        train_and_test(network, optimizer, grid, dict(epochs=args.epochs), setup, crops, test_classifier, measure_top1)


def finetune(args):
    """Fine-tuning with labels: AdamW, layer-wise learning rate decay, label smoothing, optional mixup and CutMix."""
    setup = EvalSetup(args)
    backbone = setup.backbone
    if args.drop_path_rate and not backbone.blocks:
        raise CheckpointError(f"--drop_path_rate is of vision transformers, not of {backbone.arch}")
    if args.drop_path_rate is None:
        args.drop_path_rate = 0.1 if backbone.blocks else 0.0
    backbone.drop_path_rate = args.drop_path_rate
    torch.manual_seed(args.seed)
    extractor = supervised.FeatureExtractor(backbone)
    network = supervised.Classifiers(extractor, len(setup.classes), frozen=False).to(setup.device).eval()
    groups = supervised.build_layer_decay_groups(network, args.lr, args.weight_decay, args.layer_decay)
    hparams = {name: getattr(args, name) for name in (
        "epochs", "lr", "warmup_epochs", "layer_decay", "weight_decay", "drop_path_rate", "label_smoothing", "mixup",
        "cutmix")}
    crops = supervised.build_crops(args, setup.info, setup.device)
    train_and_test(network, build_optimizer("adamw", groups), [(args.lr, args.weight_decay)], hparams, setup, crops,
                   test_classifier, measure_top1)


def segmentation(args):
    """Linear segmentation: batch norm and a 1x1 convolution on the patch tokens of a frozen backbone, AdamW; mIoU."""
    setup = EvalSetup(args)
    setup.origin.update(n_last_blocks=args.n_last_blocks)
    torch.manual_seed(args.seed)
    try:
        features = PatchFeatures(setup.backbone, args.n_last_blocks)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    network = supervised.Classifiers(features, len(setup.classes), build_head=SegmentationHead)
    network = network.to(setup.device).eval()
    grid = [(args.lr, args.weight_decay)]
    optimizer = build_optimizer("adamw", supervised.build_head_groups(network, grid))
    crops = SemanticCrop(args.image_size, args.crop_scale, setup.info["mean"], setup.info["std"])
    train_and_test(network, optimizer, grid, dict(epochs=args.epochs), setup, crops, report_segmentation, measure_miou,
                   "test_miou", pixel_cross_entropy)


# ---- training ----

def train_and_test(network, optimizer, grid, hparams, setup, crops, report, measure, metric="test_top1",
                   criterion=F.cross_entropy):
    """Train Classifiers on random crops, or with --test_only load a trained one; test the best and write the result.

    Args:
        grid: (lr, weight decay) of each classifier; of several, the best on a held-out tenth of the images is kept.
        hparams: {name: value} that a resumed run must share, written with the result.
        crops, criterion: see `train_classifiers`.
        report: (network, setup, hyperparameters), tests the classifier and writes the result.
        measure: (network, images, setup) -> metric of each classifier, in percent.
        metric: its name in the log.
    """
    args = setup.args
    if args.test_only:
        hparams = restore_classifier(network, setup)
    else:
        train_images, val_images = setup.data.train_labeled, setup.data.val
        if len(grid) > 1:
            mask, metric = holdout_mask(len(train_images)), "held_out_top1"
            train_images, val_images = (Subset(train_images, m.nonzero().flatten().tolist()) for m in (~mask, mask))
        if 0 < (largest := len(train_images) // get_world_size()) < args.batch_size_per_gpu:
            log(f"NOTE: --batch_size_per_gpu {largest} for {args.batch_size_per_gpu}, as there are {len(train_images)} "
                f"training images")
            args.batch_size_per_gpu = largest
        log_grid(network, grid, args.batch_size_per_gpu * get_world_size())
        completed = supervised.train_classifiers(
            network, optimizer, train_images, crops, get_fixed_settings(setup) | hparams | {"grid": grid},
            lambda: {metric: max(measure(network, val_images, setup))}, setup.output, args, criterion)
        if not completed:  # stopped by a signal
            return
        accuracies = measure(network, val_images, setup) if len(grid) > 1 else [0.0]
        best = accuracies.index(max(accuracies))
        network.heads = network.heads[best:best + 1]
        hparams = save_classifier(network, grid, best, accuracies, hparams, setup)
    report(network, setup, hparams)


def train_on_features(network, fit, grid, names, hparams, setup):
    """Train and test on features that are extracted once; heads[0] becomes the best classifier of the grid.

    Args:
        fit: (features, labels) -> linear layer, index of its hyperparameters in the grid, held-out accuracy of each.
        grid, names: hyperparameters of each classifier, and their names.
        hparams: {name: value}, written with the result.
    """
    for name in ("checkpoint.pth", *MODEL_FILES["pretraining"]):
        if (setup.output / name).exists():
            raise CheckpointError(f"{setup.output} holds {name} of a training run: choose another --output_dir")
    if is_rank_zero():
        create_folder(setup.output)
    features = load_or_extract_features(setup, network.tokens)
    x, y, test_x = (features[name].to(setup.device) for name in ("train_features", "train_labels", "test_features"))
    if len(x) < 2:
        raise DataError(f"{setup.data.path}: one labeled image is too few to hold out a part, add images")
    network.heads[0], best, accuracies = fit(x, y)
    hparams = save_classifier(network, grid, best, accuracies, hparams, setup, names)
    report_accuracy(network.heads[0](test_x).cpu(), features["test_labels"], setup, hparams)


def fit_quick(network, grid, x, y, args):
    """The best linear classifier of a grid, for `train_on_features`."""
    log_grid(network, grid, min(1024, len(x)))
    with progress_bar(total=2 * args.epochs * len(x), unit="img") as bar:
        classifier, best, accuracies = fit_best_classifier(x, y, network.heads[0].out_features, grid,
                                                           epochs=args.epochs, seed=args.seed, progress=bar.update)
    if not classifier.weight.isfinite().all():
        raise FloatingPointError("every classifier of the grid diverged: lower --lr")
    return classifier.to_linear(), best, accuracies


def log_grid(network, grid, batch_size):
    lrs = ", ".join(f"{lr * batch_size / 256:.3g}" for lr in sorted({lr for lr, _ in grid}))
    log(f"{len(grid)} linear classifier{'s' * (len(grid) > 1)} on {network.tokens.dim} features; effective lr {lrs} "
        f"= lr * {batch_size} / 256 (linear scaling rule)")


def measure_top1(network, images, setup):
    """Top-1 accuracy in percent of each classifier, from center crops."""
    predictions, labels = extract(setup, lambda x: network(x).argmax(dim=-1).T, images)
    return (100 * (predictions == labels.view(-1, 1)).double().mean(dim=0)).tolist()


@torch.no_grad()
def count_test_confusions(network, images, setup):
    """Confusion matrix of the pixels of images of a SemanticImages, [K, K], and their number; over all processes."""
    args, count = setup.args, len(setup.classes)
    matrix, num_images, corrupt = torch.zeros(count, count, dtype=torch.int64), 0, set()
    mine = Subset(images, range(get_rank(), len(images), get_world_size()))
    loader = build_loader(range(len(mine)), mine.__getitem__, args.num_workers)

    def test():
        nonlocal num_images
        for example in progress_bar(loader, unit="img"):
            if isinstance(example, str):
                corrupt.add(example)
                continue
            (image, labels), num_images = example[0], num_images + 1
            x = resize_to_patches(image, args.image_size, setup.backbone.patch_size)
            x = normalize(x, setup.info["mean"], setup.info["std"])[None].to(setup.device)
            with autocast(setup.device, args.precision):
                logits = network(x)[0]
            labels = torch.from_numpy(np.array(labels)).to(setup.device)
            matrix.add_(count_confusions(predict_classes(logits, labels.shape)[0], labels, count).cpu())
    distributed.wait_for(test)
    corrupt = set().union(*distributed.all_gather_objects(corrupt))
    setup.log_corrupt(corrupt)
    num_images = sum(distributed.all_gather_objects(num_images))
    if not num_images:
        raise DataError(f"{setup.data.path}: no test image can be read, the last: {max(corrupt)}")
    return distributed.all_gather_rows(matrix[None]).sum(dim=0), num_images


def measure_miou(network, images, setup):
    """Mean IoU in percent, as a list of one."""
    return [100 * summarize_confusions(count_test_confusions(network, images, setup)[0])["miou"]]


# ---- classifiers and results ----

def get_fixed_settings(setup):
    """What must not change when a classifier is resumed or tested; files may have moved."""
    origin = {name: value for name, value in setup.origin.items() if name not in ("ckpt", "data_path", "val_path")}
    return origin | {"classes": setup.classes}


def get_saved_modules(network):
    """What classifier.safetensors holds: the first classifier, and the backbone."""
    return nn.ModuleDict({"classifier": network.heads[0], "backbone": network.tokens.backbone})


def save_classifier(network, grid, best, accuracies, hparams, setup, names=("lr", "weight_decay")):
    """Write classifier.safetensors: classifier and backbone, description of the backbone, origin, hyperparameters.

    Args:
        accuracies: held-out accuracy of each member of the grid, used if there are several.
        names: of the hyperparameters in the grid.

    Returns:
        the hyperparameters, with those of the best of the grid.
    """
    chosen = dict(zip(names, grid[best]))
    hparams = hparams | chosen
    if len(grid) > 1:
        log(f"best on a held-out tenth ({accuracies[best]:.2f}%): "
            + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items()))
        hparams |= dict(held_out_top1=accuracies[best], grid=[(*pair, top1) for pair, top1 in zip(grid, accuracies)])
    if is_rank_zero():
        save_model(setup.output / "classifier.safetensors", get_saved_modules(network).state_dict(),
                   setup.info | setup.origin | dict(
                       hparams=hparams, classes=setup.classes, n_last_blocks=network.tokens.n_last_blocks,
                       avgpool_patchtokens=network.tokens.avgpool))  # of this one, not of one that it began with
    return hparams


def restore_classifier(network, setup):
    """Load what `save_classifier` wrote; returns the hyperparameters.

    Raises:
        CheckpointError: no such file, or trained on another backbone, data set or image size.
    """
    path = setup.output / "classifier.safetensors"
    weights, info, _ = read_weights(str(path), None)
    for name, value in get_fixed_settings(setup).items():
        if info.get(name) != value:
            raise CheckpointError(f"{path}: trained with {name} {str(info.get(name))[:200]}, not {str(value)[:200]}")
    try:
        # earlier versions did not save a frozen backbone
        get_saved_modules(network).load_state_dict(weights, strict=not network.frozen)
        return dict(info["hparams"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the classifier of this task ({first_line(error)})") from None


def test_classifier(network, setup, hparams):
    """Log and write the accuracy of a classifier on the test images."""
    report_accuracy(*extract(setup, lambda x: network(x)[0], setup.data.val), setup, hparams)


def report_segmentation(network, setup, hparams):
    """Log and write mIoU, accuracies, those of each class, and the confusion matrix, of all test images."""
    matrix, num_images = count_test_confusions(network, setup.data.val, setup)
    miou, accuracy, mean_accuracy, iou, class_accuracy = summarize_confusions(matrix).values()
    log(f"{num_images} test images: mIoU {100 * miou:.2f}, pixel accuracy {100 * accuracy:.2f}, mean accuracy "
        f"{100 * mean_accuracy:.2f}")
    per_class = {name: dict(iou=100 * a, accuracy=100 * b if b == b else None) for name, a, b in zip(
        setup.classes, iou.tolist(), class_accuracy.tolist()) if a == a}  # NaN: the class does not occur
    lowest = sorted(per_class.items(), key=lambda item: item[1]["iou"])[:5]
    log("lowest IoU: " + ", ".join(f"{name} {values['iou']:.1f}%" for name, values in lowest))
    write_result(setup.output / "result.json", setup, hparams | dict(
        miou=100 * miou, accuracy=100 * accuracy, mean_accuracy=100 * mean_accuracy, num_images=num_images,
        per_class=per_class, classes=setup.classes, confusion_matrix=matrix.tolist()))


def report_accuracy(logits, labels, setup, hparams):
    """Log and write top-1, top-5, per-class accuracy and confusions of logits [Q, K] with labels [Q]."""
    classes, predicted = setup.classes, logits.topk(min(5, logits.shape[1]), dim=1).indices
    correct = predicted == labels.view(-1, 1)
    top1, top5 = (100 * x.double().mean().item() for x in (correct[:, 0], correct.any(dim=1)))
    per_class = {classes[c]: 100 * correct[labels == c, 0].double().mean().item() for c in labels.unique().tolist()}
    lowest = sorted(per_class.items(), key=lambda item: item[1])[:5]
    pairs = zip(labels[~correct[:, 0]].tolist(), predicted[~correct[:, 0], 0].tolist())
    confusions = Counter((classes[label], classes[other]) for label, other in pairs).most_common(50)
    log(f"{len(labels)} test images: top-1 {top1:.2f}, top-5 {top5:.2f}")
    log("lowest per-class accuracy: " + ", ".join(f"{name} {accuracy:.1f}%" for name, accuracy in lowest))
    log("most frequent confusions: " + ", ".join(f"{a} as {b} ({count})" for (a, b), count in confusions[:5]))
    result = hparams | dict(top1=top1, top5=top5, num_images=len(labels), per_class=per_class,
                            confusions=[[*pair, count] for pair, count in confusions])
    if setup.args.save_predictions:
        result |= list_predictions(setup, labels, predicted[:, 0])
    write_result(setup.output / "result.json", setup, result)
    log(f"classify images: python evaluate.py predict --ckpt {shlex.quote(str(setup.output))} PATH")


def list_predictions(setup, labels, predicted):
    """{"classes": names, "predictions": one row per image, "confusion_matrix": [true][predicted]}, for JSON."""
    classes, count = setup.classes, len(setup.classes)
    rows = [{"file": name_image(setup.data.val, i), "class": classes[label], "predicted": classes[other]}
            for i, label, other in zip(setup.images.tolist(), labels.tolist(), predicted.tolist())]
    matrix = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    return dict(classes=classes, predictions=rows, confusion_matrix=matrix.tolist())


def write_result(path, setup, result):
    if is_rank_zero():
        write_json(path, setup.origin | result | {"corrupt": sorted(setup.corrupt)})
        log(f"written to {path}")


# ---- classifying images ----

def open_inputs(args, info):
    """The images, folders, shards and named sets of a command line, for a model of this description, as one dataset."""
    parts, options = [], dict(value_range=info.get("value_range"), channels=info["channels"])
    for paths in group_shards(args.images):
        path = paths[0]
        if os.path.isdir(path) or is_source(path):
            parts.append(distributed.run_on_rank_zero_first(
                lambda paths=paths: open_images(paths, cache_dir=args.cache_dir, **options)))
            log(f"{len(parts[-1]):,} images in {describe_paths(paths)}{parts[-1].passed_over}")
        elif os.path.exists(path):
            parts.append(ImageFiles(paths, **options))
        elif ":" in path or path == "shapes":
            data = distributed.run_on_rank_zero_first(lambda path=path: open_data(path, **options))
            parts.append(data.train)
            log(data.note)
        else:
            raise DataError(f"{path}: no such image or folder")
    return ConcatImages(parts, [None] * len(parts), [])


def predict(args):
    """Classify images with the classifier of linear, logistic or finetune; writes file, class, probability as CSV."""
    device = distributed.init_distributed(args.device)[2]
    network, info = supervised.load_classifier(args.ckpt)
    set_matmul_precision(device, "fp32", network.tokens.backbone.embed_dim)
    network.to(device)
    classes, images = info["classes"], open_inputs(args, info)
    create_folder(Path(args.output).parent)
    k = min(args.topk, len(classes))
    top, _, indices, corrupt = extract_features(
        lambda x: torch.cat(network(x)[0].softmax(dim=-1).topk(k), dim=-1), images, info["image_size"], args, device,
        build_view(info))
    for message in corrupt:
        log(f"skipped corrupt image {message}")
    rows = [["file", *(name + f"_{i}" * (i > 1) for i in range(1, k + 1) for name in ("class", "probability"))]]
    for i, values in zip(indices.tolist(), top.tolist()):
        rows.append([images.name(i)])
        for probability, label in zip(values[:k], values[k:]):
            rows[-1] += [classes[int(label)], f"{probability:.6f}"]
    counts = ", ".join(f"{name} {count}" for name, count in Counter(row[1] for row in rows[1:]).most_common(10))
    log(f"{len(top)} images, {len(corrupt)} corrupt; most frequent: {counts}")
    if is_rank_zero():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(args.output, text.getvalue())
        log(f"written to {args.output}")


# ---- features to a file ----

def embed(args):
    """Write features of images, and their names, to a file: .npy, .csv, .parquet or .safetensors."""
    device = distributed.init_distributed(args.device)[2]
    backbone, info, origin = open_backbone(args, device, rgb_only=False)
    extractor = supervised.FeatureExtractor(backbone, args.n_last_blocks, args.avgpool_patchtokens)
    size = resolve_image_size(args.image_size, backbone)
    images = open_inputs(args, info)
    create_folder(Path(args.output).parent)
    origin |= dict(images=args.images, image_size=size, n_last_blocks=args.n_last_blocks,
                   avgpool_patchtokens=args.avgpool_patchtokens)

    def extract(part):
        features, _, *rest = extract_features(extractor, part, size, args, device, build_view(info), allow_none=True)
        return features, *rest

    count = write_features(args.output, images, extract, origin, log)
    log(f"{count} images, {len(images) - count} corrupt, {extractor.dim} features each")
    log(f"written to {args.output}")


TASKS = {"knn": knn, "fewshot": fewshot, "linear": linear, "logistic": logistic, "finetune": finetune,
         "segmentation": segmentation, "predict": predict, "embed": embed}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, FloatingPointError)
