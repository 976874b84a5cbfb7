"""Which flags do not suit the pictures, for whoever did not choose them.

    for sentence in advice(args, pictures=50_000, side=32, steps=14_000):
        print(sentence)

This file needs nothing.
"""

import contextlib
import statistics


def usual_side(images, most=8):
    """Median of the shorter sides of a few of the pictures, pixels; None if none can be read.

    Args:
        images: index -> (PIL image, label); OSError where it cannot be read.
    """
    sides = []
    for i in range(0, len(images), -(-len(images) // most) or 1):
        with contextlib.suppress(OSError):
            sides.append(min(images[i][0].size))
    return statistics.median(sides) if sides else None


def advice(args, pictures, side, steps):
    """A sentence on each flag that is known to cost accuracy or time with such pictures.

    Args:
        args: the flags of train.py.
        pictures: how many there are to train on.
        side: their usual shorter side, pixels; None if it is not known.
        steps: of the whole run.
    """
    sentences = []
    if side and args.global_crops_size > 1.5 * side:
        sentences.append(f"views of {args.global_crops_size} pixels only enlarge pictures of {side:.0f}: smaller ones "
                         f"(--global_crops_size, --local_crops_size, a --patch_size that leaves 16 patches or more) "
                         f"cost a fraction of the time")
    patches = (args.global_crops_size // args.patch_size) ** 2 if args.patch_size else None
    if patches and patches < 16:
        sentences.append(f"a global view has no more than {patches} patches: try a smaller --patch_size")
    if args.out_dim > pictures:
        sentences.append(f"--out_dim {args.out_dim} are more prototypes than the {pictures} pictures: try fewer")
    memory = 1 / max(1 - args.momentum_teacher, 1e-9)
    if args.teacher == "momentum" and memory > max(100, steps / 10):
        sentences.append(f"--momentum_teacher {args.momentum_teacher:g} averages over {memory:,.0f} steps, of "
                         f"{steps:,} in the whole run: try 0.99, or more --epochs")
    return sentences
