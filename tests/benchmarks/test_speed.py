import json

import pytest
import torch

from benchmarks import speed as bench

TINY = ("--arch vit_tiny --batch_size_per_gpu 2 --out_dim 300 --global_crops_size 32 --local_crops_size 16 "
        "--local_crops_number 2 --warmup 1 --runs 2 --device cpu").split()


@pytest.mark.parametrize("task, settings", [("step", ["fp32", "fp32+checkpointing", "bf16"]), ("loss", ["fp32"]),
                                            ("update", ["fp32"]), ("features", ["fp32", "bf16"])])
def test_rows_for_machines_and_for_people(capsys, task, settings):
    bench.main(bench.parse_args([task, *TINY, "--settings", *settings]))
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["row"] for row in rows] == settings
    for row in rows:
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"] and row["row"] in captured.err
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["crops"] == ("1x32" if task == "features" else "2x32 + 2x16")
        assert row["batch"] == 2 and row["out_dim"] == 300
        if task in ("step", "features"):
            assert row["mfu"] == pytest.approx(
                row["gflops_per_image"] * row["images_per_second"] / row["peak_gflops"])
    if task == "step":
        assert rows[1]["peak_mib"] < rows[0]["peak_mib"]


def test_views_from_files(capsys, tmp_path, scene, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of the process that runs all tests
    for i in range(3):
        scene.save(tmp_path / f"{i}.jpg")
    bench.main(bench.parse_args(["views", *TINY, "--data_path", str(tmp_path)]))
    captured = capsys.readouterr()
    rows = {(row := json.loads(line))["row"]: row for line in captured.out.splitlines()}
    assert {"on a worker", "files to pixels", "pixels on cpu"} <= rows.keys()
    assert rows["on a worker"]["images_per_second"] == pytest.approx(2 / rows["on a worker"]["seconds"])
    assert rows["files to pixels"]["peak_mib"] is None


@pytest.mark.parametrize("prepare, expected", [
    (list, [1, 2, 3, 1, 2, 3]), (lambda files: [10 * file for file in files], [10, 20, 30, 10, 20, 30])])
def test_rows_take_the_same_files_in_turn(prepare, expected):
    seen = []
    take, call = bench.in_turn([1, 2, 3], 2, seen.extend, prepare)
    for _ in range(3):
        take()
        call()
    assert seen == expected


def test_operations_are_those_of_the_formula():
    args = bench.parse_args(["step", "--arch", "vit_small", "--local_crops_number", "3"])
    D, K = 384, 65536

    def forward(pixels):
        n, blocks = (pixels // 16) ** 2 + 1, 12
        tokens_through = (blocks - 1) * n + 1  # of the last block only CLS leaves
        linear = 2 * D * (tokens_through * (D + 8 * D) + blocks * n * 3 * D)
        attention = 4 * D * n * tokens_through
        return linear + attention + 2 * (n - 1) * 3 * 16**2 * D

    head = 2 * (D * 2048 + 2048 * 2048 + 2048 * 256 + 256 * K)
    teacher = 2 * forward(224) + 2 * head
    student = 2 * forward(224) + 3 * forward(96) + 5 * head
    pixels = 2 * (2 * 196 + 3 * 36) * 3 * 16**2 * D  # whose gradient nobody wants
    assert bench.flops_per_image(args) == pytest.approx(teacher + 3 * student - pixels, rel=0.01)
    args.task = "features"
    assert bench.flops_per_image(args) == pytest.approx(forward(224), rel=0.01)


def test_memory_is_what_is_held_at_most():
    """With what was held before the call and let go in it, as old gradients are."""
    def build():
        held = [torch.zeros(1_000_000)]

        def call():
            held[0] = None
            held[0] = torch.ones(1_000_000)
            a = torch.ones(1_000_000)
            b = a + 1
            del a
            return b * 2
        return bench.nothing, call

    assert bench.build_measured(build, "cpu")[2] == pytest.approx(12e6, rel=0.01)


def test_every_call_of_the_loss_sees_the_same_logits(monkeypatch):
    args = bench.parse_args(["loss", *TINY])
    student, teacher = bench.empty_logits(args)
    monkeypatch.setattr(bench, "empty_logits", lambda args: (student, teacher))
    prepare, call = bench.our_loss(args, "fp32", set())
    prepare()
    before = student.detach().clone()
    call()
    assert not torch.equal(student, before)
    prepare()
    assert torch.equal(student, before) and student.std().item() == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("argv, words", [
    (["--settings", "int8"], "'int8' is not fp32, bf16 or fp16"), (["--runs", "0"], "--runs: '0' is not a whole")])
def test_what_cannot_be_timed_is_named(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        bench.parse_args(["step", *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("task", ["features", "video"])
def test_frozen_backbones_have_no_checkpointing(task):
    with pytest.raises(bench.BenchError, match="nothing is computed again where there is no backward"):
        bench.main(bench.parse_args([task, *TINY, "--settings", "bf16+checkpointing"]))


def test_video_is_one_frame(capsys):
    bench.main(bench.parse_args(["video", *TINY, "--patch_size", "32", "--settings", "fp32", "bf16"]))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["row"] for row in rows] == ["fp32", "bf16"]
    assert {(row["batch"], row["crops"]) for row in rows} == {(1, "480x832")}
    assert rows[0]["images_per_second"] == pytest.approx(1 / rows[0]["seconds"])


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(bench.NoReference, match="no checkout of facebookresearch/dino"):
        bench.main(bench.parse_args(["loss", *TINY, "--reference", str(tmp_path)]))
