"""The command line: flags with checked values, one-line errors, devices and processes.

    def parse_args(argv=None):
        return parser("tool.py", __doc__).parse_args(argv)

    run(main, parse_args, DataError)            # a DataError ends with its message and status 2

Every script of this project speaks through this file, so that a mistake always reads the same: one line that
names the input, status 2, no traceback. This file needs torch and nothing else.
"""

import argparse
import datetime
import math
import os
import re
import shlex
import signal
import sys
import time

import torch
import torch.distributed as dist


def parser(prog, doc):
    """A parser whose errors are one line; `@FILE` reads more flags from a file, `#` starts a comment there."""
    result = argparse.ArgumentParser(prog=prog, usage=argparse.SUPPRESS, description=doc, fromfile_prefix_chars="@",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def words(line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            result.error(f"{error} in the line {line!r} of a flag file")
    result.convert_arg_line_to_args = words
    return result


def add_tasks(parser, tasks):
    """A subparser for each task: {name: function whose docstring says what it does} -> {name: parser}."""
    subparsers = parser.add_subparsers(prog=parser.prog, dest="task", required=True, metavar="TASK")
    return {name: subparsers.add_parser(name, help=task.__doc__, description=task.__doc__, usage=argparse.SUPPRESS,
                                        allow_abbrev=False) for name, task in tasks.items()}


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
rate = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
seed = number(int, lambda x: 0 <= x < 2**63, "a whole number from 0 to below 2^63")


def require_range(parser, args, name, from_zero=False):
    """End with a parser error unless a flag of two numbers is a range, above 0 or from 0 on."""
    low, high = getattr(args, name)
    if low > high or (low == 0 and not from_zero):
        parser.error(f"--{name} {low} {high} is not a range above 0, lower end first")


def boolean(text):
    """An argparse type: true or false, in the usual spellings."""
    if text.lower() not in ("true", "false", "1", "0", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "on")


def add_model_flags(group):
    """The flags of every command that judges a backbone: --ckpt, --checkpoint_key and --untrained."""
    group.add_argument("--ckpt", nargs="?", help="model file (default: teacher.safetensors of the newest run)")
    group.add_argument("--checkpoint_key", choices=["teacher", "student"],
                       help="network to take from a full checkpoint (default: teacher)")
    group.add_argument("--untrained", action="store_true", help="judge random weights of the same shapes instead")


def add_machine_flags(group, workers=True):
    """The flags of every command that runs a network: --device and, if it loads pictures in workers, --num_workers."""
    group.add_argument("--device", type=device, default="auto", help="cuda, mps or cpu (default: the first there is)")
    if not workers:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
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


class ProcessError(ValueError):
    """Processes were started in a way that cannot work."""


def start_processes(device, timeout_minutes=30.0):
    """Join the process group if torchrun started this process: rank, number of processes, torch.device.

    Args:
        timeout_minutes: how long a process waits for the others before it gives up.

    Raises:
        ProcessError: more processes than GPUs, or several on a device that has no process group.
    """
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device(device)
    here = torch.device(device)
    if device == "mps":
        raise ProcessError("torchrun: several processes need CUDA, or --device cpu")
    if device == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ProcessError(f"torchrun: process {local_rank} of this machine has no GPU of its own; "
                               f"--nproc_per_node may be {torch.cuda.device_count()} at most")
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts: without a part of its own a restart meets addresses of the dead.
        # Over several machines each counts its own restarts, so there is no common name for such a part:
        # there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart a store of its own.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # gloo carries what is agreed between the hosts, without waiting for the GPUs
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world_size, timeout=timeout)
    return rank, world_size, here


def several_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process():
    return not several_processes() or dist.get_rank() == 0


def rank_zero_first(make):
    """Call `make` on rank 0 and then on the others, so that a download is made once."""
    if not is_first_process():
        gather(None)
    result = make()
    if is_first_process():
        gather(None)
    return result


def gather(value):
    """The value of every process, in the order of rank; a plain list of one without a process group."""
    values = [value]
    if several_processes():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def require_same(what, value):
    """Refuse to go on with processes that disagree, which would wait for each other or train different things.

    Raises:
        ProcessError: on all processes; the message names the first that differs from process 0.
    """
    values = gather(value)
    for rank, theirs in enumerate(values):
        if theirs != values[0]:
            raise ProcessError(f"process {rank} has {what} {theirs}, process 0 has {values[0]}: all need the same "
                               f"pictures and one --output_dir that they share")


class StopSignals:
    """From here on SIGTERM, SIGINT and SIGUSR1 are wishes to stop, that the program grants when it is ready.

    A second SIGINT, two seconds later or more (torchrun and a terminal may each send one), stops at once.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.receive) for number in numbers}

    def restore(self):
        """From here on they are what they were before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.since = number, time.monotonic()
            # print may be in the middle of a line of its own
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving\n".encode())

    def agreed(self):
        """The name of a signal that some process has received, or None; the same on every process, so all must ask."""
        number = torch.tensor(self.number)
        if several_processes():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(number.item()).name if number else None


OPTIONAL = {"matplotlib": "matplotlib", "av": "av", "timm": "timm"}  # module -> pip's name: what some commands need


def run(main, parse_args, *errors):
    """Call main(parse_args()); the given errors, and those of the machine, end as one line and status 2.

    An interruption from the keyboard ends as one line and status 130.
    """
    for stream in (sys.stdout, sys.stderr):  # file names need not be text that a terminal can show
        stream.reconfigure(errors="backslashreplace")
    status = 2
    try:
        main(parse_args())
    except (*errors, ProcessError, OSError) as error:
        # What a loader's worker raises arrives with its traceback before the message.
        message = str(error).rpartition(f"{type(error).__name__}: ")[2]
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        message = f"this needs {error.name}, which is not installed: pip install {OPTIONAL[error.name]}"
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except RecursionError:
        message = "a flag file includes itself"
    except UnicodeDecodeError:
        message = "a flag file (@FILE) is not text"
    except (RuntimeError, MemoryError, ValueError) as error:
        message = of_the_machine(error)
        if not message:
            raise
    else:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())[:1000]}", file=sys.stderr)
    sys.exit(status)


def of_the_machine(error):
    """What an error of torch's says of the machine (memory, compiler, workers, processes), or None: it is a defect."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in text or "size calc" in text:
        asked = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
        return f"out of memory: smaller batches, pictures or networks take less ({asked[0] if asked else text})"
    if "more than 1 value per channel" in text:
        return "batch norm needs several pictures to learn from: raise --batch_size_per_gpu"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"torch cannot compile here, leave --compile out or mend this: {text.strip().splitlines()[0]}"
    if "DataLoader worker" in text:
        return f"a process that loads pictures died, often for want of memory: lower --num_workers ({text})"
    if "LOCAL_RANK" in os.environ and re.search("gloo|nccl|timed out|timeout|connection|socket", text, re.IGNORECASE):
        waited = "waited in vain for" if re.search("timed out|timeout", text, re.IGNORECASE) else "lost"
        return (f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} {waited} the others: one of them "
                f"died or hangs, look for the one that says something else, or nothing ({text})")
    return None
