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
import statistics
from pathlib import Path

import torch

from common import cli, distributed
from common.checkpoint import CheckpointError
from common.cli import fraction, nonnegative_float, nonnegative_int, percentage, positive_float, positive_int
from common.distributed import get_world_size
from common.files import create_folder
from common.logger import log, progress_bar
from common.paths import result_file
from common.precision import set_matmul_precision
from common.weights import open_backbone, resolve_image_size
from data.datasets import DataError
from data.loaders import build_view
from data.semantic import SemanticCrop
from evaluation import report, supervised
from evaluation.classifiers import Classifiers, FeatureExtractor, load_classifier
from evaluation.embed import WRITERS, write_features
from evaluation.features import extract_features
from evaluation.fewshot import SHOTS, fewshot_classifier
from evaluation.knn import knn_classifier, knn_predict
from evaluation.linear import COSTS, LRS, WEIGHT_DECAYS, fit_best_logistic_regression
from evaluation.segmentation import PatchFeatures, SegmentationHead, pixel_cross_entropy
from evaluation.setup import EvalSetup, check_output, list_class_names, open_inputs
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

    for task in (predict, embed):
        task.add_argument("images", nargs="+", metavar="PATH", help="images, folders, shards, or sets as for train.py")
        add(task, "--batch_size_per_gpu", 128, "images per GPU", positive_int)
        cli.add_cache_flag(task)
    predict.add_argument("--ckpt", required=True, help="classifier.safetensors of linear, logistic or finetune")
    predict.add_argument("--output", default="predictions.csv", metavar="FILE.csv", help="file, class, probability")
    add(predict, "--topk", 1, "classes of each image, the most probable first", positive_int)
    cli.add_device_flags(predict)

    add(embed, "--output", "features.npy", "file that ends in " + ", ".join(WRITERS), metavar="FILE")
    cli.add_model_flags(embed, output_dir=False)
    add(embed, "--image_size", None, "side of the center crop (default: the size in training)", cli.image_side)
    add(embed, "--n_last_blocks", 1, "blocks whose CLS tokens to concatenate, 0 for none", nonnegative_int)
    add(embed, "--avgpool_patchtokens", False, "append the last block's mean patch token", cli.boolean, nargs="?",
        const=True)

    # the tasks that lack one of these flags need its value
    parser.set_defaults(features=None, quick=False, save_predictions=False, precision="fp32", warmup_epochs=0,
                        label_smoothing=0.0, mixup=0.0, cutmix=0.0, val_path=None, cache_dir=None)
    args = parser.parse_args(argv)
    if endings := {"predict": (".csv",), "embed": WRITERS}.get(args.task):
        if Path(args.output).suffix.lower() not in endings:
            parser.error(f"--output {args.output} does not end in {', '.join(endings)}")
        return args
    if args.save_predictions and args.features:
        parser.error("--features holds no file names, leave it out with --save_predictions")
    if args.features and not args.features.endswith(".safetensors"):
        parser.error(f"--features {args.features} does not end in .safetensors")
    if args.task in ("knn", "fewshot", "logistic"):
        return args
    cli.check_range(parser, args, "crop_scale")
    cli.check_run_flags(parser, args, warmup_epochs=5)
    if args.quick:
        args.precision = "fp32"
    if args.features and not args.quick:
        parser.error("--features keeps what --quick extracts; without --quick features depend on random crops")
    return args


# ---- tasks ----

