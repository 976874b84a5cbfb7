"""Train a vision transformer with DINO: self-supervised, multi-crop self-distillation.

    python train.py @recipes/demo.txt                                   # built-in shapes, two minutes on two CPU cores
    python train.py --arch vit_small --data_path /data/imagenet         # one GPU
    torchrun --nproc_per_node=8 train.py @recipes/imagenet_vits16.txt --batch_size_per_gpu 128 --data_path DIR

Writes to --output_dir: teacher.safetensors and student.safetensors (backbone and head), teacher_best.safetensors (best
k-NN so far, if there are labels), checkpoint.pth (to resume from), log.jsonl and flags.txt. Interrupted runs resume
automatically: repeat the command. The loss starts near ln(out_dim), stays there for the first hundreds of steps, then
falls while the KL divergence between teacher and student stays above zero.
"""

import common  # noqa: F401 (first: it checks the version of Python)

# isort: split
import contextlib
import functools
import itertools
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from augment import IMAGENET_MEAN, IMAGENET_STD
from backbones import BackboneError, broadcast_buffers, build_backbone, convert_sync_batchnorm
from common import auto, cli, distributed, dry_run, estimate
from common.auto import PAPER
from common.checkpoint import CheckpointError, Run
from common.cli import boolean, fraction, nonnegative_float, nonnegative_int, positive_float, positive_int
from common.files import atomic_write, write_json
from common.hub import absolute_path
from common.initial_weights import CONTINUE, follow_initial_weights, load_initial_weights, read_initial_weights
from common.log_sinks import SINKS, LogSinks
from common.logger import Logger, describe_environment
from common.memory import available_memory, peak_memory
from common.precision import autocast, cast_weights, set_matmul_precision
from common.run_flags import (
    FIXED_FLAGS,
    can_compile,
    check_channels,
    check_log_to,
    check_patch_size,
    fill_in_arch,
    is_new_run,
    list_flags_of_run,
    write_flags,
)
from common.weights import save_model
from data.datasets import DataError, describe_paths, hash_images, make_absolute, open_data
from data.images import show_channels
from data.loaders import (
    MultiCropDataset,
    build_multicrop,
    build_train_loader,
    default_attention_size,
    derive_seed,
    iter_batch_keys,
    iter_on_device,
)
from data.sample import is_nearly_black, measure_normalization, sample_images, typical_side
from data.shapes import Shapes
from dino_loss import (
    DINOHead,
    DINOLoss,
    MultiCropWrapper,
    cosine_schedule,
    koleo_loss,
    teacher_temp_schedule,
    update_teacher,
)
from evaluation.masks import mask_mean_and_heads
from evaluation.online import detect_collapse, evaluate_online
from optim import build_optimizer, build_param_groups, clip_gradients, decay_layers
from vit import SIZES

# ---- flags ----

