import itertools
import json

import pytest
import torch

import train
from benchmarks import speed
from common.precision import is_onednn_exact

FLAGS = ("--embed_dim 64 --depth 2 --num_heads 1 --batch_size_per_gpu 2 --out_dim 300 --global_crops_size 32 "
         "--local_crops_size 16 --local_crops_number 2 --warmup 1 --runs 2 --device cpu").split()


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*argv): the rows that the command prints, and its table."""
    monkeypatch.setitem(speed.MATMUL_SIZE, "cpu", 256)  # half precision is slow on CPUs that emulate it

    def run(*argv):
        speed.main(speed.parse_args([*argv[:1], *FLAGS, *argv[1:]]))
        captured = capsys.readouterr()
        return [json.loads(line) for line in captured.out.splitlines()], captured.err
    return run


@pytest.mark.parametrize("task, settings", [("step", ["fp32", "fp32+checkpointing", "bf16"]), ("loss", ["fp32"]),
                                            ("update", ["fp32"]), ("features", ["fp32", "bf16"])])
def test_rows_of_a_task(run, task, settings):
    rows, table = run(task, "--settings", *settings)
    assert [row["row"] for row in rows] == settings
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and f"\n{row['row']}" in table
        assert row["images_per_sec"] == pytest.approx(2000 / row["ms"])
        assert row["batch_size_per_gpu"] == 2 and row["out_dim"] == 300 and row["peak_mib"] > 0
        if task in ("step", "features") and row["row"] == "fp32":
            assert row["mfu"] == pytest.approx(row["gflops_per_image"] * row["images_per_sec"] / row["peak_gflops"])
        if task in ("loss", "update"):
            assert row["mfu"] is None and row["gflops_per_image"] is None


def test_flags_of_a_run_in_the_default_folder_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = vars(speed.parse_args(["step"]))
    (tmp_path / "runs" / "dino").mkdir(parents=True)
    (tmp_path / "runs" / "dino" / "checkpoint.pth").write_bytes(b"")
    (tmp_path / "runs" / "dino" / "flags.txt").write_text("# auto: out_dim\n--patch_size 8\n--out_dim 512\n")
    assert train.parse_args([]).out_dim == 512 and vars(speed.parse_args(["step"])) == expected


@pytest.mark.parametrize("local_crops", [0, 2])
def test_parts_of_a_step(run, local_crops, restore_threads):
    """Memory tells the parts apart: nothing is kept for a backward pass through the teacher."""
    rows, _ = run("parts", "--data_path", "shapes", "--batch_size_per_gpu", "4", "--local_crops_number",
                  str(local_crops), "--num_threads", "2")
    assert {row["threads"] for row in rows} == {2}
    memory = {row["row"]: row["peak_mib"] for row in rows}
    assert [*memory] == ["images", "images and crops", "teacher", "student backbone", "student head", "loss", "update",
                         "whole step"]
    assert memory["teacher"] < memory["student backbone"] < memory["whole step"]
    assert all(row["images_per_sec"] == pytest.approx(4000 / row["ms"]) for row in rows)
    with pytest.raises(SystemExit):
        run("parts", "--settings", "fp32", "bf16")


def test_checkpointing_takes_less_memory(run):
    rows, _ = run("step", "--settings", "fp32", "fp32+checkpointing", "--runs", "1", "--batch_size_per_gpu", "8",
                  "--global_crops_size", "64", "--patch_size", "8", "--depth", "8")
    assert rows[1]["peak_mib"] < rows[0]["peak_mib"]


def test_no_mfu_where_half_precision_is_emulated(run, monkeypatch):
    monkeypatch.setattr(speed, "resolve_precision", lambda precision, device: "fp32")
    monkeypatch.setattr(speed, "measure_peak_flops", lambda device, precision: {"fp32": 1e12}[precision])
    rows, table = run("features", "--settings", "fp32", "bf16")
    assert rows[0]["mfu"] > 0 and rows[1]["mfu"] is None and rows[1]["peak_gflops"] is None
    assert rows[0]["peak_gflops"] == 1000 and "1000" in table


def test_views_from_files(run, tmp_path, scene):
    for i in range(3):
        scene.save(tmp_path / f"{i}.jpg")
    rows, _ = run("views", "--data_path", str(tmp_path))
    rows = {row["row"]: row for row in rows}
    assert {"on a worker", "files to pixels", "pixels on cpu"} <= rows.keys()
    assert rows["on a worker"]["images_per_sec"] == pytest.approx(2000 / rows["on a worker"]["ms"])


def test_calls_of_views_take_the_next_images_in_turn(tmp_path, scene):
    for i in range(3):
        scene.resize((40 + i, 40)).save(tmp_path / f"{i}.png")
    args = speed.parse_args(["views", *FLAGS, "--data_path", str(tmp_path)])
    calls = speed.list_view_rows(args)["files to pixels"]()
    widths = [[len(pixels) // 40 for (pixels, _), *_ in call()] for call in calls]
    assert widths == [[40, 41], [42, 40], [41, 42], [40, 41], [42, 40]]


def test_flops_equal_the_formula():
    is_onednn_exact.cache_clear()  # its product must not be counted
    args = speed.parse_args("step --arch vit_small --local_crops_number 3 --out_dim 4096 --device cpu".split())
    D, K = 384, 4096

    def forward(side):
        n, blocks = (side // 16) ** 2 + 1, 12
        tokens = (blocks - 1) * n + 1  # only the CLS token leaves the last block
        linear = 2 * D * (tokens * (D + 8 * D) + blocks * n * 3 * D)
        attention = 4 * D * n * tokens
        return linear + attention + 2 * (n - 1) * 3 * 16**2 * D

    head = 2 * (D * 2048 + 2048 * 2048 + 2048 * 256 + 256 * K)
    teacher = 2 * forward(224) + 2 * head
    student = 2 * forward(224) + 3 * forward(96) + 5 * head
    images = 2 * (2 * 196 + 3 * 36) * 3 * 16**2 * D  # whose gradient is not computed
    assert speed.count_flops(args) == pytest.approx(teacher + 3 * student - images, rel=0.01)
    args.task = "features"
    assert speed.count_flops(args) == pytest.approx(forward(224), rel=0.01)


def test_peak_memory_counts_what_was_allocated_before_the_call():
    """Such as gradients of the previous step, which the call frees."""
    def build():
        held = [torch.zeros(1_000_000)]

        def run():
            held[0] = None
            held[0] = torch.ones(1_000_000)
            a = torch.ones(1_000_000)
            b = a + 1
            del a
            return b * 2
        return itertools.repeat(run)

    assert speed.measure_memory(build, "cpu")[1] == pytest.approx(12e6, rel=0.01)


def test_every_call_of_the_loss_gets_the_same_logits():
    seen, args = [], speed.parse_args(["loss", *FLAGS])
    code = speed.Ours(args)
    dino_loss = code.build_training()["dino_loss"]

    def record(student, teacher, **kwargs):
        seen.append((student, student.detach().clone(), teacher.clone()))
        return dino_loss(student, teacher, **kwargs)
    code.build_training = lambda: dict(dino_loss=record)
    for call in itertools.islice(speed.bench_loss(code, args), 2):
        call()
    (student, first, teacher), (_, second, other_teacher) = seen
    assert torch.equal(first, second) and torch.equal(teacher, other_teacher)
    assert not torch.equal(student, second)  # which is why it is filled again
    assert first.std().item() == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("argv, message", [
    (["step", "--settings", "int8"], "--settings: invalid choice: 'int8' (choose from"),
    (["step", "--runs", "0"], "--runs: '0' is not an integer above 0"),
    (["step", "--out_dim", "0"], "--out_dim: '0' is not an integer above 0"),
    (["step", "--arch", "resnet18"], "--arch resnet18 is not one of vit.py's"),
    (["features", "--settings", "bf16+checkpointing"], "+checkpointing needs a backward pass"),
    (["video", "--settings", "bf16+checkpointing"], "+checkpointing needs a backward pass")])
def test_invalid_flags(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        speed.parse_args(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_flags_of_train_and_flag_files(tmp_path):
    (tmp_path / "flags.txt").write_text("--lr 0.1  # of a recipe\n--batch_size_per_gpu 3")
    assert speed.parse_args(["loss"]).batch_size_per_gpu == 8
    args = speed.parse_args(["loss", f"@{tmp_path}/flags.txt", "--settings", "fp32", "bf16", "--blur", "1", "0", "0.5"])
    assert (args.lr, args.batch_size_per_gpu, args.settings, args.blur) == (0.1, 3, ["fp32", "bf16"], (1, 0, 0.5))


def test_video_times_one_frame(run):
    rows, _ = run("video", "--patch_size", "32", "--local_crops_size", "32", "--settings", "fp32", "bf16")
    assert [row["row"] for row in rows] == ["fp32", "bf16"]
    assert {row["batch_size_per_gpu"] for row in rows} == {1}
    assert rows[0]["images_per_sec"] == pytest.approx(1000 / rows[0]["ms"])


def test_folder_without_a_checkout(tmp_path):
    with pytest.raises(speed.checkout.ReferenceImplementationError, match="no checkout of facebookresearch/dino"):
        speed.main(speed.parse_args(["loss", *FLAGS, "--reference", str(tmp_path)]))


@pytest.mark.parametrize("task", speed.TASKS)
def test_reference_row(run, request, tmp_path, scene, task):
    """With --reference only, because this repository holds nothing of the reference implementation."""
    if request.config.getoption("--reference") is None:
        pytest.skip("needs --reference DIR, a checkout of facebookresearch/dino")
    scene.save(tmp_path / "0.jpg")
    more = dict(views=["--data_path", str(tmp_path)], video=["--patch_size", "32", "--local_crops_size", "32"])
    rows, _ = run(task, *more.get(task, []), "--reference", request.config.getoption("--reference"))
    assert rows[0]["row"] == "reference" and rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0
