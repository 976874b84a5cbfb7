import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torchvision import transforms
from torchvision.datasets import ImageFolder

import evaluate
from common.weights import CheckpointError, load_backbone, save_model
from data.datasets import Data, DataError, TorchvisionDataset
from data.loaders import center_crop_view
from data.shapes import Shapes
from evaluation import report, supervised
from evaluation.classifiers import load_classifier
from evaluation.fewshot import draw_images
from evaluation.linear import holdout_mask
from train import build_networks
from vit import VisionTransformer

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
CPU = ["--num_workers", "0", "--device", "cpu"]


def write_images(folder, train, val):
    """Images of three classes in folder/images."""
    for part, count in (("train", train), ("val", val)):
        shapes = Shapes("test", count, 32)
        for i in range(count):
            path = folder / "images" / part / f"class{i % 3}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shapes[i][0].save(path)


def write_masks(folder, sizes=((32, 32), (40, 30), (24, 50))):
    """Images of several sizes and masks of three classes and unlabeled pixels, in folder/set."""
    for part, count in (("train", 60), ("val", 23)):
        shapes = Shapes("test", count, 64)
        for i in range(count):
            image, mask = shapes.render(i)
            labels = mask.numpy().astype(np.uint8) * (1 + i % 2)
            labels[:5] = 255
            size = sizes[i % len(sizes)]
            for kind, item in (("images", image), ("masks", Image.fromarray(labels))):
                path = folder / "set" / kind / part / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                item.resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Working directory with labeled images and a run trained on them: (folder, model file, model)."""
    write_images(tmp_path, 60, 23)
    torch.manual_seed(0)
    model = VisionTransformer(**VIT).eval()
    path = tmp_path / "runs" / "one" / "teacher.safetensors"
    path.parent.mkdir(parents=True)
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()},
               dict(arch="vit_tiny", backbone=VIT, data_path=str(tmp_path / "images")))
    monkeypatch.chdir(tmp_path)
    return tmp_path, path, model


def run(*argv):
    evaluate.main(evaluate.parse_args(list(argv)))


def train(task, *flags, output=None):
    """Run linear or finetune; returns result.json."""
    run(task, *CPU, "--batch_size_per_gpu", "16", "--val_freq", "0", *flags)
    output = output or Path("runs", "one", f"teacher.{task}{'_quick' * ('--quick' in flags)}.images")
    return json.loads((output / "result.json").read_text())


def load_test_images():
    """The test images in evaluation order [23, 3, 32, 32], and their labels."""
    shapes, order = Shapes("test", 23, 32), sorted(range(23), key=lambda i: (i % 3, i))
    return torch.stack([center_crop_view(shapes[i][0], 32) for i in order]), torch.tensor([i % 3 for i in order])


# ---- k-NN ----

def released_weights():
    """Random weights with the names and shapes of the released ViT-S/16, dino_deitsmall16_pretrain.pth."""
    D, shapes = 384, {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "patch_embed.proj.weight": (384, 3, 16, 16),
                      "patch_embed.proj.bias": (384,), "norm.weight": (384,), "norm.bias": (384,)}
    for block in range(12):
        for name, rows, columns in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D),
                                    ("mlp.fc2", D, 4 * D), ("norm1", D, 0), ("norm2", D, 0)):
            shapes[f"blocks.{block}.{name}.weight"] = (rows, columns) if columns else (rows,)
            shapes[f"blocks.{block}.{name}.bias"] = (rows,)
    torch.manual_seed(1)
    return {name: 0.05 * torch.randn(shape) + name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            for name, shape in shapes.items()}


def test_knn_of_a_released_checkpoint_follows_the_papers_protocol(tmp_path, capsys):
    """224 of 256 pixels, bicubic, CLS features, temperature 0.07, as computed by timm and scikit-learn."""
    weights, ckpt = released_weights(), tmp_path / "dino_deitsmall16_pretrain.pth"
    write_images(tmp_path, 12, 3)
    torch.save(weights, ckpt)
    run("knn", "--ckpt", str(ckpt), "--data_path", str(tmp_path / "images"), *CPU, "--features",
        str(tmp_path / "features.safetensors"))
    assert "all 150 backbone tensors matched" in capsys.readouterr().out
    model = timm.create_model("vit_small_patch16_224.dino").eval()
    model.load_state_dict(weights)
    view = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
                               transforms.ToTensor(), transforms.Normalize(model.default_cfg["mean"],
                                                                           model.default_cfg["std"])])
    features, expected = load_file(tmp_path / "features.safetensors"), {}
    for part in ("train", "val"):
        images = ImageFolder(tmp_path / "images" / part, transform=view)
        with torch.no_grad():
            expected[part] = model(torch.stack([x for x, _ in images])), images.targets
    torch.testing.assert_close(features["train_features"], expected["train"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(features["test_features"], expected["val"][0], rtol=0, atol=1e-4)
    classifier = KNeighborsClassifier(10, metric="cosine", algorithm="brute",
                                      weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(*expected["train"])
    result = json.loads((tmp_path / "dino_deitsmall16_pretrain.knn.images.json").read_text())
    assert result["knn"]["10"]["top1"] == pytest.approx(100 * classifier.score(*expected["val"]), abs=1e-4)
    assert (result["num_train_images"], result["num_images"], result["temperature"]) == (12, 3, 0.07)


def test_knn_without_arguments_evaluates_the_newest_run(trained, capsys):
    _, path, model = trained
    run("knn", *CPU)
    out = capsys.readouterr().out
    result = json.loads(path.with_suffix(".knn.images.json").read_text())
    assert list(result["knn"]) == ["10", "20", "60"] and result["dataset_sizes"] == [60, 23]
    assert "23 test images, 60 train images, 32 pixels, temperature 0.07" in out

    def features(count):
        shapes = Shapes("test", count, 32)
        order = sorted(range(count), key=lambda i: (i % 3, i))
        with torch.no_grad():
            x = model(torch.stack([center_crop_view(shapes[i][0], 32) for i in order]))
        return torch.nn.functional.normalize(x).numpy(), [i % 3 for i in order]

    train_features, test_features = features(60), features(23)
    for k, accuracies in result["knn"].items():
        classifier = KNeighborsClassifier(int(k), weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
        expected = 100 * classifier.fit(*train_features).score(*test_features)
        assert accuracies["top1"] == pytest.approx(expected, abs=0.01) and f"{accuracies['top1']:.2f}" in out


def test_a_recorded_data_set_is_never_downloaded(trained):
    folder, path, model = trained
    save_model(path, model.state_dict(), dict(backbone=VIT, data_path=f"cifar10:{folder}"))
    with pytest.raises(DataError, match="Dataset not found"):
        run("knn")


def test_a_data_path_recorded_in_a_named_file_is_not_opened(trained):
    _, path, _ = trained
    with pytest.raises(DataError, match="trained on .*images; name the labeled images with --data_path"):
        run("knn", "--ckpt", str(path), *CPU)


def test_cached_features_give_the_same_accuracy(trained, capsys):
    _, path, _ = trained
    results = []
    for message in ("features written to", "features loaded from"):
        run("knn", *CPU, "--features", "cache.safetensors")
        assert message in capsys.readouterr().out
        results.append(json.loads(path.with_suffix(".knn.images.json").read_text()))
    assert results[0] == results[1]
    features = load_file("cache.safetensors")
    assert features["train_features"].shape == (60, 32) and features["test_features"].shape == (23, 32)
    with pytest.raises(CheckpointError, match="holds features with image_size 32, not 40"):
        run("knn", *CPU, "--features", "cache.safetensors", "--image_size", "40")


def test_untrained_evaluates_the_initial_weights_of_train_py(trained, capsys):
    _, path, _ = trained
    student, _ = build_networks(VIT, dict(out_dim=8, hidden_dim=8), seed=0)
    run("knn", "--untrained", *CPU, "--features", "cache.safetensors")
    assert "teacher.safetensors untrained: 23 test images" in capsys.readouterr().out
    assert [file.name for file in path.parent.glob("*.json")] == ["teacher.untrained.knn.images.json"]
    with torch.no_grad():
        expected = student.backbone.eval()(load_test_images()[0])
    torch.testing.assert_close(load_file("cache.safetensors")["test_features"], expected)


def test_results_of_other_data_and_flags_are_kept(trained):
    """And the same evaluation replaces its own result; names are those of the data."""
    folder, path, _ = trained
    shutil.copytree("images", "others")
    shutil.copytree("images", Path("elsewhere", "images"))
    written = {}
    for file, *flags in (["images"], ["others", "--data_path", "others"], ["images.2", "--temperature", "1"],
                         ["images.3", "--data_path", "elsewhere/images"], ["images"]):
        run("knn", *CPU, *flags)
        file = path.with_name(f"teacher.knn.{file}.json")
        content = file.read_text()
        assert written.setdefault(file, content) == content
    assert all(file.read_text() == content for file, content in written.items()) and len(set(written.values())) == 4
    assert {*path.parent.glob("*.json")} == written.keys()
    assert json.loads(written[path.with_name("teacher.knn.others.json")])["data_path"] == str(folder / "others")
    first = train("linear", "--quick", "--epochs", "1")
    train("linear", "--quick", "--epochs", "1", "--data_path", "others",
          output=path.with_name("teacher.linear_quick.others"))
    assert json.loads((path.with_name("teacher.linear_quick.images") / "result.json").read_text()) == first


def test_a_model_trained_on_replaces_its_result(trained):
    """And a file that is no result of this repository, or cut off, is kept."""
    _, path, model = trained
    result, checksums = path.with_name("teacher.knn.images.json"), []
    result.write_text('{"knn": ')
    for shift in (0, 1):
        save_model(path, {f"backbone.{k}": v + shift for k, v in model.state_dict().items()}, dict(backbone=VIT))
        run("knn", *CPU, "--ckpt", str(path), "--data_path", "images")
        checksums.append(json.loads(path.with_name("teacher.knn.images.2.json").read_text())["sha256"])
        assert checksums[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(set(checksums)) == 2 and len(list(path.parent.glob("*.json"))) == 2
    assert result.read_text() == '{"knn": '


def test_predictions_and_confusion_matrix_on_request(trained):
    """Of every image that can be read, by the path of its file."""
    folder, path, model = trained
    (folder / "images" / "val" / "class1" / "04.png").write_bytes(b"bad")
    images, labels = (x[torch.arange(23) != 9] for x in load_test_images())  # 8 of class 0, and 1.png before it
    files = sorted((folder / "images" / "val").rglob("*.png"))
    del files[9]
    run("knn", *CPU, "--nb_knn", "5", "60", "--save_predictions")
    results = json.loads(path.with_suffix(".knn.images.json").read_text())["knn"]
    assert results.keys() == {"5", "60"}
    results["linear"] = train("linear", "--quick", "--epochs", "3", "--save_predictions")
    classifier = load_file(path.with_name("teacher.linear_quick.images") / "classifier.safetensors")
    with torch.no_grad():
        logits = model(images) @ classifier["classifier.weight"].T + classifier["classifier.bias"]
    assert [int(row["predicted"][-1]) for row in results["linear"]["predictions"]] == logits.argmax(dim=1).tolist()
    for result in results.values():
        rows, matrix = result["predictions"], np.array(result["confusion_matrix"])
        assert [row["file"] for row in rows] == list(map(str, files))
        assert [row["class"] for row in rows] == [f"class{label}" for label in labels] and len(rows) == 22
        for i, j in itertools.product(range(3), range(3)):
            assert matrix[i, j] == sum((row["class"], row["predicted"]) == (f"class{i}", f"class{j}") for row in rows)
        assert 100 * matrix.trace() / 22 == pytest.approx(result["top1"])
    assert "predictions" not in train("linear", "--quick", "--epochs", "3")
    held_out = sorted((folder / "images" / "val").rglob("*.png"))[::10]  # a folder without a held-out part
    run("knn", *CPU, "--data_path", "images/val", "--save_predictions")
    rows = json.loads(path.with_suffix(".knn.val.json").read_text())["knn"]["10"]["predictions"]
    assert [row["file"] for row in rows] == list(map(str, held_out))


def test_unwritable_paths_are_refused_before_extraction(trained, monkeypatch):
    monkeypatch.setattr(evaluate.EvalSetup, "extract", None)
    for flags, message in ((["--features", "/proc/f.safetensors"], "^/proc: no"),
                           (["--output_dir", "/proc"], "^/proc: no"),
                           (["--output_dir", "/proc/missing"], "/proc/missing")):
        with pytest.raises(OSError, match=message):
            run("knn", *CPU, *flags)


# ---- few labels, logistic regression ----

def test_fewshot(trained, capsys, exit_message):
    """Accuracies with features cached by knn, as computed by scikit-learn on the same draws."""
    _, path, _ = trained
    run("knn", *CPU, "--features", "cache.safetensors")
    flags = ["fewshot", *CPU, "--features", "cache.safetensors", "--percent", "12"]
    run(*flags, "--shots", "1", "5", "--draws", "3", "--seed", "7")
    out = capsys.readouterr().out
    result = json.loads(path.with_suffix(".fewshot.images.json").read_text())
    assert (result["num_train_images"], result["num_images"], result["image_size"]) == (60, 23, 32)
    assert list(result["fewshot"]) == ["1-shot", "5-shot", "12%"]
    features = load_file("cache.safetensors")
    x, test_x = (torch.nn.functional.normalize(features[f"{part}_features"]).double() for part in ("train", "test"))
    y, test_y = features["train_labels"], features["test_labels"]
    for (name, methods), amount in zip(result["fewshot"].items(), (1, 5, 0.12)):
        for method, theirs in (("logistic", LogisticRegression(C=100, tol=1e-7, max_iter=5000)),
                               ("nearest_class_mean", NearestCentroid())):
            draws = [draw_images(y, amount, seed) for seed in (7, 8, 9)]
            assert [len(rows) for rows in draws] == [{1: 3, 5: 15, 0.12: 6}[amount]] * 3
            expected = [100 * theirs.fit(x[rows], y[rows]).score(test_x, test_y) for rows in draws]
            assert methods[method]["top1"] == pytest.approx(expected, abs=0.2)
            assert methods[method]["mean"] == pytest.approx(np.mean(expected))
            assert methods[method]["std"] == pytest.approx(np.std(expected, ddof=1))
            assert f"{np.mean(expected):8.2f} ± {np.std(expected, ddof=1):5.2f}" in out
        assert f"{name:>8}{methods['logistic']['mean']:8.2f} ±" in out
    for shots, message in (("21", "--shots 21: class class0 has 20 training images, lower --shots"),
                           ("0", "'0' is not an integer above 0")):
        assert message in exit_message(run, *flags, "--shots", "1", shots)
    for i in range(15):  # the default is what every class has
        Path("images", "train", "class1", f"{3 * i + 1:02}.png").unlink()
    run("fewshot", *CPU, "--draws", "1")
    result = json.loads(path.with_suffix(".fewshot.images.2.json").read_text())["fewshot"]
    assert list(result) == ["1-shot", "2-shot", "5-shot", "1%", "10%"]
    assert result["1-shot"] == result["1%"] and result["1%"]["logistic"]["std"] == 0
    for image in Path("images", "train", "class1").iterdir():
        image.write_bytes(b"bad")
    for flags in ([], ["--shots", "2"]):
        assert exit_message(run, "fewshot", *CPU, *flags).endswith(
            ": class class1 has no training image: add some, or leave the class out of the test images")


def test_logistic(trained, capsys):
    """C is selected as by scikit-learn on the held-out tenth; the classifier's file is for predict."""
    _, path, model = trained
    run("logistic", *CPU, "--C", "0.01", "0.1", "3", "--save_predictions")
    out = capsys.readouterr().out
    result = json.loads(Path("runs/one/teacher.logistic.images/result.json").read_text())
    run("logistic", *CPU, "--features", "cache.safetensors", "--C", "0.1", "--output_dir", "one_C")
    features = load_file("cache.safetensors")
    x, y, held_out = features["train_features"].double(), features["train_labels"], holdout_mask(60)
    for C, accuracy in result["grid"]:
        theirs = LogisticRegression(C=C, max_iter=10_000, tol=1e-6).fit(x[~held_out], y[~held_out])
        assert accuracy == pytest.approx(100 * theirs.score(x[held_out], y[held_out]), abs=0.2)
    assert result["C"] == max(result["grid"], key=lambda pair: pair[1])[0]
    assert f"held-out tenth ({result['held_out_top1']:.2f}%): C {result['C']:g}" in out
    theirs = LogisticRegression(C=result["C"], max_iter=10_000, tol=1e-6).fit(x, y)
    expected = 100 * theirs.score(features["test_features"].double(), features["test_labels"])
    assert result["top1"] == pytest.approx(expected, abs=0.2) and len(result["predictions"]) == 23
    one = json.loads(Path("one_C/result.json").read_text())
    assert one["C"] == 0.1 and "grid" not in one
    run("predict", "--num_workers", "0", "--ckpt", "runs/one/teacher.logistic.images", "images/val")
    with open("predictions.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == [row["predicted"] for row in result["predictions"]]


# ---- classifiers ----

def test_quick_linear(trained, capsys):
    """Features are the paper's, accuracies those of the saved classifier, totals add up, --test_only agrees."""
    folder, _, model = trained
    flags = ["--quick", "--avgpool_patchtokens", "--epochs", "40"]
    result = train("linear", *flags, "--features", "cache.safetensors")
    out = capsys.readouterr().out
    images, labels = load_test_images()
    with torch.no_grad():
        tokens = model.get_intermediate_layers(images, 1)[0]
    x = load_file("cache.safetensors")["test_features"]
    torch.testing.assert_close(x, torch.cat((tokens[:, 0], tokens[:, 1:].mean(dim=1)), dim=1))
    classifier = load_file(folder / "runs" / "one" / "teacher.linear_quick.images" / "classifier.safetensors")
    predictions = (x @ classifier["classifier.weight"].T + classifier["classifier.bias"]).argmax(dim=1)
    assert result["top1"] == pytest.approx(100 * (predictions == labels).double().mean().item())
    assert f"top-1 {result['top1']:.2f}" in out and list(result["per_class"]) == ["class0", "class1", "class2"]
    assert sum(n * a for n, a in zip([8, 8, 7], result["per_class"].values())) / 23 == pytest.approx(result["top1"])
    assert sum(count for *_, count in result["confusions"]) == round(23 * (1 - result["top1"] / 100))
    assert "per-class accuracy: " in out and "confusions: " in out
    assert result["top5"] == 100 and "effective lr 0.000234, 0.000703," in out  # batch size 60
    assert train("linear", *flags, "--test_only") == result


@pytest.mark.parametrize("task, flags", [("linear", ["--lr", "0.3"]), ("linear", ["--lr", "0.1", "3"]),
                                         ("finetune", ["--lr", "0.01", "--mixup", "0.8", "--warmup_epochs", "1"])])
def test_a_saved_classifier_is_evaluated_again(trained, capsys, task, flags):
    _, path, model = trained
    result = train(task, *flags, "--epochs", "3", "--precision", "fp32")
    out = capsys.readouterr().out
    assert result["num_images"] == 23 and result["dataset_sizes"] == [60, 23] and "(linear scaling rule)" in out
    assert ("best on a held-out tenth" in out) == (len(flags) == 3)
    output = path.with_name(f"teacher.{task}.images")
    saved = output / "classifier.safetensors"
    images, labels = load_test_images()
    backbone, _ = load_backbone(saved if task == "finetune" else path)
    classifier = load_file(saved)
    with torch.no_grad():
        logits = backbone(images) @ classifier["classifier.weight"].T + classifier["classifier.bias"]
    assert result["top1"] == pytest.approx(100 * (logits.argmax(dim=1) == labels).double().mean().item())
    (output / "checkpoint.pth").unlink()
    with safe_open(saved, "pt") as file:  # hyperparameters under the names of results: those of this evaluation count
        info = {name: json.loads(value) for name, value in file.metadata().items()}
    save_model(saved, load_file(saved), info | {"hparams": info["hparams"] | dict(top1=-1, path="", setup=None)})
    assert train(task, "--test_only") == result | dict(path="", setup=None)
    save_model(saved, load_file(saved), info)
    before = saved.read_bytes()
    assert train(task, "--test_only") == result and saved.read_bytes() == before
    assert (task == "linear") == all(torch.equal(a, b) for a, b in zip(backbone.parameters(), model.parameters()))
    for flags, message in (([], "holds classifier.safetensors of an? .* run: --resume none"),
                           (["--test_only", "--image_size", "40"], "trained with image_size 32, not 40"),
                           (["--test_only", "--untrained", "--output_dir", str(output)], "False, not True")):
        with pytest.raises(CheckpointError, match=message):
            train(task, *flags)


@pytest.mark.parametrize("task, flags", [("linear", ["--quick", "--avgpool_patchtokens"]),
                                         ("finetune", ["--lr", "0.01", "--warmup_epochs", "0"])])
def test_predict(trained, capsys, exit_message, task, flags):
    """Classes and probabilities of images in nested folders, computed again from the weights in the file alone."""
    folder, path, _ = trained
    train(task, *flags, "--epochs", "3")
    output = path.with_name(f"teacher.{task}{'_quick' * (task == 'linear')}.images")
    ckpt = output / "classifier.safetensors"
    backbone, _ = load_backbone(ckpt)
    path.unlink()  # the classifier needs no other file
    names = ["b.png", "nested/deep/ünï, \"☃\".png", "nested/a.png"]
    images = [Shapes("test", 40, 32)[i][0] for i in (30, 31, 32)]
    for name, image in zip(names, images):
        (folder / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / "new" / name)
    (folder / "new" / "nested" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("new", "notes.txt").write_text("none")
    capsys.readouterr()
    run("predict", "--num_workers", "0", "--ckpt", str(ckpt), "--topk", "2", "new", "images/val/class0/00.png")
    out = capsys.readouterr().out
    assert "4 images in new (passed over 1: 1 .txt)\n" in out  # the corrupt one among them
    assert "4 images, 1 corrupt; most frequent: class" in out and "skipped corrupt image new/nested/bad.png" in out
    with open("predictions.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "class", "probability", "class_2", "probability_2"]
    order = [0, 2, 1]  # by path
    assert [row[0] for row in rows] == [*(f"new/{names[i]}" for i in order), "images/val/class0/00.png"]
    x = torch.stack([center_crop_view(images[i], 32) for i in order] + [load_test_images()[0][0]])
    weights = load_file(ckpt)
    with torch.no_grad():
        tokens = backbone.get_intermediate_layers(x, 1)[0]
        x = torch.cat((tokens[:, 0], tokens[:, 1:].mean(dim=1)), dim=1) if task == "linear" else tokens[:, 0]
        probabilities = (x @ weights["classifier.weight"].T + weights["classifier.bias"]).softmax(dim=1)
    for row, values in zip(rows, probabilities):
        first, second = values.argsort(descending=True)[:2].tolist()
        assert (row[1], row[3]) == (f"class{first}", f"class{second}")
        assert [float(row[2]), float(row[4])] == pytest.approx(values[[first, second]].tolist(), abs=1e-5)
    before = Path("predictions.csv").read_bytes()
    with tarfile.open("new.tar", "w") as tar:
        for i in order:
            tar.add(folder / "new" / names[i], names[i])
    run("predict", "--num_workers", "0", "--ckpt", str(ckpt), "--topk", "2", "--output", "tar.csv", "new.tar")
    with open("tar.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file))[1:] == [[f"{folder}/new.tar/{row[0][4:]}", *row[1:]] for row in rows[:3]]
    run("predict", "--num_workers", "0", "--ckpt", str(output), "--output", "out/new.csv", "new/b.png")  # the folder
    assert len(Path("out/new.csv").read_text().splitlines()) == 2 and Path("predictions.csv").read_bytes() == before
    for argv, message in (([str(ckpt), "missing.png"], "missing.png: no such image or folder"),
                          ([str(ckpt), "new/nested/bad.png"], "no image can be read, the last: new/nested/bad.png"),
                          (["new", "new"], "new/classifier.safetensors: no such file"),
                          (["none.safetensors", "new"], "none.safetensors: no such file"),
                          ([str(ckpt), "new", "--output", "new"], "--output new does not end in .csv")):
        assert message in exit_message(run, "predict", "--num_workers", "0", "--ckpt", *argv)


def test_embed(trained, capsys, exit_message, monkeypatch):
    """Features of a folder, a file, a tar and a named set, in every format, equal those of the model."""
    folder, path, model = trained
    with tarfile.open("new.tar", "w") as tar:
        tar.add("images/val/class0/00.png", "a.png")
    Path("images/val/class1/04.png").write_bytes(b"bad")
    images, _ = load_test_images()
    images = images[[i for i in range(23) if i != 9]]
    files = [name for name in sorted(map(str, Path("images/val").rglob("*.png"))) if not name.endswith("04.png")]
    names = [*files, "images/val/class0/00.png", f"{folder}/new.tar/a.png"]
    with torch.no_grad():
        tokens = model.get_intermediate_layers(images[[*range(22), 0, 0]])[0]
    cls, patches = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    inputs = ["embed", "--num_workers", "0", "images/val", "images/val/class0/00.png", "new.tar"]
    run(*inputs)
    out = capsys.readouterr().out
    assert "24 images, 1 corrupt, 32 features each\nwritten to features.npy" in out and "04.png" in out
    torch.testing.assert_close(torch.from_numpy(np.load("features.npy")), cls)
    assert json.loads(Path("features.npy.names.json").read_text()) == names
    run(*inputs, "--n_last_blocks", "0", "--avgpool_patchtokens", "--output", "out/patches.safetensors")
    torch.testing.assert_close(load_file("out/patches.safetensors")["features"], patches)
    run(*inputs, "--avgpool_patchtokens", "--output", "both.PARQUET")
    table = parquet.read_table("both.PARQUET").to_pydict()
    torch.testing.assert_close(torch.tensor(table["features"]), torch.cat((cls, patches), dim=1))
    assert table["file"] == names and not list(Path().rglob("*.parts"))
    for argv, message in ((["images", "--output", "f.txt"], "f.txt does not end in .npy, .parquet, .csv, .safetensors"),
                          (["missing"], "missing: no such image or folder"),
                          (["images/val/class1/04.png"], "features.npy: not written, 0 of 1 images can be read"),
                          (["images", "--n_last_blocks", "0"], "--n_last_blocks 0 alone leaves no features: add --avg"),
                          (["images", "--n_last_blocks", "2"], "--n_last_blocks 2 is not from 1 to 1, the"),
                          (["images", "--n_last_blocks", "2", "--avgpool_patchtokens"], "2 is not from 0 to 1, the"),
                          (["images", "--image_size", "30"], "--image_size 30: not multiples")):
        assert message in exit_message(run, "embed", "--num_workers", "0", *argv)
    capsys.readouterr()
    run("embed", "--num_workers", "0", "images/val/class0/00.png", "--output", "one.npy")
    assert "\n1 image, 0 corrupt, 32 features each\n" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pyarrow is not installed: pip install pyarrow" in exit_message(run, *inputs, "--output", "x.parquet")


def test_outputs_do_not_overwrite_inputs(trained, exit_message):
    """A shard, also one of a folder or pattern and under another name; a list, images of channels, the model file."""
    folder, path, _ = trained
    run("logistic", *CPU)
    buffer, classifier = io.BytesIO(), str(path.with_name("teacher.logistic.images"))
    Shapes("test", 1, 32)[0][0].save(buffer, "PNG")
    Path("shards").mkdir()
    for i in range(2):
        parquet.write_table(pyarrow.table({"image": [{"bytes": buffer.getvalue(), "path": "a.png"}]}),
                            f"shards/{i}.parquet")
    os.link("shards/1.parquet", "linked.parquet")
    Path("list.csv").write_text("images/val/class0/00.png\n")
    Path("channels").mkdir()
    for i in range(2):
        np.save(f"channels/{i}.npy", np.full((32, 32, 5), 9 * i, np.uint8))
    many = VisionTransformer(**VIT, in_chans=5)
    save_model("many.safetensors", {f"backbone.{k}": v for k, v in many.state_dict().items()},
               dict(arch="vit_tiny", backbone=VIT | dict(in_chans=5), channels=5, mean=[0.5] * 5, std=[0.2] * 5))
    files = {file: file.read_bytes() for file in (*Path("shards").iterdir(), Path("list.csv"), path,
                                                  *Path("channels").iterdir())}
    for task, ckpt, output, *inputs in (
            ("embed", path, "shards/0.parquet", "shards/0.parquet"), ("embed", path, "shards/1.parquet", "shards"),
            ("embed", path, "linked.parquet", "images", "shards/{0..1}.parquet"),
            ("embed", path, "list.csv", "./list.csv"), ("predict", classifier, "list.csv", "list.csv"),
            ("embed", "many.safetensors", "channels/1.npy", "channels"),
            ("embed", path, str(path), "images")):
        assert exit_message(run, task, *CPU, "--ckpt", str(ckpt), *inputs, "--output", output).endswith(
            f"--output {output}: is one of the inputs, choose another")
    assert {file: file.read_bytes() for file in files} == files
    run("embed", *CPU, "--ckpt", str(path), "list.csv", "--output", "other.csv")
    assert len(Path("other.csv").read_text().splitlines()) == 2


def test_embed_takes_named_sets(small_shapes, trained):
    _, path, model = trained
    run("embed", "--num_workers", "0", "shapes", "--ckpt", str(path), "--output", "f.csv")
    with open("f.csv", newline="") as file:
        _, *rows = csv.reader(file)
    with torch.no_grad():
        expected = model(torch.stack([center_crop_view(Shapes("train", 300, 32)[i][0], 32) for i in range(3)]))
    assert [row[0] for row in rows] == [str(i) for i in range(300)]
    np.testing.assert_allclose(np.array([row[1:] for row in rows[:3]], float), expected, atol=1e-5)


def test_a_linear_classifier_is_fine_tuned(trained):
    """Its file describes the new classifier, which takes other features."""
    train("linear", "--quick", "--avgpool_patchtokens", "--epochs", "1")
    ckpt = Path("runs", "one", "teacher.linear_quick.images", "classifier.safetensors")
    train("finetune", "--ckpt", str(ckpt), "--data_path", "images", "--epochs", "1", "--warmup_epochs", "0",
          output=ckpt.with_name("classifier.finetune.images"))
    network, _ = load_classifier(ckpt.with_name("classifier.finetune.images"))
    assert network.heads[0].weight.shape == (3, 32) and load_classifier(ckpt)[0].tokens.avgpool


@pytest.mark.parametrize("change, words", [
    (dict(classes=["a"]), "size mismatch"), (dict(classes=5), "not iterable"), (dict(image_size=30), "not multiples"),
    (dict(image_size="x"), "not a number of pixels"), (dict(n_last_blocks=2), "--n_last_blocks 2 is not from 1 to 1"),
    (dict(n_last_blocks="1"), "not supported"), ("classifier", "not classifier.safetensors of evaluate.py"),
    ("backbone", "holds no backbone")])
def test_other_files_are_no_classifiers(trained, change, words):
    _, path, model = trained
    weights = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{change}.")}
    info = dict(backbone=VIT, classes=["a", "b"], image_size=32) | (change if isinstance(change, dict) else {})
    save_model("other.safetensors", weights, info)
    with pytest.raises(CheckpointError, match=words):
        run("predict", "--ckpt", "other.safetensors", "images")


def test_small_sets_lower_the_batch_and_blocks_are_counted(trained, capsys):
    result = train("linear", "--lr", "0.1", "0.3", "--epochs", "2", "--batch_size_per_gpu", "128")
    out = capsys.readouterr().out
    assert "NOTE: --batch_size_per_gpu 54 for 128, as there are 54 training images" in out  # 6 of 60 are held out
    assert "effective lr 0.0211, 0.0633 = lr * 54 / 256" in out and result["num_images"] == 23
    log = Path("runs", "one", "teacher.linear.images", "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1]
    with pytest.raises(CheckpointError, match="--n_last_blocks 99 is not from 1 to 1, the model's depth"):
        train("linear", "--n_last_blocks", "99")


class Killed(BaseException):
    """Not caught by any handler of the program."""


@pytest.mark.parametrize("task, flags", [
    ("linear", ["--lr", "0.1", "0.3"]), ("segmentation", []),
    ("finetune", ["--cutmix", "1", "--mixup", "0.8", "--warmup_epochs", "1"])])
@pytest.mark.parametrize("stop", ["killed", "SIGTERM"])
def test_interrupted_training_resumes_exactly(trained, monkeypatch, capsys, task, flags, stop):
    """Classifier, backbone and log equal those of an uninterrupted run; after a kill from the last whole epoch on."""
    folder, path, _ = trained
    if task == "segmentation":
        write_masks(folder)
        flags = ["--data_path", str(folder / "set")]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    flags = [*flags, "--epochs", "3", "--log_every", "1", "--save_every_minutes", "0"]
    output = path.with_name(f"teacher.{task}.{'set' if task == 'segmentation' else 'images'}")
    train(task, *flags, output=output)
    output.rename(folder / "uninterrupted")
    log = map(json.loads, (folder / "uninterrupted" / "log.jsonl").read_text().splitlines())
    steps_per_epoch = sum(record["epoch"] == 0 for record in log if "step" in record)
    step = supervised.supervised_step
    calls = itertools.count()

    def stop_at_step_5(*args, **kwargs):
        if next(calls) == 5:
            if stop == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(supervised, "supervised_step", stop_at_step_5)
    capsys.readouterr()
    with pytest.raises(Killed) if stop == "killed" else contextlib.nullcontext():
        run(task, *CPU, "--batch_size_per_gpu", "16", "--val_freq", "0", *flags)
    assert not (output / "classifier.safetensors").exists()
    assert stop == "killed" or "stopped by SIGTERM" in capsys.readouterr().out
    train(task, *flags, output=output)
    assert f"step {5 // steps_per_epoch * steps_per_epoch if stop == 'killed' else 6} of" in capsys.readouterr().out
    resumed, expected = (load_file(place / "classifier.safetensors") for place in (output, folder / "uninterrupted"))
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in resumed)
    logs = [[json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
            for place in (output, folder / "uninterrupted")]
    resumed, expected = ([(record["step"], record["loss"], record["lr"]) for record in log] for log in logs)
    assert resumed == expected
    with pytest.raises(CheckpointError, match="was trained with epochs 3, not 5"):
        train(task, *flags, "--epochs", "5")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stopped_evaluation_is_repeated(trained, monkeypatch):
    """A signal during the evaluation after the second of three epochs: the resumed run logs it, and no other twice."""
    folder, path, _ = trained
    flags = [*CPU, "--batch_size_per_gpu", "16", "--val_freq", "1", "--lr", "0.1", "--epochs", "3"]
    output, measure, calls = path.with_name("teacher.linear.images"), report.measure_top1, itertools.count(1)

    def stop_at_second_call(*args):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    def read_evaluations():
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        return [(record["epoch"], record["test_top1"]) for record in log if "test_top1" in record]

    run("linear", *flags)
    expected = read_evaluations()
    assert [epoch for epoch, _ in expected] == [0, 1]
    output.rename(folder / "uninterrupted")
    monkeypatch.setattr(report, "measure_top1", stop_at_second_call)
    run("linear", *flags)
    assert not (output / "classifier.safetensors").exists() and read_evaluations() == expected[:1]
    run("linear", *flags)
    assert (output / "classifier.safetensors").exists() and read_evaluations() == expected


def test_linear_keeps_the_statistics_of_a_convolutional_stem_and_finetune_trains_them(trained):
    _, path, _ = trained
    sizes = VIT | dict(conv_stem=True)
    model = VisionTransformer(**sizes)
    model(torch.randn(4, 3, 32, 32))  # other statistics than those of a new one
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()}, dict(
        arch="vit_tiny", backbone=sizes, data_path="images"))
    name = "backbone.patch_embed.stem.0.norm.running_mean"
    for task, is_kept in (("linear", True), ("finetune", False)):
        output = path.with_name(f"teacher.{task}.images")
        result = train(task, "--epochs", "1", "--lr", "0.01", output=output)
        after = load_file(output / "classifier.safetensors")
        assert torch.equal(after[name], model.patch_embed.stem[0].norm.running_mean) == is_kept
        before = result["top1"]
        assert train(task, "--test_only", output=output)["top1"] == before


SCRIPT = """
import contextlib, io, json, os
import torch.distributed as dist
import data.semantic, evaluate
if os.environ["RANK"] != "0":
    data.semantic.progress_bar = None  # classes are counted on rank 0 alone
for i, argv in enumerate(json.loads({commands!r})):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)  # else a process group finds the addresses of the one before
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.main(evaluate.parse_args(argv))
    assert out.getvalue().count("written to") == (dist.get_rank() == 0), out.getvalue()
    dist.destroy_process_group()
"""


def test_two_processes_equal_one(trained, run_torchrun):
    """Accuracies and losses of all tasks; an odd number of test images, so the shares are not equal."""
    folder, path, _ = trained
    write_masks(folder)
    results, losses, confusions = [], [], []
    for processes in (1, 2):
        outputs = [folder / f"{task}{processes}" for task in ("linear", "quick", "finetune")]
        common = ["--ckpt", str(path), "--data_path", str(folder / "images"), *CPU, "--batch_size_per_gpu",
                  str(20 // processes)]
        training = [*common, "--epochs", "2", "--log_every", "1", "--precision", "fp32", "--output_dir"]
        dense = [*training[:2], "--data_path", str(folder / "set"), *training[4:], str(folder / f"dense{processes}")]
        commands = [["knn", *common, "--save_predictions"], ["segmentation", *dense],
                    ["linear", "--lr", "0.3", *training, str(outputs[0])],
                    ["linear", "--quick", *training, str(outputs[1])],
                    ["finetune", "--warmup_epochs", "1", "--drop_path_rate", "0", *training, str(outputs[2])],
                    ["fewshot", *common, "--draws", "3"],
                    ["logistic", *common, "--C", "1e-3", "1e-1", "10", "--output_dir", str(folder / f"lr{processes}")],
                    ["embed", str(folder / "images" / "val"), *common[:2], *common[4:], "--output",
                     str(folder / f"embed{processes}.npy")]]
        if processes == 1:
            for command in commands:
                run(*command)
        else:
            run_torchrun(processes, SCRIPT.format(commands=json.dumps(commands)))
        results.append([json.loads(file.read_text()) for file in (
            *(output / "result.json" for output in (*outputs, folder / f"lr{processes}")),
            *(path.with_name(f"teacher.{task}.images.json") for task in ("knn", "fewshot")))])
        losses.append([json.loads(line)["loss"]
                       for output in (outputs[0], outputs[2], folder / f"dense{processes}")
                       for line in (output / "log.jsonl").read_text().splitlines()])
        result = json.loads((folder / f"dense{processes}" / "result.json").read_text())
        confusions.append(np.array(result["confusion_matrix"]))
    assert results[0] == results[1]
    np.testing.assert_allclose(np.load(folder / "embed1.npy"), np.load(folder / "embed2.npy"), atol=1e-5)
    assert (folder / "embed1.npy.names.json").read_bytes() == (folder / "embed2.npy.names.json").read_bytes()
    assert confusions[0].sum() == confusions[1].sum() > 10_000
    assert np.abs(confusions[0] - confusions[1]).sum() <= 1e-3 * confusions[0].sum()  # rounding moves single pixels
    assert len(losses[0]) == 18 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_diverged_fine_tuning_is_an_error(trained):
    with pytest.raises(FloatingPointError, match="the loss is not finite.*lower --lr"):
        train("finetune", "--lr", "1e38", "--epochs", "2", "--warmup_epochs", "0", "--precision", "bf16")


def test_a_diverged_classifier_does_not_affect_the_others(trained):
    folder, path, _ = trained
    flags = ["--epochs", "6", "--precision", "fp32", "--weight_decay", "10", "--lr", "0.3"]
    assert train("linear", *flags, "3e38")["lr"] == 0.3
    train("linear", *flags, "0.3", "--output_dir", "alone", output=folder / "alone")
    alone, other = (load_file(output / "classifier.safetensors") for output in (
        folder / "alone", path.with_name("teacher.linear.images")))
    torch.testing.assert_close(alone, other)
    with pytest.raises(FloatingPointError, match="every classifier of the grid diverged"):
        train("linear", "--quick", "--lr", "10", "--weight_decay", "100", "--epochs", "100")


def test_signal_handlers_are_restored_after_training(trained):
    before = signal.getsignal(signal.SIGTERM)
    train("linear", "--lr", "0.1", "--epochs", "1")
    assert signal.getsignal(signal.SIGTERM) is before


def test_logits_are_computed_in_float32(trained, monkeypatch):
    """In bfloat16 two of a thousand classes often tie."""
    report_accuracy, seen = report.report_accuracy, []
    monkeypatch.setattr(report, "report_accuracy", lambda logits, *rest: (
        seen.append(logits), report_accuracy(logits, *rest)))
    train("finetune", "--epochs", "1", "--warmup_epochs", "0", "--precision", "bf16")
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


def test_files_of_other_features_runs_and_classes_are_refused(trained):
    folder, path, model = trained
    cache = ["--features", "cache.safetensors"]
    train("linear", "--quick", "--epochs", "1", *cache)
    with pytest.raises(CheckpointError, match="with avgpool_patchtokens False, not None"):
        run("knn", *CPU, *cache)
    Path("cache.safetensors").unlink()
    run("knn", *CPU, *cache, "--untrained")
    with pytest.raises(CheckpointError, match="with untrained True, not False"):
        run("knn", *CPU, *cache)
    Path("cache.safetensors").unlink()
    networks = {name: {f"backbone.{key}": tensor + i for key, tensor in model.state_dict().items()}
                for i, name in enumerate(("student", "teacher"))}
    torch.save(networks | {"info": load_backbone(path)[1]}, "both.pth")
    both = ["knn", *CPU, *cache, "--ckpt", "both.pth", "--data_path", "images"]
    run(*both)
    with pytest.raises(CheckpointError, match="with network teacher, not student"):
        run(*both, "--checkpoint_key", "student")
    Path("cache.safetensors").unlink()
    run(*both, "--checkpoint_key", "student")
    moved, place = next((folder / "images" / "train" / "class0").iterdir()), folder / "images" / "train" / "class1"
    os.rename(moved, place / "moved.png")
    with pytest.raises(CheckpointError, match="cache.safetensors: holds features with train_files"):
        run(*both, "--checkpoint_key", "student")
    os.rename(place / "moved.png", moved)
    assert {p.name for p in folder.glob("*.knn.*.json")} == {"both.knn.images.json", "both.student.knn.images.json"}
    before = path.read_bytes()
    for flags in ([], ["--resume", "none", "--overwrite"]):
        with pytest.raises(CheckpointError, match="holds teacher.safetensors,? of another kind of run"):
            train("linear", "--output_dir", str(path.parent), *flags)
    assert path.read_bytes() == before
    train("linear", "--lr", "0.1", "--epochs", "1")
    output = str(path.with_name("teacher.linear.images"))
    with pytest.raises(CheckpointError, match="another kind of run|was trained with"):
        train("finetune", "--output_dir", output)
    weights, info = load_file(path), load_backbone(path)[1]
    save_model(str(path), weights | {"backbone.cls_token": weights["backbone.cls_token"] + 1}, info)
    with pytest.raises(CheckpointError, match="the model has changed, --resume none --overwrite trains on it anew"):
        train("linear", "--lr", "0.1", "--epochs", "1")
    path.write_bytes(before)
    for part in ("train", "val"):
        (folder / "images" / part / "class0").rename(folder / "images" / part / "zebra")
    for flags in (["--lr", "0.1", "--epochs", "1"], ["--test_only"]):
        with pytest.raises(CheckpointError, match="trained with classes .'class0'"):
            train("linear", *flags)


def test_corrupt_images_are_skipped_and_counted(trained, capsys):
    folder, path, _ = trained
    corrupt = folder / "images" / "val" / "class1" / "01.png"
    corrupt.write_bytes(b"bad")
    (folder / "images" / "train" / "class1" / "01.png").write_bytes(b"bad")
    result = train("linear", "--lr", "0.1", "--epochs", "2", "--val_freq", "1")
    assert result["num_images"] == 22 and len(result["corrupt"]) == result["corrupt_train_images"] == 1
    assert capsys.readouterr().out.count(f"skipped corrupt image {corrupt}") == 1
    lines = (path.with_name("teacher.linear.images") / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert log[-1]["corrupt_images"] == 1


# ---- segmentation ----

def test_segmentation_equals_scikit_learn(trained, capsys):
    """The confusion matrix, from the weights in classifier.safetensors by hand; --test_only agrees."""
    folder, path, model = trained
    write_masks(folder)
    (folder / "set" / "images" / "val" / "05.png").write_bytes(b"bad")
    (folder / "set" / "masks" / "train" / "07.png").write_bytes(b"bad")
    Image.new("L", (3, 3)).save(folder / "set" / "masks" / "train" / "08.png")
    flags = ["--data_path", "set", "--epochs", "3", "--val_freq", "2", "--image_size", "48", "--precision", "fp32"]
    output = path.with_name("teacher.segmentation.set")
    result = train("segmentation", *flags, output=output)
    out = capsys.readouterr().out
    weights, truths, predictions = load_file(output / "classifier.safetensors"), [], []
    for i in [*range(5), *range(6, 23)]:
        image, mask = (Image.open(folder / "set" / kind / "val" / f"{i:02}.png") for kind in ("images", "masks"))
        width, height = (max(1, round(side * 48 / min(image.size) / 8)) * 8 for side in image.size)
        x = transforms.functional.to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
        x = transforms.functional.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            tokens = model.get_intermediate_layers(x[None])[0][0, 1:]
        mean, var, scale, shift = (weights[f"classifier.norm.{name}"] for name in (
            "running_mean", "running_var", "weight", "bias"))
        tokens = (tokens - mean) / (var + 1e-5).sqrt() * scale + shift
        logits = tokens @ weights["classifier.weight"][:, :, 0, 0].T + weights["classifier.bias"]
        logits = torch.nn.functional.interpolate(logits.T.view(1, 3, height // 8, width // 8), mask.size[::-1],
                                                 mode="bilinear")[0]
        truths.append(np.asarray(mask).ravel())
        predictions.append(logits.argmax(dim=0).numpy().ravel())
    truth, predicted = np.concatenate(truths), np.concatenate(predictions)
    truth, predicted = truth[truth != 255], predicted[truth != 255]
    found = np.array(result["confusion_matrix"])
    assert found.sum() == len(truth)
    assert np.abs(found - confusion_matrix(truth, predicted, labels=range(3))).sum() <= 4  # ties
    assert result["miou"] == pytest.approx(100 * jaccard_score(truth, predicted, average="macro"), abs=0.05)
    assert result["accuracy"] == pytest.approx(100 * (truth == predicted).mean(), abs=0.05)
    recalls = recall_score(truth, predicted, labels=range(3), average=None)
    assert [row["accuracy"] for row in result["per_class"].values()] == pytest.approx(100 * recalls, abs=0.1)
    assert list(result["per_class"]) == ["0", "1", "2"] and result["num_images"] == 22
    assert "22 test images: mIoU " in out and "epoch 1: test mIoU " in out and "effective lr 0.001 = lr * 16" in out
    assert result["corrupt_train_images"] == 2
    assert [result[name] for name in ("seed", "precision", "crop_scale", "global_batch_size")] == [
        0, "fp32", [0.25, 1.0], 16]
    assert result["corrupt"] == [next(line.split("image ", 1)[1] for line in out.splitlines() if "05.png" in line)]
    assert train("segmentation", *flags, "--test_only", output=output) == result


def test_segmentation_of_the_built_in_shapes_learns(trained, small_shapes):
    """From random weights: mIoU above that of the background for all pixels, a ninth of its share."""
    _, path, _ = trained
    output = path.with_name("teacher.untrained.segmentation.shapes-32")
    result = train("segmentation", "--untrained", "--epochs", "2", "--lr", "0.1", "--image_size", "32",
                   output=output)
    assert result["dataset_sizes"] == [300, 60] and len(result["classes"]) == 9
    background = np.array(result["confusion_matrix"])[0].sum() / np.sum(result["confusion_matrix"])
    assert result["miou"] > 100 * background / 9 + 3


def test_wrong_segmentation_input_is_one_line(trained, exit_message):
    folder, path, _ = trained
    write_masks(folder)
    run("segmentation", *CPU, "--data_path", "set", "--epochs", "1", "--val_freq", "0")
    output = path.with_name("teacher.segmentation.set")
    assert json.loads((output / "result.json").read_text())["image_size"] == 72  # 480 / 224 * 32, whole patches
    for flags, message in (
            (["--data_path", "images"], "images: no images with masks; expected images/ beside masks/"),
            (["--data_path", "set", "--n_last_blocks", "4"], "--n_last_blocks 4 is more than the model's depth, 1"),
            (["--data_path", "set", "--image_size", "50"], "--image_size 50: not multiples of the model's patch size"),
            (["--data_path", "set", "--epochs", "2"], "was trained with epochs 1, not 2"),
            (["--data_path", "set", "--test_only", "--n_last_blocks", "1", "--untrained", "--output_dir", str(output)],
             "trained with untrained False, not True")):
        assert message in exit_message(run, "segmentation", *CPU, *flags)
    assert "classifies patches, here images are" in exit_message(run, "predict", "--ckpt", str(output), "images")
    write_masks(folder / "one", [(32, 32)])
    for path in [*(folder / "one").rglob("*.png")]:
        path.rename(path.parents[1] / "0.png")
    for path in [*(folder / "one").rglob("train"), *(folder / "one").rglob("val")]:
        path.rmdir()
    assert exit_message(run, "segmentation", *CPU, "--data_path", "one/set").endswith(
        "one/set: too few labeled images to train and to hold out a part, at least 2 are needed")
    for path in (folder / "set" / "masks" / "val").iterdir():
        Image.fromarray(np.full(np.asarray(Image.open(path)).shape, 255, np.uint8)).save(path)
    assert "set: the masks of the 23 test images are unlabeled, nothing to test" in exit_message(
        run, "segmentation", *CPU, "--data_path", "set", "--test_only")
    for path in (folder / "set" / "masks" / "val").iterdir():
        path.write_bytes(b"bad")
    assert "set: no test image can be read, the last: " in exit_message(
        run, "segmentation", *CPU, "--data_path", "set", "--test_only")


def test_segmentation_of_black_and_white_masks(trained):
    """Two classes, 0 and 255, none of which is left out: with classes.txt too."""
    folder, path, _ = trained
    write_masks(folder, sizes=[(32, 32)])
    for mask in (folder / "set" / "masks").rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(mask)) % 255 > 0).astype(np.uint8) * 255).save(mask)
    (folder / "set" / "classes.txt").write_text("sky\nshape\n")
    result = train("segmentation", "--data_path", "set", "--epochs", "1", output=path.with_name(
        "teacher.segmentation.set"))
    matrix = np.array(result["confusion_matrix"])
    shapes = sum((np.asarray(Image.open(mask)) > 0).sum() for mask in (folder / "set" / "masks" / "val").iterdir())
    assert matrix.sum(axis=1).tolist() == [23 * 32**2 - shapes, shapes] and result["miou"] < 100
    assert list(result["per_class"]) == result["classes"] == ["sky", "shape"]


# ---- class names ----

def test_class_names_are_unique():
    images = Shapes("test", 9, 32)
    assert evaluate.list_class_names(Data(images, images, images, "", ""))[:2] == ["red", "amber"]
    images.classes = [("tench", "Tinca tinca"), "crane", "crane"]
    names = evaluate.list_class_names(Data(images, images, images, "", ""))
    assert names == ["tench, Tinca tinca", "crane (1)", "crane (2)"]


class Unnamed(torch.utils.data.Dataset):
    """Without class names, and without an end of its iteration, like torchvision's SVHN."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.new("RGB", (32, 32)), self.labels[i]


def test_classes_without_names_are_numbered():
    train, test = TorchvisionDataset(Unnamed([0, 2, 1])), TorchvisionDataset(Unnamed([4]))
    test.images.labels.append("corrupt")
    assert evaluate.list_class_names(Data(train, train, test, "", "")) == ["0", "1", "2", "3", "4"]


def test_a_classifier_of_the_version_before_the_redesign_is_resumed_and_tested(small_shapes, tmp_path, capsys):
    before = Path(__file__).parent / "fixtures" / "before_redesign"
    shutil.copytree(before / "linear", tmp_path / "linear")
    flags = ["--ckpt", str(before / "teacher.safetensors"), "--data_path", "shapes", "--lr", "0.1", "--epochs", "2",
             "--precision", "fp32", "--output_dir", str(tmp_path / "linear")]
    run("linear", *CPU, *flags, "--test_only")
    tested = json.loads((tmp_path / "linear" / "result.json").read_text())
    run("linear", *CPU, *flags)
    assert "holds a complete run" in capsys.readouterr().out
    resumed = json.loads((tmp_path / "linear" / "result.json").read_text())
    assert tested["top1"] == resumed["top1"] and tested["confusions"] == resumed["confusions"]


def test_quick_classifiers_do_not_go_into_the_folder_of_a_run(trained):
    folder, path, _ = trained
    with pytest.raises(CheckpointError, match="holds teacher.safetensors of a training run: choose another"):
        run("linear", *CPU, "--quick", "--ckpt", str(path), "--data_path", "images", "--output_dir", str(path.parent))
    assert not (path.parent / "classifier.safetensors").exists()
