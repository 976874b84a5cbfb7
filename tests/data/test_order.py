import math
import tracemalloc

import numpy as np
import pytest
import torch

from data.order import block_order, derive_seed, full_order, mix_bits, permute

CHI_SQUARE = {5: 20.5, 23: 49.7, 99: 148.2, 119: 172.7}  # quantiles at 1 - 1e-3, by degrees of freedom


def chi_square(counts):
    counts = np.asarray(counts, float).ravel()
    return ((counts - counts.mean()) ** 2).sum() / counts.mean()


def iter_orders():
    yield full_order, {}
    for block_size in (1, 2, 3, 7, 32, 1024):
        for mixed_blocks in (1, 2, 3, 64):
            yield block_order, dict(block_size=block_size, mixed_blocks=mixed_blocks)


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5, 8, 10, 31, 32, 33, 63, 64, 65, 100, 1000, 4097])
def test_every_image_once(num_images):
    for order, options in iter_orders():
        for seed in range(3):
            indices = order(np.arange(num_images), num_images, seed, seed + 1, **options)
            assert sorted(indices) == [*range(num_images)], (order, options)


def test_hundred_billion_images_without_memory():
    num_images = 10**11
    positions = np.random.default_rng(0).integers(0, num_images, 10_000)
    for order in full_order, block_order:
        tracemalloc.start()
        indices = order(positions, num_images, 0, 0)
        assert tracemalloc.get_traced_memory()[1] < 4e6  # 400 bytes a position
        tracemalloc.stop()
        assert len({*indices}) == len({*positions}) and indices.min() >= 0 and indices.max() < num_images
        assert abs(indices.mean() / num_images - 0.5) < 4 / math.sqrt(12 * len(indices))
        assert abs(np.corrcoef(positions, indices)[0, 1]) < 4 / math.sqrt(len(indices))


def test_positions_in_any_order_and_number():
    for order in full_order, block_order:
        whole = order(np.arange(5000), 5000, 3, 4)
        positions = np.random.default_rng(0).permutation(5000)[:300]
        assert (order(positions, 5000, 3, 4) == whole[positions]).all()
        assert order(77, 5000, 3, 4) == whole[77]


def test_orders_stay_as_they_are():
    """Runs resume with the order they began with. The hash: first outputs of SplitMix64 for seed 1234567."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix_bits(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert full_order(np.arange(8), 1_281_167, 0, 1).tolist() == \
        [413604, 216144, 15132, 252357, 1053103, 1228731, 808063, 159465]
    assert block_order(np.arange(8), 1_281_167, 0, 1).tolist() == \
        [435699, 209708, 894926, 1173215, 324149, 1260723, 416792, 268210]


@pytest.mark.parametrize("n, freedom", [(3, 5), (4, 23), (5, 119)])
def test_all_permutations_of_few_images_are_equally_likely(n, freedom):
    keys = np.random.default_rng(n).integers(0, 2**63, 40_000)
    code = sum(permute(np.full(len(keys), i), n, keys) * np.uint64(n**i) for i in range(n))
    counts = np.unique(code, return_counts=True)[1]
    assert len(counts) == math.factorial(n) and chi_square(counts) < CHI_SQUARE[freedom]


@pytest.mark.parametrize("order", [full_order, lambda positions, n, seed, epoch: torch.randperm(
    n, generator=torch.Generator().manual_seed(1000 * seed + epoch)).numpy()], ids=["full", "randperm"])
def test_statistics_of_a_permutation(order):
    """Bounds are four standard deviations, or quantiles at 1e-3, of random permutations; randperm is within them."""
    n, epochs = 1000, 200
    orders = np.stack([order(np.arange(n), n, epoch % 2, epoch) for epoch in range(epochs)])
    tenths = np.zeros((10, 10))
    np.add.at(tenths, (np.arange(n) // 100 + 0 * orders, orders // 100), 1)
    assert chi_square(tenths) < CHI_SQUARE[99]  # position and index
    fixed = (orders == np.arange(n)).sum(1)
    assert abs(fixed.mean() - 1) < 4 / math.sqrt(epochs) and abs(fixed.var() - 1) < 4 * math.sqrt(3 / epochs)
    assert abs((fixed == 0).mean() - math.exp(-1)) < 4 * math.sqrt(0.2325 / epochs)
    for other in (np.roll(orders, 1, 1), np.roll(orders, 1, 0)):  # neighbors; other epochs and seeds
        assert abs(np.corrcoef(orders.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(n * epochs)
        assert abs((orders == other).sum() - (0 if other[0, 1] == orders[0, 0] else epochs)) < 4 * math.sqrt(epochs)
    steps = np.diff(orders, axis=1) % n
    assert abs((steps == 1).sum() - epochs) < 4 * math.sqrt(epochs)


def test_seeds_and_epochs_have_orders_of_their_own():
    for order in full_order, block_order:
        orders = {tuple(order(np.arange(100), 10_000, seed, epoch)) for seed in range(4) for epoch in range(4)}
        assert len(orders) == 16


@pytest.mark.parametrize("num_images", [100_000, 100_001, 99_999, 64_123])
def test_blocks_are_read_in_order_and_mixed(num_images):
    block_size, mixed_blocks = 100, 8
    order = block_order(np.arange(num_images), num_images, 0, 5, block_size, mixed_blocks)
    indices = (order - derive_seed("order", 0, 5) % num_images) % num_images  # where the first block begins
    blocks = indices // block_size
    rest = num_images % block_size
    assert (indices[num_images - rest:] == np.arange(num_images - rest, num_images)).all()
    first, last = (np.full(blocks.max() + 1, -1) for _ in range(2))
    last[blocks] = np.arange(num_images)
    first[blocks[::-1]] = np.arange(num_images)[::-1]
    assert (last - first < block_size * (mixed_blocks + 1)).all()  # all of a block is read within one window
    width = next(width for width in range(8, 17) if len({*blocks[:width]}) == len({*blocks[:50 * width]}) == width)
    rows = blocks[:width * block_size].reshape(-1, width)
    assert (np.sort(rows) == np.sort(rows[0])).all() and len({tuple(row) for row in rows}) > 90
    steps = [np.diff(indices[blocks == block]) for block in range(20)]
    assert all((step == 1).sum() >= len(step) - 1 for step in steps)  # but for the one wrap
    starts = [indices[blocks == block][0] % block_size for block in range(num_images // block_size)]
    assert chi_square(np.bincount(np.array(starts) // 10, minlength=10)) < 27.9


def test_blocks_begin_at_another_image_in_each_epoch():
    """So that the images after the last whole block, which end an epoch and may be dropped, are others in each."""
    last = np.array([block_order(np.arange(990, 1000), 1000, 0, epoch, 99, 8) for epoch in range(2000)])
    assert (np.diff(last) % 1000 == 1).all() and chi_square(np.bincount(last[:, 0] // 10)) < CHI_SQUARE[99]


def test_every_position_of_blocks_is_uniform():
    orders = np.stack([block_order([0, 1, 500, 999], 1000, 0, epoch, 20, 8) for epoch in range(2000)])
    assert all(chi_square(np.bincount(column // 10, minlength=100)) < CHI_SQUARE[99] for column in orders.T)
    assert abs(np.corrcoef(orders[:, 0], orders[:, 1])[0, 1]) < 4 / math.sqrt(2000)


def test_few_images_are_in_as_many_blocks():
    indices = (block_order(np.arange(640), 640, 0, 0) - derive_seed("order", 0, 0) % 640) % 640
    assert all(len({*row}) == 64 for row in (indices // 10).reshape(-1, 64))
