"""A run that can be killed: its state is saved whole, and taken up as if nothing had happened.

    save_state("checkpoint.pth", keep=2, student=..., optimizer=..., progress=..., flags=...)
    found = resume("checkpoint.pth", ...)       # the newest whole state is in place again; None where there is none

A kill or a full disk leaves the old file or the new one, never half of one. Nothing is unpickled but tensors and
plain values, and checksums are checked, which torch.load does not. This file needs torch and NumPy.
"""

import argparse
import contextlib
import errno
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it, what is wrong and what would be right."""


class RunMismatchError(CheckpointError):
    """What a folder holds was made by a run that these flags do not continue."""


# ---- files that are always whole ----

def save_checkpoint(path, keep=1, **state):
    """Write a run's state to `path`, and keep the ones that were there before as PATH.1 to PATH.(keep - 1).

    Raises:
        FloatingPointError: a tensor is not finite; nothing is written.
        OSError: the disk is full or the folder not writable; what was there is untouched.
    """
    for name, tensor in iter_tensors(state):
        if find_fault(tensor):
            raise FloatingPointError(f"{path}: not written, {name} {find_fault(tensor)}")
    atomic_write(path, lambda temporary: torch.save(state, temporary), keep)
    for older in list_checkpoints(path)[keep:]:  # of a time when more were kept
        older.unlink()


def list_checkpoints(path):
    """`path` and the older ones that `save_state` kept beside it: those that exist, newest first."""
    path = Path(path)
    older = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdecimal()]
    return [path] * path.exists() + sorted(older, key=lambda p: int(p.suffix[1:]))


def load_checkpoint(path):
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or holds anything but tensors and plain values.
        OSError: it cannot be read at present (permissions, a disk or network that fails); it may be sound.
    """
    try:
        verify_checksums(path)
        with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of odd protocols, which fail or not all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # unpickling raises nearly anything on damaged files
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE,
                                             errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT):
            raise
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({first_line(error)})") from None


def allowed_globals():
    """What the reference's checkpoints hold besides: flags as a Namespace, learning rates as numbers of NumPy's."""
    scalar, (dtype, _) = np.float64(0).__reduce__()
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # before NumPy 2, and since
    return [argparse.Namespace, np.dtype, type(dtype), *names]


def verify_checksums(path):
    """Read an archive of torch.save once through: torch itself would take flipped bits for weights."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it claims to hold more than it does")
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} does not match its checksum")


def atomic_write(path, write, keep=1):
    """Call `write` on a temporary file beside `path`, flush it to the disk and rename it to `path`.

    Whenever the process is killed there is a whole file: the new one, or the one before at `path` or PATH.1.
    """
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        names = [f"{path}", *(f"{path}.{age}" for age in range(1, keep))]
        for newer, older in reversed(list(zip(names, names[1:]))):
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        if "DataLoader worker" in str(error):  # its death is raised wherever the program happens to be
            raise
        raise OSError(f"{path}: cannot be written, what was there is untouched ({first_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    if os.name == "posix":
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)  # the renaming too
        os.close(folder)


def write_json(path, content):
    """Write plain values so that there is always a whole file, see `write_whole`."""
    atomic_write(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1)))


def check_writable(folder):
    """Raise OSError if no file can be made in a folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder}: nothing can be written there ({error.strerror})") from None


def iter_tensors(state, name="state"):
    """(name, tensor) of all that a nest of dicts, lists and tuples holds."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from iter_tensors(value, f"{name}[{key!r}]")


def find_fault(tensor):
    """What keeps a tensor from being part of a network, as the rest of a sentence; None for a sound one."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return "is no plain tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "claims more numbers than it holds"
    if not tensor.float().isfinite().all():
        return "holds NaN or infinity"
    return None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- going on ----

def resume_run(path, fixed, flags, objects, progress, is_sound=lambda progress: True, say=print):
    """Load the newest whole state of a run into `objects` and `progress`; returns its path, None if there is none.

    Args:
        path: where `save_state(path, fixed=..., flags=..., progress=..., **state dicts)` has saved.
        fixed: {name: value} of what must be as it was.
        flags: {name: value} of what may have changed; what did is said.
        objects: {name: what has a state_dict}; "optimizer" and "scaler" among them.
        progress: dict of plain values, "step" and "log_bytes" among them, updated in place; those saved must be of
            the same types.
        is_sound: whether a saved progress is one, asked when its types are right.

    Raises:
        AnotherRun: what must be as it was is not.
        CheckpointError: there are saved states, and none is whole.
    """
    reason = None
    for p in list_checkpoints(path):
        if reason:
            say(f"WARNING: {reason}; trying the one before")
        try:
            state = load_checkpoint(p)
            for name, value in state["fixed"].items():
                if name in fixed and fixed[name] != value:
                    raise RunMismatchError(f"{p} was trained with {name} {value}, not {fixed[name]}: choose another "
                                     f"--output_dir for another run")
            if not state["fixed"].keys() <= fixed.keys():  # what is new since then, restore finds out
                raise RunMismatchError(f"{p} is of another kind of run: choose another --output_dir")
            changed = [f"--{name} {state['flags'][name]} -> {value}" for name, value in flags.items()
                       if state["flags"].get(name, value) != value]
            restore_state(state, objects, progress, is_sound)
        except (RunMismatchError, OSError):
            raise
        except CheckpointError as error:
            reason = str(error)
        except Exception as error:  # a whole file may still hold anything
            reason = f"{p}: not a run's state ({first_line(error)[:200]})"
        else:
            for change in changed:
                say(f"changed since {p} was saved: {change}")
            return p
    if reason:
        raise CheckpointError(f"{reason}; no whole one is beside it: --resume none --overwrite starts anew")
    return None


