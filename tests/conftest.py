import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Numbers computed with the reference implementation: golden("head") -> tensors, golden("knn.json") -> values."""
    def load(name):
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        return load_file(GOLDEN / f"{name}.safetensors")
    return load


@pytest.fixture(scope="session")
def image():
    """The pictures that the golden values were computed on: image(b, h, w, phase) -> [b, 3, h, w]."""
    def wave(b, h, w, phase=0.0):
        i, j = torch.arange(h, dtype=torch.float64).view(-1, 1), torch.arange(w, dtype=torch.float64).view(1, -1)
        bb, cc = torch.arange(b).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
        return torch.sin(0.05 * i + 0.07 * j + 0.9 * bb + 0.4 * cc + phase).float()
    assert math.isclose(wave(1, 2, 2)[0, 0, 1, 1], math.sin(0.12), rel_tol=1e-6)
    return wave


@pytest.fixture
def scene():
    """A 97 x 61 RGB picture with structure at all scales, as PIL image."""
    from PIL import Image
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 6, 9, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(61, 97), mode="bicubic")[0]
    x = x + 0.1 * torch.randn(3, 61, 97, generator=generator)
    pixels = (x.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (97, 61), pixels.numpy().tobytes())


@pytest.fixture
def model(tmp_path):
    """A small backbone with random weights, and its file."""
    from common.weights import save_model
    from vit import VisionTransformer
    torch.manual_seed(3)
    vit = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    network = VisionTransformer(**vit).eval()
    path = tmp_path / "runs" / "one" / "teacher.safetensors"
    path.parent.mkdir(parents=True)
    save_model(path, {f"backbone.{k}": v for k, v in network.state_dict().items()}, dict(backbone=vit))
    return network, path


@pytest.fixture
def stopped(capsys):
    """stopped(run, *argv): the one line with which a command ends."""
    from common import cli
    from common.checkpoint import CheckpointError
    from data.datasets import DataError

    def stopped(run, *argv):
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda args: run(*argv), lambda: None, DataError, CheckpointError)
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1
        return error[0]
    return stopped


@pytest.fixture
def in_processes():
    """in_processes(count, script): run it under torchrun, beside the project's files; each process must end well."""
    def in_processes(count, script):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                   "--no-python", sys.executable, "-c", script]
        result = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
                                timeout=300, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return in_processes


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=12, help="how often the killed run is killed (default: 12)")
    parser.addoption("--reference", help="checkout of facebookresearch/dino, for tests beside it (default: none)")
    parser.addoption("--pictures", help="folder of real pictures for tests of views and copies (default: generated)")


@pytest.fixture
def shapes_300(monkeypatch):
    """The built-in pictures, 300 and 60 of them."""
    from data import datasets as data
    full = data.Shapes.__init__
    monkeypatch.setattr(data.Shapes, "__init__",
                        lambda self, part, length, size: full(self, part, 300 if part == "train" else 60, size))
