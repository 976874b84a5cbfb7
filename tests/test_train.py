import copy
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import export
import infer
import train
from common import estimate
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.weights import load_backbone
from data import loaders
from data.datasets import DataError
from data.images import read_image
from data.loaders import center_crop_view
from data.shapes import Shapes
from dino_loss import DINOHead, DINOLoss, MultiCropWrapper, koleo_loss
from optim import build_optimizer, build_param_groups
from plotting.curves import read_log
from train import build_networks, compile_blocks, compute_schedule, train_step
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]
BEFORE = ROOT / "tests" / "fixtures" / "before_redesign"
TINY = ("--arch vit_tiny --patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --out_dim 64 --hidden_dim 32 "
        "--drop_path_rate 0 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --warmup_epochs 0 "
        "--device cpu --num_workers 0 --precision fp32 --knn_every 0 --log_every 1").split()


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def build(args):
    return build_networks(*train.model_arguments(args))


# ---- golden trajectories, through the functions that train.py runs ----

@pytest.mark.parametrize("variant", ["plain", pytest.param("compiled", marks=pytest.mark.slow), "checkpointed"])
@pytest.mark.parametrize("name, flags", [
    ("adamw", "--optimizer adamw --lr 2e-3"),
    ("sgd_free_last", "--optimizer sgd --lr 0.1 --norm_last_layer false")])
def test_24_steps_equal_the_reference(golden, image, name, flags, variant):
    g = golden(f"trajectory_{name}")
    args = train.parse_args(TINY + flags.split() + (
        "--epochs 4 --warmup_epochs 1 --min_lr 1e-5 --weight_decay 0.04 --weight_decay_end 0.4 --momentum_teacher 0.9 "
        "--clip_grad 0.3 --freeze_last_layer 1 --warmup_teacher_temp 0.04 --teacher_temp 0.06 "
        "--warmup_teacher_temp_epochs 2").split())

    def network():
        result = MultiCropWrapper(
            VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2),
            DINOHead(32, 96, hidden_dim=64, bottleneck_dim=32, norm_last_layer=args.norm_last_layer))
        result.load_state_dict({key[5:]: value.clone() for key, value in g.items() if key.startswith("init.")})
        return result

    student, teacher, dino_loss = network(), network().requires_grad_(False), DINOLoss(96)
    groups = build_param_groups(student)
    expected = golden(f"param_groups_{name}.json")
    assert sorted(n for n, _ in groups[0]["params"]) == sorted(expected["decay"])
    assert sorted(n for n, _ in groups[1]["params"]) == sorted(expected["no_decay"])
    optimizer = build_optimizer(args.optimizer, groups)
    student.backbone.activation_checkpointing = variant == "checkpointed"
    if variant == "compiled":
        compile_blocks(student.backbone)
        compile_blocks(teacher.backbone)
    losses, finite = [], torch.tensor(True)
    for step in range(24):
        crops = [image(4, s, s, 0.3 * step + 1.1 * v) for v, s in enumerate((32, 32, 16, 16, 16))]
        schedule = compute_schedule(step, 6, 256, args)  # a global batch size of 256 leaves the lr unscaled
        losses.append(train_step(student, teacher, dino_loss, optimizer, no_scaler(), [crops], schedule, args,
                                 finite)[0])
    assert finite
    torch.testing.assert_close(torch.stack(losses).double(), g["loss"], rtol=0, atol=2e-5)
    torch.testing.assert_close(dino_loss.center, g["center"], rtol=0, atol=1e-4)
    for which, net in (("student", student), ("teacher", teacher)):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, g[f"{which}.{key}"], rtol=0, atol=1e-4, msg=f"{which}.{key}")


# ---- parts ----

def test_a_run_may_end_before_its_schedules():
    flags = [*TINY, *"--warmup_epochs 1 --lr 0.01 --min_lr 0 --weight_decay 0.1 --weight_decay_end 0.3".split(),
             "--momentum_teacher", "0.9"]
    short, resumed, long = (train.parse_args([*flags, *more.split()]) for more in (
        "--epochs 4 --schedule_epochs 8", "--epochs 8 --schedule_epochs 5", "--epochs 8"))
    for step in range(40):
        assert compute_schedule(step, 10, 256, short) == compute_schedule(step, 10, 256, long)
        assert compute_schedule(step, 10, 256, resumed) == compute_schedule(step, 10, 256, long)
    end = compute_schedule(40, 10, 256, short)  # the step after the last, halfway from 0.1 to 0.3 and from 0.9 to 1
    assert (end.weight_decay, end.momentum) == pytest.approx((0.2, 0.95)) and 0.005 < end.lr < 0.007


def test_accumulated_micro_batches_are_one_large_batch():
    results = []
    for parts in (1, 4):
        args = train.parse_args([*TINY, "--lr", "0.1"])
        student, teacher = build(args)
        optimizer = build_optimizer("sgd", build_param_groups(student))  # adamw would amplify rounding near 0
        dino_loss = DINOLoss(64)
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            crops = [torch.randn(8, 3, s, s, generator=generator) for s in (32, 32, 16)]
            micro_batches = [[crop.chunk(parts)[i] for crop in crops] for i in range(parts)]
            stats = train_step(student, teacher, dino_loss, optimizer, no_scaler(), micro_batches,
                               compute_schedule(step + 5, 10, 256, args), args, torch.tensor(True))
        results.append((stats, dino_loss.center, *student.parameters()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_the_teacher_starts_as_a_copy_of_the_student():
    student, teacher = build_networks(*train.model_arguments(train.parse_args(TINY)), drop_path_rate=0.1)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters()))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert (student.backbone.drop_path_rate, teacher.backbone.drop_path_rate) == (0.1, 0.0)


