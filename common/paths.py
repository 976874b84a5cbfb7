"""Paths of model files, and of the outputs that are named after them.

    ckpt = find_model(args.ckpt)                    # a file, or the newest run's teacher
    file = weights_file(ckpt, log=print)            # the file itself, downloaded if `ckpt` is a name
    path = output_file(origin, args, "npz")         # teacher.npz, beside the model or in --output_dir
"""

import itertools
import json
import os
from pathlib import Path

from common.checkpoint import CheckpointError
from common.files import create_folder, read_json
from common.hub import WEIGHT_FILES, download_weights, is_remote


def find_model(ckpt=None):
    """Path of --ckpt: a file, a folder of transformers, the teacher in the folder of a run; None for the newest run.

    A name of `is_remote` stays, so that outputs are named after it, in the current folder.
    """
    ckpt = (ckpt or find_newest_model()).rstrip("/") or "/"
    return weights_file(ckpt) if os.path.exists(os.path.join(ckpt, "teacher.safetensors")) else ckpt


def find_newest_model(root="runs"):
    """The teacher of the run that was written last: runs/*/teacher.safetensors, but no hidden folder of a dry run."""
    found = sorted(Path(root).glob("[!.]*/teacher.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no trained model below {root}/: run train.py @recipes/demo.txt or name one with --ckpt")
    return str(found[-1])


def weights_file(path, log=lambda text: None):
    """The model file itself, that in a folder of transformers, the teacher in the folder of a run, or a download.

    Args:
        log: called with the path and the SHA-256 of a download.
    """
    if is_remote(path):
        return download_weights(path, log)
    if not os.path.isdir(path):
        return str(path)
    for name in WEIGHT_FILES:
        if os.path.exists(file := os.path.join(path, name)):
            return file
    raise CheckpointError(f"{path}: holds no teacher.safetensors or model.safetensors, name a model file")


def output_file(origin, args, ending):
    """Path of an output file about a model, named after it; in --output_dir or beside the model file.

    Raises:
        OSError: the folder is not writable; checked before the computation.
    """
    path = sibling_path(origin["ckpt"], args.checkpoint_key, ending, args.untrained)
    folder = Path(args.output_dir or path.parent)
    create_folder(folder)
    return folder / path.name


def result_file(origin, args, ending):
    """Path of the JSON file of a result, see `output_file`; numbered where that file has one of other data or flags.

    Args:
        origin: {name: value} of model, data and flags, all of which the file will hold.
    """
    expected = {name: value for name, value in json.loads(json.dumps(origin)).items() if name not in ("ckpt", "sha256")}
    for number in itertools.count(1):
        path = output_file(origin, args, ending + f".{number}" * (number > 1) + ".json")
        if not path.exists() or expected.items() <= read_json(path).items():
            return path


def output_folder(origin, args, ending):
    """Path of an output folder about a model: --output_dir, or beside the model file, named after it."""
    return Path(args.output_dir or sibling_path(origin["ckpt"], args.checkpoint_key, ending, args.untrained))


def sibling_path(ckpt, key, ending, untrained=False):
    """Path beside a model file: its stem, the network unless it is the teacher, ".untrained", and an ending.

    For a name of `is_remote`, its last part, in the current folder.
    """
    file = Path(ckpt) if Path(ckpt).name not in ("", "..") else Path(ckpt).resolve()  # a folder of transformers
    folder, stem = (Path(), str(ckpt).rpartition("/")[2]) if is_remote(ckpt) else (file.parent, file.stem)
    network = f".{key}" * (key not in (None, "teacher", stem))
    return folder / f"{stem}{network}{'.untrained' * untrained}.{ending}"
