"""Train facebookresearch/dino from a checkout as a run of train.py was trained, for comparison.

    python train.py @recipes/as_released/cifar10.txt --data_path DATA --output_dir runs/as_released
    python -m benchmarks.reference CHECKOUT --like runs/as_released --output_dir runs/reference
    python visualize.py run runs/as_released runs/reference --against seconds

Its train_dino runs in a single process: backbone, head, loss, augmentation, optimizer, schedules, loop and checkpoints
are its own. Constants in its code (sizes of crops and networks, strength of the augmentation) are replaced by the flags
of the run, and its sampler by one with the order of train.py. The features are evaluated after the same epochs as in
the run; as in train.py, this does not count in the times. A corrupt image ends it, and it does not resume.
"""

import argparse
import contextlib
import functools
import itertools
import random
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import train
from benchmarks import checkout
from benchmarks.checkout import ReferenceImplementationError
from common import cli
from common.checkpoint import CheckpointError, load_checkpoint
from common.logger import Logger
from common.weights import save_model
from data.datasets import DataError, open_data
from data.loaders import iter_batch_keys
from vit import SIZES

SUPPORTED = dict(teacher="momentum", loss="ce", centering="mean", predictor=False, l2_bottleneck=True, accum_steps=1,
                 clip_mode="per_parameter")  # flags for which the reference implementation has one value only


def parse_args(argv=None):
    parser = cli.build_parser("reference.py", __doc__)
    parser.add_argument("checkout", metavar="CHECKOUT", help="folder with facebookresearch/dino")
    parser.add_argument("--like", required=True, metavar="RUN", help="output folder of the run of train.py to repeat")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for log and checkpoints")
    return parser.parse_args(argv)


def load_flags(run):
    """The flags of a run of train.py, and its number of images.

    Raises:
        ReferenceImplementationError: not a run of train.py, or the reference implementation cannot repeat it here.
    """
    state = load_checkpoint(Path(run, "checkpoint.pth"))
    if not isinstance(state, dict) or not {"flags", "fixed"} <= state.keys():
        raise ReferenceImplementationError(f"--like {run}: not a run of train.py")
    flags, fixed = argparse.Namespace(**vars(train.parse_args([])) | state["flags"]), state["fixed"]
    unsupported = [f"--{name} {getattr(flags, name)}" for name, value in SUPPORTED.items()
                   if getattr(flags, name) != value]
    unsupported += [name for name, is_supported in (
        (f"--arch {flags.arch}", flags.arch in SIZES),
        ("more than one process", fixed["global_batch_size"] == flags.batch_size_per_gpu),
        ("--warmup_teacher_temp_epochs above --epochs", flags.warmup_teacher_temp_epochs <= flags.epochs),
        (f"--device {flags.device} here", flags.device == "cpu" or
         flags.device == "cuda" and torch.cuda.is_available())) if not is_supported]
    if unsupported:
        raise ReferenceImplementationError(
            f"--like {run}: the reference implementation does not support {', '.join(unsupported)}")
    return flags, fixed["num_images"]


# ---- replacements for parts of the reference implementation ----

def build_augmentation(kind, flags):
    """Its DataAugmentationDINO, with the sizes and strengths of the flags."""
    augmentation = kind(flags.global_crops_scale, flags.local_crops_scale, flags.local_crops_number)
    transforms = augmentation.global_transfo1, augmentation.global_transfo2, augmentation.local_transfo
    for transform, size, p in zip(transforms, [flags.global_crops_size] * 2 + [flags.local_crops_size], flags.blur):
        crop, color, blur, *_ = transform.transforms
        crop.size = (size, size)
        blur.prob, (blur.radius_min, blur.radius_max) = p, flags.blur_radius
        jitter = color.transforms[1].transforms[0]
        for name, strength in zip(("brightness", "contrast", "saturation"), flags.color_jitter):
            setattr(jitter, name, (1 - strength, 1 + strength))
        jitter.hue = (-flags.color_jitter[3], flags.color_jitter[3])
    return augmentation


