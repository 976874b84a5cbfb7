"""Command line: checked flag types, flags shared by several commands, one-line errors.

    def parse_args(argv=None):
        parser = build_parser("tool.py", __doc__)
        parser.add_argument("--epochs", type=positive_int, default=100, help="training epochs")
        return parser.parse_args(argv)

    run_command(main, parse_args, DataError)        # a DataError prints its message and exits with status 2

Help shows default values. `@FILE` reads more flags from a file, with comments and quotes as in a shell; `~` at the
start of any value is the home folder. Every command of this repository runs through `run_command`, so an error is
always one line: what failed, the value, the fix.
"""

import argparse
import difflib
import functools
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys

import torch
import torch.distributed as dist

from common import distributed
from common.files import describe_os_error, read_text
from common.precision import PRECISIONS, resolve_precision

# ---- parsers ----

class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of the module docstring, appends defaults, and names values N, X or by their type."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", "X")

    def _get_help_string(self, action):
        if action.default is None or action.nargs == 0 or "(default:" in action.help:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class FlagLexer(shlex.shlex):
    """Words of a flag file: quoted as in a shell, where # starts a comment only at the start of a word."""

    commenters = property(lambda self: "#" * (self.state == " "), lambda self, value: None)
    escape = property(lambda self: "\\" * (os.sep == "/"), lambda self, value: None)  # it is in paths of Windows


class StrictArgumentParser(argparse.ArgumentParser):
    """Reads flag files, expands ~, and refuses empty arguments, which an unset shell variable leaves.

    Drops --local-rank, which torch.distributed.launch adds to the LOCAL_RANK that it sets.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-05 too, as in Python 3.14

    def parse_known_args(self, args=None, namespace=None):
        args = [expand_home(word) for argument in (sys.argv[1:] if args is None else args)
                for word in self.read_flags(argument) if not re.match("--local[-_]rank=", argument)]
        for i, argument in enumerate(args):
            if argument == "" or re.fullmatch("--[a-z_]+=", argument):
                self.error(f"empty argument after {' '.join([*args[:i], argument]).strip()}")
        return super().parse_known_args(args, namespace)

    def parse_given_args(self, args=None):
        """Parsed arguments, and the names of those that are given, not defaults."""
        parsed = self.parse_args(args)
        marked = self.parse_args(args, argparse.Namespace(**dict.fromkeys(vars(parsed), self)))
        return parsed, {name for name, value in vars(marked).items() if value is not self}

    def describe_defaults(self, names, text):
        """Let the help of flags show a text in place of their defaults."""
        for action in self._actions:
            if action.dest in names:
                action.help += f" (default: {text})"

    def read_flags(self, argument, depth=0):
        """The argument itself or, of @FILE, the words of the file and of those that it names."""
        if not argument.startswith("@"):
            return [argument]
        try:
            text = read_text(expand_home(argument[1:]))
        except OSError as error:
            self.error(f"flag file {describe_os_error(error)}")
        if "\0" in text or depth > 9:
            self.error(f"flag file {argument[1:]}: is not text, or includes itself")
        lexer = FlagLexer(text, posix=True)
        lexer.whitespace_split = True
        try:
            return [word for argument in lexer for word in self.read_flags(argument, depth + 1)]
        except ValueError as error:
            self.error(f"flag file {argument[1:]}: {error} near {lexer.token[:40]!r}, quote it or write \\'")

    def error(self, message):
        """Add the nearest flag, task or choice to the message on one that does not exist."""
        parsers = (self, *getattr(self, "tasks", {}).values())
        known = [name for parser in parsers for name in parser._option_string_actions]
        if match := re.search(r"invalid choice: '?(\S+?)'? \(choose from (.*)\)", message):
            known = re.findall(r"[^\s',]+", match[2])
        if match := match or re.search(r"unrecognized arguments: (--[^\s=]+)", message):
            word = match[1][:2] + match[1][2:].replace("-", "_")
            known = [name for name in known if name != word]  # a flag of another task
            nearest = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known)
            message += "".join(f"; did you mean {name}?" for name in nearest[:1])
        super().error(message)


def expand_home(argument):
    """Home folder for ~ at the start of a value: ~/x, --flag=~/x, NAME:~/x or --flag=NAME:~/x."""
    start, path = re.fullmatch(r"(?s)((?:--\w+=)?(?:\w+:)?)(.*)", argument).groups()
    return start + os.path.expanduser(path)


def build_parser(prog, description):
    """ArgumentParser with one-line errors, `@FILE` and defaults in its help."""
    return StrictArgumentParser(prog=prog, usage=argparse.SUPPRESS, description=description,
                                formatter_class=HelpFormatter, allow_abbrev=False)


def add_subcommands(parser, functions):
    """Add a subparser for each {name: function}, described by the function's docstring; returns {name: subparser}."""
    subparsers = parser.add_subparsers(prog=parser.prog, dest="task", required=True, metavar="TASK")
    parser.tasks = {name: subparsers.add_parser(name, help=function.__doc__, description=function.__doc__,
                                                usage=argparse.SUPPRESS, formatter_class=HelpFormatter,
                                                allow_abbrev=False)
                    for name, function in functions.items()}
    return parser.tasks