@pytest.mark.parametrize("kind", ["student", "previous_step", "previous_epoch"])
def test_the_other_teachers_of_the_paper(kind):
    args = train.parse_args([*TINY, "--teacher", kind, "--lr", "0.01"])
    student, teacher = build(args)
    optimizer, dino_loss = build_optimizer("adamw", build_param_groups(student)), DINOLoss(64)

    def weights(network):
        return torch.cat([p.detach().flatten() for p in network.parameters()])
    students = [weights(student)]
    torch.manual_seed(0)
    for step in range(6):  # 3 per epoch
        crops = [torch.randn(4, 3, s, s) for s in (32, 32, 16)]
        train_step(student, teacher, dino_loss, optimizer, no_scaler(), [crops], compute_schedule(step, 3, 256, args),
                   args, torch.tensor(True))
        students.append(weights(student))
        assert not torch.equal(students[-1], students[-2])
        expected = {"student": step + 1, "previous_step": step, "previous_epoch": (step + 1) // 3 * 3}[kind]
        assert torch.equal(weights(teacher), students[expected])


def test_koleo_is_of_the_features_of_each_global_crop():
    args = train.parse_args([*TINY, *"--koleo_loss_weight 0.5 --clip_grad 0 --weight_decay 0 --lr 0.1".split()])
    student, teacher = build(args)
    optimizer, schedule = build_optimizer("sgd", build_param_groups(student)), compute_schedule(5, 3, 256, args)
    micro_batches, values = [[torch.randn(4, 3, s, s) for s in (32, 32, 16)] for _ in range(2)], []
    expected = copy.deepcopy(student)
    for crops in micro_batches:
        loss = DINOLoss(64)(expected(crops), teacher(crops[:2]), schedule.teacher_temp)
        first, second = (expected.backbone(crop) for crop in crops[:2])
        koleo = koleo_loss(first) + koleo_loss(second)
        ((loss + 0.5 * koleo) / 2).backward()
        values.append(torch.stack((loss, koleo)).detach())
    stats = train_step(student, teacher, DINOLoss(64), optimizer, no_scaler(), micro_batches, schedule, args,
                       torch.tensor(True), log=True)
    torch.testing.assert_close(stats[[0, 3]], sum(values) / 2)
    for p, q in zip(student.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q if q.grad is None else q - schedule.lr * q.grad)


def test_koleo_spreads_the_features_of_a_run(small_shapes, tmp_path, capsys):
    for weight in (0, 1):
        run(tmp_path / f"{weight}", f"--epochs 3 --koleo_loss_weight {weight} --lr 0.01 --knn_every 3")
    without, with_it = (lines(tmp_path / f"{weight}") for weight in (0, 1))
    assert "koleo" not in without[-2] and " koleo " in capsys.readouterr().out
    koleo = [line["koleo"] for line in with_it if "koleo" in line]
    assert len(koleo) == 12 and koleo[-1] < koleo[0] - 0.1
    assert with_it[-1]["rankme"] > without[-1]["rankme"] + 1


def test_koleo_of_a_single_image_is_refused(small_shapes, tmp_path):
    with pytest.raises(DataError, match="--koleo_loss_weight compares the images of a batch"):
        run(tmp_path, "--koleo_loss_weight 0.1 --batch_size_per_gpu 1")


@pytest.mark.parametrize("precision, bad, expected", [
    ("fp32", None, True), ("fp32", math.inf, False), ("fp32", math.nan, False), ("fp16", math.nan, False)])
def test_the_finite_flag_collects_losses(precision, bad, expected):
    args = train.parse_args([*TINY, "--precision", precision])
    student, teacher = build(args)
    optimizer, finite = build_optimizer("adamw", build_param_groups(student)), torch.tensor(True)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    for value in (0.0, bad or 0.0, 0.0):
        crops = [torch.full((2, 3, 32, 32), value), torch.zeros(2, 3, 32, 32)]
        train_step(student, teacher, DINOLoss(64), optimizer, scaler, [crops], compute_schedule(0, 3, 256, args), args,
                   finite)
    assert finite.item() == expected


def test_the_finite_flag_collects_gradients_but_for_fp16():
    """A loss of infinite slope: finite itself, its gradient not."""
    class InfiniteSlope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    for precision, expected in (("fp32", False), ("fp16", True)):
        args = train.parse_args([*TINY, "--precision", precision])
        student, teacher = build(args)
        forward = student.head.forward
        student.head.forward = lambda x, forward=forward: InfiniteSlope.apply(forward(x))
        optimizer, finite = build_optimizer("adamw", build_param_groups(student)), torch.tensor(True)
        before = [p.detach().clone() for p in student.parameters()]
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        train_step(student, teacher, DINOLoss(64), optimizer, scaler, [[torch.zeros(2, 3, 32, 32)] * 2],
                   compute_schedule(5, 3, 256, args), args, finite)
        assert finite.item() == expected
        if precision == "fp16":  # GradScaler has skipped the step
            assert all(torch.equal(p, q) for p, q in zip(student.parameters(), before)) and scaler.get_scale() == 2**15


# ---- whole runs ----

def run(folder, flags):
    train.main(train.parse_args([*TINY, "--output_dir", str(folder), *flags.split()]))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.fixture(autouse=True)
def restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_output_folder_among_the_images_is_not_searched(tmp_path, capsys):
    shapes, folder = Shapes("train", 40, 32), tmp_path / "images" / "run"
    folder.mkdir(parents=True)
    for i in range(40):
        shapes[i][0].save(folder.parent / f"{i:02}.png")
    shapes[0][0].save(folder / "curves.png")
    run(folder, f"--epochs 1 --batch_size_per_gpu 8 --data_path {folder.parent}")
    assert f"40 images in {folder.parent}, no labels" in capsys.readouterr().out
    with pytest.raises(DataError, match="choose another --output_dir"):
        run(folder.parent, f"--epochs 1 --data_path {folder.parent}")


def test_values_of_more_than_8_bits_have_one_range_everywhere(tmp_path, capsys, exit_message):
    """Found in the training images, then the same in every command, whatever the values of an image."""
    rng = np.random.RandomState(0)
    for part, c, i in itertools.product(("train", "val"), "ab", range(4)):
        (tmp_path / "data" / part / c).mkdir(parents=True, exist_ok=True)
        values = rng.randint(0, 4000 if part == "train" else 400, (32, 32)).astype("uint16")
        Image.fromarray(values).save(tmp_path / "data" / part / c / f"{i}.png")
    flags = [*TINY, "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--epochs", "1",
             "--batch_size_per_gpu", "4"]
    train.main(train.parse_args(flags))
    printed = capsys.readouterr().out
    assert "values 0 (black) to 4095 (white)" in printed and "NOTE: the images are nearly black" not in printed
    assert "--value_range 0.0 4095.0" in (tmp_path / "out" / "flags.txt").read_text()
    for file in (tmp_path / "data" / "train").glob("*/*.png"):  # none has values above 255 any more
        Image.open(file).point(lambda value: value / 64).save(file)
    train.main(train.parse_args([*flags, "--epochs", "2"]))
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    for file in (tmp_path / "data" / "train").glob("*/*.png"):
        Image.open(file).point(lambda value: value * 64).save(file)
    path = str(tmp_path / "out" / "teacher.safetensors")
    backbone, info = load_backbone(path)
    assert info["value_range"] == [0, 4095]
    line = exit_message(train.main, train.parse_args([*flags, "--value_range", "0", "4000"]))
    assert "value_range (0.0, 4095.0), not (0.0, 4000.0)" in line

    dark = str(tmp_path / "data" / "val" / "b" / "1.png")
    view = center_crop_view(read_image(dark, value_range=(0, 4095)), 32)
    assert (view - center_crop_view(read_image(dark), 32)).mean() < -1  # by its own values it would be bright
    with torch.no_grad():
        expected = backbone(view[None])[0].numpy()
    features = tmp_path / "features.safetensors"
    evaluate.main(evaluate.parse_args(["knn", "--ckpt", path, "--data_path", str(tmp_path / "data"), "--device", "cpu",
                                       "--num_workers", "0", "--features", str(features)]))
    np.testing.assert_allclose(load_file(features)["test_features"][5], expected, atol=1e-5)
    export.main(export.parse_args(["--ckpt", path]))
    session, metadata = infer.open_model(path.replace(".safetensors", ".onnx"))
    with Image.open(dark) as image:
        found, _ = infer.infer(session, metadata, infer.prepare(image, metadata))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    train.main(train.parse_args([*flags[:-6], "--output_dir", str(tmp_path / "dark"), "--data_path",
                                 str(tmp_path / "data"), "--epochs", "1", "--batch_size_per_gpu", "4", "--value_range",
                                 "0", "65535"]))
    assert "NOTE: the images are nearly black: --value_range" in capsys.readouterr().out


def test_files_log_and_console_of_a_run(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 2 --knn_every 1 --saveckp_freq 1 --linear_probe")
    out = capsys.readouterr().out
    for words in ("effective lr 0.001 = 0.004 * 64 / 256", "raw pixels", "untrained backbone", "linear top-1"):
        assert words in out
    line = next(line for line in out.splitlines() if " epoch 1/2 [8/8] " in line)
    for words in ("loss ", "(ln K 4.16)", "entropy ", "kl ", "lr ", " img/s", "data ", "elapsed 0:0", "eta 0:00:00"):
        assert words in line
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.pth", "checkpoint.pth.1", "checkpoint0000.pth", "checkpoint0001.pth",
                     "teacher.safetensors", "flags.txt", "student.safetensors", "teacher_best.safetensors", "log.jsonl",
                     ".lock"}
    records = [line for line in lines(tmp_path) if "loss" in line]
    assert len(records) == 8
    assert records[0].keys() == {
        "epoch", "step", "loss", "ln_k", "teacher_entropy", "teacher_marginal_entropy", "kl", "lr", "wd", "momentum",
        "teacher_temp", "images_per_sec", "data_time", "step_time", "eta", "corrupt_images", "loss_scale"}
    assert records[0]["ln_k"] == pytest.approx(math.log(64)) and 0 < records[0]["teacher_entropy"] <= math.log(64)
    assert records[0]["kl"] == pytest.approx(records[0]["loss"] - records[0]["teacher_entropy"])
    evaluations = [line for line in lines(tmp_path) if "eval" in line]
    assert [(line["eval"], "linear_top1" in line, "rankme" in line) for line in evaluations] == [
        ("raw pixels", False, False), *((name, True, True) for name in ("untrained backbone", "epoch 0", "epoch 1"))]
    assert f"rank {evaluations[-1]['rankme']:.1f} of 32" in out and 1 < evaluations[-1]["rankme"] < 32
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert state["progress"]["step"] == 8 and state["flags"]["embed_dim"] == 32
    teacher = load_file(tmp_path / "teacher.safetensors")
    assert teacher.keys() == state["teacher"].keys()
    assert all(torch.equal(value, state["teacher"][name]) for name, value in teacher.items())
    again = vars(train.parse_args([f"@{tmp_path / 'flags.txt'}"]))  # the flags written are the flags used
    assert state["flags"] == again | {"auto": state["flags"]["auto"]}


def test_a_run_resumed_with_more_epochs_keeps_its_warm_up(small_shapes, tmp_path, capsys):
    def learning_rates(folder, *flags):
        train.main(train.parse_args([*TINY[:first], *TINY[first + 2:], "--schedule_epochs", "20", "--output_dir",
                                     str(tmp_path / folder), *flags]))
        return [line["lr"] for line in lines(tmp_path / folder) if "lr" in line]

    first = TINY.index("--warmup_epochs")
    learning_rates("run", "--epochs", "2")
    assert "--warmup_epochs 1 with --epochs 2" in capsys.readouterr().out
    resumed = learning_rates("run", "--epochs", "12")  # of which a new run would warm up for two
    assert resumed == learning_rates("whole", "--epochs", "12", "--warmup_epochs", "1") and len(resumed) == 48


def test_images_without_labels_are_evaluated_by_rank(tmp_path, capsys):
    """At the start and at each epoch, once also in a resumed run; there is no k-NN accuracy and no best teacher."""
    shapes, folder = Shapes("train", 40, 32), tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        shapes[i][0].save(folder / f"{i:02}.png")
    flags = f"--batch_size_per_gpu 8 --data_path {folder} --knn_every 1 --knn_images 100 --epochs "
    run(tmp_path / "run", flags + "2")
    out = capsys.readouterr().out
    records = [line for line in lines(tmp_path / "run") if "eval" in line]
    assert [(line.pop("eval"), *line) for line in records] == [
        (name, "rankme") for name in ("untrained backbone", "epoch 0", "epoch 1")]
    for name, record in zip(("untrained backbone", "epoch 0", "epoch 1"), records):
        assert f"features of {name}: rank {record['rankme']:.1f} of 32\n" in out and 1 < record["rankme"] < 20
    assert "k-NN" not in out and not (tmp_path / "run" / "teacher_best.safetensors").exists()
    run(tmp_path / "run", flags + "2")
    run(tmp_path / "run", flags + "3")
    assert [line["eval"] for line in lines(tmp_path / "run") if "eval" in line] == [
        "untrained backbone", "epoch 0", "epoch 1", "epoch 2"]
    backbone, _ = load_backbone(str(tmp_path / "run" / "teacher.safetensors"))
    with torch.no_grad():  # of 20 images, a fifth of --knn_images
        features = backbone(torch.stack([center_crop_view(read_image(folder / f"{i:02}.png"), 32) for i in range(40)]))
    features = features[list(loaders.random_subset(range(40), 20).indices)]
    p = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p /= p.sum()
    rank = [line["rankme"] for line in lines(tmp_path / "run") if "eval" in line][-1]
    assert rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)


