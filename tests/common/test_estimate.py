import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from common import estimate
from common.estimate import Cost, choose_batch_size, resolve_batch_size

ROOT = Path(__file__).parents[2]
GB = 10**9
COST = Cost(fixed_bytes=0.5 * GB, bytes_per_image=0.1 * GB, seconds_per_image=1.0)


# ---- batch size ----

@pytest.mark.parametrize("available, num_images, expected", [
    (9, 1000, 64), (8.5, 1000, 32), (5, 1000, 32), (1, 1000, 2), (0.7, 1000, 0), (9, 40, 32), (9, 63, 32), (9, 1, 1),
    (math.inf, 64, 64)])
def test_the_batch_size_is_the_largest_that_leaves_a_fifth_free(available, num_images, expected):
    assert choose_batch_size(num_images, COST, available * GB) == expected
    if expected:
        assert COST.memory(expected) <= 0.8 * available * GB


@pytest.mark.parametrize("batch_size, free, total, expected, words", [
    ("auto", 16, 16, 64, ""), ("auto", 3, 16, 16, "--batch_size_per_gpu 16: a step with 64 images takes about 6.9 GB"),
    ("auto", 2, 2.5, 8, "a step with 64 images"),
    (64, 16, 16, 64, ""), (180, 16, 16, 180, "a step with 180 images takes about 18.5 GB, 16.0 GB are free: set --"),
    (8, 1, 16, 8, "set --batch_size_per_gpu 2"), (1, 0.1, 16, 1, "lower --out_dim")])
def test_a_batch_size_given_by_hand_is_kept_with_a_note(batch_size, free, total, expected, words):
    found, note = resolve_batch_size(batch_size, 1000, COST, (free * GB, total * GB))
    assert found == expected and words in note and bool(words) == bool(note)


@pytest.mark.parametrize("batch_size, free, total, words", [
    ("auto", 0.7, 16, "a step with 1 image takes about 0.6 GB, 0.7 GB are free, of 16.0 GB in all: lower --out_dim"),
    (64, 4, 5, "a step with 64 images takes about 6.9 GB, 4.0 GB are free, of 5.0 GB in all: set --b")])
def test_what_cannot_fit_is_refused(batch_size, free, total, words):
    with pytest.raises(estimate.MemoryEstimateError, match=re.escape(words)):
        resolve_batch_size(batch_size, 1000, COST, (free * GB, total * GB))


# ---- memory ----

