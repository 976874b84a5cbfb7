"""Checkpoints: checked loads, and runs that resume exactly where they were interrupted.

    run = Run(Path("runs/dino"), "pretraining", objects, fixed, flags, progress, logger)
    first_step = run.start(args, total_steps)           # resumes from the newest intact checkpoint
    for step in range(first_step, total_steps):
        ...
        run.save(step + 1)

A kill or a full disk leaves the old file or the new one. Files are loaded with weights_only=True, and their checksums
are verified, which torch.load does not do.
"""

import argparse
import contextlib
import errno
import os
import pickle
import re
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.distributed import check_same_on_all_ranks, is_rank_zero
from common.files import atomic_write, check_file, first_line, read_text, remove_temporaries

RENAMED_KEYS = {  # keys of checkpoints and model files of version 0 -> today's
    "number of pictures": "num_images", "global batch": "global_batch_size", "unreadable": "corrupt_images",
    "pictures": "dataset_sizes", "how": "hparams", "vit": "backbone"}
NEWER_FLAGS = {  # and what runs that began before them have
    "conv_stem": False, "koleo_loss_weight": 0.0, "schedule_epochs": 0}
MODEL_FILES = {"pretraining": ("teacher.safetensors", "teacher_best.safetensors", "student.safetensors"),
               "classification": ("classifier.safetensors",)}  # kind of run -> what it leaves behind


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it, what is wrong and the fix."""


class RunMismatchError(CheckpointError):
    """The output folder holds a run that these flags do not continue."""


# ---- files ----

def save_checkpoint(path, keep=1, **state):
    """Write a nest of tensors and plain values atomically, see `atomic_write`.

    Raises:
        FloatingPointError: a tensor is not finite; nothing is written.
    """
    for name, tensor in iter_tensors(state):
        if find_fault(tensor):
            raise FloatingPointError(f"{path}: not written, {name} {find_fault(tensor)}")
    atomic_write(path, lambda temporary: torch.save(state, temporary), keep)
    for older in list_checkpoints(path)[keep:]:
        older.unlink()


def list_checkpoints(path):
    """`path` and the previous checkpoints PATH.1, PATH.2 ... that exist, newest first."""
    path = Path(path)
    older = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdecimal()]
    return [path] * path.exists() + sorted(older, key=lambda p: int(p.suffix[1:]))


def load_checkpoint(path):
    """Read a file of torch.save onto the CPU, with today's names for the keys of older versions.

    Raises:
        CheckpointError: the file is missing, corrupt, or holds anything but tensors and plain values.
        OSError: it cannot be read at present (permissions, a disk or network that fails).
    """
    try:
        verify_checksums(check_file(path))
        with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # unpickling raises nearly anything on corrupt files
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the file itself may be intact
            raise
        reason = "no tensors and plain values" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(f"{path}: not a checkpoint, or corrupt ({reason})") from None
    for section in ("fixed", "progress"):
        if isinstance(state, dict) and isinstance(state.get(section), dict):
            state[section] = rename_old_keys(state[section])
    return state


def rename_old_keys(values):
    """{name: value} with the keys of older versions -> the same with today's."""
    return {RENAMED_KEYS.get(name, name): value for name, value in values.items()}


class NumberType:
    """Stand-in for numpy.dtype while unpickling: numpy's own follows pointers that a file may hold."""

    def __init__(self, code, *flags):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        self.order = state[1]

    def read(self, content):
        """Bytes, or Python 2's text of them, -> list of numbers."""
        if not re.fullmatch("[<>|=][biuf][1248]", name := f"{self.order}{self.code}"):
            raise pickle.UnpicklingError(f"numpy.dtype {name} is not allowed")
        return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, name).tolist()


def read_number(number_type, content):
    """Stand-in for the constructor of numpy scalars."""
    return number_type.read(content)[0]


