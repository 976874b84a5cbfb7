"""Order of the images in an epoch, as a function of (seed, epoch, position), without an array of all images.

    positions = np.arange(step * 1024, (step + 1) * 1024)
    indices = full_order(positions, num_images, seed=0, epoch=3)      # a permutation of all images
    indices = block_order(positions, num_images, seed=0, epoch=3)     # for disks and networks with slow random reads

torch.randperm would hold 8 bytes per image in every process, 0.8 GB for 10^8 images, and take seconds at the start of
every epoch and of every resume. Here a position is mapped to its image alone: a Feistel network (Luby and Rackoff 1988)
permutes [0, 2^b) whatever its round function is, and cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains") restricts it to [0, n): it is applied again where the result is n or more, at most once on average.

full_order is defined for up to 2^53 images, block_order for up to 2^40.
"""

import random

import numpy as np

ROUNDS = 24  # with 8, permutations of 5 to 7 images are not uniform; with 4, not even single positions of 100
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


def full_order(positions, num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [N] of the images at positions [N] of an epoch: a permutation of all images."""
    return permute(positions, num_images, derive_seed("order", seed, epoch)).astype(np.int64)


def block_order(positions, num_images: int, seed: int, epoch: int, block_size: int = 1024,
                mixed_blocks: int = 64) -> np.ndarray:
    """Indices [N] of the images at positions [N] of an epoch in which blocks of consecutive images are read in order.

    The blocks begin at a random image and are permuted. Each `mixed_blocks` of them, or up to twice as many, are a
    window, which is read in rows: a row is the next image of each of its blocks, in random order. Within a block,
    reading starts at a random image and wraps, so that which images meet in a row differs between epochs. The images
    after the last whole block, others in each epoch, come last. Blocks are smaller where there would be fewer than
    `mixed_blocks` of them.
    """
    p, key = np.atleast_1d(np.asarray(positions, np.int64)), derive_seed("order", seed, epoch)
    block_size = max(min(block_size, num_images // mixed_blocks), 1)
    blocks = num_images // block_size
    windows = max(blocks // mixed_blocks, 1)
    window = ((p // block_size + 1) * windows - 1) // blocks
    window_start = window * blocks // windows  # in blocks
    width = (window + 1) * blocks // windows - window_start
    row, column = np.divmod(p - window_start * block_size, width)

    row_key = mix_bits((window_start * block_size + row).astype(np.uint64) ^ np.uint64(key))
    is_rest = p >= blocks * block_size
    slot = window_start + permute(np.where(is_rest, 0, column), width, row_key).astype(np.int64)
    block = permute(np.where(is_rest, 0, slot), blocks, key ^ 1)
    first = (mix_bits(block ^ np.uint64(key ^ 2)) % np.uint64(block_size)).astype(np.int64)
    index = block.astype(np.int64) * block_size + (first + row) % block_size
    return (np.where(is_rest, p, index) + key % num_images) % num_images


def derive_seed(*key) -> int:
    """63-bit seed that depends on the key only."""
    return random.Random(repr(key)).getrandbits(63)


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
