"""Commands from start to end on CUDA, on a small ViT and few images."""

import json

import pytest
import torch

pytestmark = pytest.mark.slow
# the shapes of measure.py, whose compiled blocks are used again
FLAGS = "--arch vit_small --embed_dim 64 --depth 2 --num_heads 1 --out_dim 1024 --global_crops_size 64 " \
    "--local_crops_size 32 --precision bf16 --batch_size_per_gpu 4 --warmup_epochs 0 --knn_every 1 --log_every 1 " \
    "--num_workers 1".split()


def read_log(folder):
    """Steps with a loss, and evaluations, in the log of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line], [line["eval"] for line in lines if "eval" in line]


@pytest.fixture(scope="module")
def trained(run_command, images, tmp_path_factory):
    """Folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    run_command("train.py", *FLAGS, "--data_path", images, "--output_dir", folder, "--epochs", 1)
    return folder


def test_training_and_resuming(run_command, images, trained):
    assert read_log(trained) == (list(range(12)), ["raw pixels", "untrained backbone", "epoch 0"])
    output = run_command("train.py", *FLAGS, "--data_path", images, "--output_dir", trained, "--epochs", 2)
    assert "resuming at step 12 of 24" in output
    assert read_log(trained) == (list(range(24)), ["raw pixels", "untrained backbone", "epoch 0", "epoch 1"])


@pytest.mark.parametrize("command, result", [
    ("evaluate.py knn", "teacher.knn.*.json"), ("evaluate.py linear --quick --epochs 2", "result.json"),
    ("segment.py masks --num_images 4", "teacher.masks.*.json")])
def test_evaluation(run_command, images, trained, command, result):
    script, *argv = command.split()
    data = ["--data_path", images] if script == "evaluate.py" else []
    run_command(script, *argv, *data, "--ckpt", trained / "teacher.safetensors", "--num_workers", 0)
    assert json.loads(next(trained.rglob(result)).read_text())


def test_training_by_two_processes(run_command, images, tmp_path):
    if torch.cuda.device_count() == 1:
        pytest.skip("needs two GPUs")
    flags = ["--data_path", images, "--output_dir", tmp_path, "--epochs", 1, "--compile", "false"]
    run_command("train.py", *FLAGS, *flags, processes=2)
    assert read_log(tmp_path) == (list(range(6)), ["raw pixels", "untrained backbone", "epoch 0"])
