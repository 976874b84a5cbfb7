import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from common.checkpoint import load_checkpoint
from data import loaders
from data.shapes import Shapes
from dino_loss import DINOHead, DINOLoss
from step import MultiCropWrapper, build_networks, compile_blocks, train_step, update_teacher
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]
TINY = ("--arch vit_tiny --patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --out_dim 64 --hidden_dim 32 "
        "--drop_path_rate 0 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --warmup_epochs 0 "
        "--device cpu --num_workers 0 --precision fp32 --knn_every 0 --log_every 1").split()


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def build(args):
    return build_networks(*train.model_arguments(args))


# ---- the golden trajectories, through the functions that train.py runs ----

@pytest.mark.parametrize("way", ["plain", "compiled", "checkpointed"])
@pytest.mark.parametrize("name, flags", [
    ("adamw", "--optimizer adamw --lr 2e-3"),
    ("sgd_free_last", "--optimizer sgd --lr 0.1 --norm_last_layer false")])
def test_24_steps_equal_the_reference(golden, image, name, flags, way):
    g = golden(f"trajectory_{name}")
    args = train.parse_args(TINY + flags.split() + (
        "--epochs 4 --warmup_epochs 1 --min_lr 1e-5 --weight_decay 0.04 --weight_decay_end 0.4 --momentum_teacher 0.9 "
        "--clip_grad 0.3 --freeze_last_layer 1 --warmup_teacher_temp 0.04 --teacher_temp 0.06 "
        "--warmup_teacher_temp_epochs 2").split())

    def network():
        result = MultiCropWrapper(VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2),
                               DINOHead(32, 96, hidden_dim=64, bottleneck_dim=32, norm_last_layer=args.norm_last_layer))
        result.load_state_dict({key[5:]: value.clone() for key, value in g.items() if key.startswith("init.")})
        return result

    student, teacher, dino_loss = network(), network().requires_grad_(False), DINOLoss(96)
    groups = train.param_groups(student)
    expected = golden(f"param_groups_{name}.json")
    assert sorted(n for n, _ in groups[0]["params"]) == sorted(expected["decay"])
    assert sorted(n for n, _ in groups[1]["params"]) == sorted(expected["no_decay"])
    optimizer = train.build_optimizer(args.optimizer, groups)
    student.backbone.activation_checkpointing = way == "checkpointed"
    if way == "compiled":
        compile_blocks(student, teacher)
    losses = []
    for step in range(24):
        views = [image(4, s, s, 0.3 * step + 1.1 * v) for v, s in enumerate((32, 32, 16, 16, 16))]
        now = train.settings_at(step, 6, 256, args)  # 256 pictures a step leave the lr unscaled
        reached = torch.tensor(step)
        losses.append(train_step(student, teacher, dino_loss, optimizer, no_scaler(), reached, [views], now,
                                 clip_grad=args.clip_grad)[0])
        assert reached == step + 1
    torch.testing.assert_close(torch.stack(losses).double(), g["loss"], rtol=0, atol=2e-5)
    torch.testing.assert_close(dino_loss.center, g["center"], rtol=0, atol=1e-4)
    for which, net in (("student", student), ("teacher", teacher)):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, g[f"{which}.{key}"], rtol=0, atol=1e-4, msg=f"{which}.{key}")


# ---- the parts ----

def test_accumulated_passes_are_one_large_batch():
    results = []
    for parts in (1, 4):
        args = train.parse_args([*TINY, "--lr", "0.1"])
        student, teacher = build(args)
        optimizer = train.build_optimizer("sgd", train.param_groups(student))  # adamw would magnify rounding near 0
        dino_loss = DINOLoss(64)
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            views = [torch.randn(8, 3, s, s, generator=generator) for s in (32, 32, 16)]
            passes = [[view.chunk(parts)[i] for view in views] for i in range(parts)]
            now = train.settings_at(step + 5, 10, 256, args)
            stats = train_step(student, teacher, dino_loss, optimizer, no_scaler(), torch.tensor(step + 5),
                                     passes, now)
        results.append((stats, dino_loss.center, *student.parameters()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_views_of_several_sizes_are_view_major():
    torch.manual_seed(0)
    args = train.parse_args(TINY)
    network, _ = build(args)
    views = [torch.randn(3, 3, s, s) for s in (32, 32, 16, 16)]
    expected = torch.cat([network.head(network.backbone(view)) for view in views])
    torch.testing.assert_close(network(views), expected, rtol=0, atol=1e-5)


def test_teacher_starts_as_the_student_and_moves():
    args = train.parse_args(TINY)
    student, teacher = build(args)
    before = [p.clone() for p in teacher.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), before))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    update_teacher(teacher, student, 0.9)
    for p, q in zip(teacher.parameters(), before):
        torch.testing.assert_close(p, q + 0.1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["student", "previous_step", "previous_epoch"])
