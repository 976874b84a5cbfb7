"""Runs that are killed, stopped, corrupted and resumed."""

import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from common import checkpoint, cli
from common.checkpoint import CheckpointError, iter_tensors, list_checkpoints, load_checkpoint, save_checkpoint
from data import loaders
from data.loaders import iter_batch_keys
from data.shapes import Shapes
from data.workers import iter_batches
from evaluation import online

ROOT = Path(__file__).parents[2]
TINY = ("--arch vit_tiny --patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --out_dim 64 --hidden_dim 32 "
        "--drop_path_rate 0.2 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --warmup_epochs 0 "
        "--device cpu --num_workers 0 --precision fp32 --knn_every 4 --log_every 1 --batch_size_per_gpu 16 "
        "--freeze_last_layer 1 --saveckp_freq 0").split()
STEPS = 6  # in an epoch

server = multiprocessing.get_context("forkserver")  # forks from a process that has imported torch
server.set_forkserver_preload(["train"])


def start(target, *args, output=os.devnull, limit=resource.RLIM_INFINITY):
    """Call target(*args) in a process whose output goes to a file and which may write no file larger than `limit`."""
    process = server.Process(target=run_target, args=(target, args, output, limit))
    process.start()
    return process


def run_target(target, args, output, limit):
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    multiprocessing.set_start_method("fork", force=True)  # of loader workers
    target(*args)


def kill(process):
    """SIGKILL the process and its loader workers, which would end by themselves within five seconds."""
    workers = children_of(process.pid)
    process.kill()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """96 images of two classes: 6 steps of 16 per epoch."""
    folder = tmp_path_factory.mktemp("images")
    shapes = Shapes("train", 96, 32)
    for i in range(96):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        shapes[i][0].save(path)
    return folder


@pytest.fixture
def flags(images, tmp_path):
    """Flags of a small run in a folder of this name: flags("whole", "--epochs 3")."""
    def of(name, more=""):
        return [*TINY, "--data_path", str(images), "--output_dir", str(tmp_path / name), *more.split()]
    return of


@pytest.fixture(autouse=True)
def restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(flags):
    train.main(train.parse_args(flags))


def records(folder):
    """Records of log.jsonl without the times, and without the one of each process on its environment."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    times = ("images_per_sec", "data_time", "step_time", "eta")
    found = [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]
    return [record for record in found if "run" not in record]


def steps_logged(folder):
    try:
        return (folder / "log.jsonl").read_bytes().count(b'"step"')
    except FileNotFoundError:
        return 0


def new_steps(folder, logged):
    """Steps logged since the log was this list of lines; steps logged again count, since their times differ."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    same = next((i for i, (a, b) in enumerate(zip(lines, logged)) if a != b), min(len(lines), len(logged)))
    return sum('"step"' in line for line in lines[same:])


def assert_identical(whole, parts):
    """Bit for bit: student, teacher, optimizer, center, scaler, progress, log and model files."""
    one, two = (load_checkpoint(folder / "checkpoint.pth") for folder in (whole, parts))
    tensors, others = (dict(iter_tensors(state)) for state in (one, two))
    assert tensors.keys() == others.keys() and len(tensors) > 150
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert different == []
    for name in ("knn", "step", "corrupt_images", "epoch_stats"):
        assert one["progress"][name] == two["progress"][name]
    assert one["scaler"] == two["scaler"] and records(whole) == records(parts)
    for name in ("student", "teacher", "teacher_best"):
        files = [load_file(folder / f"{name}.safetensors") for folder in (whole, parts)]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


# ---- killed ----

