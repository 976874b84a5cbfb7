"""The training step on CUDA: host syncs, launches, graphs, collectives, matrix products, memory."""

import shutil

import pytest

pytestmark = pytest.mark.slow
LAUNCHES = 1700  # of a step of ViT-S/16 in bf16 with 2 x 224 and 8 x 96 pixels, not compiled


@pytest.mark.parametrize("flags", [
    "--precision bf16", "--precision fp16", "--precision fp32", "--precision bf16 --accum_steps 2",
    "--precision bf16 --clip_mode global --centering sinkhorn", "--precision fp32 --optimizer lars"])
def test_a_step_never_waits_for_the_device(measure, flags):
    counts = measure("count_syncs", flags=flags)
    assert counts["syncs"] == counts["pageable"] == 0


@pytest.mark.parametrize("views", ["cpu", "device"])
def test_the_loop_waits_for_the_device_on_log_steps_only(measure, needs_stub, images, tmp_path, views):
    """A run of 8 steps and one of 24 wait as often, because both log and save once, at the end of the epoch."""
    for path in sorted(images.glob("train/*/*.png"))[::3]:
        shutil.copy(path, tmp_path)
    flags = f"--views {views} --epochs 1 --warmup_epochs 0 --knn_every 0 --compile false"
    data_paths = [str(path) for path in (tmp_path, images, tmp_path)]  # the first run compiles
    _, long, short = measure("count_syncs_of_runs", flags=flags, data_paths=data_paths)
    assert 0 < short == long


def test_launches_of_a_step(measure, needs_stub):
    phases = measure("count_launches", flags="--arch vit_small --precision bf16")
    assert sum(phases.values()) <= LAUNCHES, phases
    assert phases["forward"] > 12 * 2 * 6  # two crop sizes: projections, MLP, attention and norms of each block


def test_compiled_blocks_are_six_graphs_without_breaks(measure):
    """Ordinary and last block, for two crop sizes of the student and one of the teacher, however many blocks."""
    assert measure("count_graphs", flags="--depth 4") == dict(graphs=6, breaks={})


@pytest.mark.parametrize("flags, center_reductions", [
    ("--centering mean", 1), ("--centering mean --accum_steps 2", 1), ("--centering batch", 1 + 2),
    ("--centering sinkhorn", 1 + 3 * 2), ("--centering sinkhorn --accum_steps 2", 1 + 2 * 3 * 2)])
def test_collectives_of_a_step_on_eight_gpus(measure, needs_stub, flags, center_reductions):
    """Each gradient is reduced once, and the [K] sums of the centering (two for each Sinkhorn iteration)."""
    found = measure("count_collectives", flags=flags, world_size=8)
    buckets = found["counts"].pop("nccl all_reduce") - center_reductions
    assert found["syncs"] == 0 and 1 <= buckets <= 2
    assert found["counts"] == {"bytes of nccl all_reduce": 4 * (
        found["parameters"] + center_reductions * found["out_dim"])}


@pytest.mark.parametrize("precision, kinds", [
    ("bf16", {"gemm bf16", "gemm fp32 tf32"}), ("fp16", {"gemm fp16", "gemm fp32 tf32"}),
    ("fp32", {"gemm fp32 ieee"})])
def test_products_of_the_head(measure, needs_stub, precision, kinds):
    """The last layer is in float32: by TF32 beside half precision."""
    products = measure("count_products", precision=precision)
    assert products.keys() == kinds
    assert precision == "fp32" or products["gemm fp32 tf32"] == 3  # logits, gradients of features and weight


def test_knn_is_in_ieee_float32_where_tf32_is_allowed(measure, needs_stub):
    assert measure("count_knn_products").keys() == {"gemm fp32 ieee"}


@pytest.mark.parametrize("arch, batch_size, bound", [
    ("vit_small", 64, 8.15), ("vit_base", 32, 9.1), ("vit_large", 16, 15.6)])
def test_peak_memory_of_a_step(measure, arch, batch_size, bound):
    """With 65,536 prototypes, in GiB."""
    peak = measure("measure_memory", flags=f"--arch {arch} --batch_size_per_gpu {batch_size} --precision bf16")
    assert 0.9 * bound < peak < bound
