import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import peer_worker, peers, speed
from data.folders import ImageFolder
from data.loaders import MultiCropDataset, build_multicrop

FLAGS = ("--arch vit_tiny --embed_dim 64 --depth 2 --num_heads 2 --batch_size_per_gpu 2 --out_dim 300 --hidden_dim 32 "
         "--global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --device cpu --precision fp32 --runs 2 "
         "--steps 2 --drop_path_rate 0").split()


@pytest.fixture
def args():
    return peers.parse_args([*FLAGS, "--reference", "none"])


def test_flags_reach_a_worker_unchanged(args):
    """Tuples too, which are lists in JSON."""
    assert vars(peer_worker.read_settings(json.dumps(vars(args)))) == vars(args)


def test_images_are_copies_or_shapes(tmp_path, scene, monkeypatch):
    monkeypatch.setattr(peers, "PHOTO_SIDE", 24)
    peers.write_images(None, tmp_path / "shapes", 3)
    files = sorted((tmp_path / "shapes").rglob("*.*"))
    assert [(image.format, image.size) for image in map(Image.open, files)] == [("JPEG", (24, 24))] * 3
    for i in range(6):
        scene.crop((i, 0, 60, 60)).save(tmp_path / f"{i}.JPEG")
    peers.write_images(str(tmp_path), tmp_path / "copies", 2)  # the shapes are among the nine images, at the end
    assert [path.read_bytes() for path in sorted((tmp_path / "copies").rglob("*.jpeg"))] == \
        [(tmp_path / f"{i}.JPEG").read_bytes() for i in (0, 4)]


def test_turns_of_a_worker(tmp_path, args, capsys):
    """The protocol, and the first loss: that of the same step in this process."""
    args.threads = torch.get_num_threads()
    peers.write_images(None, tmp_path / "images", 8 * args.batch_size_per_gpu)
    settings = vars(args) | dict(folder=str(tmp_path / "images"))
    worker = peers.Worker("ours", sys.executable, settings, tmp_path)
    state = Path(f"/proc/{worker.process.pid}/stat")
    try:
        for _ in range(600 * state.exists()):
            if state.read_text().rpartition(")")[2].split()[0] == "T":  # stopped between turns
                break
            time.sleep(0.1)
        else:
            assert not state.exists()
        args.warmup, args.runs = 1, 1
        answers = peers.time_workers({"ours": worker, "again": worker}, args)
    finally:
        worker.close()
    assert worker.process.returncode < 0
    peers.print_results(args, {"ours": worker.info, "again": worker.info}, answers)
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [(row["task"], row["row"]) for row in rows] == [
        (task, name) for task in ("crops", "step", "both") for name in ("ours", "again")]
    for row in rows:
        assert row["images_per_sec"] == pytest.approx(2000 / row["ms"]) and row["torch"] == torch.__version__
        assert row["precision"] == "fp32" and row["peak_mib"] > 50 and f"\n{row['row']}" in captured.err
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    for step, both in zip(answers["train"]["ours"], answers["train"]["again"]):
        assert step["both"] > step["step"] > 0 and both["both"] > both["step"] > 0

    code = speed.Ours(args)
    images = MultiCropDataset(ImageFolder(settings["folder"]), build_multicrop(args), args.seed)
    crops = [torch.stack(views) for views in zip(*(images[0, i][0] for i in range(2)))]
    expected = code.step(crops, **code.build_training())
    assert rows[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_process_that_ends(tmp_path):
    settings = dict(threads=1, device="cpu")
    with pytest.raises(peers.PeerError, match="lightly-train: its process ended with status 1: .*NotFoundError.*; "
                                              "install it with: python -m venv DIR; DIR/bin/pip install lightly-train"):
        peers.Worker("lightly-train", sys.executable, settings, tmp_path)


@pytest.mark.parametrize("argv, message", [
    ([], "--env or --reference is missing; for lightly, install it with: python -m venv DIR; DIR/bin/pip install"),
    (["--env", "torch=python"], "'torch=python' is not NAME=PYTHON with NAME one of lightly, lightly-train,"),
    (["--env", "lightly"], "'' is no python for lightly; install it with: python -m venv DIR; DIR/bin/pip install"),
    (["--env", "lightly=/none/python"], "'/none/python' is no python for lightly; install it with"),
    (["--reference", "x", "--arch", "resnet18"], "--arch resnet18 is not one of vit.py's"),
    (["--reference", "x", "--steps", "0"], "--steps: '0' is not an integer above 0")])
def test_invalid_flags(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        peers.parse_args(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_first_losses_of_peers(request, capsys):
    """With --peers or --reference only, because other libraries are not in the environment of the tests."""
    options = [f"--{name}={value}" for name in ("reference",) if (value := request.config.getoption(name))]
    environments = request.config.getoption("--peers")
    if not options and not environments:
        pytest.skip("needs --peers NAME=PYTHON, or --reference DIR, a checkout of facebookresearch/dino")
    peers.main(peers.parse_args([*FLAGS, *options, *(["--env", *environments] if environments else [])]))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["row"] for row in rows} >= {"ours", *(name.partition("=")[0] for name in environments)}
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(300), abs=0.8) and row["ms"] > 0 and row["version"]