def knn(args):
    """Weighted k-NN classification of frozen features."""
    setup = EvalSetup(args)
    settings = dict(temperature=args.temperature, nb_knn=args.nb_knn, save_predictions=args.save_predictions)
    path = result_file(setup.origin | settings, args, f"knn.{setup.name}")
    features = setup.load_or_extract_features(setup.backbone)
    flags = dict(temperature=args.temperature, memory_mb=args.knn_memory_mb, device=setup.device)
    accuracies = knn_classifier(**features, ks=args.nb_knn, **flags)
    results = {k: dict(top1=top1, top5=top5) for k, (top1, top5) in accuracies.items()}
    if args.save_predictions:
        for k in results:
            predicted, _ = knn_predict(features["train_features"], features["train_labels"], features["test_features"],
                                       k, **flags)
            results[k] |= report.list_predictions(setup, features["test_labels"], predicted)
    num_test, num_train = len(features["test_labels"]), len(features["train_labels"])
    log(f"k-NN of {setup.origin['ckpt']}{' untrained' * args.untrained}: {num_test} test images, {num_train} train "
        f"images, {args.image_size} pixels, temperature {args.temperature}\n     k   top-1   top-5")
    for k, (top1, top5) in accuracies.items():
        log(f"{k:6d}  {top1:6.2f}  {top5:6.2f}")
    setup.write_result(path, settings | dict(num_images=num_test, num_train_images=num_train, knn=results))


def fewshot(args):
    """Classification with few labels: logistic regression and nearest class mean on random draws of images."""
    setup = EvalSetup(args)
    settings = {name: getattr(args, name) for name in ("shots", "percent", "draws", "C", "seed")}
    path = result_file(setup.origin | settings, args, f"fewshot.{setup.name}")
    features = setup.load_or_extract_features(setup.backbone)
    counts = features["train_labels"].bincount(minlength=int(features["test_labels"].max()) + 1).tolist()
    shots = args.shots or [n for n in SHOTS if n <= min(counts)] or SHOTS[:1]
    if max(shots) > min(counts):
        name = list_class_names(setup.data)[counts.index(min(counts))]
        if not min(counts):
            raise DataError(f"class {name} has no training image: add some, or leave the class out of the test images")
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
    setup.write_result(path, settings | dict(num_images=num_test, num_train_images=num_train, fewshot=results))


