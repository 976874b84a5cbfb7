"""The command line: flags with checked values, one-line errors, devices and processes.

    args = parser("tool.py", __doc__).parse_args()
    run(main, args, DataError)                  # a DataError ends with its message and status 2

Every script of this project speaks through this file, so that a mistake always reads the same: one line that
names the input, status 2, no traceback. This file needs torch and nothing else.
"""

import argparse
import math
import os
import sys

import torch
import torch.distributed as dist


def parser(prog, doc):
    """A parser whose errors are one line; `@FILE` reads more flags from a file, `#` starts a comment there."""
    result = argparse.ArgumentParser(prog=prog, usage=argparse.SUPPRESS, description=doc, fromfile_prefix_chars="@",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    result.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()
    return result


def number(kind, allowed, words):
    """An argparse type: text -> kind, refused with `words` unless it is finite and allowed."""
    def parse(text):
        try:
            value = kind(text)
            if math.isfinite(value) and allowed(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return parse


positive = number(int, lambda x: x > 0, "a whole number above 0")
natural = number(int, lambda x: x >= 0, "a whole number, 0 or more")
positive_float = number(float, lambda x: x > 0, "a number above 0")
natural_float = number(float, lambda x: x >= 0, "a number, 0 or more")
share = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def boolean(text):
    """An argparse type: true or false, in the usual spellings."""
    if text.lower() not in ("true", "false", "1", "0", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "on")


def add_machine_flags(group):
    """The flags of every command that runs a network: --device and --num_workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    group.add_argument("--device", type=device, default="auto", help="cuda, mps or cpu (default: the first there is)")
    group.add_argument("--num_workers", type=natural, default=min(10, cores), metavar="N",
                       help=f"processes that load pictures, for each that computes (default: {min(10, cores)})")


def device(text):
    """An argparse type: cuda, mps, cpu or auto -> the name of a device that is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if text == "auto":
        return next(name for name in there if there[name])
    if not there.get(text):
        names = " or ".join(name for name in there if there[name])
        raise argparse.ArgumentTypeError(f"{text!r} is not a device that torch finds here ({names})")
    return text


def start_processes(device):
    """Join the process group if torchrun started this process: rank, number of processes, torch.device."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    here = torch.device(device)
    if device == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), here


def run(main, args, *errors):
    """Call main(args); the given errors, and those of the file system, end as one line and status 2."""
    try:
        main(args)
    except (*errors, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