def test_the_papers_other_teachers(kind):
    args = train.parse_args([*TINY, "--teacher", kind, "--lr", "0.01"])
    student, teacher = build(args)
    optimizer, dino_loss = train.build_optimizer("adamw", train.param_groups(student)), DINOLoss(64)

    def weights(network):
        return torch.cat([p.detach().flatten() for p in network.parameters()])
    students = [weights(student)]
    torch.manual_seed(0)
    for step in range(6):  # of three to an epoch
        now = train.settings_at(step, 3, 256, args)
        train_step(student, teacher, dino_loss, optimizer, no_scaler(), torch.tensor(step),
                   [[torch.randn(4, 3, s, s) for s in (32, 32, 16)]], now)
        students.append(weights(student))
        assert not torch.equal(students[-1], students[-2])
        expected = {"student": step + 1, "previous_step": step, "previous_epoch": (step + 1) // 3 * 3}[kind]
        assert torch.equal(weights(teacher), students[expected])


@pytest.mark.parametrize("kind", ["momentum", "previous_step"])
def test_no_teacher_moves_on_a_step_that_fails(kind):
    args = train.parse_args([*TINY, "--teacher", kind, "--lr", "0.01", "--momentum_teacher", "0.5"])
    student, teacher = build(args)
    optimizer, before = train.build_optimizer("adamw", train.param_groups(student)), teacher.state_dict()
    with torch.no_grad():
        next(student.parameters()).add_(1.0)  # so that there is somewhere to move to
    before = {name: value.clone() for name, value in before.items()}
    views = [torch.full((4, 3, 32, 32), math.inf), torch.zeros(4, 3, 32, 32)]
    train_step(student, teacher, DINOLoss(64), optimizer, no_scaler(), torch.tensor(0), [views],
               train.settings_at(0, 3, 256, args))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


# ---- whole runs ----

def run(folder, flags):
    train.main(train.parse_args([*TINY, "--output_dir", str(folder), *flags.split()]))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.fixture(autouse=True)
def signals_as_before():
    """train.main takes over signals for the rest of its process, which here goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_writes_what_it_promises(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 2 --knn_every 1 --saveckp_freq 1 --linear_probe")
    out = capsys.readouterr().out
    for words in ("effective lr 0.000125", "raw pixels", "untrained backbone", "teacher entropy", "ln K 4.16", "img/s",
                  "linear classifier"):
        assert words in out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.pth", "checkpoint.pth.1", "checkpoint0000.pth", "checkpoint0001.pth",
                     "teacher.safetensors", "flags.txt", "student.safetensors", "teacher_best.safetensors", "log.jsonl",
                     ".lock"}
    records = [line for line in lines(tmp_path) if "loss" in line]
    assert len(records) == 8
    assert records[0]["ln_k"] == pytest.approx(math.log(64)) and 0 < records[0]["teacher_entropy"] <= math.log(64)
    assert records[0]["kl"] == pytest.approx(records[0]["loss"] - records[0]["teacher_entropy"])
    assert [(line["knn"], "linear" in line) for line in lines(tmp_path) if "knn" in line] == [
        ("raw pixels", False), ("untrained backbone", True), ("epoch 0", True), ("epoch 1", True)]
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert state["progress"]["step"] == 8 and state["flags"]["embed_dim"] == 32
    teacher = load_file(tmp_path / "teacher.safetensors")
    assert teacher.keys() == state["teacher"].keys()
    assert all(torch.equal(value, state["teacher"][name]) for name, value in teacher.items())
    again = vars(train.parse_args([f"@{tmp_path / 'flags.txt'}"]))  # the flags written are the flags used
    assert state["flags"] == again


def test_an_interrupted_run_ends_like_a_whole_one(small_shapes, tmp_path):
    flags = "--drop_path_rate 0.2 --epochs 3"
    run(tmp_path / "whole", flags)

    class Killed(Exception):
        pass

    def save_then_die(*args, **kwargs):
        save(*args, **kwargs)
        raise Killed

    save, train.save_run = train.save_run, save_then_die
    try:
        for _ in range(2):
            with pytest.raises(Killed):
                run(tmp_path / "parts", flags)
    finally:
        train.save_run = save
    run(tmp_path / "parts", flags + " --num_workers 2")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for which in ("student", "teacher", "dino_loss"):
        for name, value in whole[which].items():
            assert torch.equal(value, parts[which][name]), f"{which} {name}"


def test_two_processes_equal_one_with_twice_the_batch(scene, tmp_path):
    for i in range(301):
        part = tmp_path / "pictures" / ("val" if i > 240 else "train") / str(i % 3)
        part.mkdir(parents=True, exist_ok=True)
        scene.rotate(7 * i).resize((40, 40)).save(part / f"{i}.png")
    flags = TINY + ["--data_path", str(tmp_path / "pictures"), *(
        "--epochs 4 --batch_size_per_gpu 24 --lr 0.02 --knn_every 4 --knn_images 241".split())]

    def start(*command):
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    two = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags, "--output_dir",
                str(tmp_path / "two"))
    one = start("train.py", *flags, "--batch_size_per_gpu", "48", "--output_dir", str(tmp_path / "one"))
    for process in (two, one):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    knn = [[line["top1"] for line in lines(tmp_path / name) if "knn" in line] for name in ("one", "two")]
    assert knn[0] == pytest.approx(knn[1], abs=2.0)
    for name, value in load_file(tmp_path / "one" / "teacher.safetensors").items():
        torch.testing.assert_close(value, load_file(tmp_path / "two" / "teacher.safetensors")[name], rtol=0, atol=1e-4)


def test_views_made_in_batches_teach_the_same(small_shapes, tmp_path, monkeypatch):
    """To rounding: each view is the same picture with the same numbers."""
    class Counted(loaders.BatchMultiCrop):
        def __call__(self, pixels, plans):
            batches.append(len(pixels))
            return super().__call__(pixels, plans)

    batches = []
    monkeypatch.setattr(loaders, "BatchMultiCrop", Counted)
    for where, made in (("cpu", []), ("device", 8 * [64])):
        run(tmp_path / where, f"--epochs 2 --views {where} --num_workers 2")
        assert batches == made
    torch.testing.assert_close(losses(tmp_path / "cpu"), losses(tmp_path / "device"), rtol=0, atol=1e-3)
    for line in (tmp_path / "device" / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds = record["data_seconds"] + record["compute_seconds"]
        assert 0 < record["data_seconds"] < seconds
        assert record["images_per_second"] == pytest.approx(64 / seconds)


@pytest.mark.parametrize("flags", [
    "--precision bf16 --optimizer lars", "--precision fp16 --optimizer sgd --accum_steps 2 --batch_size_per_gpu 32",
    "--use_bn_in_head true --clip_mode global --local_crops_number 0 --views device",
    "--clip_grad 0 --norm_last_layer false"])
def test_every_way_to_train_runs(small_shapes, tmp_path, flags):
    run(tmp_path, f"--epochs 1 {flags}")
    assert len(losses(tmp_path)) == 4 and all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.parametrize("asked, epochs, recorded", [(2, 2, 2), (9, 1, 2)])
def test_a_trace_is_recorded(small_shapes, tmp_path, asked, epochs, recorded):
    """Of the steps asked for, or, in a run that is shorter, of all after two."""
    run(tmp_path, f"--epochs {epochs} --profile {asked} --activation_checkpointing" + " --compile" * (epochs == 1))
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 2 * recorded  # for each group of parameters
    assert sum(name.startswith("ProfilerStep#") for name in names) >= recorded
    assert len(losses(tmp_path)) == 4 * epochs


def test_a_machine_without_a_compiler_is_told(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--compile", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {
        "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "torch cannot compile here, leave --compile out" in result.stderr.splitlines()[-1]
    assert "compiler found" in result.stderr.splitlines()[-1]


def test_collapse_to_uniform_is_reported(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 2 --warmup_teacher_temp 1 --teacher_temp 1")
    assert "WARNING: collapsed to uniform" in capsys.readouterr().out


NO_CENTRING = "--epochs 8 --lr 0.02 --teacher_temp 0.01 --warmup_teacher_temp 0.01 --momentum_teacher 0.5 " \
    "--center_momentum 1"


def test_collapse_to_one_prototype_is_reported(small_shapes, tmp_path, capsys):
    run(tmp_path, NO_CENTRING)
    assert "WARNING: collapsed to one prototype" in capsys.readouterr().out


def test_sharing_the_prototypes_out_prevents_that_collapse(small_shapes, tmp_path, capsys):
    run(tmp_path, f"{NO_CENTRING} --centering sinkhorn")
    assert "collapsed" not in capsys.readouterr().out
    assert min(line["teacher_entropy_of_mean"] for line in lines(tmp_path) if "loss" in line) > 0.5 * math.log(64)


@pytest.mark.parametrize("teacher", ["student", "momentum"])
def test_a_teacher_without_momentum_is_reported(small_shapes, tmp_path, capsys, teacher):
    run(tmp_path, f"--epochs 4 --lr 0.002 --momentum_teacher 0.99 --teacher {teacher}")
    assert ("WARNING: collapsed to one prototype" in capsys.readouterr().out) == (teacher != "momentum")


@pytest.mark.parametrize("flags", ["--loss mse --predictor true --use_bn_in_head true --local_crops_number 0",
                                   "--predictor true --l2_bottleneck false --teacher previous_epoch"])
def test_a_run_with_other_switches_goes_on(small_shapes, tmp_path, flags):
    run(tmp_path / "whole", f"--epochs 2 {flags}")
    run(tmp_path / "parts", f"--epochs 1 {flags}")
    run(tmp_path / "parts", f"--epochs 2 {flags}")
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "whole"))
    assert losses(tmp_path / "parts")[0] == losses(tmp_path / "whole")[0] and len(losses(tmp_path / "parts")) == 8
    student, teacher = (load_file(tmp_path / "parts" / f"{name}.safetensors") for name in ("student", "teacher"))
    assert student.keys() - teacher.keys() == {f"head.predictor.{layer}" for layer in (
        "0.weight", "0.bias", "2.weight", "2.bias")}
    assert ("kl" in lines(tmp_path / "whole")[0]) and (lines(tmp_path / "whole")[0]["kl"] is None) == ("mse" in flags)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.txt")), ids=lambda path: path.stem)
def test_recipes_are_flags(path):
    base = ["--device", "cpu"] + [f"@{ROOT / 'recipes' / 'demo.txt'}"] * (path.parent.name == "ablations")
    args = train.parse_args([*base, f"@{path}"])
    assert train.settings_at(0, 10, 256, args).teacher_temp > 0
    changed = {name: value for name, value in vars(args).items() if value != getattr(train.parse_args(base), name)}
    assert bool(changed) == (path.stem != "dino")


def test_flags_reach_loss_and_head(small_shapes, tmp_path, capsys):
    flags = "--epochs 1 --student_temp 0.2 --center_momentum 0.5 --head_layers 2 --bottleneck_dim 24"
    made, build = [], train.DINOLoss

    def kept(*args):
        made.append(build(*args))
        return made[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DINOLoss", kept)
        run(tmp_path, flags)
    assert (made[0].student_temp, made[0].center_momentum, made[0].iterations) == (0.2, 0.5, 0)
    teacher = load_file(tmp_path / "teacher.safetensors")
    heads = {name[5:]: tuple(value.shape) for name, value in teacher.items() if name.startswith("head.")}
    assert heads == {"mlp.0.weight": (32, 32), "mlp.0.bias": (32,), "mlp.2.weight": (24, 32), "mlp.2.bias": (24,),
                     "last_layer.weight_v": (64, 24), "last_layer.weight_g": (64, 1)}
    with pytest.raises(train.CheckpointError, match="bottleneck_dim 24, not 256"):
        run(tmp_path, "--epochs 2 --head_layers 2")


def test_a_run_from_before_a_flag_goes_on(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    for name in ("head_layers", "bottleneck_dim", "l2_bottleneck", "predictor"):
        del state["fixed"][name]
    train.save_state(tmp_path / "checkpoint.pth", 1, **state)
    run(tmp_path, "--epochs 2")
    assert "going on at step 4 of 8" in capsys.readouterr().out and len(losses(tmp_path)) == 8


def test_unreadable_pictures_are_skipped_and_named(tmp_path, capsys):
    folder = tmp_path / "my #1 pictures"
    folder.mkdir()
    shapes = Shapes("train", 70, 32)
    for i in range(70):
        shapes[i][0].save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"not a picture")
    whole = (folder / "06.png").read_bytes()
    (folder / "06.png").write_bytes(whole[:len(whole) // 2])
    flags = [*TINY, "--data_path", str(folder), "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    train.main(train.parse_args(flags))
    out = capsys.readouterr().out
    assert "skipped unreadable picture" in out and "05.png" in out and "06.png" in out
    assert lines(tmp_path / "run")[-1]["unreadable"] == 2
    assert train.parse_args([f"@{tmp_path}/run/flags.txt"]).data_path == str(folder)


@pytest.mark.parametrize("flags, words", [
    ("--seed 1", "seed 0, not 1"), ("--batch_size_per_gpu 32", "global batch 64, not 32"),
    ("--norm_last_layer false", "norm_last_layer True, not False"), ("--embed_dim 64", "embed_dim 32, not 64")])
def test_another_run_is_not_continued(small_shapes, tmp_path, flags, words):
    run(tmp_path, "--epochs 1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(train.CheckpointError, match=words):
        run(tmp_path, f"--epochs 2 {flags}")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_judging_later_does_not_call_the_trained_untrained(small_shapes, tmp_path, capsys):
    run(tmp_path, "--epochs 1")
    run(tmp_path, "--epochs 2 --knn_every 1")
    assert [line["knn"] for line in lines(tmp_path) if "knn" in line] == ["epoch 0", "epoch 1"]
    assert "untrained" not in capsys.readouterr().out