def logistic(args):
    """Logistic regression with an L2 penalty on frozen features; writes a classifier as linear does."""
    setup = EvalSetup(args)
    network = Classifiers(FeatureExtractor(setup.backbone), len(setup.classes)).eval()

    def fit(x, y):
        count = -(-len(args.C) // get_world_size())
        with progress_bar(total=count, unit="C") as bar:
            layer, *rest = fit_best_logistic_regression(x.to(setup.fit_device), y.to(setup.fit_device),
                                                        len(setup.classes), args.C, bar.update)
        return layer.float().to(setup.device), *rest

    supervised.train_on_features(network, fit, [(C,) for C in args.C], ["C"], {}, setup)


def linear(args):
    """Linear classifiers on frozen features: SGD on random crops and flips, or with --quick on features once."""
    setup = EvalSetup(args)
    n_last_blocks = args.n_last_blocks or max(1, min(4, len(setup.backbone.blocks)))
    extractor = FeatureExtractor(setup.backbone, n_last_blocks, args.avgpool_patchtokens)
    setup.origin |= dict(n_last_blocks=extractor.n_last_blocks, avgpool_patchtokens=extractor.avgpool)
    weight_decays = args.weight_decay or (WEIGHT_DECAYS if args.quick else [0])
    grid = [(lr, weight_decay) for lr in args.lr for weight_decay in weight_decays]
    torch.manual_seed(args.seed)
    network = Classifiers(extractor, len(setup.classes), len(grid)).to(setup.device).eval()
    if args.quick and not args.test_only:
        supervised.train_on_features(network, lambda x, y: supervised.fit_quick(network, grid, x, y, args), grid,
                                     ["lr", "weight_decay"], dict(quick=True, epochs=args.epochs, seed=args.seed),
                                     setup)
    else:
        optimizer = build_optimizer("sgd", supervised.build_head_groups(network, grid))
        crops = supervised.build_crops(args, setup.info, setup.device)
        supervised.train_and_test(network, optimizer, grid, dict(epochs=args.epochs), setup, crops,
                                  report.evaluate_classifier, report.measure_top1)


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
    extractor = FeatureExtractor(backbone)
    network = Classifiers(extractor, len(setup.classes), frozen=False).to(setup.device).eval()
    groups = supervised.build_layer_decay_groups(network, args.lr, args.weight_decay, args.layer_decay)
    hparams = {name: getattr(args, name) for name in (
        "epochs", "lr", "warmup_epochs", "layer_decay", "weight_decay", "drop_path_rate", "label_smoothing", "mixup",
        "cutmix")}
    crops = supervised.build_crops(args, setup.info, setup.device)
    supervised.train_and_test(network, build_optimizer("adamw", groups), [(args.lr, args.weight_decay)], hparams, setup,
                              crops, report.evaluate_classifier, report.measure_top1)


def segmentation(args):
    """Linear segmentation: batch norm and a 1x1 convolution on the patch tokens of a frozen backbone, AdamW; mIoU."""
    setup = EvalSetup(args)
    if args.n_last_blocks > (depth := len(setup.backbone.blocks)):
        raise CheckpointError(f"--n_last_blocks {args.n_last_blocks} is more than the model's depth, {depth}")
    setup.origin |= dict(n_last_blocks=args.n_last_blocks)
    torch.manual_seed(args.seed)
    features = PatchFeatures(setup.backbone, args.n_last_blocks)
    network = Classifiers(features, len(setup.classes), build_head=SegmentationHead).to(setup.device).eval()
    grid = [(args.lr, args.weight_decay)]
    optimizer = build_optimizer("adamw", supervised.build_head_groups(network, grid))
    crops = SemanticCrop(args.image_size, args.crop_scale, setup.info["mean"], setup.info["std"])
    supervised.train_and_test(network, optimizer, grid, dict(epochs=args.epochs), setup, crops,
                              report.report_segmentation, report.measure_miou, "test_miou", pixel_cross_entropy)


def predict(args):
    """Classify images with the classifier of linear, logistic or finetune; writes file, class, probability as CSV."""
    device = distributed.init_distributed(args.device)[2]
    network, info = load_classifier(args.ckpt)
    set_matmul_precision(device, "fp32", network.tokens.backbone.embed_dim)
    network.to(device)
    images, k = open_inputs(args, info), min(args.topk, len(info["classes"]))
    create_folder(Path(args.output).parent)
    top, _, indices, corrupt = extract_features(
        lambda x: torch.cat(network(x)[0].softmax(dim=-1).topk(k), dim=-1), images, info["image_size"], args, device,
        build_view(info))
    for message in corrupt:
        log(f"skipped corrupt image {message}")
    names = [images.name(i) for i in indices.tolist()]
    report.write_predictions(args.output, names, top, info["classes"], len(corrupt))


def embed(args):
    """Write features of images, and their names, to a file: .npy, .csv, .parquet or .safetensors."""
    device = distributed.init_distributed(args.device)[2]
    backbone, info, origin = open_backbone(args, device, rgb_only=False)
    extractor = FeatureExtractor(backbone, args.n_last_blocks, args.avgpool_patchtokens)
    size = resolve_image_size(args.image_size, backbone)
    check_output(args.output, [origin["ckpt"]])
    images = open_inputs(args, info)
    create_folder(Path(args.output).parent)
    origin |= dict(images=args.images, image_size=size, n_last_blocks=args.n_last_blocks,
                   avgpool_patchtokens=args.avgpool_patchtokens)

    def extract(part):
        features, _, *rest = extract_features(extractor, part, size, args, device, build_view(info), allow_none=True)
        return features, *rest

    count = write_features(args.output, images, extract, origin, log)
    log(f"{count} image{'s' * (count != 1)}, {len(images) - count} corrupt, {extractor.dim} features each")
    log(f"written to {args.output}")


TASKS = {task.__name__: task for task in (knn, fewshot, linear, logistic, finetune, segmentation, predict, embed)}


def main(args):
    TASKS[args.task](args)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, FloatingPointError)