def restore_state(state, objects, progress, is_sound):
    """Put a state into the objects it was saved from; raises nearly anything if it is not what they can take."""
    for name, tensor in iter_tensors(state):
        if find_fault(tensor):
            raise ValueError(f"{name} {find_fault(tensor)}")
    saved, optimizer, scaler = state["progress"], objects["optimizer"], objects["scaler"]
    if types_of(saved) != types_of(progress) or min(saved["step"], saved["log_bytes"]) < 0 or saved["step"] >= 2**63 \
            or not is_sound(saved):
        raise ValueError("its progress is not a run's")
    for name, thing in objects.items():
        if thing is not optimizer and thing is not scaler:
            thing.load_state_dict(state[name])
    if scaler.is_enabled() and state["scaler"]:  # it is empty but under fp16
        if types_of(state["scaler"]) != types_of(scaler.state_dict()):
            raise ValueError("its scaler is not one")
        if 1 <= state["scaler"]["scale"] < 2.0**127:  # else of a run that had given up: begin with a new one
            scaler.load_state_dict(state["scaler"])
    ours, theirs = optimizer.state_dict(), state["optimizer"]["state"]
    if shapes_of(theirs) != shapes_of(ours["state"]):
        raise ValueError("its optimizer does not fit the network")
    optimizer.load_state_dict(ours | {"state": theirs})  # the groups stay ours: nothing in them is learnt
    progress.update(saved)


def shapes_of(state):
    return {name: tensor.shape for name, tensor in iter_tensors(state)}


def types_of(values):
    return {name: type(value) for name, value in values.items()}


def acquire_lock(path):
    """Open a file that no other living process has claimed; the claim ends when the file is closed.

    Raises:
        AnotherRun: one has. Two runs in one folder would overwrite each other.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by workers that outlive a kill
    except (BlockingIOError, PermissionError):
        raise RunMismatchError(f"{path.parent}: another process is training in this folder; name another "
                         f"--output_dir") from None
    except (ImportError, OSError):  # no locks on this system, or on this kind of disk
        pass
    return file


MODELS = {"pretraining": ("teacher.safetensors", "teacher_best.safetensors", "student.safetensors"),
          "classification": ("classifier.safetensors",)}  # kind of run -> its model files


def prepare_output_dir(output, found, overwrite, kind="pretraining"):
    """Make a folder ready for a run: `found`, what it goes on from, becomes checkpoint.pth; without, all is deleted.

    Returns the claim on the folder, to be held while the run goes on.

    Raises:
        AnotherRun: a new run would delete something learnt, and `overwrite` does not allow it; it would delete a run
            of another kind, which nothing allows; or see `claim`.
    """
    for other, names in MODELS.items():
        for name in names:
            if other != kind and (output / name).exists():
                raise RunMismatchError(f"{output} holds {name}, of another kind of run ({other}): name another --output_dir")
    learnt = sorted(path for pattern in ("checkpoint*.pth*", *MODELS[kind]) for path in output.glob(pattern)
                    if path.suffix != ".tmp")
    if learnt and not found and not overwrite:
        raise RunMismatchError(f"{output} holds {learnt[0].name} of an earlier run: --resume none --overwrite deletes that "
                         f"run, another --output_dir keeps it")
    output.mkdir(parents=True, exist_ok=True)
    held = acquire_lock(output / ".lock")
    newest = output / "checkpoint.pth"
    for path in output.glob("*.tmp"):  # of a save that was killed
        path.unlink()
    if not found:
        for path in (*learnt, output / "log.jsonl", output / "nonfinite.json"):
            path.unlink(missing_ok=True)
    elif found != newest:
        with contextlib.suppress(FileNotFoundError):
            os.replace(newest, f"{newest}.damaged")
        os.replace(found, newest)
    return held


def was_restarted():
    """Whether torchrun or Slurm started this process again after an interruption."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in counts)
