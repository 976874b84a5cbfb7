"""Speed and memory of crops and training steps, next to other libraries that train DINO.

    python -m venv ~/lightly && ~/lightly/bin/pip install lightly timm           # an environment for each, once
    python -m venv ~/lightly-train && ~/lightly-train/bin/pip install lightly-train timm
    python -m venv ~/stable && ~/stable/bin/pip install stable-pretraining
    python -m benchmarks.peers --env lightly=~/lightly/bin/python lightly-train=~/lightly-train/bin/python \\
        stable-pretraining=~/stable/bin/python --reference DIR --data_path /photos --precision fp32

Other flags are those of train.py. Each library runs in a process of its own, with its own crops, loader and training
loop, on the same image files; the processes take turns and are stopped in between. A turn loads and trains on a batch:
`step` is the second half of it, `both` all of it, and `crops` a batch from files to crops in one thread, as on a loader
worker. `loss` is that of the first step, near ln(out_dim). Standard output gets one JSON object per row, standard error
a table; ratio is the speed relative to ours.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import checkout, peer_worker, speed
from benchmarks.peer_worker import PACKAGES
from common import cli
from data.datasets import DataError, ImageFolder
from data.shapes import Shapes

TASKS = {"crops": "crops", "step": "train", "both": "train"}  # what is timed: the task of the worker
COLUMNS = dict(version="s", precision="s", ms=".1f", ms_min=".1f", ms_max=".1f", images_per_sec=".2f", ratio=".2f",
               peak_mib=".0f", gpu_mib=".0f", loss=".3f")  # of the tables, with their formats
PHOTO_SIDE, NUM_SHAPES = 400, 64  # of the built-in shapes, if there are no photographs


class PeerError(Exception):
    """A library is not installed in its environment, or its process ended."""


def install_hint(name):
    return f"install it with: python -m venv DIR; DIR/bin/pip install {PACKAGES[name]}"


def environment(text):
    """Argument type: NAME=PYTHON of a library and the python that has it."""
    name, _, python = text.partition("=")
    if name not in PACKAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON with NAME one of {', '.join(PACKAGES)}")
    if not shutil.which(python):
        raise argparse.ArgumentTypeError(f"{python!r} is no python for {name}; {install_hint(name)}")
    return name, os.path.abspath(shutil.which(python))


def parse_args(argv=None):
    parser = cli.build_parser("peers.py", __doc__)
    parser.add_argument("--env", nargs="+", default=(), type=environment, metavar="NAME=PYTHON",
                        help=f"{', '.join(PACKAGES)}: the python of its environment")
    parser.add_argument("--reference", metavar="DIR", help="checkout of facebookresearch/dino, timed as one more row")
    parser.add_argument("--data_path", metavar="DIR", help="folder of images (default: JPEGs of the built-in shapes)")
    parser.add_argument("--num_workers", type=cli.num_workers, default=0, help="data loader workers, for both")
    parser.add_argument("--steps", type=cli.positive_int, default=1,
                        help="steps of a turn; with --num_workers many more than batches in the queue")
    parser.add_argument("--warmup", type=cli.positive_int, default=1, help="untimed turns")
    parser.add_argument("--runs", type=cli.positive_int, default=5, help="timed turns")
    args = speed.parse_train_flags(parser, argv)
    if not args.env and not args.reference:
        parser.error(f"--env or --reference is missing; for lightly, {install_hint('lightly')}")
    return args


def write_images(data_path, folder, count):
    """Write images to a subfolder of `folder`: copies of files in data_path, or JPEGs of the built-in shapes."""
    (folder / "0").mkdir(parents=True)
    images = ImageFolder(data_path) if data_path else Shapes("train", NUM_SHAPES, PHOTO_SIDE)
    for i in range(count):
        path, source = folder / "0" / f"{i:06}.jpg", i * len(images) // count
        if data_path:
            source = Path(images.name(source))
            shutil.copyfile(source, path.with_suffix(source.suffix.lower()))
        else:
            images[source][0].save(path, quality=90)


class Worker:
    """A process of peer_worker.py, which is stopped but while it is asked."""

    def __init__(self, name, python, settings, folder):
        self.name, self.log = name, open(folder / f"{name}.log", "w+", errors="replace")  # noqa: SIM115
        path = {"PYTHONPATH": peer_worker.ROOT} if name not in PACKAGES else {}
        self.process = subprocess.Popen(
            [python, peer_worker.__file__, name, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, cwd=folder, process_group=0 if os.name == "posix" else None,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | path)
        self.info = self.receive()

    def receive(self):
        """The next answer; then the process and its loader workers are stopped."""
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            last = ([line.strip() for line in self.log if line.strip()] or ["no output"])[-1]
            is_missing = self.name in PACKAGES and re.search("(Module|Package)NotFoundError", last)
            raise PeerError(f"{self.name}: its process ended with status {status}: {last}"
                            + (f"; {install_hint(self.name)}" if is_missing else ""))
        self.send_signal("SIGSTOP")
        return json.loads(line)

    def ask(self, task):
        """The answer to a task, see peer_worker.py."""
        self.send_signal("SIGCONT")
        with contextlib.suppress(BrokenPipeError):  # of a process that was killed, such as for its memory
            self.process.stdin.write(f"{task}\n")
            self.process.stdin.flush()
        return self.receive()

    def send_signal(self, name):
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, getattr(signal, name))

    def close(self):
        self.send_signal("SIGKILL")
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        self.log.close()


def time_workers(workers, args):
    """{task: {name: list of answers}}, in alternation, warm-up included."""
    answers = {task: {name: [] for name in workers} for task in ("crops", "train")}
    for _ in range(args.warmup + args.runs):
        for task, by_name in answers.items():
            for name, worker in workers.items():
                by_name[name].append(worker.ask(task))
    return answers


def main(args):
    cli.set_num_threads(args)
    images = args.batch_size_per_gpu * args.steps
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_images(args.data_path, folder / "images", images * (args.warmup + args.runs))
        settings = vars(args) | dict(folder=str(folder / "images"), threads=torch.get_num_threads(),
                                     schedule=speed.SCHEDULE._asdict())
        pythons = {"ours": sys.executable} | ({"reference": sys.executable} if args.reference else {}) | dict(args.env)
        workers = {}
        for name, python in pythons.items():
            workers[name] = Worker(name, python, settings, folder)
            stack.callback(workers[name].close)
        answers = time_workers(workers, args)
    print_results(args, {name: worker.info for name, worker in workers.items()}, answers)


def print_results(args, info, answers):
    """Print the rows and a table of each task."""
    images = args.batch_size_per_gpu * args.steps
    flags = dict(device=args.device, threads=torch.get_num_threads(), arch=args.arch,
                 batch_size_per_gpu=args.batch_size_per_gpu, out_dim=args.out_dim, num_workers=args.num_workers,
                 crops=f"2x{args.global_crops_size} + {args.local_crops_number}x{args.local_crops_size}")
    for task, asked in TASKS.items():
        seconds = {name: [answer[task] for answer in given[args.warmup:]] for name, given in answers[asked].items()}
        rows = {}
        for name, values in seconds.items():
            trained = answers["train"][name]
            rows[name] = info[name] | dict(
                ms=1000 * statistics.median(values) / args.steps, ms_min=1000 * min(values) / args.steps,
                ms_max=1000 * max(values) / args.steps, images_per_sec=images / statistics.median(values),
                ratio=statistics.median(a / b for a, b in zip(seconds["ours"], values)), loss=trained[0]["loss"],
                peak_mib=trained[-1]["peak_mib"], gpu_mib=trained[-1]["gpu_mib"])
        speed.print_rows(dict(task=task) | flags, rows, COLUMNS)


if __name__ == "__main__":
    cli.run_command(main, parse_args, DataError, PeerError, checkout.ReferenceImplementationError)