MEASURE = """
import sys
import train
from common.memory import peak_memory
before = peak_memory("cpu")
train.main(train.parse_args(sys.argv[1:]))
print("rose by", peak_memory("cpu") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--arch vit_tiny --batch_size_per_gpu 8", "--arch vit_tiny --batch_size_per_gpu 16 --precision fp32",
    "--arch vit_small --batch_size_per_gpu 4", "--arch vit_small --batch_size_per_gpu 16 --precision fp32",
    "--arch resnet18 --batch_size_per_gpu 8 --precision fp32"])
def test_the_estimate_is_near_the_peak_of_a_run(tmp_path, flags):
    """Of two steps, within 25%: libraries allocate too."""
    command = [sys.executable, "-c", MEASURE, *flags.split(), "--data_path", "shapes:64", "--epochs", "1",
               *"--global_crops_size 224 --local_crops_size 96 --out_dim 65536".split(),
               *"--knn_every 0 --device cpu --num_workers 0 --dry_run --output_dir".split(), str(tmp_path / "run")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout
    found, expected = int(re.search(r"rose by (\d+)", out)[1]), float(re.search(r"estimated: ([\d.]+) GB", out)[1])
    base = float(re.search(r"dry run: ([\d.]+) GB", out)[1]) - found / GB
    assert found / GB == pytest.approx(expected - base, rel=0.25)


def test_measuring_leaves_no_trace():
    args = train.parse_args("--arch vit_tiny --embed_dim 32 --num_heads 2 --depth 2 --out_dim 64 --use_bn_in_head true "
                            "--global_crops_size 32 --local_crops_size 16 --device cpu --num_workers 0".split())
    objects = train.build_training(args, torch.device("cpu"), 1)
    student, teacher = objects["student"], objects["teacher"]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    cost = estimate.measure_cost(student, teacher, lambda i: i, 10, args, torch.device("cpu"))
    assert student.training and all(p.grad is None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert cost.fixed_bytes == pytest.approx(1.15 * 4 * 5 * sum(p.numel() for p in student.parameters()))


@pytest.mark.parametrize("batch_size, share, expected", [("auto", 8, [1, 2]), (2, 1e9, [1, 2]), (4, 1e9, [1, 2, 4])])
def test_measuring_takes_no_more_than_the_batch_and_the_memory(batch_size, share, expected):
    args = train.parse_args("--arch vit_tiny --depth 1 --out_dim 64 --global_crops_size 32 --local_crops_size 16 "
                            f"--device cpu --num_workers 0 --batch_size_per_gpu {batch_size}".split())
    objects, seen = train.build_training(args, torch.device("cpu"), 1), []
    student, teacher = objects["student"], objects["teacher"]
    two, _ = estimate.measure_forward(student, [32] * 2 + [16] * 8, args.precision, "cpu", 2)
    student.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0][0])))
    estimate.measure_cost(student, teacher, lambda i: i, 10, args, torch.device("cpu"), share * two)
    assert seen == expected


def test_the_first_call_in_which_a_gpu_loads_its_kernels_is_not_timed():
    """With it, the measurement would end at two images, and a fast GPU would seem as slow as a CPU."""
    args = train.parse_args("--arch vit_tiny --depth 1 --out_dim 64 --global_crops_size 32 --device cpu".split())
    student, seen = train.build_training(args, torch.device("cpu"), 1)["student"], []

    def load_kernels(module, inputs):
        if not seen:
            time.sleep(1.1)
        seen.append(len(inputs[0][0]))

    student.register_forward_pre_hook(load_kernels)
    estimate.measure_forward(student, [32, 32], "fp32", "cpu", 4)
    assert seen == [1, 2, 4]


def test_activation_checkpointing_takes_less():
    def measure(*flags):
        args = train.parse_args("--arch vit_tiny --global_crops_size 64 --local_crops_size 32 --device cpu".split()
                                + list(flags))
        student = train.build_training(args, torch.device("cpu"), 1)["student"]
        return estimate.measure_forward(student, [64, 64], "fp32", "cpu", 2)[0]

    whole = measure()
    # a block of width D keeps x, norm(x) twice, q, k, v, the attention's output (7 D), fc1 and GELU (8 D) of each token
    assert whole / (2 * 17 * 12 * 192 * 4) == pytest.approx(15, abs=2)
    assert 0 < measure("--activation_checkpointing") < whole / 4


def test_the_crops_of_all_micro_batches_are_counted():
    """They are in memory together: a step loads them before its first forward pass."""
    args = train.parse_args("--arch vit_tiny --depth 1 --out_dim 64 --global_crops_size 64 --local_crops_size 32 "
                            "--local_crops_number 8 --num_workers 0 --device cpu".split())
    networks = [train.build_training(args, torch.device("cpu"), 1)[name] for name in ("student", "teacher")]
    costs = {}
    for args.accum_steps in (1, 5):
        costs[args.accum_steps] = estimate.measure_cost(*networks, lambda i: i, 10, args, torch.device("cpu"))
    crops = 4 * 3 * (2 * 64**2 + 8 * 32**2)  # bytes of one image's
    more = costs[5].bytes_per_image - costs[1].bytes_per_image
    assert costs[5].fixed_bytes == costs[1].fixed_bytes and 4 * crops < more < 1.2 * 4 * crops


def test_durations_are_in_units_that_fit():
    assert list(map(estimate.format_duration, (0.2, 119, 120, 2400, 7199, 7200, 172_800))) == [
        "1 second", "119 seconds", "2 minutes", "40 minutes", "120 minutes", "2 hours", "2 days"]