def parse_args(argv=None, follow_run=True):
    """Flags with the reference implementation's names and defaults, checked against each other.

    Args:
        follow_run: whether flags that are not given are those of the run in --output_dir, which is resumed.
    """
    parser, add = cli.build_parser("train.py", __doc__), cli.add_flag

    def add_switch(group, name, help):
        add(group, name, False, help, boolean, nargs="?", const=True)

    model = parser.add_argument_group("model")
    add(model, "--arch", "vit_small", f"{', '.join(SIZES)}; a torchvision classifier such as resnet50; or timm:NAME")
    add(model, "--patch_size", None, "vit_*: pixels; 8 is better and four times slower", positive_int)
    add(model, "--embed_dim", None, "vit_*: width (default: the arch's)", positive_int)
    add(model, "--depth", None, "vit_*: number of blocks (default: the arch's)", positive_int)
    add(model, "--num_heads", None, "vit_*: attention heads (default: the arch's)", positive_int)
    add_switch(model, "--conv_stem", "vit_*: convolutional stem: learns faster, but no other library reads the model")
    add(model, "--drop_path_rate", None, "stochastic depth (default: 0.1 for vit_*, else 0)", cli.fraction_below_one)
    add(model, "--out_dim", 65536, "prototypes K; 1024 to 4096 for some ten thousand images", positive_int)
    add(model, "--hidden_dim", 2048, "width of the projection head; less for narrow backbones", positive_int)
    add(model, "--norm_last_layer", True, "fix the weight norm of the last layer; false: better, less stable", boolean)
    add(model, "--use_bn_in_head", False, "batch norm in the projection head", boolean)

    add(model, "--init", None, "weights to continue from: a checkpoint or model file, also of the reference, timm or "
        "transformers, dino_vits16_full or hf:USER/NAME; the defaults of other flags follow it", absolute_path,
        metavar="FILE")
    add(model, "--init_head_epochs", 0, "epochs with the backbone frozen, for --init without heads", nonnegative_int)
    add(model, "--layer_decay", 1.0, "lr factor per block of the backbone, from the top down", fraction)

    teacher = parser.add_argument_group("teacher")
    add(teacher, "--momentum_teacher", 0.996, "initial EMA momentum, rises to 1; lower for short runs", fraction)
    add(teacher, "--warmup_teacher_temp", 0.04, "initial; lower it if the loss stays at ln(out_dim)", positive_float)
    add(teacher, "--teacher_temp", 0.04, "temperature after warm-up; above 0.07 is mostly unstable", positive_float)
    add(teacher, "--warmup_teacher_temp_epochs", 0, "epochs of temperature warm-up; 30 for long runs", nonnegative_int)
    add(teacher, "--centering", "mean", "of the teacher's output: EMA of its mean logits (paper), softmax over the "
        "batch, or Sinkhorn-Knopp", choices=["mean", "batch", "sinkhorn"])

    optim = parser.add_argument_group("optimization")
    add(optim, "--epochs", 100, "training epochs", positive_int)
    add(optim, "--batch_size_per_gpu", "auto", "images per GPU and micro-batch; auto: 64, less if images or memory are "
        "few", auto_or(positive_int), metavar="N")
    add(optim, "--accum_steps", 1, "micro-batches per gradient step", positive_int)
    add(optim, "--optimizer", "adamw", "sgd or lars for ResNets", choices=["adamw", "sgd", "lars"])
    add(optim, "--lr", 0.0005, "peak learning rate for a global batch size of 256, scaled linearly", positive_float)
    add(optim, "--min_lr", 1e-6, "learning rate at the end of its schedule", nonnegative_float)
    add(optim, "--warmup_epochs", None, "epochs of linear learning-rate warm-up (default: 10, less below 100)",
        nonnegative_int)
    add(optim, "--schedule_epochs", 0, "epochs of the lr, weight decay and momentum schedules, if above --epochs; "
        "twice for short runs", nonnegative_int)
    add(optim, "--weight_decay", 0.04, "initial weight decay, of matrices only", nonnegative_float)
    add(optim, "--weight_decay_end", 0.4, "weight decay at the end of its schedule, a cosine", nonnegative_float)
    add(optim, "--koleo_loss_weight", 0.0, "weight of the KoLeo regularizer, which spreads features; DINOv2: 0.1",
        nonnegative_float)
    add(optim, "--clip_grad", 3.0, "maximal gradient norm, 0 disables clipping", nonnegative_float)
    add(optim, "--freeze_last_layer", 1, "epochs with the last layer frozen; raise if unstable", nonnegative_int)

    cli.add_crop_flags(parser.add_argument_group("crops"))

    run = parser.add_argument_group("run")
    cli.add_data_flags(run, "shapes", "image folders, shards, lists of files, torchvision sets as NAME:ROOT, or "
                       "shapes[:PIXELS]; several are concatenated")
    add(run, "--value_range", None, "black and white of images of more than 8 bits (default: found in the data)",
        cli.finite_float, nargs=2)
    add(run, "--channels", None, "read images as so many channels, of any depth (default: as RGB of 8 bits)",
        positive_int)
    add(run, "--normalization", None, "imagenet; measure: found in the data (default with --channels); or means and "
        "stds of values in [0, 1]", lambda x: x if x in ("imagenet", "measure") else cli.finite_float(x), nargs="+")
    add(run, "--shuffle", "full", "order of an epoch; blocks: reads neighbors together, for slow disks and networks",
        choices=["full", "blocks"])
    add(run, "--output_dir", "runs/dino", "folder of the run")
    cli.add_run_flags(run)
    add(run, "--log_to", None, "also log there, with figures of each evaluation: " + ", ".join(SINKS), nargs="+",
        choices=list(SINKS), metavar="NAME")
    add(run, "--save_every_steps", 0, "steps between checkpoints within an epoch, 0 for none", nonnegative_int)
    add(run, "--keep", 2, "recent checkpoints to keep", positive_int)
    add(run, "--saveckp_freq", 20, "epochs between numbered checkpoints, which are kept, 0 for none", nonnegative_int)
    add(run, "--knn_every", 10, "epochs between evaluations: RankMe and, if there are labels, k-NN; 0 for none",
        nonnegative_int)
    add(run, "--knn_images", 20000, "at most so many train images for k-NN, a fifth for validation and RankMe",
        positive_int)
    add_switch(run, "--linear_probe", "evaluate linear classifiers on the k-NN features too")
    add(run, "--compile", "auto", "torch.compile the blocks: slow first steps, then faster; auto: vit_* on CUDA",
        auto_or(boolean), nargs="?", const=True)
    add_switch(run, "--activation_checkpointing", "recompute the student's blocks in backward: slower, less memory")
    add(run, "--profile", 0, "steps to record in trace.json for Perfetto, 0 for none", nonnegative_int)
    add_switch(run, "--dry_run", "two steps, a save, a resume, an evaluation, the time of the run; nothing is kept")
    add(run, "--timeout_minutes", 30.0, "how long to wait for other ranks, or for a batch", positive_float)
    cli.add_device_flags(run)
    add(run, "--num_threads", None, "CPU threads of torch; 1 if loader workers keep the other cores busy (default: "
        "torch's)", positive_int)

    ablations = parser.add_argument_group("ablations")
    add(ablations, "--teacher", "momentum", "EMA of the student; the student; the student one step or epoch ago",
        choices=["momentum", "student", "previous_step", "previous_epoch"])
    add(ablations, "--loss", "ce", "cross-entropy, squared error of centered directions, or InfoNCE of embeddings of "
        "out_dim dimensions", choices=["ce", "mse", "infonce"])
    add(ablations, "--queue_size", 65536, "keys for InfoNCE; far less than images in an epoch", positive_int)
    add(ablations, "--student_temp", 0.1, "temperature of the student", positive_float)
    add(ablations, "--center_momentum", 0.9, "EMA momentum of the center, 1 disables centering", fraction)
    add(ablations, "--head_layers", 3, "layers of the projection head before the last layer", positive_int)
    add(ablations, "--bottleneck_dim", 256, "input width of the last layer", positive_int)
    add(ablations, "--l2_bottleneck", True, "L2-normalize the input of the last layer", boolean)
    add(ablations, "--predictor", False, "two more layers in the student's head", boolean)
    add(ablations, "--clip_mode", "per_parameter", "gradient norm to clip", choices=["per_parameter", "global"])

    parser.describe_defaults(PAPER, "from the data")
    argv = sys.argv[1:] if argv is None else argv
    args, given = parser.parse_given_args(argv)
    of_run, of_run_auto = list_flags_of_run(args) if follow_run else ((), ())
    args = parser.parse_args([*of_run, *argv])
    if of_run and args.normalization == ["measure"]:
        args.normalization = parser.parse_args(of_run).normalization
    hand_made = given | ({"centering"} if "center_momentum" in given else set())  # which is for the mean alone
    args.auto = tuple(name for name in (of_run_auto if of_run else PAPER) if name not in hand_made)
    if args.init and not of_run:
        follow_initial_weights(parser, args, given)
    if args.init_head_epochs and not args.init:
        parser.error("--init_head_epochs is for --init")
    if args.init_head_epochs >= args.epochs:
        parser.error(f"--init_head_epochs {args.init_head_epochs} is not less than --epochs {args.epochs}")
    fill_in_arch(parser, args)
    cli.check_crop_flags(parser, args)
    if args.loss != "ce" and args.centering != "mean":
        parser.error(f"--centering {args.centering} gives probabilities, --loss {args.loss} compares logits")
    cli.check_run_flags(parser, args, warmup_epochs=10)
    if args.value_range and args.value_range[0] >= args.value_range[1]:
        parser.error(f"--value_range {args.value_range[0]:g} {args.value_range[1]:g} is not an ascending range")
    check_channels(parser, args)
    check_log_to(parser, args)
    if args.compile == "auto":
        args.compile = args.device == "cuda" and args.arch in SIZES and can_compile()
    if args.views == "auto":
        args.views = "device" if args.device == "cuda" else "cpu"
    return args


