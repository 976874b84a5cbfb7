"""Flags that follow from the data where they are not given: pure functions of images, their size, epochs and steps.

    args.auto = ("out_dim", "momentum_teacher", ...)                # names of the flags that were not given
    fit_to_images(args, num_images=9469, side=128)
    fit_to_steps(args, total_steps=5310)

At a million images of 224 pixels and 62,500 steps they are the paper's. What each rule rests on is in
docs/training.md.
"""

PAPER = dict(patch_size=16, global_crops_size=224, local_crops_size=96, local_crops_number=8,
             global_crops_scale=(0.4, 1.0), local_crops_scale=(0.05, 0.4), blur=(1.0, 0.1, 0.5), out_dim=65536,
             use_bn_in_head=False, centering="mean", lr=0.0005, schedule_epochs=0, freeze_last_layer=1,
             momentum_teacher=0.996)
SMALL = 100_000  # images of a data set
SHORT = 200_000  # images of a run: number times epochs


def is_short(num_images: int, epochs: int) -> bool:
    """Whether a run from random weights sees so few images that its features may stay below raw pixels."""
    return num_images * epochs < SHORT


def fit_to_images(args, num_images: int, side: float | None) -> None:
    """Set patch size, crops, blur, prototypes, head, centering, learning rate, schedules and freezing in args.auto.

    Args:
        side: typical shorter side of an image in pixels, None if unknown.
    """
    side = side or PAPER["global_crops_size"]
    short = is_short(num_images, args.epochs)
    size = min(PAPER["global_crops_size"], int(side)) if "global_crops_size" in args.auto else args.global_crops_size
    if short and side <= 64 and {"patch_size", "global_crops_size", "local_crops_size"} <= {*args.auto}:
        size = min(size, 32)  # more images in the same time
    small_and_short = short and size < 64
    given = [getattr(args, name) for name in ("global_crops_size", "local_crops_size") if name not in args.auto]
    side_in_patches = 4 if small_and_short else 8
    p = choose_patch_size(size, given, side_in_patches) if "patch_size" in args.auto else args.patch_size or 1
    found = dict(patch_size=p, global_crops_size=max(1, size // p) * p, out_dim=choose_out_dim(num_images),
                 local_crops_size=max(1, round(size * 3 / 7 / p)) * p)  # as 96 to 224
    if side < 64 or short:  # objects that fill their images, or no time for hard views
        found |= dict(global_crops_scale=(0.8, 1.0), local_crops_scale=(0.3, 0.8))
    if short:
        found |= dict(lr=0.004 if small_and_short else 0.002, schedule_epochs=2 * args.epochs)
    if num_images < SMALL:  # more epochs in the same time, and a loss that falls from the first steps
        found |= dict(local_crops_number=4, use_bn_in_head=True, centering="sinkhorn" if args.loss == "ce" else "mean")
    if small_and_short:
        found |= dict(out_dim=min(found["out_dim"], 1024), local_crops_number=2, blur=(0.0, 0.0, 0.0),
                      freeze_last_layer=0)
    set_auto(args, found)


def fit_to_steps(args, total_steps: int) -> None:
    """Set the teacher's momentum, if it is in args.auto: its horizon is 1/250 of the run, 10 to 250 steps."""
    horizon = min(max(total_steps / 250, 10), 250)
    set_auto(args, dict(momentum_teacher=round(1 - 1 / horizon, 4)))


def choose_patch_size(size: int, multiples: tuple[int, ...] = (), side_in_patches: int = 8) -> int:
    """The largest of 16, 8, 4, 2 and 1 with so many patches along a crop, or half of it if that divides given sizes."""
    largest = next((p for p in (16, 8, 4, 2) if side_in_patches * p <= size), 1)
    return next((p for p in (largest, largest // 2) if p and not any(given % p for given in multiples)), largest)


def choose_out_dim(num_images: int) -> int:
    """Number of prototypes: a power of two, an eighth of the images to a sixteenth, 256 at least."""
    return min(max(2 ** (num_images.bit_length() - 4), 256), PAPER["out_dim"])


def set_auto(args, values):
    for name in values.keys() & {*args.auto}:
        setattr(args, name, values[name])


def format_value(value):
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def describe_auto(args, num_images: int, side: float | None, total_steps: int) -> str:
    """"auto: out_dim 1024 (9,469 images of 128 pixels, 18 epochs); momentum_teacher 0.9529 (5,310 steps)"."""
    def describe(names):
        values = {name: getattr(args, name) for name in PAPER if name in names}
        return ", ".join(f"{name} {' '.join(map(format_value, value if isinstance(value, tuple) else [value]))}"
                         for name, value in values.items())
    of_images, of_steps = describe({*args.auto} - {"momentum_teacher"}), describe({*args.auto} & {"momentum_teacher"})
    size = f" of {side:.0f} pixels" if side else ""
    parts = [f"{of_images} ({num_images:,} images{size}, {args.epochs} epochs)"] * bool(of_images) + [
        f"{of_steps} ({total_steps:,} steps)"] * bool(of_steps)
    return f"auto: {'; '.join(parts)}" if parts else ""
