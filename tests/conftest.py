import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow: many kills, fuzzing, browser")
    parser.addoption("--kills", type=int, help="how often the killed run is killed (default: 3, with --slow 12)")
    parser.addoption("--reference", help="checkout of facebookresearch/dino, for tests beside it (default: none)")
    parser.addoption("--peers", action="append", default=[], metavar="NAME=PYTHON",
                     help="as --env of benchmarks.peers, for tests beside other libraries; may be repeated")
    parser.addoption("--images", help="folder of real images for tests of crops and copies (default: generated)")


def pytest_configure(config):
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: tiny models are faster so
    torch.set_num_threads(1)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup and some job runners ignore it, and tests send it
    config.addinivalue_line("markers", "slow: run with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="session")
def golden():
    """Numbers computed with the reference implementation: golden("head") -> tensors, golden("knn.json") -> values."""
    def load(name):
        if name.endswith(".json"):
            return json.loads((ROOT / "tests" / "golden" / name).read_text())
        return load_file(ROOT / "tests" / "golden" / f"{name}.safetensors")
    return load


@pytest.fixture(scope="session")
def image():
    """The images that the golden values were computed on: image(b, h, w, phase) -> [b, 3, h, w]."""
    def wave(b, h, w, phase=0.0):
        i, j = torch.arange(h, dtype=torch.float64).view(-1, 1), torch.arange(w, dtype=torch.float64).view(1, -1)
        bb, cc = torch.arange(b).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
        return torch.sin(0.05 * i + 0.07 * j + 0.9 * bb + 0.4 * cc + phase).float()
    assert math.isclose(wave(1, 2, 2)[0, 0, 1, 1], math.sin(0.12), rel_tol=1e-6)
    return wave


@pytest.fixture
def scene():
    """A 97 x 61 RGB image with structure at all scales, as PIL image."""
    from PIL import Image
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 6, 9, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(61, 97), mode="bicubic")[0]
    x = x + 0.1 * torch.randn(3, 61, 97, generator=generator)
    pixels = (x.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (97, 61), pixels.numpy().tobytes())


@pytest.fixture
def model(tmp_path):
    """A small backbone with random weights, and its model file."""
    from common.weights import save_model
    from vit import VisionTransformer
    torch.manual_seed(3)
    network = VisionTransformer(**TINY).eval()
    path = tmp_path / "runs" / "one" / "teacher.safetensors"
    path.parent.mkdir(parents=True)
    save_model(path, {f"backbone.{k}": v for k, v in network.state_dict().items()}, dict(backbone=TINY))
    return network, path


@pytest.fixture
def small_shapes(monkeypatch):
    """The built-in shapes, 300 for training and 60 held out."""
    from data.shapes import Shapes
    init = Shapes.__init__
    monkeypatch.setattr(Shapes, "__init__",
                        lambda self, part, length, size: init(self, part, 300 if part == "train" else 60, size))


@pytest.fixture
def restore_threads():
    """Restore the number of torch's threads after a test that changes it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def check_links():
    """check_links(text, folder): [target] of the links of a page to files; all of them and their anchors must exist."""
    def check_links(text, folder):
        links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", text)
        for target, anchor in links:
            file = (folder / target).resolve()
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
        return [target for target, _ in links]
    return check_links


@pytest.fixture
def exit_message(capsys):
    """exit_message(main, *argv): the one line with which a command ends in exit status 2."""
    from common.checkpoint import CheckpointError
    from common.cli import run_command
    from data.datasets import DataError

    def exit_message(main, *argv):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda args: main(*argv), lambda: None, DataError, CheckpointError)
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1
        return error[0]
    return exit_message


@pytest.fixture
def run_torchrun():
    """run_torchrun(count, script): run a script in `count` processes, from the root; all must exit with status 0.

    As at the end of a command, the process group is destroyed: without that its threads sometimes abort the process.
    """
    end = "\nimport torch.distributed as dist\nif dist.is_initialized(): dist.destroy_process_group()\n"

    def run_torchrun(count, script):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                   "--no-python", sys.executable, "-c", script + end]
        result = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return run_torchrun
