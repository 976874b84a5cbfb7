"""Flags of a training run: those that follow from others are filled in, and all are written.

A resumed run keeps those that follow from the data, from its first number of epochs or from --init.

    fill_in_arch(parser, args)                                # sizes of --arch, or a parser error
    write_flags("runs/photos/flags.txt", args)                # python train.py @runs/photos/flags.txt
    words, auto = list_flags_of_run(args)                     # what the run that will be resumed keeps
"""

import contextlib
import importlib.util
import os
import shlex
import shutil
from pathlib import Path

import torch

from backbones import BackboneError, check_arch
from common.auto import PAPER
from common.checkpoint import list_checkpoints, was_restarted
from common.files import read_text, write_text
from common.log_sinks import find_missing_package
from vit import SIZES

FIXED_FLAGS = (  # a resumed run must have the same
    "arch", "patch_size", "embed_dim", "depth", "num_heads", "conv_stem", "out_dim", "hidden_dim", "norm_last_layer",
    "use_bn_in_head", "head_layers", "bottleneck_dim", "l2_bottleneck", "predictor", "loss", "queue_size", "optimizer",
    "global_crops_size", "value_range", "channels", "normalization", "shuffle", "init", "layer_decay", "seed")
FLAGS_OF_INIT = (  # beside those of PAPER, which follow from the weights of --init; a resumed run has the same
    "init", "arch", "embed_dim", "depth", "num_heads", "conv_stem", "hidden_dim", "head_layers", "bottleneck_dim",
    "l2_bottleneck", "teacher_temp", "warmup_teacher_temp", "norm_last_layer", "init_head_epochs", "layer_decay")


def fill_in_arch(parser, args):
    """Fill in the defaults of --arch, and end with a parser error if its sizes are inconsistent."""
    vit_defaults = {"patch_size": PAPER["patch_size"]} | SIZES.get(args.arch, SIZES["vit_small"])
    if args.drop_path_rate is None:
        args.drop_path_rate = 0.1 if args.arch in SIZES else 0.0
    if args.arch not in SIZES:
        try:
            check_arch(args.arch)
        except BackboneError as error:
            parser.error(f"--arch: {error}")
        args.auto = tuple(name for name in args.auto if name != "patch_size")
        for name in (*vit_defaults, "conv_stem", "activation_checkpointing"):
            if getattr(args, name):
                parser.error(f"--{name} is for {', '.join(SIZES)}, not for --arch {args.arch}")
        return
    for name, value in vit_defaults.items():
        setattr(args, name, getattr(args, name) or value)
    if args.embed_dim % args.num_heads:
        parser.error(f"--embed_dim {args.embed_dim} is not a multiple of --num_heads {args.num_heads}")
    if "patch_size" not in args.auto and (problem := check_patch_size(args, unless_in=args.auto)):
        parser.error(problem)


def check_patch_size(args, unless_in=()):
    """What is wrong with the patch size of a vision transformer, for its crops or a convolutional stem; "" if nothing.

    Args:
        unless_in: names of crop sizes that are not known yet.
    """
    if args.conv_stem and (args.patch_size < 2 or args.patch_size & (args.patch_size - 1)):
        return f"--conv_stem needs a --patch_size of 2, 4, 8 ..., not {args.patch_size}"
    names = ["global_crops_size"] + ["local_crops_size"] * (args.local_crops_number > 0)
    return "; ".join(f"--{name} {getattr(args, name)} is not a multiple of --patch_size {args.patch_size}"
                     for name in names if args.arch in SIZES and name not in unless_in
                     and getattr(args, name) % args.patch_size)


def check_channels(parser, args):
    """Fill in the default of --normalization, and end with a parser error if it or the model does not fit --channels.
    """
    channels = args.channels or 3
    if channels != 3 and args.arch not in SIZES:
        parser.error(f"--channels {channels} is for {', '.join(SIZES)}, not for --arch {args.arch}")
    values = args.normalization = tuple(args.normalization or ["measure" if args.channels else "imagenet"])
    is_named = values == ("measure",) or (values == ("imagenet",) and channels == 3)
    if not is_named and (len(values) != 2 * channels or {"imagenet", "measure"} & {*values}
                         or min(values[channels:]) <= 0):
        parser.error(f"--normalization {' '.join(map(str, values))}: expected measure, or {channels} means and "
                     f"{channels} positive standard deviations")


def check_log_to(parser, args):
    """Drop repetitions, and all for a dry run; end with a parser error if a package is not installed."""
    args.log_to = tuple(dict.fromkeys(args.log_to or ())) or None
    packages = [*(args.log_to or ()), *["matplotlib"] * bool(args.log_to and args.knn_every)]
    if package := find_missing_package(packages):
        parser.error(f"--log_to {' '.join(args.log_to)}: {package} is not installed: pip install {package}")
    if args.dry_run:
        args.log_to = None


def can_compile():
    """Whether torch.compile works on CUDA here: Triton, and the C compiler that it calls."""
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(importlib.util.find_spec("triton") and has_compiler) and torch.cuda.get_device_capability()[0] >= 7


def write_flags(path, args):
    """Write the resolved flags so that @FILE reads them, but for those that would delete the run."""
    flags = {name: value if isinstance(value, tuple) else [value] for name, value in vars(args).items()
             if name not in ("resume", "overwrite", "dry_run", "auto") and value is not None}
    lines = [shlex.join([f"--{name}", *map(str, values)]) for name, values in flags.items()]
    lines[:0] = [f"# auto: {' '.join(args.auto)}"] * bool(args.auto)  # read by list_flags_of_run
    write_text(path, "\n".join(lines) + "\n")


def is_new_run(args):
    """Whether no run in --output_dir will be resumed."""
    is_resumed = args.resume == "auto" or was_restarted(args.output_dir)
    return not (is_resumed and list_checkpoints(Path(args.output_dir, "checkpoint.pth")))


def list_flags_of_run(args):
    """Arguments that the run that will be resumed keeps unless others are given, and its auto flags; [], () if new."""
    if is_new_run(args):
        return [], ()
    with contextlib.suppress(OSError, ValueError):
        lines = read_text(Path(args.output_dir, "flags.txt")).splitlines()
        words = {name: values for name, *values in map(shlex.split, filter(str.strip, lines)) if name != "#"}
        if args.arch not in SIZES and words.get("--arch") != [args.arch]:
            return [], ()  # which cannot be resumed as such
        names = tuple(name for line in lines if line.startswith("# auto: ") for name in line.split()[2:])
        kept = ("batch_size_per_gpu", "warmup_epochs", "channels", "normalization", "value_range", *PAPER,
                *(FLAGS_OF_INIT * ("--init" in words)))
        return [word for name in kept if f"--{name}" in words for word in (f"--{name}", *words[f"--{name}"])], names
    return [], ()
