"""Measurements and commands on the GPU or, on a machine without one, on the CUDA stub (stub.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.shapes import Shapes

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """Command that runs a script on the device."""
    if HAS_GPU:
        return [sys.executable]
    present = {"g++": shutil.which("g++"), "nm": shutil.which("nm"), "torch for CUDA": torch.backends.cuda.is_built()}
    for name in (name for name, is_there in present.items() if not is_there):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is missing")
    command = [sys.executable, HERE / "stub.py", tmp_path_factory.mktemp("stub")]
    run(command)
    return command


@pytest.fixture
def needs_stub():
    if HAS_GPU:
        pytest.skip("launches, copies and collectives are counted on the stub only")


@pytest.fixture(scope="session")
def measure(interpreter):
    """measure(name, **arguments): what a function of measure.py returns in a process of its own."""
    def measure(name, **arguments):
        output = run([*interpreter, HERE / "measure.py", name, json.dumps(arguments)], PYTHONPATH=str(ROOT))
        return json.loads(output.splitlines()[-1])
    return measure


@pytest.fixture(scope="session")
def run_command(interpreter):
    """run_command(script, *argv, processes=1): output of a script of the root, of several processes by torchrun."""
    def run_command(script, *argv, processes=1):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    "--no-python"] if processes > 1 else []
        # without caching the stub's memory is new, and zero, for each tensor: not what another one left
        variables = {} if HAS_GPU else dict(STUB_GPUS=str(processes), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return run([*torchrun, *interpreter, script, *argv, "--device", "cuda"], **variables)
    return run_command


def run(command, **variables):
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | variables, timeout=600, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folder with the layout of ImageNet: 48 images for training and 16 held out, of 8 classes."""
    folder = tmp_path_factory.mktemp("images")
    for part, length in (("train", 48), ("val", 16)):
        shapes = Shapes("train", length, 64)
        for i in range(length):
            image, label = shapes[i]
            path = folder / part / shapes.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder
