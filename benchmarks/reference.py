"""The reference, facebookresearch/dino from a checkout: trained as a run of train.py was, and judged alike.

    python train.py @recipes/as_released/cifar10.txt --data_path DATA --output_dir runs/as_released
    python reference.py CHECKOUT --like runs/as_released --output_dir runs/reference
    python visualize.py run runs/as_released runs/reference --against seconds

Its own train_dino runs, in one process, as the run must have: backbone, head, loss, augmentation, optimizer, schedules,
loop and checkpoints are its. What it has written into the code instead of into flags (the sizes of views and networks,
the strength of the augmentation) is set to what the run's flags say. Pictures come in the run's order. Without CUDA its
device calls do nothing, and nothing is wrapped in DistributedDataParallel, which would only cost time. There is a k-NN
test after each epoch that had one in the run; like train.py's it does not count in the times. An unreadable picture
ends it, and it does not go on where it was interrupted.
"""

import argparse
import contextlib
import functools
import random
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from augment import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.checkout import (
    FILES,
    ReferenceImplementationError,
    import_reference,
    init_single_process,
    stub_cuda_calls,
)
from common import cli
from common.checkpoint import CheckpointError, load_checkpoint
from common.logger import Logger
from common.weights import save_model
from data.datasets import DataError, open_data
from data.loaders import iter_batch_keys
from evaluation.online import evaluate_online
from vit import SIZES

WITHOUT = dict(teacher="momentum", loss="ce", centering="mean", predictor=False, l2_bottleneck=True, accum_steps=1,
               clip_mode="per_parameter")  # flags that it has no word for
DEFAULTS = WITHOUT | dict(linear_probe=False, student_temp=0.1, center_momentum=0.9, head_layers=3, bottleneck_dim=256)


def parse_args(argv=None):
    parser = cli.build_parser("reference.py", __doc__)
    parser.add_argument("checkout", metavar="CHECKOUT", help="folder with facebookresearch/dino")
    parser.add_argument("--like", required=True, metavar="RUN", help="folder of a run of train.py that has saved")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for log and checkpoints")
    return parser.parse_args(argv)


def flags_of(run):
    """The flags that a run was trained with, and how many pictures it had.

    Raises:
        NoReference: it is no run of train.py, or the reference cannot do the same here.
    """
    state = load_checkpoint(Path(run, "checkpoint.pth"))
    if not isinstance(state, dict) or not {"flags", "fixed"} <= state.keys():
        raise ReferenceImplementationError(f"--like {run}: no run of train.py")
    flags, pictures = argparse.Namespace(**DEFAULTS | state["flags"]), state["fixed"]["number of pictures"]
    if flags.arch not in SIZES:
        raise ReferenceImplementationError(f"--like {run}: the reference is run with its transformers alone, not with {flags.arch}")
    for name, only in WITHOUT.items():
        if getattr(flags, name) != only:
            raise ReferenceImplementationError(f"--like {run}: the reference has no --{name} {getattr(flags, name)}")
    if state["fixed"]["global batch"] != flags.batch_size_per_gpu:
        raise ReferenceImplementationError(f"--like {run}: several processes trained it, the reference runs in one here")
    if flags.warmup_teacher_temp_epochs > flags.epochs:
        raise ReferenceImplementationError(f"--like {run}: the reference has no --warmup_teacher_temp_epochs beyond --epochs")
    if flags.device == "mps" or (flags.device == "cuda" and not torch.cuda.is_available()):
        raise ReferenceImplementationError(f"--like {run}: the reference cannot run on {flags.device} here, as it did")
    return flags, pictures


# ---- what takes the place of what it has written down ----

def views(augmentation, flags):
    """Its augmentation, of the run's flags."""
    transform = augmentation(flags.global_crops_scale, flags.local_crops_scale, flags.local_crops_number)
    kinds = (transform.global_transfo1, transform.global_transfo2, transform.local_transfo)
    for kind, size, p in zip(kinds, [flags.global_crops_size] * 2 + [flags.local_crops_size], flags.blur):
        crop, colors, blur, *_ = kind.transforms
        crop.size = (size, size)
        blur.prob, (blur.radius_min, blur.radius_max) = p, flags.blur_radius
        jitter = colors.transforms[1].transforms[0]
        for name, strength in zip(("brightness", "contrast", "saturation"), flags.color_jitter):
            setattr(jitter, name, (1 - strength, 1 + strength))
        jitter.hue = (-flags.color_jitter[3], flags.color_jitter[3])
    return transform