def auto_or(kind):
    """Argument type: "auto", or what another type takes."""
    return lambda text: text if text == "auto" else kind(text)


def image_format(args):
    """Arguments of MultiCrop on the images: channels, mean and std, of --normalization that has been measured."""
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if args.normalization != ("imagenet",):
        mean, std = args.normalization[:len(args.normalization) // 2], args.normalization[len(args.normalization) // 2:]
    return dict(channels=args.channels, mean=mean, std=std)


# ---- model ----

def model_arguments(args):
    """Arguments of build_backbone, and those of DINOHead after the first."""
    names = ("patch_size", "embed_dim", "depth", "num_heads") if args.arch in SIZES else ("arch",)
    backbone = dict(img_size=args.global_crops_size) | {name: getattr(args, name) for name in names}
    backbone |= {"in_chans": args.channels} if args.channels and args.arch in SIZES else {}
    backbone |= {"conv_stem": True} if args.conv_stem else {}
    head = dict(out_dim=args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer,
                nlayers=args.head_layers, hidden_dim=args.hidden_dim, bottleneck_dim=args.bottleneck_dim,
                l2_bottleneck=args.l2_bottleneck)
    return backbone, head


def build_networks(backbone_args, head_args, drop_path_rate=0.0, seed=0, predictor=False):
    """Student, and teacher: a copy of it without stochastic depth, predictor and gradients (section 3.1)."""
    torch.manual_seed(seed)
    student_backbone = build_backbone(backbone_args, drop_path_rate)
    student = MultiCropWrapper(student_backbone, DINOHead(student_backbone.embed_dim, **head_args, predictor=predictor))
    teacher_backbone = build_backbone(backbone_args)
    teacher = MultiCropWrapper(teacher_backbone, DINOHead(teacher_backbone.embed_dim, **head_args))
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return student, teacher.requires_grad_(False)


def compile_blocks(backbone):
    """torch.compile the blocks of a backbone, or all of a backbone without blocks, once per crop size."""
    for module in backbone.blocks or [backbone]:
        module.compile(dynamic=False)


def build_training(args, device, world_size):
    """Student, teacher, loss, optimizer and gradient scaler by their names in a checkpoint, on the device."""
    student, teacher = build_networks(*model_arguments(args), args.drop_path_rate, args.seed, args.predictor)
    student.backbone.activation_checkpointing = args.activation_checkpointing
    if args.arch not in SIZES:  # find out now whether it takes the local crops
        size = args.local_crops_size if args.local_crops_number else args.global_crops_size
        student.backbone.try_size(size, size)
    if device.type == "cuda" and world_size > 1:
        student, teacher = map(convert_sync_batchnorm, (student, teacher))
    student, teacher = student.to(device), teacher.to(device)
    dino_loss = DINOLoss(args.out_dim, args.student_temp, args.center_momentum, args.centering, args.loss,
                         args.queue_size).to(device)
    optimizer = build_optimizer(args.optimizer, build_param_groups(
        student, decay_layers(student.backbone, args.layer_decay) if args.layer_decay < 1 else None))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    return dict(student=student, teacher=teacher, dino_loss=dino_loss, optimizer=optimizer, scaler=scaler)


def model_info(args, data):
    """Description of the model in its files, which other commands read instead of flags."""
    backbone, head = model_arguments(args)
    return dict(arch=args.arch, backbone=backbone, head=head, patch_size=args.patch_size,
                image_size=args.global_crops_size, **image_format(args), data_path=data.path,
                value_range=args.value_range) | ({"val_path": make_absolute(args.val_path)} if args.val_path else {})


def save_run(run, step):
    """Save the checkpoint, and student and teacher as model files."""
    run.save(step)
    save_models(run)


def save_models(run):
    """Write student and teacher as model files, on rank 0."""
    if distributed.is_rank_zero():
        for name in ("student", "teacher"):
            save_model(run.path.with_name(f"{name}.safetensors"), run.objects[name].state_dict(),
                       run.extra["info"] | {"network": name})


# ---- evaluation during training ----

def evaluate_and_log(name, data, args, run, with_pixels=False):
    """k-NN (and linear) accuracy of the teacher's features if there are labels, and RankMe; keeps the best teacher.

    Args:
        with_pixels: whether to log the k-NN accuracy of raw pixels too.
    """
    knn, teacher, has_labels = run.progress["knn"], run.objects["teacher"], data.val is not None
    best = max((top1 for other, (top1, _) in knn.items() if has_labels and other.startswith("epoch")), default=-1.0)
    broadcast_buffers(teacher.eval())
    info = run.extra["info"]
    scores, pixel_scores, held_out, corrupt = evaluate_online(teacher.backbone, data, args, info["mean"], info["std"],
                                                              with_pixels)
    run.logger.log_corrupt(corrupt if distributed.is_rank_zero() else [])
    if pixel_scores:
        log_scores("raw pixels", pixel_scores, run)
    log_scores(name, scores, run, functools.partial(
        draw_evaluation, f"{run.path.parent.resolve().name}, {name}", held_out, data, args, run))
    teacher.train()
    if distributed.is_rank_zero() and has_labels and name.startswith("epoch") and knn[name][0] > best:
        save_model(run.path.with_name("teacher_best.safetensors"), teacher.state_dict(),
                   info | {"network": "teacher"})


def log_scores(name, scores, run, draw=None):
    """Log, print and remember the scores of one evaluation, see `evaluate_online`."""
    run.progress["knn"][name] = scores.get("knn_top1"), scores.get("knn_top5")  # None without labels
    run.logger.log({"eval": name} | scores, draw)
    fields = {"knn_top1": "top-1 {:.1f}%", "knn_top5": "top-5 {:.1f}%", "linear_top1": "linear top-1 {:.1f}%",
              "rankme": f"rank {{:.1f}} of {run.objects['teacher'].backbone.embed_dim}"}
    run.logger.print(f"{'k-NN' if 'knn_top1' in scores else 'features'} of {name}: "
                     + ", ".join(fields[key].format(value) for key, value in scores.items()))


def draw_evaluation(title, held_out, data, args, run, mass=0.6, most=500):
    """The teacher's attention to a held-out image, and an embedding of held-out images: {name: PIL image}.

    Args:
        mass: share of the attention that a mask keeps.
        most: images in the embedding.
    """
    from plotting import attention, embedding, sheet

    stride = -(-len(held_out.features) // most)
    features, labels = held_out.features[::stride], held_out.labels[::stride]
    points, method = embedding.embed_2d(features, args.seed)
    labels, names, colors, note = embedding.group_images(data, labels, features, args.seed)
    figure = embedding.plot_scatter(points, labels, names, colors, f"{method} of {len(points):,} images, {title}{note}")
    figures = {"embedding": embedding.render_figure(figure)}
    if args.arch in SIZES:
        backbone, info = run.objects["teacher"].backbone, run.extra["info"]
        image = held_out.images[int(held_out.indices[0])][0]
        size = default_attention_size(args.global_crops_size, args.patch_size)
        with torch.compiler.set_stance("force_eager"):
            maps = attention.compute_attention(backbone, image, size, info, args.device)
        masks = mask_mean_and_heads(torch.from_numpy(maps), mass).numpy()
        figures["attention"] = sheet.draw_attention_sheet("held-out image", show_channels(image), maps, masks, mass,
                                                          1000, title)
    return figures


def finish_epoch(step, steps_per_epoch, data, args, run):
    """At an epoch boundary, evaluate and keep a numbered checkpoint where due, unless an earlier process did."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    if step_in_epoch:
        return
    numbered = run.path.with_name(f"checkpoint{epoch - 1:04}.pth")
    is_due = step and args.saveckp_freq and epoch % args.saveckp_freq == 0 and not numbered.exists()
    if distributed.is_rank_zero() and is_due:
        atomic_write(numbered, lambda temporary: shutil.copyfile(run.path, temporary))
    if not args.knn_every:
        return
    name = f"epoch {epoch - 1}" if step else "initial backbone" if args.init else "untrained backbone"
    if name in run.progress["knn"]:
        return
    if step == 0:
        evaluate_and_log(name, data, args, run, with_pixels=True)
    elif epoch % args.knn_every == 0 or epoch == args.epochs:
        evaluate_and_log(name, data, args, run)
        save_run(run, step)


def warn_if_collapsed(run, previous_stats, epoch, args):
    """Print a warning if the teacher has collapsed; returns the epoch's statistics and starts those of the next."""
    stats = run.progress["epoch_stats"].copy()
    run.progress["epoch_stats"].clear()
    problem = detect_collapse(stats, args.out_dim, previous_stats)
    # below 8 images the mean output has a low entropy without any collapse
    if problem and args.batch_size_per_gpu >= 8 and epoch >= max(args.warmup_epochs, args.freeze_last_layer):
        run.logger.print(f"WARNING: {problem}")
    return stats


# ---- non-finite values ----

def check_finite(finite, scaler, first, last, images, args, run):
    """Stop the run if a loss or gradient of the steps first to last was not finite; the last checkpoint is untouched.

    With a single step to blame (--log_every 1), its images are listed in nonfinite.json.

    Raises:
        FloatingPointError: on all ranks.
    """
    finite = all(distributed.all_gather_objects(bool(finite)))
    if finite and scaler.get_scale() >= 1:
        return
    problem = "the loss scale fell below 1" if finite else "the loss or a gradient is not finite"
    fix = {"fp16": "--precision bf16 or a lower --lr", "bf16": "--precision fp32 or a lower --lr",
           "fp32": "a lower --lr"}[args.precision]
    message = f"{problem} in {args.precision}; the last checkpoint is untouched, resume with {fix}"
    if first == last:
        path = run.path.with_name("nonfinite.json")
        message = f"step {last}: {message}; the images of the step are listed in {path}"
        if distributed.is_rank_zero():
            write_step_images(path, last, images, args, run.fixed["shuffle"])
    else:
        message = f"steps {first} to {last}: {message}, or with --log_every 1 to find the step and its images"
    distributed.wait_for_all_ranks()  # the first process that ends stops all others
    raise FloatingPointError(message)


def write_step_images(path, step, images, args, shuffle):
    """Write the (epoch, index) keys of a step's images, and their files where there are any."""
    world_size = distributed.get_world_size()
    batches = (iter_batch_keys(step, step + 1, len(images), args.seed, args.batch_size_per_gpu, args.accum_steps, rank,
                               world_size, shuffle) for rank in range(world_size))
    keys = [key for batch in itertools.chain.from_iterable(batches) for key in batch]
    write_json(path, dict(step=step, images=[
        dict(epoch=epoch, index=index) | ({"file": images.name(index)} if hasattr(images, "name") else {})
        for epoch, index in keys]))


# ---- training ----

class Schedule(NamedTuple):
    """Scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's EMA
    teacher_temp: float
    freeze_last_layer: bool  # no gradient for the last layer (first epochs)
    teacher_lags: bool = False  # the teacher is updated before the student (ablation)
    freeze_backbone: bool = False  # no gradient for the backbone (--init without heads)


def compute_schedule(step, steps_per_epoch, global_batch_size, args):
    """Scheduled values of a step, a pure function of it; the cosines may end after the run."""
    total_steps, epoch = max(args.epochs, args.schedule_epochs) * steps_per_epoch, step // steps_per_epoch
    momentum = cosine_schedule(step, total_steps, args.momentum_teacher, 1.0)
    is_epoch_end = (step + 1) % steps_per_epoch == 0
    return Schedule(
        lr=cosine_schedule(step, total_steps, args.lr * global_batch_size / 256, args.min_lr,
                           warmup_steps=args.warmup_epochs * steps_per_epoch),
        weight_decay=cosine_schedule(step, total_steps, args.weight_decay, args.weight_decay_end),
        momentum={"momentum": momentum, "previous_epoch": float(not is_epoch_end)}.get(args.teacher, 0.0),
        teacher_temp=teacher_temp_schedule(epoch, args.warmup_teacher_temp, args.teacher_temp,
                                           args.warmup_teacher_temp_epochs),
        freeze_last_layer=epoch < args.freeze_last_layer,
        teacher_lags=args.teacher == "previous_step",
        freeze_backbone=epoch < args.init_head_epochs)


def train_step(student, teacher, dino_loss, optimizer, scaler, micro_batches, schedule, args, finite, log=False):
    """One gradient step of DINO (algorithm 1). Never waits for the device, but for LARS in fp16.

    Args:
        student: MultiCropWrapper, or DistributedDataParallel around it.
        scaler: torch.amp.GradScaler, enabled for fp16 only.
        micro_batches: for each, a list of V crop tensors [B, C, s, s], the two global crops first.
        args: precision, koleo_loss_weight, clip_grad and clip_mode.
        finite: 0-dim bool tensor, set to False in place once a loss or (but for fp16) a gradient is not finite.
        log: also return the teacher's entropies, which takes one more pass over its logits, and KoLeo.

    Returns:
        [1], [3] or [4] on the device, of this rank, in nats: the loss without KoLeo; the two of
        DINOLoss.teacher_entropy; KoLeo before its weight, if it has one.
    """
    network, stats, temp = getattr(student, "module", student), [], schedule.teacher_temp
    with cast_weights(teacher, args.precision), cast_weights(network, args.precision):
        for i, crops in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last or student is network else student.no_sync():
                with autocast(crops[0].device, args.precision):
                    with torch.no_grad():
                        teacher_logits = teacher(crops[:2])
                    student_logits, features = student(crops, return_features=True)
                logged = list(dino_loss.teacher_entropy(teacher_logits, temp)) if log else []
                total = loss = dino_loss(student_logits, teacher_logits, temp, update_center=False, overwrite=True)
                if args.koleo_loss_weight:
                    koleo = sum(map(koleo_loss, features.unflatten(0, (len(crops), -1))[:2]))  # of each global crop
                    total = loss + args.koleo_loss_weight * koleo
                    logged += [koleo] * log
                if is_last:
                    dino_loss.reduce_center()  # overlaps with backward
                scaler.scale(total / len(micro_batches)).backward()
            stats.append(torch.stack((loss, *logged)).detach())
            finite &= total.detach().isfinite()

    for group in optimizer.param_groups:
        group["lr"] = schedule.lr * group["lr_scale"]
        group["weight_decay"] = schedule.weight_decay * group["is_decayed"]
    scaler.unscale_(optimizer)
    grad_norms = clip_gradients(network.parameters(), args.clip_grad, args.clip_mode == "per_parameter")
    if not scaler.is_enabled():  # the scaler skips a step whose gradients overflow
        finite &= grad_norms.isfinite().all()
    frozen = [network.head.last_layer] * schedule.freeze_last_layer + [network.backbone] * schedule.freeze_backbone
    for p in itertools.chain.from_iterable(module.parameters() for module in frozen):
        p.grad = None
    if schedule.teacher_lags:
        update_teacher(teacher, network, schedule.momentum)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    dino_loss.update_center()
    if not schedule.teacher_lags:
        update_teacher(teacher, network, schedule.momentum)
    return torch.stack(stats).mean(dim=0)


def train(student, run, data, first_step, total_steps, args, device):
    """Train from first_step to total_steps; False if a signal stopped the run, which is then saved."""
    teacher, dino_loss, optimizer, scaler = (run.objects[k] for k in ("teacher", "dino_loss", "optimizer", "scaler"))
    steps_per_epoch, logger, signals = total_steps // args.epochs, run.logger, distributed.StopSignals()
    multicrop = build_multicrop(args, args.compile, **image_format(args))
    last_step = min(first_step + 2, total_steps) if args.dry_run else total_steps
    keys = iter_batch_keys(first_step, last_step, len(data.train), args.seed, args.batch_size_per_gpu,
                           args.accum_steps, distributed.get_rank(), distributed.get_world_size(), run.fixed["shuffle"])
    loader = build_train_loader(data.train, multicrop, keys, args.seed, args.num_workers, device.type == "cuda",
                                args.timeout_minutes)
    batches = iter_on_device(loader, multicrop, device)
    finite, unchecked, previous_stats, completed = torch.tensor(True, device=device), first_step, [], first_step
    try:
        finish_epoch(first_step, steps_per_epoch, data, args, run)
        logger.start_progress(first_step, total_steps)
        if args.profile and distributed.is_rank_zero():
            logger.start_profiler(args.profile, run.path.with_name("trace.json"))

        for step in range(first_step, last_step):
            epoch, is_epoch_end = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
            is_log_step = is_epoch_end or (step + 1) % args.log_every == 0 or step == 0
            loaded, is_save_step = signals.wait(lambda: [logger.next_batch(batches) for _ in range(args.accum_steps)],
                                                run.is_save_due(args.save_every_minutes))
            micro_batches, _, corrupt = zip(*loaded)
            logger.log_corrupt(sum(corrupt, []))
            # reseed here, because the loader consumes torch's global generator too
            torch.manual_seed(derive_seed("drop path", args.seed, step, distributed.get_rank()))
            schedule = compute_schedule(step, steps_per_epoch, run.fixed["global_batch_size"], args)

            stats = train_step(student, teacher, dino_loss, optimizer, scaler, micro_batches, schedule, args, finite,
                               log=is_log_step)

            completed = step + 1
            logger.count_step()
            is_save_step |= is_epoch_end or completed % (args.save_every_steps or math.inf) == 0
            if is_log_step or is_save_step:
                check_finite(finite, scaler, unchecked, step, data.train, args, run)
                unchecked = completed
            if is_log_step:
                log_train_step(stats, schedule, step, total_steps, args, run)
            elif step == first_step:  # of a resumed run, whose log is that of an uninterrupted one
                logger.progress.set_postfix_str(f"loss {stats[0].item():.3f}")
            if is_epoch_end:
                previous_stats = warn_if_collapsed(run, previous_stats, epoch, args)
            if is_save_step:
                save_run(run, completed)
                finish_epoch(completed, steps_per_epoch, data, args, run)
                logger.reset_timer()
    except distributed.StopRequested as stop:  # raised while waiting for data or evaluating, on all ranks
        if args.dry_run:
            logger.close()
            logger.print(f"dry run stopped by {stop}; nothing was kept")
            return False
        if unchecked < completed:
            check_finite(finite, scaler, unchecked, completed - 1, data.train, args, run)
        save_run(run, completed)
        run.print_stopped(stop, completed, total_steps, args)
        return False
    logger.close()
    signals.restore()
    return True


def log_train_step(stats, schedule, step, total_steps, args, run):
    """Average the statistics of a step over the ranks, log and print them."""
    if distributed.get_world_size() > 1:
        dist.all_reduce(stats)
    loss, entropy, marginal_entropy, *koleo = (stats / distributed.get_world_size()).tolist()
    ln_k, kl = math.log(args.out_dim), loss - entropy if args.loss == "ce" else math.nan
    if args.loss == "infonce":  # of embeddings, not of distributions over prototypes
        ln_k = entropy = marginal_entropy = math.nan
    run.progress["epoch_stats"].append((entropy, marginal_entropy, kl))
    run.logger.gather_corrupt()
    record = dict(epoch=step * args.epochs // total_steps, step=step, loss=loss, ln_k=ln_k,
                  teacher_entropy=entropy, teacher_marginal_entropy=marginal_entropy, kl=kl, lr=schedule.lr,
                  wd=schedule.weight_decay, momentum=schedule.momentum, teacher_temp=schedule.teacher_temp,
                  **run.logger.throughput(run.fixed["global_batch_size"], total_steps - step - 1),
                  corrupt_images=len(run.logger.corrupt_images), loss_scale=run.objects["scaler"].get_scale())
    fields = ["loss {loss:.3f}", "(ln K {ln_k:.2f})", "entropy {teacher_entropy:.2f}", "kl {kl:.3f}", "lr {lr:.1e}"]
    hidden = {"mse": ("kl",), "infonce": ("(ln K", "entropy", "kl ")}.get(args.loss, ())
    if koleo:
        record["koleo"], = koleo
        fields.insert(4, "koleo {koleo:.2f}")
    run.logger.log_step(record, args.epochs, [x for x in fields if not x.startswith(hidden)])


# ---- the whole run ----

def main(args):
    cli.set_num_threads(args)
    rank, world_size, device = distributed.init_distributed(args.device, args.timeout_minutes)
    data = distributed.run_on_rank_zero_first(
        lambda: open_data(args.data_path, output_dir=args.output_dir, value_range=args.value_range,
                          val_path=args.val_path, cache_dir=args.cache_dir, channels=args.channels))
    args.value_range = tuple(getattr(data.train, "value_range", None) or ()) or None
    distributed.check_same_on_all_ranks("images:", len(data.train))
    if args.normalization == ("measure",):
        values = sum(measure_normalization(data.train), ()) if rank == 0 else None
        args.normalization = distributed.all_gather_objects(values)[0]
    keeps_flags = bool(list_flags_of_run(args)[0])  # asked here, since a dry run is in another folder
    with dry_run.temporary_run(args) if args.dry_run else contextlib.nullcontext():
        pretrain(args, data, keeps_flags, rank, world_size, device)


def pretrain(args, data, keeps_flags, rank, world_size, device):
    """The run that the flags describe, from its first or next step to the end, or to a signal.

    Args:
        keeps_flags: whether a run is resumed, or would be but for --dry_run, whose flags followed from the data before.
    """
    logger = Logger(Path(args.output_dir, "log.jsonl"), is_silent=rank != 0, device=device)
    if args.log_to and rank == 0:
        logger.sinks = LogSinks(args.log_to, args.output_dir, logger.print)
    memory = *available_memory(device), peak_memory(device)
    sample = list(sample_images(data.train)) if rank == 0 else []  # the other ranks need not decode images for it
    side = distributed.all_gather_objects(typical_side(sample))[0]
    if not keeps_flags:
        auto.fit_to_images(args, len(data.train), side)
    if problem := check_patch_size(args):
        raise DataError(problem)
    objects = build_training(args, device, world_size)
    set_matmul_precision(args.device, args.precision, objects["student"].backbone.embed_dim)
    logger.print(data.note)
    crops = MultiCropDataset(data.train, build_multicrop(args, **image_format(args)), args.seed)
    args.batch_size_per_gpu = estimate.fit_batch_size(objects["student"], objects["teacher"], lambda i: crops[0, i],
                                                      len(data.train), args, device, memory, logger.print)
    if args.koleo_loss_weight and args.batch_size_per_gpu == 1:
        raise DataError("--koleo_loss_weight compares the images of a batch: --batch_size_per_gpu 1 must be 2 or more")
    global_batch_size = args.batch_size_per_gpu * args.accum_steps * world_size
    total_steps = args.epochs * (len(data.train) // global_batch_size)
    if total_steps == 0:
        raise DataError(f"{describe_paths(args.data_path)}: {len(data.train)} images are fewer than the global batch "
                        f"size {global_batch_size} (batch_size_per_gpu x accum_steps x GPUs): set --batch_size_per_gpu "
                        f"{max(1, len(data.train) // (args.accum_steps * world_size))}")
    if not keeps_flags:
        auto.fit_to_steps(args, total_steps)
    print_setup(objects["student"], global_batch_size, total_steps, args, world_size, logger)
    if args.auto and not keeps_flags:
        logger.print(auto.describe_auto(args, len(data.train), side, total_steps))
    if not args.init and not isinstance(data.train, Shapes) and auto.is_short(len(data.train), args.epochs):
        logger.print(f"NOTE: {len(data.train):,} images in {args.epochs} epochs are few for random weights, whose "
                     f"features may stay below raw pixels: raise --epochs, or continue from weights with --init")
    if sample and not args.channels and all(map(is_nearly_black, sample)):
        logger.print("NOTE: the images are nearly black: --value_range sets the black and white of grayscale of more "
                     "than 8 bits; color of 16 bits is read by its upper 8, scale it before")
    run, first_step = start_run(objects, data, global_batch_size, total_steps, args, logger)
    student = wrap_student(objects["student"], objects["teacher"], args, device, world_size)
    try:
        completed = train(student, run, data, first_step, total_steps, args, device)
    except Exception:
        logger.close(failed=True)
        raise
    if completed:
        if args.dry_run:
            dry_run.print_estimate(run, total_steps, args)
        else:
            print_results(run, data, args)


def print_setup(student, global_batch_size, total_steps, args, world_size, logger):
    """Print model and effective learning rate, and what follows from --init."""
    millions = sum(p.numel() for p in student.backbone.parameters()) / 1e6
    sizes = f"/{args.patch_size}: width {args.embed_dim}, {args.depth} blocks" if args.patch_size else \
        f": width {student.backbone.embed_dim}"
    sizes += ", convolutional stem" * args.conv_stem
    outputs = f"embeddings of {args.out_dim} dimensions" if args.loss == "infonce" else f"{args.out_dim} prototypes"
    logger.print(f"{args.arch}{sizes}, {millions:.1f} M parameters; {outputs}; {args.precision} on {world_size} x "
                 f"{args.device}")
    logger.print(f"epochs: {args.epochs} of {total_steps // args.epochs} steps, global batch size {global_batch_size}; "
                 f"effective lr {args.lr * global_batch_size / 256:.3g} = {args.lr:g} * {global_batch_size} / 256 "
                 f"(linear scaling rule)")
    if args.freeze_last_layer >= args.epochs:
        logger.print(f"NOTE: --freeze_last_layer {args.freeze_last_layer} with --epochs {args.epochs}: the last layer "
                     f"is not trained")
    if args.warmup_teacher_temp_epochs > args.epochs and args.warmup_teacher_temp != args.teacher_temp:
        logger.print(f"NOTE: --warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} with --epochs "
                     f"{args.epochs}: the run ends before the temperature is {args.teacher_temp:g}")
    if args.init:
        names = [*CONTINUE, *["channels"] * bool(args.channels)]
        flags = ", ".join(f"{name} {auto.format_value(getattr(args, name))}" for name in names)
        logger.print(f"continuing from {args.init} with {flags}; flags given by hand win")
    if args.compile:
        logger.print("compiling: the first steps take a minute or more, --compile false avoids it")


def print_results(run, data, args):
    """Print accuracies, where the files of the run are, and commands to go on with."""
    log, knn, quote = run.logger.print, run.progress["knn"], shlex.quote
    ckpt = f"--ckpt {quote(str(run.path.with_name('teacher.safetensors')))}"
    paths = [args.data_path] if isinstance(args.data_path, str) else args.data_path
    data_path = f" --data_path {shlex.join(paths)}" * (not isinstance(data.train, Shapes))
    image = str(data.train.name(0)) if hasattr(data.train, "name") else ""
    image = quote(image) if os.path.isfile(image) else "shapes"
    epochs = [name for name in knn if name.startswith("epoch")]
    baselines = [name for name in knn if name not in epochs]
    if epochs and args.knn_every and data.val is not None:
        log("k-NN top-1 (k = 20): " + ", ".join(f"{name} {knn[name][0]:.1f}%" for name in (*baselines, epochs[-1])))
        if better := [name for name in baselines if knn[name][0] >= knn[epochs[-1]][0]]:
            stem = ", --conv_stem" * (args.arch in SIZES and not args.conv_stem and not args.init)
            log(f"WARNING: the trained backbone is not better than {' and '.join(better)}: try more --epochs{stem}, "
                f"smaller --patch_size and --global_crops_size, a higher --lr, or --init with trained weights")
    log(f"the run is in {args.output_dir}, the model in teacher.safetensors; next:")
    log(f"  python visualize.py run {quote(args.output_dir)}")
    if data.val is not None:
        val_paths = [args.val_path] if isinstance(args.val_path, str) else args.val_path or ()
        log(f"  python evaluate.py knn {ckpt}{data_path}" + f" --val_path {shlex.join(val_paths)}" * bool(val_paths))
    if args.arch in SIZES:
        log(f"  python visualize.py attention {ckpt} {image}")
    if image != "shapes" and len(paths) == 1:
        log(f"  python retrieve.py search {ckpt}{data_path} {image}")
    log(f"  python export.py {ckpt}")


def start_run(objects, data, global_batch_size, total_steps, args, logger):
    """Start a run or resume it: the Run, and the step to start at."""
    fixed = {name: getattr(args, name) for name in FIXED_FLAGS}
    fixed |= {"global_batch_size": global_batch_size, "num_images": len(data.train)}
    run = Run(Path(args.output_dir), "pretraining", objects, fixed, vars(args), dict(knn={}, epoch_stats=[]), logger,
              args.keep, extra=dict(info=model_info(args, data)))
    # before the start of the run deletes a previous one, whose weights these may be
    weights = read_initial_weights(args.init, logger.print) if args.init and is_new_run(args) else None
    first_step = run.start(args, total_steps)
    if weights:
        load_initial_weights(weights, objects["student"], objects["teacher"], objects["dino_loss"], logger.print)
    if distributed.is_rank_zero():
        if first_step < total_steps:
            logger.log(dict(run=dict(first_step=first_step, flags=vars(args)) | describe_environment(args.device)
                            | hash_images(data.train)))
        write_flags(run.path.with_name("flags.txt"), args)
    if first_step:
        save_models(run)  # they may be older or newer than the checkpoint
    return run, first_step


def wrap_student(student, teacher, args, device, world_size):
    """Compile, and wrap the student in DDP if there are ranks."""
    if args.compile:
        compile_blocks(student.backbone)
        compile_blocks(teacher.backbone)
    if world_size == 1:
        return student
    return nn.parallel.DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None,
                                               gradient_as_bucket_view=True)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, BackboneError, CheckpointError, estimate.MemoryEstimateError,
                    FloatingPointError)
