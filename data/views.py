"""Which views a run makes: the flags for them, what they must be, and the multicrop that they mean.

    add_view_flags(parser.add_argument)
    args = parser.parse_args()
    require_views(parser, args)
    multicrop = build_multicrop(args)
"""

import functools

from augment import BatchMultiCrop, MultiCrop
from common import cli
from common.cli import natural, natural_float, positive, share


def add_view_flags(add):
    """Give a parser the flags of views, by its add_argument or what is called like it."""
    add("--global_crops_size", default=224, help="pixels", type=positive)
    add("--global_crops_scale", default=(0.4, 1.0), help="share of the area; 0.14 1 without local crops", type=share,
        nargs=2)
    add("--local_crops_number", default=8, help="0 for no multi-crop", type=natural)
    add("--local_crops_size", default=96, help="pixels", type=positive)
    add("--local_crops_scale", default=(0.05, 0.4), help="share of the area", type=share, nargs=2)
    add("--color_jitter", default=(0.4, 0.4, 0.2, 0.1), help="brightness, contrast, saturation, hue", type=share,
        nargs=4)
    add("--blur", default=(1.0, 0.1, 0.5), help="probability for first global, second global, local views", type=share,
        nargs=3)
    add("--blur_radius", default=(0.1, 2.0), help="pixels; less for small pictures", type=natural_float, nargs=2)
    add("--views", default="auto", help="where they are made: cpu in the workers, device in batches; auto is device on "
        "CUDA", choices=["auto", "cpu", "device"])


def require_views(parser, args):
    """End with a parser error unless the flags of views can be met."""
    for name in ("global_crops_scale", "local_crops_scale", "blur_radius"):
        cli.require_range(parser, args, name, from_zero=name == "blur_radius")
    if args.color_jitter[3] > 0.5:
        parser.error(f"--color_jitter: a hue of {args.color_jitter[3]} is more than half a turn, 0.5")


def build_multicrop(args, compile=False):
    """MultiCrop for --views cpu, BatchMultiCrop for device."""
    brightness, contrast, saturation, hue = args.color_jitter
    kind = functools.partial(BatchMultiCrop, compile=compile) if args.views == "device" else MultiCrop
    return kind(args.global_crops_size, args.global_crops_scale, args.local_crops_size, args.local_crops_scale,
                args.local_crops_number, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue,
                blur=args.blur, blur_radius=args.blur_radius)