@pytest.mark.parametrize("form", ["folder", pytest.param("tar", marks=pytest.mark.slow)])
def test_killed_at_random_steps(flags, images, tmp_path, request, form):
    """SIGKILL after a random number of steps; each start has another number of workers."""
    kills = request.config.getoption("--kills") or (12 if request.config.getoption("--slow") else 3)
    more = f"--epochs {1 + kills} --save_every_steps 4"
    if form == "tar":
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            tar.add(images, ".")
        more += f" --data_path {tmp_path}/images.tar --cache_dir {tmp_path}/cache --shuffle blocks"
    run(flags("whole", more))
    rng, done, parts = random.Random(0), 0, tmp_path / "parts"
    while done < kills:
        args = train.parse_args(flags("parts", f"{more} --num_workers {rng.choice((0, 1, 2))}"))
        logged = (parts / "log.jsonl").read_text().splitlines() if parts.exists() else []
        target = rng.randint(1, STEPS)
        child = start(train.main, args)
        while child.is_alive() and new_steps(parts, logged) < target:
            time.sleep(0.001)
        time.sleep(rng.choice((0, 0.002, 0.01)))  # into the step, or the save
        assert child.is_alive(), "the run ended before it was killed often enough"
        kill(child)
        done += 1
    run(flags("parts", more))
    assert_identical(tmp_path / "whole", parts)


def die_within_a_save(args, save, point):
    """Train; at this save, die before its point-th operation on the disk, 0 being half-way through the writing."""
    saves, steps = 0, 0
    save_run, torch_save = train.save_run, torch.save

    def counted_save_run(*args, **kwargs):
        nonlocal saves, steps
        saves, steps = saves + 1, 0
        save_run(*args, **kwargs)

    def half_save(state, path):
        torch_save(state, path)
        if saves == save and point == 0:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(call):
        def wrapped(*args):
            nonlocal steps
            steps += 1
            if saves == save and steps == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return wrapped

    train.save_run, torch.save = counted_save_run, half_save
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    train.main(args)


@pytest.mark.slow
def test_killed_within_a_save(flags, tmp_path):
    more = "--epochs 6 --save_every_steps 2 --knn_every 0"
    run(flags("whole", more))
    # the writing, then 10 calls of fsync and replace for checkpoint, student and teacher
    moments = [(1, 0), (1, 2), *((2, point) for point in range(11))]
    for save, point in moments:
        child = start(die_within_a_save, train.parse_args(flags("parts", more)), save, point)
        child.join()
        assert child.exitcode == -signal.SIGKILL, (save, point)
        assert bool(list_checkpoints(tmp_path / "parts" / "checkpoint.pth")) == (save > 1), (save, point)
    run(flags("parts", more))
    for folder in ("whole", "parts"):
        (tmp_path / folder / "teacher_best.safetensors").touch()
        (tmp_path / folder / "teacher_best.safetensors").unlink()
        os.link(tmp_path / folder / "teacher.safetensors", tmp_path / folder / "teacher_best.safetensors")
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    assert list((tmp_path / "parts").glob("*.tmp")) == []


class Killed(Exception):
    pass


def die_after_saving(monkeypatch, times):
    """Make a run end right after it has saved so often."""
    save_run, saves = train.save_run, []

    def save_then_die(*args, **kwargs):
        save_run(*args, **kwargs)
        saves.append(1)
        if len(saves) == times:
            raise Killed

    monkeypatch.setattr(train, "save_run", save_then_die)


def test_epoch_statistics_survive_an_interruption(flags, monkeypatch):
    seen = {"whole": [], "parts": []}
    for name in seen:
        monkeypatch.setattr(train, "detect_collapse", lambda *means, name=name: seen[name].append(means))
        if name == "parts":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                die_after_saving(patch, times=1)
                run(flags(name, "--epochs 2 --save_every_steps 4 --knn_every 0"))
        run(flags(name, "--epochs 2 --save_every_steps 4 --knn_every 0"))
    assert len(seen["whole"]) == 2 and seen["whole"] == seen["parts"]


