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
import functools
import itertools
import random
import sys
from pathlib import Path

import torch

import train
from benchmarks import checkout
from common import cli
from common.checkpoint import CheckpointError, load_checkpoint
from common.logger import Logger
from data.datasets import DataError, open_data
from data.loaders import iter_batch_keys


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
        raise checkout.ReferenceImplementationError(f"--like {run}: not a run of train.py")
    flags = argparse.Namespace(**vars(train.parse_args([], follow_run=False)) | state["flags"])
    flags.shuffle = state["fixed"].get("shuffle", "randperm")  # of runs that began before this flag
    checkout.check_flags(flags, state["fixed"]["global_batch_size"] // flags.batch_size_per_gpu // flags.accum_steps)
    return flags, state["fixed"]["num_images"]


class EpochSampler(list):
    """(epoch, index) keys of one epoch in the order of train.py; replaces DistributedSampler."""

    def __init__(self, num_images, flags):
        self.order = dict(num_images=num_images, seed=flags.seed, batch_size=flags.batch_size_per_gpu,
                          shuffle=flags.shuffle)
        self.steps = num_images // flags.batch_size_per_gpu
        self.set_epoch(0)

    def set_epoch(self, epoch):
        keys = iter_batch_keys(epoch * self.steps, (epoch + 1) * self.steps, **self.order)
        self[:] = itertools.chain.from_iterable(keys)


def main(args):
    (flags, num_images), output = load_flags(args.like), Path(args.output_dir)
    cli.set_num_threads(flags)
    main_dino, utils, _ = modules = checkout.import_reference(args.checkout, flags.device)
    if (output / "log.jsonl").exists():
        raise checkout.ReferenceImplementationError(f"--output_dir {output}: holds a run already, choose another")
    data = open_data(flags.data_path, value_range=flags.value_range, val_path=flags.val_path, cache_dir=flags.cache_dir)
    if len(data.train) != num_images:
        raise DataError(f"{flags.data_path}: {len(data.train)} images, but {num_images} when {args.like} was trained")
    output.mkdir(parents=True, exist_ok=True)
    logger = Logger(output / "log.jsonl")
    logger.start_progress(0, flags.epochs * (num_images // flags.batch_size_per_gpu))
    run = argparse.Namespace(path=output / "checkpoint.pth", logger=logger, progress=dict(step=0, knn={}),
                             extra=dict(info=train.model_info(flags, data)), save=lambda step: None)
    random.seed(flags.seed)  # used by its blur and solarization, but not seeded by it
    vars(flags).update(arch="vit_small", output_dir=str(output), gpu=0, saveckp_freq=0,
                       use_fp16=flags.precision != "fp32" and flags.device == "cuda")
    with checkout.patch_all([
            *checkout.list_patches(*modules, flags),
            (main_dino.datasets, "ImageFolder", lambda _, transform: checkout.TransformedImages(data.train, transform)),
            (torch.utils.data, "DistributedSampler", lambda images, shuffle: EpochSampler(num_images, flags)),
            (utils, "restart_from_checkpoint", functools.partial(get_networks, run)),
            (utils.MetricLogger, "log_every", functools.partialmethod(log_every, flags=flags, data=data, run=run)),
            (sys, "path", [*sys.path, args.checkout])]):  # for spawned loader workers
        try:
            main_dino.train_dino(flags)
        except SystemExit:
            raise checkout.ReferenceImplementationError("the reference stopped: its loss is not finite") from None
    logger.close()


def get_networks(run, path, run_variables, student, teacher, **objects):
    """Keep the networks of its train_dino for `log_every`; replaces restart_from_checkpoint."""
    run.objects = dict(student=student.module, teacher=getattr(teacher, "module", teacher))


def log_every(metrics, loader, *_, flags, data, run):
    """Yield the batches of an epoch; log, save and evaluate between them as train.py does."""
    first_step, total_steps, logger = run.progress["step"], len(loader) * flags.epochs, run.logger
    train.finish_epoch(first_step, len(loader), data, flags, run)  # evaluates the untrained backbone
    logger.reset_timer()
    batches = iter(loader)
    for step in range(first_step, first_step + len(loader)):
        yield logger.next_batch(batches)
        logger.count_step()
        if (step + 1) % flags.log_every == 0 or (step + 1) % len(loader) == 0:
            record = dict(epoch=step // len(loader), step=step,
                          **{name: metrics.meters[name].value for name in ("loss", "lr", "wd")},
                          **logger.throughput(flags.batch_size_per_gpu, total_steps - step - 1))
            logger.log_step(record, flags.epochs, ["loss {loss:.3f}", "lr {lr:.1e}"])
    run.progress["step"] = step + 1
    train.save_models(run)
    train.finish_epoch(step + 1, len(loader), data, flags, run)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, checkout.ReferenceImplementationError)
