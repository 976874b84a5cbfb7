import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier
from step import build_networks
from torchvision import transforms
from torchvision.datasets import ImageFolder

import evaluate
from common.weights import CheckpointError, load_backbone, save_model
from data.datasets import Data, DataError, TorchvisionDataset
from data.loaders import center_crop_view
from data.shapes import Shapes
from evaluation import supervised as classify
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]


def write_pictures(folder, train, val):
    """So many pictures of three classes in folder/pictures."""
    for part, count in (("train", train), ("val", val)):
        shapes = Shapes("test", count, 32)
        for i in range(count):
            path = folder / "pictures" / part / f"class{i % 3}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shapes[i][0].save(path)


@pytest.fixture
def run(tmp_path):
    """A folder of labelled pictures, a model trained on it, and where they are."""
    write_pictures(tmp_path, 60, 23)
    torch.manual_seed(0)
    vit = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = VisionTransformer(**vit).eval()
    path = tmp_path / "runs" / "one" / "teacher.safetensors"
    path.parent.mkdir(parents=True)
    save_model(path, {f"backbone.{k}": v for k, v in model.state_dict().items()},
               dict(arch="vit_tiny", backbone=vit, data_path=str(tmp_path / "pictures")))
    return tmp_path, path, model


def released_layout():
    """Random weights under the names and in the shapes of the released ViT-S/16, dino_deitsmall16_pretrain.pth."""
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


