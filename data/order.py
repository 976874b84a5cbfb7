"""Order of the images in an epoch, as a function of (seed, epoch, position), without an array of all images.

    positions = np.arange(step * 1024, (step + 1) * 1024)
    indices = full_order(positions, num_images, seed=0, epoch=3)      # a permutation of all images
    indices = block_order(positions, num_images, seed=0, epoch=3)     # for disks and networks with slow random reads

torch.randperm would hold 8 bytes per image in every process, 0.8 GB for 10^8 images, and take seconds at the start of
every epoch and of every resume. Here a position is mapped to its image alone: a Feistel network (Luby and Rackoff 1988)
permutes [0, 2^b) whatever its round function is, and cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains") restricts it to [0, n): it is applied again where the result is n or more, at most once on average.

All orders are defined for up to 2^53 images.
"""

import functools
import random

import numpy as np

ROUNDS = 24  # with 8, permutations of 5 to 7 images are not uniform; with 4, not even single positions of 100
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


def full_order(positions, num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [N] of the images at positions [N] of an epoch: a permutation of all images."""
    return permute(positions, num_images, derive_key(seed, epoch)).astype(np.int64)


def block_order(positions, num_images: int, seed: int, epoch: int, block_size: int = 1024,
                mixed_blocks: int = 64) -> np.ndarray:
    """Indices [N] of the images at positions [N] of an epoch in which blocks of consecutive images are read in order.

    The blocks are permuted, and each `mixed_blocks` of them are a window, which is read in rows: a row is the next
    image of each of its blocks, in random order. Every block starts at a random image and wraps, so that which images
    meet in a row differs between epochs. The last block may be shorter; it is the last block of a random window.
    Blocks are smaller where there would be fewer than `mixed_blocks` of them.
    """
    p = np.atleast_1d(np.asarray(positions, np.uint64))
    key = derive_key(seed, epoch)
    block_size = max(min(block_size, num_images // mixed_blocks), 1)
    B, W = np.uint64(block_size), np.uint64(mixed_blocks)
    num_blocks = -(-num_images // block_size)
    num_windows = -(-num_blocks // mixed_blocks)
    last_width = np.uint64(num_blocks - (num_windows - 1) * mixed_blocks)
    short_size = np.uint64(num_images - (num_blocks - 1) * block_size)
    short_window = permute(0, num_blocks, key ^ 1)[0] // W
    short_slot = np.uint64(min((int(short_window) + 1) * mixed_blocks, num_blocks) - 1)

    p = p + np.where(p >= (short_slot + np.uint64(1)) * B - (B - short_size), B - short_size, np.uint64(0))
    window = p // (W * B)
    place = p - window * (W * B)  # in the window
    width = np.where(window == num_windows - 1, last_width, W)  # blocks of the window
    rows = np.where(window == short_window, short_size, B)  # after which the short block is used up
    narrow = np.maximum(width, np.uint64(2)) - np.uint64(1)
    is_narrow = place >= rows * width
    rest = place - np.where(is_narrow, rows * width, np.uint64(0))
    width = np.where(is_narrow, narrow, width)
    row, column = np.where(is_narrow, rows, np.uint64(0)) + rest // width, rest % width

    slot = window * W + permute(column, width, mix_bits((window * B + row) ^ np.uint64(key)))
    is_short = slot == short_slot
    whole = permute(np.where(is_short, np.uint64(0), slot - (slot > short_slot)), max(num_blocks - 1, 1), key ^ 2)
    block = np.where(is_short, np.uint64(num_blocks - 1), whole)
    size = np.where(is_short, short_size, B)
    start = mix_bits(block ^ np.uint64(key ^ 3)) % size
    return (block * B + (start + row) % size).astype(np.int64)


@functools.lru_cache(maxsize=8)
def derive_key(seed, epoch):
    """64-bit key of an epoch."""
    return random.Random(repr(("order", seed, epoch))).getrandbits(64)


def permute(x, n, key) -> np.ndarray:
    """Integers x in [0, n) -> integers in [0, n), a permutation for every n and 64-bit key. The arguments broadcast."""
    x, n, key = (np.atleast_1d(np.array(a, np.uint64)) for a in np.broadcast_arrays(
        *(np.asarray(a, np.uint64) for a in (x, n, key))))
    bits = np.frexp((n - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)  # of n - 1
    x = permute_bits(x, bits, key)
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = permute_bits(x[outside], bits[outside], key[outside])
    return x


def permute_bits(x, bits, key):
    """Feistel network on integers of `bits` bits, in halves that differ by a bit if that is odd; uint64 arrays."""
    half, one = bits >> np.uint64(1), np.uint64(1)
    high_mask, low_mask = (one << (bits - half)) - one, (one << half) - one
    high, low = x >> half, x & low_mask
    for i in range(ROUNDS):
        key = key + np.uint64(GOLDEN)
        if i % 2:
            low = low ^ mix_bits(high ^ key) & low_mask
        else:
            high = high ^ mix_bits(low ^ key) & high_mask
    return high << half | low


def mix_bits(x):
    """Hash of uint64 arrays: the output function of SplitMix64 (Steele, Lea and Flood 2014; constants of Stafford)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