def test_the_log_begins_with_what_a_reproduction_needs(scene, tmp_path, capsys):
    folder = tmp_path / "my photos"
    folder.mkdir()
    for i in range(9):
        scene.rotate(i).save(folder / f"{i}.png")
    flags = [*TINY, "--data_path", str(folder), "--batch_size_per_gpu", "2", "--log_every", "50"]

    def train_epochs(epochs, name="run"):
        args = train.parse_args([*flags, "--output_dir", str(tmp_path / name), "--epochs", str(epochs)])
        train.main(args)
        return vars(args), [line["run"] for line in lines(tmp_path / name) if "run" in line], capsys.readouterr().out

    args, (header,), out = train_epochs(1)
    assert lines(tmp_path / "run")[0] == {"run": header}
    assert header["flags"] == json.loads(json.dumps(args)) and header["first_step"] == 0
    names = "\0".join(f"{i}.png" for i in range(9))
    sizes = "".join(f"{(folder / f'{i}.png').stat().st_size} " for i in range(9))
    assert header["sha256"] == hashlib.sha256((names + sizes).encode()).hexdigest() and header["num_images"] == 9
    assert header["torch"] == torch.__version__ and "commit" in header and "cpu" in header["device"]
    # what to do next can be pasted
    ckpt = f"--ckpt '{tmp_path}/run/teacher.safetensors'" if " " in str(tmp_path) else f"--ckpt {tmp_path}/run/teacher"
    for words in ("visualize.py attention", "retrieve.py search", "export.py"):
        assert f"python {words} {ckpt}" in out
    assert f"--data_path '{folder}' '{folder}/0.png'" in out
    assert read_log(tmp_path / "run" / "log.jsonl")["loss"].keys() == {1, 4}  # the first step is logged
    _, headers, _ = train_epochs(2)  # resumed
    assert [header["first_step"] for header in headers] == [0, 4]
    assert len(read_log(tmp_path / "run" / "log.jsonl")["loss"]) == 3
    assert train_epochs(2)[1] == headers  # complete
    (folder / "3.png").write_bytes((folder / "4.png").read_bytes() + b" ")
    assert train_epochs(1, "other")[1][0]["sha256"] != header["sha256"]


