import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

import evaluate
from batches import eval_view
from checkpoint import CheckpointError, save_model
from data import DataError, Shapes
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """A folder of labelled pictures, a model trained on it, and where they are."""
    for part, count in (("train", 60), ("val", 23)):
        shapes = Shapes("test", count, 32)
        for i in range(count):
            path = tmp_path / "pictures" / part / f"class{i % 3}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shapes[i][0].save(path)
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = VisionTransformer(**vit).eval()
    path = tmp_path / "runs" / "one" / "teacher.safetensors"
    path.parent.mkdir(parents=True)
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()},
               dict(arch="vit_tiny", vit=vit, data_path=str(tmp_path / "pictures")))
    return tmp_path, path, model


def test_knn_with_no_argument_judges_the_newest_run(run, monkeypatch, capsys):
    folder, path, model = run
    monkeypatch.chdir(folder)
    evaluate.main(evaluate.parse_args(["knn", "--num_workers", "0", "--device", "cpu"]))
    out = capsys.readouterr().out
    result = json.loads(path.with_suffix(".knn.json").read_text())
    assert list(result["knn"]) == ["10", "20", "60"] and result["bank"] == 60 and result["queries"] == 23

    def features(part, count):
        shapes = Shapes("test", count, 32)
        order = sorted(range(count), key=lambda i: (i % 3, i))
        with torch.no_grad():
            x = model(torch.stack([eval_view(shapes[i][0], 32) for i in order]))
        return torch.nn.functional.normalize(x).numpy(), [i % 3 for i in order]

    bank, queries = features("train", 60), features("val", 23)
    for k, scores in result["knn"].items():
        theirs = KNeighborsClassifier(int(k), weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
        assert scores["top1"] == pytest.approx(100 * theirs.fit(*bank).score(*queries), abs=0.01)
        assert f"{scores['top1']:.2f}" in out


def test_what_a_run_was_trained_on_is_never_downloaded(run, monkeypatch):
    folder, path, model = run
    monkeypatch.chdir(folder)
    vit = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    save_model(path, model.state_dict(), dict(vit=vit, data_path=f"cifar10:{folder}"))
    with pytest.raises(DataError, match="Dataset not found"):
        evaluate.main(evaluate.parse_args(["knn"]))


def test_two_and_three_processes_give_the_same_table(run):
    folder, path, _ = run
    tables = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
                     ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]):
        command = [sys.executable, *launcher, str(ROOT / "evaluate.py"), "knn", "--ckpt", str(path),
                   "--data_path", str(folder / "pictures")]
        result = subprocess.run(command + ["--num_workers", "0"], cwd=folder, capture_output=True, text=True,
                                timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        tables.append(result.stdout[result.stdout.index("     k"):])
    assert tables[0] == tables[1] == tables[2] and "23 pictures among 60" in result.stdout


def test_features_are_kept_and_taken_up(run, monkeypatch, capsys):
    folder, path, _ = run
    monkeypatch.chdir(folder)
    kept, command = folder / "features.safetensors", ["knn", "--num_workers", "0", "--device", "cpu", "--features"]
    tables = []
    for said in ("features written to", "features taken from"):
        evaluate.main(evaluate.parse_args([*command, str(kept)]))
        out = capsys.readouterr().out
        assert said in out
        tables.append(json.loads(path.with_suffix(".knn.json").read_text()))
    assert tables[0] == tables[1]
    whole = {name: tensor.clone() for name, tensor in load_file(kept).items()}  # older versions map the file
    assert whole["bank"].shape == (60, 32) and whole["queries"].shape == (23, 32)
    with pytest.raises(CheckpointError, match="holds features with image_size 32, not 40"):
        evaluate.main(evaluate.parse_args([*command, str(kept), "--image_size", "40"]))
    with safe_open(kept, "pt") as file:
        metadata = file.metadata()
    for name, value, words in (("bank", whole["bank"] * torch.nan, "its bank are not features"),
                               ("query_labels", whole["query_labels"][:3], "its queries are not features")):
        save_file(whole | {name: value}, kept, metadata)
        with pytest.raises(CheckpointError, match=words):
            evaluate.main(evaluate.parse_args([*command, str(kept)]))
    kept.write_bytes(kept.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="no features, or damaged"):
        evaluate.main(evaluate.parse_args([*command, str(kept)]))


def test_linear_probe(run, monkeypatch, capsys):
    """The features are the paper's, the answers scikit-learn's on these features, the report adds up."""
    folder, path, model = run
    monkeypatch.chdir(folder)
    kept = folder / "features.safetensors"
    evaluate.main(evaluate.parse_args(["linear", "--num_workers", "0", "--device", "cpu", "--features", str(kept),
                                       "--avgpool_patchtokens", "--epochs", "40"]))
    out = capsys.readouterr().out
    result = json.loads(path.with_suffix(".linear.json").read_text())
    shapes, order = Shapes("test", 23, 32), sorted(range(23), key=lambda i: (i % 3, i))
    with torch.no_grad():
        tokens = model.get_intermediate_layers(torch.stack([eval_view(shapes[i][0], 32) for i in order]), 1)[0]
    x = load_file(kept)
    torch.testing.assert_close(x["queries"], torch.cat((tokens[:, 0], tokens[:, 1:].mean(dim=1)), dim=1))
    assert f"top-1 {result['top1']:.2f}" in out and list(result["per_class"]) == ["class0", "class1", "class2"]
    counts = [8, 8, 7]
    assert sum(n * a for n, a in zip(counts, result["per_class"].values())) / 23 == pytest.approx(result["top1"])
    assert sum(count for *_, count in result["confused"]) == round(23 * (1 - result["top1"] / 100))
    assert result["top5"] == 100  # of three classes


def test_linear_probe_of_two_processes(run):
    folder, path, _ = run
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "evaluate.py"), "linear", "--ckpt", str(path), "--data_path", str(folder / "pictures")]
    result = subprocess.run(command + ["--num_workers", "0", "--epochs", "5"], cwd=folder, capture_output=True,
                            text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("linear probe of") == 1 and "features of 60 pictures" in result.stdout