def allowed_globals():
    """What checkpoints of the reference implementation hold besides: argparse.Namespace and NumPy scalars."""
    names = [(read_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2
    return [argparse.Namespace, (NumberType, "numpy.dtype"), *names]


def verify_checksums(path):
    """Read a zip archive of torch.save once: torch itself would take flipped bits for weights."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("its entries are larger than the file")
            corrupt = archive.testzip()
            if corrupt:
                raise ValueError(f"{corrupt} does not match its checksum")


def iter_tensors(state, name="state"):
    """Yield (name, tensor) for all tensors in a nest of dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from iter_tensors(value, f"{name}[{key!r}]")


def find_fault(tensor):
    """Why a tensor cannot be a weight, as the rest of a sentence; None if it can."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return "is not a dense tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "has a shape larger than its storage"
    if not tensor.float().isfinite().all():
        return "holds NaN or infinity"
    return None


# ---- runs ----

class Run:
    """A training run in its output folder: locks the folder, resumes from checkpoint.pth and saves it.

    Args:
        output: Path of the folder.
        kind: key of MODEL_FILES.
        objects: {name: object with a state_dict}; "optimizer" and "scaler" among them.
        fixed: {name: value} that a resumed run must share.
        flags: {name: value} that may change; changes are printed.
        progress: plain values to save and restore besides the step.
        logger: Logger of the run.
        keep: checkpoints to keep, the newest included.
        extra: more to save, as {name: plain values}.
    """

    def __init__(self, output, kind, objects, fixed, flags, progress, logger, keep=1, extra=None):
        self.path, self.kind, self.objects, self.logger = output / "checkpoint.pth", kind, objects, logger
        self.fixed, self.flags, self.keep, self.extra = fixed, flags, keep, extra or {}
        self.progress, self.saved_at = progress | dict(step=0, corrupt_images=[], log_bytes=0), time.monotonic()

    def start(self, args, total_steps):
        """Resume, or make the folder ready for a new run; returns the step to start at.

        Args:
            args: resume ("auto" or "none") and overwrite. A restarted job resumes anyway.

        Raises:
            RunMismatchError: see `load_newest` and `prepare_output_dir`.
            CheckpointError: there are checkpoints, and none is intact.
        """
        found = self.load_newest() if args.resume == "auto" or was_restarted(self.path.parent) else None
        check_same_on_all_ranks("a run at step", self.progress["step"])
        if is_rank_zero():
            self.lock = prepare_output_dir(self.path.parent, self.kind, found, args.overwrite)
        self.logger.resume(self.progress["log_bytes"], self.progress["corrupt_images"])
        step = self.progress["step"]
        if found:
            self.logger.print(f"resuming at step {step} of {total_steps} from {found}" if step < total_steps else
                              f"{self.path.parent} holds a complete run, choose another --output_dir to train anew")
        return step

    def is_save_due(self, minutes):
        """Whether more than so many minutes have passed since the last save; 0 for never."""
        return 0 < 60 * minutes < time.monotonic() - self.saved_at

    def save(self, step):
        """Save the state before `step`, on rank 0; all ranks must call this."""
        self.saved_at = time.monotonic()
        self.logger.gather_corrupt()
        if is_rank_zero():
            self.progress.update(step=step, corrupt_images=sorted(self.logger.corrupt_images),
                                 log_bytes=self.logger.path.stat().st_size if self.logger.path.exists() else 0)
            states = {name: thing.state_dict() for name, thing in self.objects.items()}
            save_checkpoint(self.path, self.keep, **states, progress=self.progress, fixed=self.fixed, flags=self.flags,
                            **self.extra)

    def print_stopped(self, stop, step, total_steps, args):
        """The last line of a run that a signal has stopped, by StopRequested."""
        self.logger.close()
        self.logger.print(f"stopped by {stop} after step {step} of {total_steps}, saved in {self.path}: the "
                          f"same command resumes" + ", without --resume none --overwrite" * (args.resume == "none"))

    def load_newest(self):
        """Restore the newest intact checkpoint; returns its path, None if there is no checkpoint."""
        problem = None
        for path in list_checkpoints(self.path):
            if problem:
                self.logger.print(f"WARNING: {problem}; trying the previous one")
            try:
                self.restore(load_checkpoint(path), path)
                return path
            except (RunMismatchError, OSError):
                raise
            except CheckpointError as error:
                problem = str(error)
            except Exception as error:  # an intact file may still hold anything
                problem = f"{path}: not the checkpoint of a run ({first_line(error)[:200]})"
        if problem:
            raise CheckpointError(f"{problem}; no intact one is left, --resume none --overwrite starts anew")
        return None

    def restore(self, state, path):
        """Load a checkpoint into objects and progress; raises nearly anything if it does not fit."""
        if "shuffle" in self.fixed:  # a run that began before this flag keeps the order of torch.randperm
            order = state["fixed"].setdefault("shuffle", "randperm")
            if (order, self.fixed["shuffle"]) == ("randperm", "full"):
                self.fixed["shuffle"] = order
        if "evaluated" in self.progress:  # supervised training that began before this was saved evaluates once more
            state["progress"].setdefault("evaluated", 0)
        newer = {name: value for name, value in NEWER_FLAGS.items() if name in self.fixed}
        for name, value in (newer | state["fixed"]).items():
            if name not in self.fixed:
                raise RunMismatchError(f"{path} is from another kind of run: choose another --output_dir")
            if self.fixed[name] != value:
                raise RunMismatchError(f"{path} was trained with {name} {str(value)[:200]}, not "
                                       f"{str(self.fixed[name])[:200]}: {self.suggest_fix(name, value)}")
        for name, tensor in iter_tensors(state):
            if find_fault(tensor):
                raise ValueError(f"{name} {find_fault(tensor)}")
        for name, value in self.progress.items():
            if type(state["progress"][name]) is not type(value):
                raise ValueError(f"progress {name} is {state['progress'][name]!r}")
        objects = dict(self.objects)
        optimizer, scaler = objects.pop("optimizer"), objects.pop("scaler")
        for name, thing in objects.items():
            thing.load_state_dict(state[name])
        if scaler.is_enabled() and state["scaler"].get("scale", 0) >= 1:  # below 1 an older version had given up
            scaler.load_state_dict(state["scaler"])
        ours, theirs = optimizer.state_dict(), state["optimizer"]["state"]
        shapes, saved_shapes = ([(name, x.shape) for name, x in iter_tensors(x)] for x in (ours["state"], theirs))
        if shapes != saved_shapes:
            raise ValueError("its optimizer does not fit the network")
        optimizer.load_state_dict(ours | {"state": theirs})  # hyperparameters follow the flags and schedules
        flags = NEWER_FLAGS | state["flags"]
        for name, value in self.flags.items():
            if name not in ("output_dir", "resume", "overwrite", "auto") and flags.get(name, value) != value:
                self.logger.print(f"changed since {path} was saved: --{name} {flags[name]} -> {value}")
        self.progress.update(state["progress"])

    def suggest_fix(self, name, saved):
        """What to do where a setting that must stay is not the saved one."""
        if name == "global_batch_size":  # as on another number of GPUs
            images, rest = divmod(self.flags.get("batch_size_per_gpu", 0) * saved, self.fixed[name])
            if images and not rest:
                return f"set --batch_size_per_gpu {images}"
        if name == "sha256":
            return "the model has changed, --resume none --overwrite trains on it anew"
        return "choose another --output_dir"


def acquire_lock(path):
    """Open a file that no other living process has locked; the lock ends when the file is closed.

    Raises:
        RunMismatchError: another process has it. Two runs in one folder would overwrite each other.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers that outlive a kill
    except (BlockingIOError, PermissionError):
        raise RunMismatchError(f"{path.parent}: another process is training in this folder, choose another "
                               f"--output_dir") from None
    except (ImportError, OSError):  # no locks on this system or this kind of disk
        pass
    return file


def prepare_output_dir(output, kind, found, overwrite):
    """Create and lock the folder of a run; returns the lock, to be held while the run lasts.

    Args:
        found: the checkpoint that the run resumes from, which becomes checkpoint.pth. Without one, a previous run in
            the folder is deleted, if `overwrite` allows it.

    Raises:
        RunMismatchError: a new run would delete a previous one without `overwrite`, the folder holds another kind of
            run, or it is locked.
    """
    for other, names in MODEL_FILES.items():
        for name in names:
            if other != kind and (output / name).exists():
                raise RunMismatchError(f"{output} holds {name} of another kind of run ({other}): choose another "
                                       f"--output_dir")
    previous = sorted(path for pattern in ("checkpoint*.pth*", *MODEL_FILES[kind]) for path in output.glob(pattern)
                      if path.suffix != ".tmp")
    others = [path for path in map(output.joinpath, ("log.jsonl", "nonfinite.json", "result.json")) if path.exists()]
    if not (output / ".lock").exists():  # of another program, or of a run of which only these were kept
        previous += others
    if previous and not found and not overwrite:
        raise RunMismatchError(f"{output} holds {previous[0].name} of a previous run: --resume none --overwrite "
                               f"deletes it, another --output_dir keeps it")
    output.mkdir(parents=True, exist_ok=True)
    for name in (".lock", "log.jsonl"):
        if (output / name).exists():
            check_file(output / name)
    lock = acquire_lock(output / ".lock")
    newest = output / "checkpoint.pth"
    for pattern in ("checkpoint*", *MODEL_FILES[kind]):  # left by a save that was killed
        remove_temporaries(output, pattern)
    if not found:
        for path in (*previous, *others):
            path.unlink(missing_ok=True)
        lock.truncate(0)
        lock.write(get_job())  # see was_restarted
        lock.flush()
    elif found != newest:
        with contextlib.suppress(FileNotFoundError):
            os.replace(newest, f"{newest}.corrupt")
        os.replace(found, newest)
    return lock


def was_restarted(output):
    """Whether torchrun or Slurm restarted this process, in the job that began the run in the folder `output`."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    with contextlib.suppress(OSError, ValueError):
        return any(os.environ.get(name, "0") not in ("", "0") for name in counts) and (
            read_text(Path(output, ".lock")) == get_job())
    return False


def get_job():
    """Name of the job of Slurm or torchrun that this process belongs to; a restart keeps it."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""
