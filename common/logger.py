"""Training log: console lines or a progress bar, log.jsonl that a resumed run continues, throughput, profiler.

    logger = Logger(Path("log.jsonl"), is_silent=rank > 0)
    logger.start_progress(0, 1000)
    for step in range(1000):
        crops = logger.next_batch(batches)
        ...
        logger.count_step()
        record = dict(epoch=0, step=step, loss=2.3) | logger.throughput(64, 999 - step)
        logger.log_step(record, 10, ["loss {loss:.3f}"])
    logger.close()

This file needs torch, tqdm and common/distributed.py.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from common.distributed import all_gather_objects, get_world_size, is_rank_zero

BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n}/{total} {elapsed}<{remaining}{postfix}"  # within 80 columns, shorter first


class Logger:
    """Prints to the console and appends JSON lines to a log.

    Args:
        path: log file, one JSON object per line.
        is_silent: print and log nothing but corrupt images: on all ranks but 0.
        device: where the steps run.

    `sinks`, a LogSinks or None, gets all records too.
    """

    def __init__(self, path, is_silent=False, device="cpu"):
        self.path, self.is_silent, self.progress, self.profiler, self.sinks = path, is_silent, None, None, None
        self.uses_events = torch.device(device).type == "cuda"
        self.corrupt_images = set()  # messages
        self.reset_timer()

    def print(self, text):
        try:
            if not self.is_silent:
                tqdm.write(text)
        except BrokenPipeError:  # as when a terminal closes: the run is saved and stops
            signal.raise_signal(getattr(signal, "SIGHUP", signal.SIGTERM))

    def log(self, record, draw=None):
        """Append a record; values that are not finite become null. draw() -> {name: PIL image} is for the sinks."""
        if self.is_silent:
            return
        record = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in record.items()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self.sinks:
            self.sinks.write(record, draw)

    def resume(self, log_bytes, corrupt_images):
        """Continue the log of a checkpoint: what was logged after it is cut off, and will be logged again."""
        self.corrupt_images = set(corrupt_images)
        if not self.is_silent:
            with open(self.path, "a") as file:
                file.truncate(min(file.tell(), log_bytes))

    # ---- steps ----

    def start_progress(self, first_step, total_steps):
        """Start counting steps; a terminal gets a progress bar, anything else a line per `log_step`."""
        self.total_steps = total_steps
        self.progress = tqdm(total=total_steps, initial=first_step, dynamic_ncols=True, bar_format=BAR_FORMAT,
                             disable=self.is_silent or not sys.stderr.isatty())
        self.started = time.monotonic()
        self.reset_timer()

    def reset_timer(self):
        """Start measuring throughput here; what came before (evaluation, saving) does not count."""
        self.since, self.steps, self.waits = time.monotonic(), 0, []

    def next_batch(self, batches):
        """next(batches), timed as waiting for data: by the host or, on CUDA, by the stream that runs the steps."""
        start = self.read_clock()
        batch = next(batches)
        self.waits.append((start, self.read_clock()))
        return batch

    def read_clock(self):
        """Seconds, or on CUDA an event of the current stream, which also waits for crops from a side stream."""
        if not self.uses_events:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def count_step(self):
        self.steps += 1
        self.progress.update()
        if self.profiler:
            self.profiler.step()

    def throughput(self, images_per_step, steps_left):
        """Since the last call: images per second, seconds per step waiting for data and in all, seconds left."""
        if self.uses_events:
            torch.cuda.current_stream().synchronize()
        waited = sum(a.elapsed_time(b) / 1000 if self.uses_events else b - a for a, b in self.waits)
        step_time, data_time = (time.monotonic() - self.since) / self.steps, waited / self.steps
        self.reset_timer()
        self.step_time = step_time
        return dict(images_per_sec=images_per_step / step_time, data_time=data_time, step_time=step_time,
                    eta=steps_left * step_time)

    def log_step(self, record, epochs, fields):
        """Log the record of a step, and show it in the progress bar or, without one, in a line.

        Args:
            fields: formats of the record's values, the most important first.
        """
        self.log(record)
        first, *rest = (field.format(**record) for field in fields)
        speed = f"{record['images_per_sec']:.0f} img/s data {record['data_time'] / record['step_time']:.0%}"
        self.progress.set_postfix_str(" ".join([first, speed, *rest]))
        if self.progress.disable:
            elapsed, left = (datetime.timedelta(seconds=round(seconds))
                             for seconds in (time.monotonic() - self.started, record["eta"]))
            self.print(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} epoch {record['epoch']}/{epochs} "
                       f"[{record['step'] + 1}/{self.total_steps}] {' '.join([first, *rest])} {speed} "
                       f"elapsed {elapsed} eta {left}")

    def log_corrupt(self, messages):
        """Print each corrupt image once, on the rank that met it."""
        for message in set(messages) - self.corrupt_images:
            self.corrupt_images.add(message)
            tqdm.write(f"skipped corrupt image {message}")

    def gather_corrupt(self):
        """Make the corrupt images of all ranks known to each; all ranks must call this."""
        self.corrupt_images = set().union(*all_gather_objects(self.corrupt_images))

    def close(self, failed=False):
        """Close the progress bar and the sinks; write the trace of a profiler that has not recorded all its steps.

        Args:
            failed: whether an error ends the run.
        """
        if self.progress:
            self.progress.close()
        if self.sinks:
            self.sinks.close(failed)
        if self.profiler:
            self.profiler.stop()

    def start_profiler(self, steps, path):
        """Record a trace of `steps` steps, after two, for chrome://tracing or Perfetto."""
        path.unlink(missing_ok=True)
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1), record_shapes=True,
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))
        self.profiler.start()


def progress_bar(iterable=None, **kwargs):
    """A tqdm bar on rank 0, shown on a terminal only (disable=None) and removed at its end."""
    return tqdm(iterable, leave=False, disable=None if is_rank_zero() else True, **kwargs)


def log(text):
    """Print a line on rank 0, above the progress bar."""
    if is_rank_zero():
        tqdm.write(text)


def describe_environment(device):
    """Versions, device and commit, for the log of a run: {name: plain value}."""
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "numpy", "pillow")}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = ["git", "-C", root, "describe", "--always", "--dirty=, modified", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a copy without a repository
        commit = None
    return dict(commit=commit, python=platform.python_version(), torch=torch.__version__, **versions,
                platform=platform.platform(), device=name, world_size=get_world_size(),
                time=datetime.datetime.now().isoformat("T", "seconds"))