def test_a_dry_run_leaves_nothing_behind(small_shapes, tmp_path, capsys):
    def snapshot():
        return {path.relative_to(tmp_path): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    run(tmp_path / "run", "--epochs 1")
    before = snapshot()
    capsys.readouterr()
    for folder in (tmp_path / "run", tmp_path / "not" / "yet"):
        run(folder, "--epochs 3 --knn_every 1 --dry_run --log_every 50")
        assert snapshot() == before
        out = capsys.readouterr().out
        for words in ("k-NN of untrained backbone", "epoch 0/3 [1/12]", "epoch 0/3 [2/12]", "resuming at step 2 of 12",
                      "dry run: ", " GB of memory; ", " for 12 steps", "nothing was kept"):
            assert words in out
        assert "[3/12]" not in out


def test_a_stopped_dry_run_does_not_promise_to_resume(small_shapes, tmp_path, monkeypatch, capsys):
    def stop_after(*args, step=train.train_step, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", stop_after)
    run(tmp_path / "run", "--epochs 3 --dry_run")
    out = capsys.readouterr().out
    assert "dry run stopped by SIGINT; nothing was kept\n" in out and "same command resumes" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_of_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY,
               "--epochs", "1", "--dry_run", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("dry run: ") == 1, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_batch_size_follows_memory_and_is_kept(small_shapes, tmp_path, monkeypatch, capsys):
    def limit(batch_size):  # memory in which a fifth is free with so many images
        return lambda device: (COST.memory(batch_size) / 0.8 * 1.01, 1e12)

    def train_epochs(epochs, folder="run"):
        run(tmp_path / folder, f"--epochs {epochs}")
        return load_checkpoint(tmp_path / folder / "checkpoint.pth")["fixed"]["global_batch_size"]

    COST = estimate.Cost(1e9, 1e8, 1.0)
    monkeypatch.setattr(estimate, "measure_cost", lambda *args: COST)
    monkeypatch.setattr(train, "available_memory", limit(16))
    assert train_epochs(1) == 16 and "--batch_size_per_gpu 16: a step with 64 images takes" in capsys.readouterr().out
    monkeypatch.setattr(train, "available_memory", limit(64))
    assert train_epochs(2) == 16 and "resuming at step 18 of 36" in capsys.readouterr().out
    assert train_epochs(1, "other") == 64
    monkeypatch.setattr(train, "available_memory", lambda device: (1e9, 1e9))
    with pytest.raises(estimate.MemoryEstimateError, match="lower --out_dim"):
        train_epochs(1, "third")
    assert not (tmp_path / "third").exists()


def test_a_run_below_raw_pixels_says_so(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1 --knn_every 1 --lr 1e-5")  # as bad as untrained
    assert "WARNING: the trained backbone is not better than raw pixels" in capsys.readouterr().out


def test_epochs_are_no_baselines(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1 --knn_every 0")
    run(tmp_path, "--epochs 3 --knn_every 1 --lr 1e-5")  # evaluated for the first time after the first epoch
    out = capsys.readouterr().out
    last = re.findall(r"k-NN of epoch 2: top-1 ([0-9.]+)%", out)[0]
    assert f"k-NN top-1 (k = 20): epoch 2 {last}%\n" in out and "not better than" not in out


def test_a_run_whose_epochs_were_not_evaluated_is_not_called_bad(small_shapes, tmp_path, monkeypatch, capsys):
    def stop_in_epoch_1(*args, step=train.train_step, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    steps = []
    monkeypatch.setattr(train, "train_step", stop_in_epoch_1)
    run(tmp_path, "--epochs 9 --knn_every 9")
    assert "stopped by SIGINT after step 7 of" in capsys.readouterr().out
    run(tmp_path, "--epochs 1 --knn_every 9")
    out = capsys.readouterr().out
    assert "the run is in" in out and "not better than" not in out and "k-NN top-1" not in out


def test_a_flag_that_the_checkpoint_lacks_is_reported(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    del state["flags"]["schedule_epochs"], state["flags"]["koleo_loss_weight"]  # as before they existed
    save_checkpoint(tmp_path / "checkpoint.pth", **state)
    run(tmp_path, "--epochs 2 --schedule_epochs 5")
    out = capsys.readouterr().out
    assert "--schedule_epochs 0 -> 5\n" in out and "--koleo_loss_weight" not in out


def test_phases_longer_than_the_run_are_reported(small_shapes, tmp_path, capsys):
    run(tmp_path / "long", "--epochs 1 --freeze_last_layer 1 --warmup_teacher_temp_epochs 2 --teacher_temp 0.07")
    out = capsys.readouterr().out
    assert "NOTE: --freeze_last_layer 1 with --epochs 1: the last layer is not trained\n" in out
    assert "NOTE: --warmup_teacher_temp_epochs 2 with --epochs 1: the run ends before the temperature is 0.07\n" in out
    for folder, flags in (("short", "1 --teacher_temp 0.07"), ("constant", "2")):
        run(tmp_path / folder, f"--epochs 1 --freeze_last_layer 0 --warmup_teacher_temp_epochs {flags}")
    assert "_layer 0 with" not in (out := capsys.readouterr().out) and "before the temperature" not in out


@pytest.mark.parametrize("flags, words", [
    ("--epoch 5", "did you mean --epochs?"), ("--batch-size 8", "did you mean --batch_size_per_gpu?"),
    ("--arch vit_smal", "did you mean vit_small?"), ("--arch resnet51", "did you mean resnet50?"),
    ("--optimizer adam", "did you mean adamw?"), ("--qqqq 1", "unrecognized arguments: --qqqq 1\n")])
def test_what_is_unknown_suggests_the_nearest(flags, words, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(flags.split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags, expected", [
    ("", 10), ("--epochs 300", 10), ("--epochs 100", 10), ("--epochs 99", 10), ("--epochs 50", 5), ("--epochs 6", 1),
    ("--epochs 2", 1), ("--epochs 1", 0), ("--epochs 5 --warmup_epochs 10", 1), ("--epochs 20 --warmup_epochs 10", 10),
    ("--epochs 5 --warmup_epochs 0", 0), ("--epochs 100 --warmup_epochs 101", 10)])
def test_warmup_shrinks_with_few_epochs(flags, expected, capsys):
    args = train.parse_args(["--device", "cpu", *flags.split()])
    assert args.warmup_epochs == expected
    out, given = capsys.readouterr().out, int(flags.split()[-1]) if "warmup" in flags else None
    is_noted = given > args.epochs if given is not None else args.epochs < 100
    assert (f"NOTE: --warmup_epochs {expected} with --epochs {args.epochs}" in out) == is_noted
    assert (f" for {given}, which are more\n" in out) == (is_noted and given is not None)


@pytest.mark.parametrize("flags", ["", "--conv_stem", pytest.param("--shuffle blocks", marks=pytest.mark.slow)])
def test_an_interrupted_run_equals_an_uninterrupted_one(small_shapes, tmp_path, monkeypatch, flags):
    flags = f"--drop_path_rate 0.2 --epochs 3 {flags}"
    run(tmp_path / "whole", flags)

    class Killed(Exception):
        pass

    def save_then_die(*args):
        save_run(*args)
        raise Killed

    save_run = train.save_run
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", save_then_die)
        for _ in range(2):
            with pytest.raises(Killed):
                run(tmp_path / "parts", flags)
    run(tmp_path / "parts", flags + " --num_workers 2")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for which in ("student", "teacher", "dino_loss"):
        for name, value in whole[which].items():
            assert torch.equal(value, parts[which][name]), f"{which} {name}"


def test_a_run_of_the_version_before_the_redesign_resumes(small_shapes, tmp_path, capsys):
    """Its checkpoint.pth, with the keys of that version, ends like the run that it was taken from."""
    shutil.copytree(BEFORE, tmp_path / "run", ignore=shutil.ignore_patterns("linear", "*uninterrupted*"))
    train.main(train.parse_args([f"@{BEFORE / 'flags.txt'}", "--output_dir", str(tmp_path / "run")]))
    out = capsys.readouterr().out
    assert "resuming at step 8 of 16" in out
    expected = [json.loads(line) for line in (BEFORE / "log_uninterrupted.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in expected if "loss" in line}
    found = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if "loss" in line}
    assert found.keys() == expected.keys() and found == pytest.approx(expected, abs=1e-5)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["fixed"]["shuffle"] == "randperm"
    teacher, expected = (load_file(path) for path in (tmp_path / "run" / "teacher.safetensors",
                                                      BEFORE / "teacher_uninterrupted.safetensors"))
    for name, value in expected.items():
        torch.testing.assert_close(teacher[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form, flags, flags_of_one", [
    ("folder", "", "--batch_size_per_gpu 48"),
    ("folder", "--centering mean --koleo_loss_weight 0.5", "--accum_steps 2"),  # KoLeo is of the images of a process
    pytest.param("tar", "", "--batch_size_per_gpu 48", marks=pytest.mark.slow)])
def test_two_processes_equal_one_with_twice_the_batch(scene, tmp_path, form, flags, flags_of_one):
    for i in range(301):
        part = tmp_path / "images" / ("val" if i > 240 else "train") / str(i % 3)
        part.mkdir(parents=True, exist_ok=True)
        scene.rotate(7 * i).resize((40, 40)).save(part / f"{i}.png")
    if form == "tar":
        (tmp_path / "tars").mkdir()
        for part in ("train", "val"):
            with tarfile.open(tmp_path / "tars" / f"{part}.tar", "w") as tar:
                tar.add(tmp_path / "images" / part, ".")
    images = tmp_path / ("tars" if form == "tar" else "images")
    flags = TINY + ["--data_path", str(images), "--cache_dir", str(tmp_path / "cache"), *(
        "--epochs 4 --batch_size_per_gpu 24 --lr 0.02 --knn_every 4 --knn_images 241 "
        f"--use_bn_in_head false {flags}".split())]  # whose statistics are those of each process on a CPU

    def start(*command):
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)

    two = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags, "--output_dir",
                str(tmp_path / "two"))
    one = start("train.py", *flags, *flags_of_one.split(), "--output_dir", str(tmp_path / "one"))
    for process in (two, one):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    knn = [[line["knn_top1"] for line in lines(tmp_path / name) if "eval" in line] for name in ("one", "two")]
    assert knn[0] == pytest.approx(knn[1], abs=2.0)
    for name, value in load_file(tmp_path / "one" / "teacher.safetensors").items():
        torch.testing.assert_close(value, load_file(tmp_path / "two" / "teacher.safetensors")[name], rtol=0, atol=1e-4)


def test_batched_crops_train_the_same(small_shapes, tmp_path, monkeypatch):
    """To rounding: each crop has the same parameters."""
    class Counted(loaders.BatchMultiCrop):
        def __call__(self, pixels, params):
            batches.append(len(params))
            return super().__call__(pixels, params)

    batches = []
    monkeypatch.setattr(loaders, "BatchMultiCrop", Counted)
    for where, expected in (("cpu", []), ("device", 8 * [64])):
        run(tmp_path / where, f"--epochs 2 --views {where} --num_workers 2")
        assert batches == expected
    torch.testing.assert_close(losses(tmp_path / "cpu"), losses(tmp_path / "device"), rtol=0, atol=1e-3)
    for record in lines(tmp_path / "device")[1:]:
        assert 0 < record["data_time"] < record["step_time"]
        assert record["images_per_sec"] == pytest.approx(64 / record["step_time"])


@pytest.mark.parametrize("flags", [
    "--precision bf16 --optimizer lars", "--precision fp16 --optimizer sgd --accum_steps 2 --batch_size_per_gpu 32",
    "--use_bn_in_head true --clip_mode global --local_crops_number 0 --views device",
    "--clip_grad 0 --norm_last_layer false"])
def test_precisions_and_optimizers_train(small_shapes, tmp_path, flags):
    run(tmp_path, f"--epochs 1 {flags}")
    assert len(losses(tmp_path)) == 4 and all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("flags, steps, recorded", [
    ("--profile 2 --epochs 2", 8, 2), ("--profile 9 --epochs 1 --compile", 4, 2)])
def test_a_trace_is_recorded(small_shapes, tmp_path, flags, steps, recorded):
    """Of the steps asked for or, in a shorter run, of all after two."""
    run(tmp_path, f"{flags} --activation_checkpointing")
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 2 * recorded  # once per parameter group
    assert sum(name.startswith("ProfilerStep#") for name in names) >= recorded
    assert len(losses(tmp_path)) == steps


@pytest.mark.slow
def test_compile_without_a_compiler_is_one_line(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--compile", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {
        "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "torch.compile failed, use --compile false" in result.stderr.splitlines()[-1]
    assert "compiler found" in result.stderr.splitlines()[-1]


# ---- collapse ----

def test_collapse_to_uniform_is_reported(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 2 --warmup_teacher_temp 1 --teacher_temp 1 --lr 0.002 --centering mean "
                  "--use_bn_in_head false")
    assert "WARNING: collapse to uniform" in capsys.readouterr().out


NO_CENTERING = "--epochs 8 --lr 0.02 --teacher_temp 0.01 --warmup_teacher_temp 0.01 --momentum_teacher 0.5 " \
    "--center_momentum 1"


@pytest.mark.slow
def test_collapse_to_one_prototype_is_reported(small_shapes, tmp_path, capsys):
    run(tmp_path, NO_CENTERING)
    assert "WARNING: collapse to one prototype" in capsys.readouterr().out


@pytest.mark.slow
def test_sinkhorn_prevents_that_collapse(small_shapes, tmp_path, capsys):
    run(tmp_path, f"{NO_CENTERING} --centering sinkhorn")
    assert "collapse" not in capsys.readouterr().out
    assert min(line["teacher_marginal_entropy"] for line in lines(tmp_path) if "loss" in line) > 0.5 * math.log(64)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["student", "momentum"])
def test_a_teacher_without_momentum_is_reported(small_shapes, tmp_path, capsys, teacher):
    run(tmp_path, "--epochs 4 --lr 0.002 --momentum_teacher 0.99 --centering mean --use_bn_in_head false --teacher "
        f"{teacher}")
    assert ("WARNING: collapse to one prototype" in capsys.readouterr().out) == (teacher != "momentum")


# ---- flags ----

@pytest.mark.parametrize("flags", ["--loss mse --predictor true --use_bn_in_head true --local_crops_number 0",
                                   "--predictor true --l2_bottleneck false --teacher previous_epoch",
                                   "--predictor true --loss infonce --queue_size 500"])
def test_a_run_with_ablation_flags_resumes(small_shapes, tmp_path, flags, capsys):
    run(tmp_path / "whole", f"--epochs 2 {flags}")
    run(tmp_path / "parts", f"--epochs 1 {flags}")
    run(tmp_path / "parts", f"--epochs 2 {flags}")
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "whole"))
    assert losses(tmp_path / "parts")[0] == losses(tmp_path / "whole")[0] and len(losses(tmp_path / "parts")) == 8
    student, teacher = (load_file(tmp_path / "parts" / f"{name}.safetensors") for name in ("student", "teacher"))
    assert student.keys() - teacher.keys() == {f"head.predictor.{layer}" for layer in (
        "0.weight", "0.bias", "2.weight", "2.bias")}
    missing = ["kl"] * ("mse" in flags) or ["ln_k", "teacher_entropy", "teacher_marginal_entropy", "kl"] * (
        "infonce" in flags)
    assert [name for name, value in lines(tmp_path / "whole")[1].items() if value is None] == missing
    printed = re.search(r"\[1/8\] (.*?) lr", capsys.readouterr().out)[1]
    assert re.sub(r"[\d.]", "", printed) == {0: "loss  (ln K ) entropy  kl ", 1: "loss  (ln K ) entropy ",
                                             4: "loss "}[len(missing)]
    if "infonce" in flags:
        queue = load_checkpoint(tmp_path / "parts" / "checkpoint.pth")["dino_loss"]["queue"]
        assert queue.shape == (500, 64) and printed == f"loss {losses(tmp_path / 'whole')[0]:.3f}"
        for other in (flags + "0", flags.replace("infonce", "ce")):
            with pytest.raises(CheckpointError, match="was trained with (queue_size 500|loss infonce)"):
                run(tmp_path / "parts", f"--epochs 2 {other}")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.txt")), ids=lambda path: path.stem)
def test_recipes_are_flags(path):
    base = ["--device", "cpu"] + [f"@{ROOT / 'recipes' / 'shapes.txt'}"] * (path.parent.name == "ablations")
    args = train.parse_args([*base, f"@{path}"])
    assert compute_schedule(0, 10, 256, args).teacher_temp > 0
    if not path.stem.startswith(("continue", "imagenet_")):  # measured: no rule may change them
        assert args.auto == ()
    changed = {name: value for name, value in vars(args).items() if value != getattr(train.parse_args(base), name)}
    assert bool(changed) == (path.stem != "dino")


def test_a_convolutional_stem_is_in_the_files_of_its_run(small_shapes, tmp_path, exit_message):
    run(tmp_path, "--epochs 1 --conv_stem")
    backbone, info = load_backbone(tmp_path / "teacher.safetensors")
    assert info["backbone"]["conv_stem"] and backbone.patch_embed.stem[2].norm.num_batches_tracked == 4
    with pytest.raises(CheckpointError, match="was trained with conv_stem True, not False"):
        run(tmp_path, "--epochs 2")
    for flags, message in (("--arch resnet18", "--conv_stem is for vit_tiny"),
                           ("--patch_size 3 --global_crops_size 9 --local_crops_size 3", "a --patch_size of 2, 4, ")):
        assert message in exit_message(train.parse_args, ["--conv_stem", *flags.split()])


def test_number_of_threads(small_shapes, tmp_path, restore_threads):
    run(tmp_path, "--epochs 1 --num_threads 3")
    assert torch.get_num_threads() == 3


def test_flags_reach_loss_and_head(small_shapes, tmp_path, monkeypatch):
    flags = "--epochs 1 --student_temp 0.2 --center_momentum 0.5 --head_layers 2 --bottleneck_dim 24 " \
        "--centering batch --use_bn_in_head false"
    built = []

    class Recorded(DINOLoss):
        def __init__(self, *args):
            super().__init__(*args)
            built.append(self)
    with monkeypatch.context() as patch:
        patch.setattr(train, "DINOLoss", Recorded)
        run(tmp_path, flags)
    assert (built[0].student_temp, built[0].center_momentum, built[0].iterations) == (0.2, 0.5, 1)
    teacher = load_file(tmp_path / "teacher.safetensors")
    heads = {name[5:]: tuple(value.shape) for name, value in teacher.items() if name.startswith("head.")}
    assert heads == {"mlp.0.weight": (32, 32), "mlp.0.bias": (32,), "mlp.2.weight": (24, 32), "mlp.2.bias": (24,),
                     "last_layer.weight_v": (64, 24), "last_layer.weight_g": (64, 1)}
    with pytest.raises(CheckpointError, match="bottleneck_dim 24, not 256"):
        run(tmp_path, "--epochs 2 --head_layers 2")


def test_a_run_older_than_a_flag_resumes(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    for name in ("head_layers", "bottleneck_dim", "l2_bottleneck", "predictor", "conv_stem"):
        del state["fixed"][name]
    save_checkpoint(tmp_path / "checkpoint.pth", 1, **state)
    with pytest.raises(CheckpointError, match="was trained with conv_stem False, not True"):
        run(tmp_path, "--epochs 2 --conv_stem")
    run(tmp_path, "--epochs 2")
    assert "resuming at step 4 of 8" in capsys.readouterr().out and len(losses(tmp_path)) == 8


def test_corrupt_images_are_skipped_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "my #1 images"
    folder.mkdir()
    shapes = Shapes("train", 70, 32)
    for i in range(70):
        shapes[i][0].save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"not an image")
    content = (folder / "06.png").read_bytes()
    (folder / "06.png").write_bytes(content[:len(content) // 2])
    flags = [*TINY, "--data_path", str(folder), "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    train.main(train.parse_args(flags))
    out = capsys.readouterr().out
    assert "skipped corrupt image" in out and "05.png" in out and "06.png" in out
    assert lines(tmp_path / "run")[-1]["corrupt_images"] == 2
    assert train.parse_args([f"@{tmp_path}/run/flags.txt"]).data_path == str(folder)


@pytest.mark.parametrize("flags, words", [
    ("--seed 1", "seed 0, not 1"),
    ("--batch_size_per_gpu 32", "global_batch_size 64, not 32: set --batch_size_per_gpu 64"),
    ("--norm_last_layer false", "norm_last_layer True, not False"), ("--embed_dim 64", "embed_dim 32, not 64"),
    ("--shuffle blocks", "shuffle full, not blocks")])
def test_another_run_is_not_continued(small_shapes, tmp_path, flags, words):
    run(tmp_path, "--epochs 1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(CheckpointError, match=words):
        run(tmp_path, f"--epochs 2 {flags}")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_evaluation_switched_on_later_has_no_untrained_baseline(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1")
    run(tmp_path, "--epochs 2 --knn_every 1")
    assert [line["eval"] for line in lines(tmp_path) if "eval" in line] == ["epoch 0", "epoch 1"]
    assert "untrained" not in capsys.readouterr().out