class TransformedImages(torch.utils.data.Dataset):
    """The images of a run with a transform; replaces ImageFolder."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image), label


class EpochSampler(list):
    """Indices of one epoch in the order of train.py; replaces DistributedSampler."""

    def __init__(self, num_images, flags):
        self.num_images, self.flags = num_images, flags
        self.set_epoch(0)

    def set_epoch(self, epoch):
        steps = self.num_images // self.flags.batch_size_per_gpu
        keys = iter_batch_keys(epoch * steps, (epoch + 1) * steps, self.num_images, self.flags.seed,
                               self.flags.batch_size_per_gpu)
        self[:] = [index for batch in keys for _, index in batch]


# ---- training ----

def main(args):
    (flags, num_images), output = load_flags(args.like), Path(args.output_dir)
    modules = checkout.import_reference(args.checkout)
    if (output / "log.jsonl").exists():
        raise ReferenceImplementationError(f"--output_dir {output}: holds a run already, choose another")
    data = open_data(flags.data_path)
    if len(data.train) != num_images:
        raise DataError(f"{flags.data_path}: {len(data.train)} images, but {num_images} when {args.like} was trained")
    output.mkdir(parents=True, exist_ok=True)
    logger = Logger(output / "log.jsonl")
    logger.start_progress(0, flags.epochs * (num_images // flags.batch_size_per_gpu))
    run = argparse.Namespace(path=output / "checkpoint.pth", logger=logger, progress=dict(knn={}), objects={},
                             extra=dict(info=train.model_info(flags, data)))
    checkout.init_single_process(flags.device)
    random.seed(flags.seed)  # used by its blur and solarization, but not seeded by it
    reference_flags = argparse.Namespace(**vars(flags) | dict(
        arch="vit_small", output_dir=str(output), gpu=0,
        use_fp16=flags.precision != "fp32" and flags.device == "cuda"))
    with checkout.stub_cuda_calls(flags.device), contextlib.ExitStack() as stack:
        for owner, name, value in list_patches(*modules, flags, data, run):
            stack.enter_context(mock.patch.object(owner, name, value, create=name == "print"))
        stack.enter_context(mock.patch.object(sys, "path", [*sys.path, args.checkout]))  # for spawned loader workers
        try:
            modules[0].train_dino(reference_flags)
        except SystemExit:
            raise ReferenceImplementationError("the reference implementation stopped: loss is not finite") from None
    logger.close()


def list_patches(main_dino, utils, vision_transformer, flags, data, run):
    """(owner, attribute, replacement) to train with a run's flags and data, and to log and evaluate like train.py."""
    train_one_epoch, augmentation = main_dino.train_one_epoch, main_dino.DataAugmentationDINO
    sizes = {name: getattr(flags, name) for name in ("embed_dim", "depth", "num_heads")}
    is_evaluated = flags.knn_every > 0 and data.val is not None

    def train_and_evaluate(student, teacher, teacher_without_ddp, *inputs):
        epoch, run.objects["teacher"] = inputs[6], teacher_without_ddp
        if is_evaluated and epoch == 0:
            train.evaluate_and_log("untrained backbone", teacher_without_ddp.backbone, data, flags, run)
        stats = train_one_epoch(student, teacher, teacher_without_ddp, *inputs)
        save_model(run.path.with_name("teacher.safetensors"), teacher_without_ddp.state_dict(),
                   run.extra["info"] | {"network": "teacher"})
        if is_evaluated and ((epoch + 1) % flags.knn_every == 0 or epoch + 1 == flags.epochs):
            train.evaluate_and_log(f"epoch {epoch}", teacher_without_ddp.backbone, data, flags, run)
        return stats

    patches = [
        *((module, "print", lambda *args, **kwargs: None) for module in (main_dino, utils)),
        (utils, "init_distributed_mode", lambda args: None),
        (utils.MetricLogger, "log_every", functools.partialmethod(
            log_every, flags=flags, logger=run.logger, steps=itertools.count())),
        (main_dino, "DataAugmentationDINO", lambda *args: build_augmentation(augmentation, flags)),
        (main_dino.datasets, "ImageFolder", lambda path, transform: TransformedImages(data.train, transform)),
        (torch.utils.data, "DistributedSampler", lambda images, shuffle: EpochSampler(len(images), flags)),
        (vision_transformer, "vit_small", functools.partial(
            vision_transformer.VisionTransformer, img_size=[flags.global_crops_size], mlp_ratio=4, qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), **sizes)),
        (main_dino, "DINOHead", functools.partial(
            main_dino.DINOHead, nlayers=flags.head_layers, hidden_dim=flags.hidden_dim,
            bottleneck_dim=flags.bottleneck_dim)),
        (main_dino, "DINOLoss", functools.partial(
            main_dino.DINOLoss, student_temp=flags.student_temp, center_momentum=flags.center_momentum)),
        (main_dino, "train_one_epoch", train_and_evaluate)]
    if flags.device != "cuda":
        patches += [(nn.parallel, "DistributedDataParallel", checkout.SingleProcess),
                    (utils, "has_batchnorms", lambda network: False),  # SyncBatchNorm needs CUDA
                    (utils.MetricLogger, "synchronize_between_processes", lambda self: None)]  # so do its meters
    return patches


def log_every(metrics, loader, *_, flags, logger, steps):
    """Yield the batches of an epoch, and log the gradient steps between them as train.py does."""
    batches, total_steps = iter(loader), len(loader) * flags.epochs
    logger.reset_timer()
    for _, step in zip(range(len(loader)), steps):
        yield logger.next_batch(batches)
        logger.step_done()
        if (step + 1) % flags.log_every == 0 or (step + 1) % len(loader) == 0:
            record = dict(epoch=step // len(loader), step=step,
                          **{name: metrics.meters[name].value for name in ("loss", "lr", "wd")},
                          **logger.throughput(flags.batch_size_per_gpu, total_steps - step - 1))
            logger.log_step(record, flags.epochs, "loss {loss:.3f} lr {lr:.1e}")


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, ReferenceImplementationError)