class Pictures(torch.utils.data.Dataset):
    """In the place of its ImageFolder: the run's pictures, and this augmentation instead of the given one."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image), label


class Order(torch.utils.data.Sampler):
    """In the place of its DistributedSampler: the order of train.py."""

    def __init__(self, images, flags):
        self.flags, self.epoch, self.count = flags, 0, len(images)
        self.steps = self.count // flags.batch_size_per_gpu

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.steps * self.flags.batch_size_per_gpu

    def __iter__(self):
        first = self.epoch * self.steps
        for batch in iter_batch_keys(first, first + self.steps, self.count, self.flags.seed, self.flags.batch_size_per_gpu):
            yield from (index for _, index in batch)


class Alone(nn.Module):
    """In the place of DistributedDataParallel on a CPU."""

    def __init__(self, module, device_ids=None):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class Watched:
    """Its loader, with a line in the log every so many steps; a step is what is done with a batch before the next."""

    def __init__(self, loader, epoch, optimizer, losses, report, flags):
        self.loader, self.epoch, self.optimizer, self.losses = loader, epoch, optimizer, losses
        self.report, self.flags = report, flags

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches, total = iter(self.loader), len(self) * self.flags.epochs
        self.report.restart_pace()
        for i in range(len(self)):
            yield self.report.wait_for(batches)
            self.report.next_step()
            step = self.epoch * len(self) + i
            if (step + 1) % self.flags.log_every == 0 or i + 1 == len(self):
                group = self.optimizer.param_groups[0]
                record = dict(epoch=self.epoch, step=step, loss=self.losses[0].item(), lr=group["lr"],
                              weight_decay=group["weight_decay"], **self.report.pace(self.flags.batch_size_per_gpu))
                self.report.step(record, total, "loss {loss:.3f}  lr {lr:.1e}  {images_per_second:.0f} img/s")


# ---- training ----

def main(args):
    (flags, count), output = flags_of(args.like), Path(args.output_dir)
    theirs, utils, vits = import_reference(args.checkout, *FILES)
    if (output / "log.jsonl").exists():
        raise ReferenceImplementationError(f"--output_dir {output}: holds a run already, name another")
    data = open_data(flags.data_path)
    if len(data.train) != count:
        raise DataError(f"{flags.data_path}: holds {len(data.train)} pictures, the run of --like had {count}")
    output.mkdir(parents=True, exist_ok=True)
    report = Logger(output / "log.jsonl", silent=False)
    report.start_bar(0, flags.epochs * (len(data.train) // flags.batch_size_per_gpu), "step")
    train_one_epoch, judging = theirs.train_one_epoch, flags.knn_every > 0 and data.val is not None

    def measure(name, model):
        scores, _ = evaluate_online(model.eval(), data, flags)
        model.train()
        report.log(dict(knn=name) | scores)
        report.say(f"k-NN of {name}: top-1 {scores['top1']:.1f}%")

    def watched_epoch(student, teacher, teacher_without_ddp, dino_loss, loader, optimizer, *schedules):
        epoch, losses = schedules[3], [None]
        hook = dino_loss.register_forward_hook(lambda module, given, loss: losses.__setitem__(0, loss.detach()))
        if judging and epoch == 0:
            measure("untrained backbone", teacher_without_ddp.backbone)
        stats = train_one_epoch(student, teacher, teacher_without_ddp, dino_loss,
                                Watched(loader, epoch, optimizer, losses, report, flags), optimizer, *schedules)
        hook.remove()
        save_model(output / "teacher.safetensors", teacher_without_ddp.state_dict(), info)
        if judging and ((epoch + 1) % flags.knn_every == 0 or epoch + 1 == flags.epochs):
            measure(f"epoch {epoch}", teacher_without_ddp.backbone)
        return stats

    def start(its_args):
        its_args.gpu = 0
        random.seed(flags.seed)  # of its blur and solarization, which it forgets
        init_single_process(flags.device)

    sizes = {name: getattr(flags, name) for name in ("embed_dim", "depth", "num_heads")}
    info = dict(arch=flags.arch, network="teacher", patch_size=flags.patch_size, image_size=flags.global_crops_size,
                backbone=dict(img_size=flags.global_crops_size, patch_size=flags.patch_size, **sizes),
                mean=IMAGENET_MEAN, std=IMAGENET_STD, data_path=data.path)
    head = dict(nlayers=flags.head_layers, hidden_dim=flags.hidden_dim, bottleneck_dim=flags.bottleneck_dim)
    its_flags = argparse.Namespace(**vars(flags) | dict(
        arch="vit_small", output_dir=str(output), use_fp16=flags.precision != "fp32" and flags.device == "cuda"))
    with stub_cuda_calls(flags.device), contextlib.ExitStack() as patches:
        def put(target, name, value):
            patches.enter_context(mock.patch.object(target, name, value, create=name == "print"))

        for module in (theirs, utils):
            put(module, "print", lambda *args, **kwargs: None)
        put(utils, "init_distributed_mode", start)
        augmentation = theirs.DataAugmentationDINO
        put(theirs, "DataAugmentationDINO", lambda *args: views(augmentation, flags))
        put(theirs.datasets, "ImageFolder", lambda path, transform: Pictures(data.train, transform))
        put(torch.utils.data, "DistributedSampler", lambda images, shuffle: Order(images, flags))
        put(vits, "vit_small", functools.partial(
            vits.VisionTransformer, img_size=[flags.global_crops_size], mlp_ratio=4, qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), **sizes))
        put(theirs, "DINOHead", functools.partial(theirs.DINOHead, **head))
        put(theirs, "DINOLoss", functools.partial(theirs.DINOLoss, student_temp=flags.student_temp,
                                                  center_momentum=flags.center_momentum))
        put(theirs, "train_one_epoch", watched_epoch)
        if flags.device != "cuda":
            put(nn.parallel, "DistributedDataParallel", Alone)
            put(utils, "has_batchnorms", lambda network: False)  # synchronised ones are of CUDA alone
            put(utils.MetricLogger, "synchronize_between_processes", lambda self: None)  # of numbers on CUDA
        sys.path.append(args.checkout)  # where workers that start anew find its augmentation
        try:
            theirs.train_dino(its_flags)
        except SystemExit:
            raise ReferenceImplementationError("its loss is not finite, so it stopped") from None
        finally:
            sys.path.remove(args.checkout)
    report.close()


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, CheckpointError, ReferenceImplementationError)