def test_a_file_of_the_released_layout_is_judged_as_published(tmp_path, capsys):
    """The paper's protocol: 224 of 256 pixels, bicubic, features of CLS, 20 neighbours, temperature 0.07."""
    folder, weights = tmp_path, released_layout()
    write_pictures(folder, 24, 6)
    torch.save(weights, folder / "dino_deitsmall16_pretrain.pth")
    evaluate.main(evaluate.parse_args([
        "knn", "--ckpt", str(folder / "dino_deitsmall16_pretrain.pth"), "--data_path", str(folder / "pictures"),
        "--num_workers", "0", "--device", "cpu", "--features", str(folder / "features.safetensors")]))
    assert "all 150 backbone tensors matched" in capsys.readouterr().out
    theirs = timm.create_model("vit_small_patch16_224.dino").eval()
    theirs.load_state_dict(weights)
    view = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
                               transforms.ToTensor(), transforms.Normalize(theirs.default_cfg["mean"],
                                                                           theirs.default_cfg["std"])])
    expected = {}
    for part in ("train", "val"):
        images = ImageFolder(folder / "pictures" / part, transform=view)
        with torch.no_grad():
            expected[part] = theirs(torch.stack([x for x, _ in images])), images.targets
    features = load_file(folder / "features.safetensors")
    for part, name in (("train", "bank"), ("val", "queries")):
        torch.testing.assert_close(features[name], expected[part][0], rtol=0, atol=1e-4)
    (bank, labels), (queries, truth) = expected["train"], expected["val"]
    neighbours = KNeighborsClassifier(20, metric="cosine", algorithm="brute",
                                      weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(bank, labels)
    result = json.loads((folder / "dino_deitsmall16_pretrain.knn.json").read_text())
    assert result["knn"]["20"]["top1"] == pytest.approx(100 * neighbours.score(queries, truth), abs=1e-4)
    assert (result["bank"], result["queries"], result["temperature"]) == (24, 6, 0.07)


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
            x = model(torch.stack([center_crop_view(shapes[i][0], 32) for i in order]))
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
    save_model(path, model.state_dict(), dict(backbone=vit, data_path=f"cifar10:{folder}"))
    with pytest.raises(DataError, match="Dataset not found"):
        evaluate.main(evaluate.parse_args(["knn"]))


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


def train(folder, task, *more, at=None):
    """One of the tasks that train, in this process; its result."""
    command = [task, "--num_workers", "0", "--device", "cpu", "--batch_size_per_gpu", "16", "--val_freq", "0"]
    evaluate.main(evaluate.parse_args([*command, *more]))
    at = at or folder / "runs" / "one" / f"teacher.{task}{'_quick' * ('--quick' in more)}"
    return json.loads((at / "result.json").read_text())


def held_out(count=23):
    """The held-out pictures in the order in which they are judged, and their classes."""
    shapes, order = Shapes("test", count, 32), sorted(range(count), key=lambda i: (i % 3, i))
    return torch.stack([center_crop_view(shapes[i][0], 32) for i in order]), torch.tensor([i % 3 for i in order])


def test_quick_linear(run, monkeypatch, capsys):
    """The features are the paper's, the answers those of the classifier on these features, the report adds up."""
    folder, path, model = run
    monkeypatch.chdir(folder)
    kept = folder / "features.safetensors"
    result = train(folder, "linear", "--quick", "--features", str(kept), "--avgpool_patchtokens", "--epochs", "40")
    out = capsys.readouterr().out
    images, labels = held_out()
    with torch.no_grad():
        tokens = model.get_intermediate_layers(images, 1)[0]
    x = load_file(kept)["queries"]
    torch.testing.assert_close(x, torch.cat((tokens[:, 0], tokens[:, 1:].mean(dim=1)), dim=1))
    classifier = load_file(folder / "runs" / "one" / "teacher.linear_quick" / "classifier.safetensors")
    answers = (x @ classifier["classifier.weight"].T + classifier["classifier.bias"]).argmax(dim=1)
    assert result["top1"] == pytest.approx(100 * (answers == labels).double().mean().item())
    assert f"top-1 {result['top1']:.2f}" in out and list(result["per_class"]) == ["class0", "class1", "class2"]
    counts = [8, 8, 7]
    assert sum(n * a for n, a in zip(counts, result["per_class"].values())) / 23 == pytest.approx(result["top1"])
    assert sum(count for *_, count in result["confused"]) == round(23 * (1 - result["top1"] / 100))
    assert result["top5"] == 100 and "effective lr 0.000234, 0.000703," in out  # of three classes; 60 of 256 pictures


@pytest.mark.parametrize("task, more", [("linear", ["--lr", "0.3"]), ("linear", ["--lr", "0.1", "3"]),
                                        ("finetune", ["--lr", "0.01", "--mixup", "0.8", "--warmup_epochs", "1"])])
def test_a_classifier_is_judged_again_from_its_file(run, monkeypatch, capsys, task, more):
    folder, path, model = run
    monkeypatch.chdir(folder)
    result = train(folder, task, *more, "--epochs", "6", "--precision", "fp32")
    said = capsys.readouterr().out
    assert result["judged"] == 23 and result["pictures"] == [60, 23] and "(linear scaling rule)" in said
    assert ("best on a tenth held out" in said) == (len(more) == 3)
    made = folder / "runs" / "one" / f"teacher.{task}" / "classifier.safetensors"
    images, labels = held_out()
    backbone, _ = load_backbone(made if task == "finetune" else path)
    classifier = load_file(made)
    with torch.no_grad():
        logits = backbone(images) @ classifier["classifier.weight"].T + classifier["classifier.bias"]
    assert result["top1"] == pytest.approx(100 * (logits.argmax(dim=1) == labels).double().mean().item())
    (made.parent / "checkpoint.pth").unlink()
    before = made.read_bytes()
    assert train(folder, task, "--test_only") == result and made.read_bytes() == before
    assert (task == "linear") == all(torch.equal(a, b) for a, b in zip(backbone.parameters(), model.parameters()))
    for flags, words in (([], "holds classifier.safetensors of an earlier run: --resume none --overwrite"),
                         (["--test_only", "--image_size", "40"], "trained with image_size 32, not 40"),
                         (["--test_only", "--untrained", "--output_dir", str(made.parent)], "False, not True")):
        with pytest.raises(CheckpointError, match=words):
            train(folder, task, *flags)


class Killed(BaseException):
    """What no handler of the program expects."""


@pytest.mark.parametrize("task", ["linear", "finetune"])
@pytest.mark.parametrize("end", ["killed", "SIGTERM"])
def test_going_on_changes_nothing(run, monkeypatch, capsys, task, end):
    """An interrupted training ends with the same classifier, backbone and log as one that was not."""
    folder, path, _ = run
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    more = {"linear": ["--lr", "0.1", "0.3"], "finetune": ["--cutmix", "1", "--mixup", "0.8", "--warmup_epochs", "1"]}
    more = [*more[task], "--epochs", "4", "--log_every", "1", "--save_every_minutes", "1e-9"]
    output = folder / "runs" / "one" / f"teacher.{task}"
    train(folder, task, *more)
    output.rename(folder / "whole")
    step = classify.supervised_step
    calls = itertools.count()

    def interrupted(*args):
        if next(calls) == 5:
            if end == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(classify, "supervised_step", interrupted)
    capsys.readouterr()
    with pytest.raises(Killed) if end == "killed" else contextlib.nullcontext():
        train(folder, task, *more) if end == "killed" else evaluate.main(evaluate.parse_args(
            [task, "--num_workers", "0", "--device", "cpu", "--batch_size_per_gpu", "16", "--val_freq", "0", *more]))
    assert not (output / "classifier.safetensors").exists()
    assert end == "killed" or "stopped by SIGTERM after step 6 of" in capsys.readouterr().out
    train(folder, task, *more)
    assert f"going on at step {5 if end == 'killed' else 6} of" in capsys.readouterr().out
    one, two = (load_file(place / "classifier.safetensors") for place in (output, folder / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    logs = [[json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
            for place in (output, folder / "whole")]
    assert [(r["step"], r["loss"], r["lr"]) for r in logs[0]] == [(r["step"], r["loss"], r["lr"]) for r in logs[1]]
    with pytest.raises(CheckpointError, match="was trained with epochs 4, not 5"):
        train(folder, task, *more, "--epochs", "5")
    for number, handler in handlers.items():
        signal.signal(number, handler)


SEVERAL = """
import json, os, sys
import torch.distributed as dist
import evaluate
for i, argv in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)  # else a group meets the addresses of the one before
    evaluate.main(evaluate.parse_args(argv))
    if dist.is_initialized():
        dist.destroy_process_group()
"""


def test_two_and_three_processes_judge_each_picture_once(run):
    """60 and 23 pictures: neither 2 nor 3 divides those that are judged. Tables and losses are those of one process."""
    folder, path, _ = run
    tables, losses = [], []
    for processes in (1, 2, 3):
        common = ["--ckpt", str(path), "--data_path", str(folder / "pictures"), "--num_workers", "0", "--device", "cpu",
                  "--batch_size_per_gpu", str(12 // processes)]
        training = ["--epochs", "2", "--log_every", "1", "--precision", "fp32"]
        outputs = [folder / f"{task}{processes}" for task in ("linear", "quick", "finetune")]
        tasks = [["knn"], ["linear", "--lr", "0.3", "--output_dir", str(outputs[0]), *training],
                 ["linear", "--quick", "--output_dir", str(outputs[1]), *training],
                 ["finetune", "--warmup_epochs", "1", "--drop_path_rate", "0", "--output_dir", str(outputs[2]),
                  *training]]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--no-python",
                    sys.executable] if processes > 1 else []
        command = [sys.executable, *launcher, "-c", SEVERAL, json.dumps([task + common for task in tasks])]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        assert "23 pictures among 60" in result.stdout and result.stdout.count("23 pictures: top-1") == 3
        assert "features of 60 pictures" in result.stdout
        tables.append([json.loads((place / "result.json").read_text()) for place in outputs]
                      + [json.loads(path.with_name("teacher.knn.json").read_text())])
        losses.append([json.loads(line)["loss"] for place in (outputs[0], outputs[2])
                       for line in (place / "log.jsonl").read_text().splitlines()])
    assert tables[0] == tables[1] == tables[2]
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_a_training_that_diverges_says_so(run, monkeypatch):
    folder, _, _ = run
    monkeypatch.chdir(folder)
    with pytest.raises(FloatingPointError, match="in bf16 the loss is not finite; lower --lr or name --precision fp32"):
        train(folder, "finetune", "--lr", "1e38", "--epochs", "2", "--warmup_epochs", "0", "--precision", "bf16")


def test_untrained_is_what_train_py_starts_from(run, monkeypatch, capsys):
    folder, path, model = run
    monkeypatch.chdir(folder)
    student, _ = build_networks(dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
                                dict(out_dim=8, hidden_dim=8), seed=0)
    kept = folder / "features.safetensors"
    evaluate.main(evaluate.parse_args(["knn", "--untrained", "--num_workers", "0", "--device", "cpu", "--features",
                                       str(kept)]))
    assert "teacher.safetensors untrained: 23 pictures" in capsys.readouterr().out
    assert path.with_name("teacher.untrained.knn.json").exists() and not path.with_name("teacher.knn.json").exists()
    with torch.no_grad():
        torch.testing.assert_close(load_file(kept)["queries"], student.backbone.eval()(held_out()[0]))


def test_classes_keep_their_names():
    pictures = Shapes("test", 9, 32)
    assert evaluate.class_names(Data(pictures, pictures, pictures, "", ""))[:2] == ["red", "amber"]
    pictures.classes = [("tench", "Tinca tinca"), "crane", "crane"]
    names = evaluate.class_names(Data(pictures, pictures, pictures, "", ""))
    assert names == ["tench, Tinca tinca", "crane (1)", "crane (2)"]


class Unnamed(torch.utils.data.Dataset):
    """As torchvision's SVHN: no names of classes, and no end for an iteration to find."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.new("RGB", (32, 32)), self.labels[i]


def test_sets_that_do_not_name_their_classes():
    bank, queries = TorchvisionDataset(Unnamed([0, 2, 1])), TorchvisionDataset(Unnamed([4]))
    queries.images.labels.append("cut")  # cannot be read
    assert evaluate.class_names(Data(bank, bank, queries, "", "")) == ["0", "1", "2", "3", "4"]


def test_what_was_made_from_something_else_is_refused(run, monkeypatch):
    """Features of other blocks, of random weights, of the other network; a classifier of other classes; a run."""
    folder, path, model = run
    monkeypatch.chdir(folder)
    common = ["--num_workers", "0", "--device", "cpu", "--features", "kept.safetensors"]

    def knn(*more):
        evaluate.main(evaluate.parse_args(["knn", *common, *more]))

    train(folder, "linear", "--quick", "--epochs", "1", "--features", "kept.safetensors")
    with pytest.raises(CheckpointError, match="with avgpool_patchtokens False, not None"):
        knn()
    Path("kept.safetensors").unlink()
    knn("--untrained")
    with pytest.raises(CheckpointError, match="with untrained True, not False"):
        knn()
    Path("kept.safetensors").unlink()
    networks = {name: {f"backbone.{key}": tensor + i for key, tensor in model.state_dict().items()}
                for i, name in enumerate(("student", "teacher"))}
    torch.save(networks | {"info": load_backbone(path)[1]}, "both.pth")
    both = ["--ckpt", "both.pth", "--data_path", "pictures"]
    knn(*both)
    with pytest.raises(CheckpointError, match="with network teacher, not student"):
        knn(*both, "--checkpoint_key", "student")
    Path("kept.safetensors").unlink()
    knn(*both, "--checkpoint_key", "student")
    assert {p.name for p in folder.glob("*.knn.json")} == {"both.knn.json", "both.student.knn.json"}
    whole = path.read_bytes()
    for flags in ([], ["--resume", "none", "--overwrite"]):
        with pytest.raises(CheckpointError, match="holds teacher.safetensors, of another kind of run"):
            train(folder, "linear", "--output_dir", str(path.parent), *flags)
    assert path.read_bytes() == whole
    train(folder, "linear", "--lr", "0.1", "--epochs", "1")
    with pytest.raises(CheckpointError, match="holds classifiers that were trained without --quick"):
        train(folder, "linear", "--quick", "--output_dir", str(path.parent / "teacher.linear"))
    with pytest.raises(CheckpointError, match="is of another kind of run|was trained with"):
        train(folder, "finetune", "--output_dir", str(path.parent / "teacher.linear"))
    for part in ("train", "val"):
        (folder / "pictures" / part / "class0").rename(folder / "pictures" / part / "zebra")
    with pytest.raises(CheckpointError, match="was trained with classes .'class0'"):
        train(folder, "linear", "--lr", "0.1", "--epochs", "1")
    with pytest.raises(CheckpointError, match="trained with classes .'class0'"):
        train(folder, "linear", "--test_only")


def test_places_that_cannot_be_written_are_refused_at_once(run, monkeypatch):
    folder, path, _ = run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(evaluate, "extract", None)
    for flags, words in ((["--features", "/proc/f"], "/proc: nothing can be written there"),
                         (["--output_dir", "/proc"], "/proc: nothing can be written there"),
                         (["--output_dir", "/proc/missing"], "/proc/missing")):
        with pytest.raises(OSError, match=words):
            evaluate.main(evaluate.parse_args(["knn", "--num_workers", "0", "--device", "cpu", *flags]))


def test_one_that_diverges_is_not_in_the_way_of_the_others(run, monkeypatch):
    folder, path, _ = run
    monkeypatch.chdir(folder)
    more = ["--epochs", "12", "--precision", "fp32", "--weight_decay", "10", "--lr", "0.3"]
    result = train(folder, "linear", *more, "3e38")
    assert result["lr"] == 0.3
    train(folder, "linear", *more, "0.3", "--output_dir", str(folder / "alone"), at=folder / "alone")
    one, two = (load_file(at / "classifier.safetensors") for at in (folder / "alone", path.with_name("teacher.linear")))
    torch.testing.assert_close(one, two)
    with pytest.raises(FloatingPointError, match="every classifier of the grid diverged"):
        train(folder, "linear", "--quick", "--lr", "10", "--weight_decay", "100", "--epochs", "100")


def test_signals_are_the_programs_own_again_after_training(run, monkeypatch):
    folder, _, _ = run
    monkeypatch.chdir(folder)
    before = signal.getsignal(signal.SIGTERM)
    train(folder, "linear", "--lr", "0.1", "--epochs", "1")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_classifier_answers_in_float32(run, monkeypatch):
    """Under bf16 two classes of a thousand often tie."""
    folder, _, _ = run
    monkeypatch.chdir(folder)
    judge, given = evaluate.judge, []
    monkeypatch.setattr(evaluate, "judge", lambda logits, *rest, **about: (given.append(logits), judge(
        logits, *rest, **about)))
    train(folder, "finetune", "--epochs", "1", "--warmup_epochs", "0", "--precision", "bf16")
    assert not torch.equal(given[0], given[0].bfloat16().float())


def test_unreadable_pictures_are_counted(run, monkeypatch, capsys):
    folder, _, _ = run
    monkeypatch.chdir(folder)
    bad = folder / "pictures" / "val" / "class1" / "01.png"
    bad.write_bytes(b"bad")
    (folder / "pictures" / "train" / "class1" / "01.png").write_bytes(b"bad")
    result = train(folder, "linear", "--lr", "0.1", "--epochs", "4", "--val_freq", "1")
    assert result["judged"] == 22 and len(result["unreadable"]) == 1
    assert capsys.readouterr().out.count(f"skipped unreadable picture {bad}") == 1
    log = [json.loads(line) for line in (folder / "runs/one/teacher.linear/log.jsonl").read_text().splitlines()]
    assert log[-1]["unreadable"] == 1