def test_what_an_epoch_owes_is_made_up_for(flags, tmp_path, monkeypatch, capsys):
    """Killed between the save at the end of epoch 3 and its k-NN test and numbered checkpoint."""
    more = "--epochs 5 --saveckp_freq 4"
    run(flags("whole", more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after_saving(patch, times=4)
        run(flags("parts", more))
    assert "epoch 3" not in [record.get("eval") for record in records(tmp_path / "parts")]
    run(flags("parts", more))
    assert (tmp_path / "parts" / "checkpoint0003.pth").exists()
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    before = (tmp_path / "parts" / "checkpoint.pth").read_bytes()
    capsys.readouterr()
    run(flags("parts", more))
    out = capsys.readouterr().out
    assert "holds a complete run" in out and "k-NN of" not in out
    assert (tmp_path / "parts" / "checkpoint.pth").read_bytes() == before


# ---- stopped ----

@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "SIGINT", "SIGUSR1"))])
def test_signals_save_and_exit_0(flags, tmp_path, name):
    """Sent to the whole job, loader workers included, as a terminal and Slurm do."""
    more = "--epochs 4 --save_every_minutes 0"
    run(flags("whole", more))
    args = train.parse_args(flags("parts", f"{more} --num_workers 2"))
    child = start(train_like_the_script, args, output=tmp_path / "output")
    while steps_logged(tmp_path / "parts") < 8:
        time.sleep(0.001)
    workers = children_of(child.pid)
    assert len(workers) == 2
    for pid in (*workers, child.pid):
        os.kill(pid, getattr(signal, name))
    child.join()
    assert child.exitcode == 0
    output = (tmp_path / "output").read_text()
    assert f"{name}: finishing the step, then saving" in output
    step = load_checkpoint(tmp_path / "parts" / "checkpoint.pth")["progress"]["step"]
    assert f"stopped by {name} after step {step} of 24" in output and "the same command resumes" in output
    assert step >= 8 and step == steps_logged(tmp_path / "parts")
    run(flags("parts", more))
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def torchrun(flags, *more, script="train.py"):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more, str(script),
         *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_for_steps(process, folder, steps):
    while steps_logged(folder) < steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def stop_then_train(args, where):
    """A signal that comes while the first batch, or the first evaluation, waits for its images."""
    def wait(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(600)

    if where == "batch":
        train.iter_on_device = lambda *args: iter(wait, None)
    else:
        online.append_pixels = lambda model: wait
    cli.run_command(train.main, lambda: args, CheckpointError)


@pytest.mark.parametrize("where, more", [("batch", "--knn_every 0"), ("evaluation", "")])
def test_a_signal_while_waiting_for_images_loses_nothing(flags, tmp_path, capsys, where, more):
    args = flags("run", f"--epochs 2 {more}")
    child = start(stop_then_train, train.parse_args(args), where, output=tmp_path / "output")
    child.join(120)
    assert child.exitcode == 0 and "stopped by SIGHUP after step 0 of 12" in (tmp_path / "output").read_text()
    run(args)
    assert "resuming at step 0 of 12" in capsys.readouterr().out and steps_logged(tmp_path / "run") == 12


@pytest.mark.slow
def test_checkpoints_count_the_corrupt_images_of_all_processes(flags, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    ((_, index), *_), = iter_batch_keys(1, 2, 96, 0, 8, 1, rank=1, world_size=2)
    sorted(folder.glob("*/*.png"))[index].write_bytes(b"bad")
    process = torchrun(flags("two", f"--data_path {folder} --batch_size_per_gpu 8 --epochs 1 --knn_every 0 "
                                    f"--log_every 100 --save_every_steps 2"))
    output, _ = process.communicate(timeout=120)
    before = load_checkpoint(tmp_path / "two" / "checkpoint.pth.1")["progress"]
    assert before["step"] == 4 and len(before["corrupt_images"]) == 1, output


@pytest.mark.slow
def test_torchrun_stops_together_and_restarts_alone(flags, tmp_path):
    """SIGTERM to torchrun; then a killed process, and torchrun's restart; then another number of processes."""
    folder = tmp_path / "two"
    two = flags("two", "--batch_size_per_gpu 8 --epochs 20 --knn_every 0")
    process = torchrun(two)
    wait_for_steps(process, folder, 8)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    step = load_checkpoint(folder / "checkpoint.pth")["progress"]["step"]
    assert output.count(f"stopped by SIGTERM after step {step} of 120") == 1 and "exitcode" not in output

    process = torchrun(two, "--max-restarts=1")
    wait_for_steps(process, folder, step + 8)
    victim = [pid for pid in children_of(process.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()][1]
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert f"resuming at step {step} of 120" in output and output.count("resuming at step") == 2
    assert "lost the others" in output or "finishing the step" in output
    assert [record["step"] for record in records(folder)] == list(range(120))

    run(flags("two", "--batch_size_per_gpu 16 --epochs 21 --knn_every 0"))  # one process, same global batch
    assert [record["step"] for record in records(folder)] == list(range(126))


@pytest.mark.slow
def test_a_hanging_rank_times_out(flags, tmp_path):
    process = torchrun(flags("two", "--batch_size_per_gpu 8 --epochs 400 --knn_every 0 --timeout_minutes 0.15"))
    wait_for_steps(process, tmp_path / "two", 3)
    victim = [pid for pid in children_of(process.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()][1]
    os.kill(victim, signal.SIGSTOP)
    message = next(line for line in process.stdout if line.startswith("train.py: "))
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank 0 of 2 timed out waiting for the others: one of them died or hangs" in message


# ---- non-finite values ----

def nan_at(monkeypatch, steps):
    """Make the first image of these steps NaN, as a broken decoder might."""
    bad = {next(iter_batch_keys(step, step + 1, 96, 0, 16))[0] for step in steps}

    class Broken(loaders.MultiCrop):
        def __call__(self, image, key):
            crops = super().__call__(image, key)
            if key[1:] in bad:
                crops[0][0, 0, 0] = float("nan")
            return crops

    monkeypatch.setattr(loaders, "MultiCrop", Broken)


@pytest.mark.parametrize("more", ["", "--optimizer sgd --use_bn_in_head true", "--optimizer lars --clip_grad 0"])
def test_non_finite_values_stop_the_run_and_are_never_saved(flags, tmp_path, monkeypatch, more):
    more += " --epochs 3 --log_every 4 --save_every_steps 9 --keep 9 --knn_every 0"
    run(flags("whole", more))
    with monkeypatch.context() as patch:
        nan_at(patch, [9])
        with pytest.raises(FloatingPointError, match="steps 9 to 11: the loss or a gradient is not finite in fp32; the "
                           "last checkpoint is untouched, resume with a lower --lr, or with --log_every 1 to find"):
            run(flags("broken", more))
        assert not (tmp_path / "broken" / "nonfinite.json").exists()
        before = next(state for path in list_checkpoints(tmp_path / "whole" / "checkpoint.pth")
                      if (state := load_checkpoint(path))["progress"]["step"] == 9)
        broken = load_checkpoint(tmp_path / "broken" / "checkpoint.pth")
        one, two = (dict(iter_tensors({key: state[key] for key in ("student", "teacher", "dino_loss", "optimizer")}))
                    for state in (before, broken))
        assert one.keys() == two.keys() and [name for name in one if not torch.equal(one[name], two[name])] == []
        with pytest.raises(FloatingPointError, match="step 9: .* images of the step are listed in .*nonfinite.json"):
            run(flags("broken", more + " --log_every 1"))
    listed = json.loads((tmp_path / "broken" / "nonfinite.json").read_text())
    keys = next(iter_batch_keys(9, 10, 96, 0, 16))
    assert listed["step"] == 9 and [(image["epoch"], image["index"]) for image in listed["images"]] == keys
    assert listed["images"][0]["file"].endswith(".png")
    run(flags("broken", more))  # with the decoder repaired
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "broken")]
    for (name, a), (_, b) in zip(*(iter_tensors(state["student"]) for state in states)):
        assert torch.equal(a, b), name


BROKEN = """
import train
from common import cli
from data import loaders

class Broken(loaders.MultiCrop):
    def __call__(self, image, key):
        crops = super().__call__(image, key)
        if key[1:] == {key}:
            crops[0][0, 0, 0] = float("nan")
        return crops

loaders.MultiCrop = Broken
cli.run_command(train.main, train.parse_args, FloatingPointError)
"""


@pytest.mark.slow
def test_a_non_finite_value_on_one_rank_stops_all(flags, tmp_path):
    two = "--batch_size_per_gpu 8 --epochs 3 --log_every 1 --knn_every 0"
    key = list(iter_batch_keys(9, 10, 96, 0, 8, 1, rank=1, world_size=2))[0][3]
    (tmp_path / "broken.py").write_text(BROKEN.replace("{key}", str(key)))
    process = torchrun(flags("run", two), script=tmp_path / "broken.py")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1 and "step 9: the loss or a gradient is not finite in fp32" in output
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]["step"] == 6
    listed = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["images"]
    assert len(listed) == 16 and (listed[11]["epoch"], listed[11]["index"]) == key


class Overflow(torch.autograd.Function):
    """Identity with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_fp16_skips_steps_and_stops_when_no_loss_scale_helps(flags, tmp_path, monkeypatch):
    more = "--epochs 10 --precision fp16 --knn_every 0"
    forward = train.DINOHead.forward
    with monkeypatch.context() as patch:
        patch.setattr(train.DINOHead, "forward", lambda self, x: Overflow.apply(forward(self, x)))
        with pytest.raises(FloatingPointError, match="step 16: the loss scale fell below 1 in fp16.*--precision bf16"):
            run(flags("run", more))
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert state["progress"]["step"] == 12 and state["scaler"]["scale"] == 2.0 ** (16 - 12)
    assert all(tensor.isfinite().all() for _, tensor in iter_tensors(state))
    assert state["optimizer"]["state"][0]["step"] == 0
    run(flags("run", more))
    assert records(tmp_path / "run")[-1]["step"] == 59 and math.isfinite(records(tmp_path / "run")[-1]["loss"])


def test_a_loss_scale_that_an_older_version_gave_up_with_is_not_loaded(flags, tmp_path):
    more = "--precision fp16 --knn_every 0 --log_every 3"
    run(flags("run", f"--epochs 1 {more}"))
    path = tmp_path / "run" / "checkpoint.pth"
    state = load_checkpoint(path)
    state["scaler"]["scale"] = 0.5
    save_checkpoint(path, **state)
    run(flags("run", f"--epochs 2 {more}"))
    assert records(tmp_path / "run")[-1]["step"] == 11 and records(tmp_path / "run")[-1]["loss_scale"] > 1


def test_no_nan_is_ever_written(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, weights={"a": torch.ones(3)})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match=r"state\['weights'\]\['a'\] holds NaN or infinity"):
            save_checkpoint(path, weights={"a": torch.tensor([1.0, bad])})
    assert torch.equal(load_checkpoint(path)["weights"]["a"], torch.ones(3)) and len(list(tmp_path.iterdir())) == 1


# ---- corrupt ----

def flip(path, share=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(content)


def test_a_corrupt_checkpoint_falls_back_to_the_previous_one(flags, tmp_path, capsys):
    more = "--epochs 3 --save_every_steps 5 --knn_every 0"
    run(flags("parts", more.replace("3", "2")))
    newest = tmp_path / "parts" / "checkpoint.pth"
    flip(newest)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(newest)
    capsys.readouterr()
    run(flags("parts", more))
    out = capsys.readouterr().out
    assert "WARNING" in out and "does not match its checksum" in out and "trying the previous one" in out
    assert "resuming at step 10 of 18" in out and (tmp_path / "parts" / "checkpoint.pth.corrupt").exists()
    assert [record["step"] for record in records(tmp_path / "parts") if "step" in record] == list(range(18))


def test_without_an_intact_checkpoint_nothing_is_deleted(flags, tmp_path):
    run(flags("run", "--epochs 1 --save_every_steps 2 --keep 3"))
    paths = list_checkpoints(tmp_path / "run" / "checkpoint.pth")
    assert [path.name for path in paths] == ["checkpoint.pth", "checkpoint.pth.1", "checkpoint.pth.2"]
    for path in paths:
        path.write_bytes(path.read_bytes()[:5000])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match=r"checkpoint.pth.2: not a checkpoint, or corrupt .*--overwrite starts"):
        run(flags("run", "--epochs 1"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_disk_that_fails_is_not_a_corrupt_file(flags, tmp_path, monkeypatch):
    """It may recover, so the newest checkpoint is neither skipped nor renamed."""
    run(flags("run", "--epochs 1 --save_every_steps 2"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify_checksums", fail)
        with pytest.raises(OSError, match="Input/output error: .*checkpoint.pth'"):
            run(flags("run", "--epochs 2"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_model_files_are_those_of_the_checkpoint(flags, tmp_path):
    """Killed between the save of the checkpoint and that of the models, at the end of the run."""
    run(flags("run", "--epochs 1 --knn_every 0"))
    teacher = tmp_path / "run" / "teacher.safetensors"
    before = load_file(teacher)
    save_file({name: tensor + 1 for name, tensor in before.items()}, teacher, {"backbone": "{}"})
    run(flags("run", "--epochs 1 --knn_every 0"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(teacher).items())


def test_keep_can_be_lowered(flags, tmp_path):
    run(flags("run", "--epochs 1 --save_every_steps 2 --keep 3"))
    run(flags("run", "--epochs 2 --save_every_steps 2 --keep 2"))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoint.pth")][-1] == "checkpoint.pth.1"


def test_a_complete_run_is_evaluated_if_it_was_not(flags, capsys):
    run(flags("run", "--epochs 2 --knn_every 0"))
    run(flags("run", "--epochs 1 --knn_every 1"))
    out = capsys.readouterr().out
    assert "complete run" in out and out.count("k-NN of epoch 1") == 1
    run(flags("run", "--epochs 1 --knn_every 1"))
    assert "k-NN of" not in capsys.readouterr().out


def models_of(folder):
    """All values of the model files."""
    return {path.name: {name: tensor.tolist() for name, tensor in load_file(path).items()}
            for path in folder.glob("*.safetensors")}


def train_like_the_script(args):
    cli.run_command(train.main, lambda: args, CheckpointError)


def train_on_a_full_disk(args, name):
    """Train while writes to this file of the run meet a full disk."""
    start_progress, torch_save = train.Logger.start_progress, torch.save

    def start_with_a_full_disk(logger, *args):
        logger.path.unlink(missing_ok=True)
        logger.path.symlink_to("/dev/full")
        start_progress(logger, *args)

    if name == "log.jsonl":
        train.Logger.start_progress = start_with_a_full_disk
    else:
        torch.save = lambda state, path: torch_save(state, "/dev/full")
    train_like_the_script(args)


@pytest.mark.parametrize("how", ["checkpoint.pth", "log.jsonl", "a limit"])
def test_a_full_disk_is_one_line_and_loses_nothing(flags, tmp_path, how):
    run(flags("run", "--epochs 1"))
    checkpoint = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    log, models = (tmp_path / "run" / "log.jsonl").read_bytes(), models_of(tmp_path / "run")
    args = train.parse_args(flags("run", "--epochs 2 --knn_every 0"))
    if how == "a limit":
        child = start(train_like_the_script, args, output=tmp_path / "output", limit=len(checkpoint) // 3)
    else:
        child = start(train_on_a_full_disk, args, how, output=tmp_path / "output")
    child.join()
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert child.exitcode == 2 and "Traceback" not in (tmp_path / "output").read_text()
    assert ("log.jsonl: cannot be written (No space left on device)" if how == "log.jsonl" else
            "checkpoint.pth: cannot be written, the previous file is untouched") in last, last
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == checkpoint and models_of(tmp_path / "run") == models
    if how == "log.jsonl":
        (tmp_path / "run" / "log.jsonl").unlink()
    assert how == "log.jsonl" or (tmp_path / "run" / "log.jsonl").read_bytes().startswith(log)
    assert list((tmp_path / "run").glob("*.tmp")) == []
    run(flags("run", "--epochs 2"))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]["step"] == 12


# ---- what may change, and what may not ----

def test_flags_that_may_change_are_printed(flags, tmp_path, capsys):
    run(flags("run", "--epochs 1"))
    capsys.readouterr()
    run(flags("run", "--epochs 2 --precision bf16 --num_workers 1 --accum_steps 2 --batch_size_per_gpu 8 --lr 0.001"))
    out = capsys.readouterr().out
    for change in ("--epochs 1 -> 2", "--precision fp32 -> bf16", "--accum_steps 1 -> 2", "--lr 0.004 -> 0.001",
                   "--batch_size_per_gpu 16 -> 8"):
        assert change in out
    assert "--seed" not in out and "resuming at step 6 of 12" in out


def test_other_images_are_another_run(flags, tmp_path):
    run(flags("run", "--epochs 1"))
    with pytest.raises(CheckpointError, match="num_images 96, not 10000"):
        run(flags("run", "--epochs 2 --data_path shapes"))


def test_starting_anew_needs_permission(flags, tmp_path, monkeypatch, capsys):
    run(flags("run", "--epochs 1"))
    before = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    with pytest.raises(CheckpointError, match="holds checkpoint.pth of a previous run: --resume none --overwrite"):
        run(flags("run", "--epochs 2 --resume none"))
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == before
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun repeats its command after a failure
    run(flags("run", "--epochs 2 --resume none --overwrite"))
    assert "resuming at step 6 of 12" in capsys.readouterr().out
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # a restarted job, which did not begin this run
    run(flags("run", "--epochs 1 --resume none --overwrite --seed 7"))
    run(flags("run", "--epochs 2 --resume none --overwrite --seed 7"))
    assert "resuming at step 6 of 12" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    run(flags("run", "--epochs 1 --resume none --overwrite --seed 7"))
    assert "resuming" not in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["flags"]["seed"] == 7
    assert steps_logged(tmp_path / "run") == 6
    words = (tmp_path / "run" / "flags.txt").read_text()
    assert "overwrite" not in words and "resume" not in words
    for path in list_checkpoints(tmp_path / "run" / "checkpoint.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds student"):  # the models are still worth something
        run(flags("run", "--epochs 1"))


@pytest.mark.parametrize("name", ["log.jsonl", "result.json", "nonfinite.json"])
def test_files_of_other_programs_are_kept(flags, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {name} of a previous run: --resume none --overwrite deletes it"):
        run(flags("run", "--epochs 1"))
    assert (tmp_path / "run" / name).read_text() == "mine"
    run(flags("run", "--epochs 1 --resume none --overwrite"))
    assert steps_logged(tmp_path / "run") == 6
    for path in (tmp_path / "run").glob("*.*"):
        if path.name not in (".lock", name):
            path.unlink()
    run(flags("run", "--epochs 1"))  # stopped before it saved anything: the same command starts anew
    assert steps_logged(tmp_path / "run") == 6


def test_a_second_run_in_the_folder_is_refused(flags, tmp_path):
    child = start(train.main, train.parse_args(flags("run", "--epochs 500 --num_workers 1 --knn_every 0")))
    while steps_logged(tmp_path / "run") < 2:
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match="another process is training in this folder"):
        run(flags("run", "--epochs 500"))
    [worker] = children_of(child.pid)
    child.kill()
    child.join()
    run(flags("run", "--epochs 1"))  # a kill leaves no lock behind, though a worker may be left
    killed = time.monotonic()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() - killed < 60, "an orphaned worker does not end"
        time.sleep(0.1)


def test_a_killed_loader_worker_is_one_line(flags, tmp_path):
    args = train.parse_args(flags("run", "--epochs 500 --num_workers 1"))
    child = start(train_like_the_script, args, output=tmp_path / "output")
    while steps_logged(tmp_path / "run") < 2:
        time.sleep(0.001)
    os.kill(children_of(child.pid)[0], signal.SIGKILL)
    child.join()
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert child.exitcode == 2 and "a data loader worker died, often out of memory" in last
    assert "Traceback" not in (tmp_path / "output").read_text()


@pytest.mark.parametrize("error", [
    ConnectionResetError(104, "Connection reset by peer"), BrokenPipeError(), ConnectionRefusedError(), EOFError(),
    FileNotFoundError(2, "no listener"), pickle.UnpicklingError("pickle data was truncated"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")], ids=lambda error: type(error).__name__)
def test_every_way_a_worker_dies_is_recognized(error):
    """The ways in which the main process can notice a death, depending on what the worker was sending."""
    def batches():
        yield 1
        raise error
    received = []
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        for batch in iter_batches(batches()):
            received.append(batch)
    assert received == [1] and "a data loader worker died" in cli.explain_runtime_error(caught.value)


def test_a_worker_death_in_a_destructor_is_not_printed(capsys, monkeypatch):
    class Dies:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    monkeypatch.setattr(sys, "unraisablehook", cli.hide_worker_death)
    Dies("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert capsys.readouterr().err == ""
    Dies("something else")
    assert "something else" in capsys.readouterr().err


def test_locks_end_with_their_file(tmp_path):
    with checkpoint.acquire_lock(tmp_path / "lock"):
        child = start(checkpoint.acquire_lock, tmp_path / "lock", output=tmp_path / "output")
        child.join()
        assert child.exitcode == 1 and "another process is training in this folder" in (tmp_path / "output").read_text()
    child = start(checkpoint.acquire_lock, tmp_path / "lock")
    child.join()
    assert child.exitcode == 0