# ---- argument types ----

def bounded_number(kind, is_allowed, description):
    """Argument type: a finite number that `is_allowed`; `description` completes "'x' is not ..."."""
    def parse(text):
        try:
            value = kind(text)
            if math.isfinite(value) and is_allowed(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
    parse.metavar = "N" if kind is int else "X"
    return parse


positive_int = bounded_number(int, lambda x: 0 < x < 2**31, "an integer above 0 and below 2^31")
nonnegative_int = bounded_number(int, lambda x: 0 <= x < 2**31, "an integer of 0 or more and below 2^31")
image_side = bounded_number(int, lambda x: 0 < x <= 8192, "a number of pixels from 1 to 8192")
num_workers = bounded_number(int, lambda x: 0 <= x <= 256, "a number of processes from 0 to 256")
finite_float = bounded_number(float, lambda x: True, "a finite number")
positive_float = bounded_number(float, lambda x: x > 0, "a number above 0")
nonnegative_float = bounded_number(float, lambda x: x >= 0, "a number of 0 or more")
percentage = bounded_number(float, lambda x: 0 < x <= 100, "a number above 0 and up to 100")
fraction = bounded_number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
fraction_below_one = bounded_number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
seed = bounded_number(int, lambda x: 0 <= x < 2**63, "an integer from 0 to below 2^63")


def boolean(text):
    """Argument type: true or false, in the usual spellings."""
    if text.lower() not in ("true", "false", "1", "0", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "on")


def device_name(text):
    """Argument type: cuda, mps or cpu if available here; auto is the first that is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if text == "auto":
        return next(name for name in available if available[name])
    if not available.get(text):
        names = " or ".join(name for name in available if available[name])
        raise argparse.ArgumentTypeError(f"{text!r} is not available here, use {names}")
    return text


def check_range(parser, args, name, allow_zero=False):
    """End with a parser error unless the two numbers of --NAME are an ascending range above 0."""
    low, high = getattr(args, name)
    if low > high or (low == 0 and not allow_zero):
        parser.error(f"--{name} {low} {high} is not an ascending range above 0")


# ---- flags shared by several commands ----

def add_flag(group, name, default, help, type=None, **kwargs):
    """Add a flag with a default value; `kwargs` as for add_argument."""
    group.add_argument(name, default=default, help=help, type=type, **kwargs)


def add_model_flags(group, workers=True, output_dir=True):
    """Add the flags that `common.weights.open_backbone` reads, those of the device and, if wanted, --output_dir."""
    group.add_argument("--ckpt", nargs="?", help="model file, folder of a run, dino_vits16 or "
                       "hf:USER/NAME (default: that of the newest run)")
    group.add_argument("--checkpoint_key", choices=["teacher", "student"],
                       help="network of a full checkpoint (default: teacher)")
    group.add_argument("--untrained", action="store_true", help="random weights of the same shapes, as a baseline")
    if output_dir:
        group.add_argument("--output_dir", metavar="DIR", help="folder of the results (default: beside the model file)")
    add_device_flags(group, workers)


class StoreOneOrMore(argparse.Action):
    """Stores one value as itself, several as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


def add_data_flags(group, default, help):
    """Add the flags of `data.datasets.open_data`: --data_path, --val_path and --cache_dir."""
    group.add_argument("--data_path", nargs="+", action=StoreOneOrMore, default=default, metavar="PATH", help=help)
    group.add_argument("--val_path", nargs="+", action=StoreOneOrMore, metavar="PATH",
                       help="held-out images in folders or shards (default: found beside --data_path)")
    add_cache_flag(group)


def add_cache_flag(group):
    group.add_argument("--cache_dir", metavar="DIR", help="folder for indices of shards (default: ~/.cache/dino)")


def add_show_channels_flag(group):
    group.add_argument("--show_channels", type=nonnegative_int, nargs="+", metavar="C",
                       help="one or three, from 0, to draw as gray or RGB (default: 0 1 2; 0 of fewer than three)")


def check_show_channels(parser, args):
    if len(getattr(args, "show_channels", None) or [0]) not in (1, 3):
        parser.error(f"--show_channels {' '.join(map(str, args.show_channels))}: expected one channel or three")


def add_device_flags(group, workers=True):
    """Add --device and, for commands with data loader workers, --num_workers."""
    group.add_argument("--device", type=device_name, default="auto", help="cuda, mps or cpu; auto: the first available")
    if workers:
        group.add_argument("--num_workers", type=num_workers, default=min(10, distributed.count_cores()),
                           help="data loader workers per process")


def add_crop_flags(group):
    """Add the flags of multi-crop augmentation, which `data.loaders.build_multicrop` reads."""
    add = functools.partial(add_flag, group)
    add("--global_crops_size", 224, "side of a global crop in pixels", positive_int)
    add("--global_crops_scale", (0.4, 1.0), "area relative to the image; 0.14 1 without local crops", fraction, nargs=2)
    add("--local_crops_number", 8, "0 disables multi-crop", nonnegative_int)
    add("--local_crops_size", 96, "side of a local crop in pixels", positive_int)
    add("--local_crops_scale", (0.05, 0.4), "area relative to the image", fraction, nargs=2)
    add("--color_jitter", (0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue", fraction, nargs=4)
    add("--blur", (1.0, 0.1, 0.5), "probability for first global, second global, local crops", fraction, nargs=3)
    add("--blur_radius", (0.1, 2.0), "range of the sigma, pixels; less for small images", nonnegative_float, nargs=2)
    for name, help in (("--vertical_flip", "flip half of the crops upside down"),
                       ("--rotate90", "rotate crops by multiples of 90 degrees")):
        add(name, False, f"{help}, for images without a canonical orientation", boolean, nargs="?", const=True)
    add("--views", "auto", "where crops are made: loader workers (cpu) or batched (device); auto: device on CUDA",
        choices=["auto", "cpu", "device"])


def add_run_flags(group):
    """Add the flags of an interruptible run, which `common.checkpoint.Run` and the training loops read."""
    add = functools.partial(add_flag, group)
    add("--precision", "auto", "autocast dtype; auto: bf16 where the device is fast at it", choices=PRECISIONS)
    add("--resume", "auto", "auto: continue the run in output_dir; none: start anew", choices=["auto", "none"])
    group.add_argument("--overwrite", action="store_true", help="with --resume none: delete the run in output_dir")
    add("--save_every_minutes", 10.0, "minutes between checkpoints within an epoch, 0 for none", nonnegative_float)
    add("--log_every", 50, "steps between log lines", positive_int)
    add("--seed", 0, "of weights, order, crops and stochastic depth", seed)


def check_run_flags(parser, args, warmup_epochs=0):
    """End with a parser error unless the run flags are consistent; resolve --precision auto and --warmup_epochs.

    Args:
        warmup_epochs: the default for 100 epochs and more; in proportion for fewer.
    """
    if args.overwrite and args.resume != "none":
        parser.error("--overwrite deletes a run and starts anew: add --resume none")
    given = args.warmup_epochs
    if given is None or given > args.epochs:
        args.warmup_epochs = min(warmup_epochs, math.ceil(args.epochs * warmup_epochs / 100)) if args.epochs > 1 else 0
        if (given or args.epochs < 100) and os.environ.get("RANK", "0") == "0":
            reason = f" for {given}, which are more" if given else f", {warmup_epochs} with 100"
            print(f"NOTE: --warmup_epochs {args.warmup_epochs} with --epochs {args.epochs}{reason}")
    args.precision = resolve_precision(args.precision, args.device)


def check_crop_flags(parser, args):
    """End with a parser error unless the crop flags are consistent; turn lists from flag files into tuples."""
    for name in ("global_crops_scale", "local_crops_scale", "color_jitter", "blur", "blur_radius"):
        setattr(args, name, tuple(getattr(args, name)))
    for name in ("global_crops_scale", "local_crops_scale", "blur_radius"):
        check_range(parser, args, name, allow_zero=name == "blur_radius")
    if args.blur_radius[1] > args.global_crops_size:
        parser.error(f"--blur_radius {args.blur_radius[1]} is more than --global_crops_size {args.global_crops_size}")
    if args.color_jitter[3] > 0.5:
        parser.error(f"--color_jitter hue {args.color_jitter[3]} is above 0.5, half a turn of the color wheel")


def set_num_threads(args):
    """Let torch use --num_threads CPU threads, if they are given."""
    if args.num_threads:
        torch.set_num_threads(args.num_threads)


# ---- running a command ----

OPTIONAL_PACKAGES = (  # needed by some commands only
    "matplotlib", "av", "timm", "pyarrow", "fsspec", "aiohttp", "tifffile", "scipy", "huggingface_hub")


def run_command(main, parse_args, *errors):
    """Call main(parse_args()); print the given errors, and environment errors, as one line and exit with status 2.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP are one line too and exit with status 128 + their number, after whatever waits
    to be closed or removed. Other exceptions are bugs and keep their traceback. Loader workers end with the command.
    """
    prepare_streams()
    sys.unraisablehook = hide_worker_death
    handlers = distributed.handle_signals(distributed.request_stop, "SIGINT", "SIGTERM", "SIGHUP")
    processes, status, errors = multiprocessing.active_children(), 2, (*errors, distributed.DistributedError)
    try:
        main(parse_args())
        sys.stdout.flush()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        message = "interrupted" if number == signal.SIGINT else f"stopped by {error}"
        status = 128 + number
    except BrokenPipeError:
        message, status = "its output is no longer read (broken pipe)", 141
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        message = f"{error.name} is not installed: pip install {error.name}"
    except (*errors, OSError, RuntimeError, MemoryError, ValueError) as error:
        message = None if isinstance(error, errors) else explain_runtime_error(error)
        if not message and not isinstance(error, (*errors, OSError)):
            raise
        # an exception from a loader worker carries the worker's traceback before its message
        message = message or describe_os_error(error) or str(error).rpartition(f"{type(error).__name__}: ")[2]
    finally:
        kill_workers(set(multiprocessing.active_children()).difference(processes))
        for number, handler in handlers.items():
            signal.signal(number, handler)
    distributed.silence_lost_output()
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())[:1000]}", file=sys.stderr)
    sys.exit(status)


def prepare_streams():
    """Replace stdout or stderr if closed (`>&-`), and let both show any file name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # not in notebooks
            stream.reconfigure(errors="backslashreplace")


def kill_workers(processes):
    """Kill data loader workers: one that hangs or was stopped would be waited for without end."""
    if processes:
        # torch's handler raises the death of a worker
        handlers = distributed.handle_signals(signal.SIG_DFL, "SIGCHLD")
        for process in processes:
            process.kill()
            process.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def hide_worker_death(unraisable):
    """sys.unraisablehook: torch raises the death of a loader worker, or that it did not start, also in a __del__."""
    if "DataLoader" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def explain_runtime_error(error):
    """One line on an error of the environment (memory, files, compiler, workers, other ranks); None for others."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
            "can't allocate|size calc|Cannot allocate memory|can't start new thread", text):
        request = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
        return (f"out of memory, use smaller batches, images or models, or a lower --num_workers "
                f"({request[0] if request else text.strip().splitlines()[-1] if text else type(error).__name__})")
    if re.search("Too many open files|items of ancdata", text):
        return "too many open files: raise the limit (ulimit -n 4096) or lower --num_workers"
    if re.search("(file|object) </torch_", text):  # a file in shared memory
        return (f"/dev/shm is too small for the batches of data loader workers: start the container with a larger "
                f"--shm-size (Docker's default is 64 MB), or lower --num_workers ({text.strip().splitlines()[-1]})")
    if isinstance(error, OSError):
        return None
    if "more than 1 value per channel" in text:
        return "batch norm needs more than one image per GPU: raise --batch_size_per_gpu"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"torch.compile failed, use --compile false or fix this: {text.strip().splitlines()[0]}"
    if "DataLoader timed out" in text:
        return ("a data loader worker hangs, or the images come too slowly: look at the disk, lower "
                "--batch_size_per_gpu or raise --timeout_minutes")
    if "DataLoader worker" in text:
        return f"a data loader worker died, often out of memory: lower --num_workers ({text})"
    if "WORLD_SIZE" in os.environ and re.search("gloo|nccl|timed out|timeout|connection|socket", text, re.IGNORECASE):
        what = "timed out waiting for" if re.search("timed out|timeout", text, re.IGNORECASE) else "lost"
        return (f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} {what} the others: one of them died "
                f"or hangs, look for the rank that prints something else or nothing ({text})")
    return None
