"""Numbers as pictures: maps in colour, masks over a picture, several heads at once, features as RGB.

    in_color(attention[0], picture.size).save("head1.png")              # [h, w] -> dark to light
    spotlight(picture, mask)                                            # grey and dark but where the mask is
    heads_in_color(picture, attention, masks)                           # each head in a colour of its own

A map is one flat square for each patch, unless it is asked to be smooth. This file needs numpy and Pillow and nothing
else.
"""

import numpy as np
from PIL import Image, ImageOps

HEAT = (0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)  # lighter is more: "inferno"
SIGNED = (5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)  # white is nothing: "RdBu"
COLORS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167), (240, 228, 66),
          (136, 34, 85), (51, 34, 136), (153, 153, 51), (102, 17, 0), (68, 170, 153), (231, 41, 138), (102, 166, 30),
          (170, 68, 153), (117, 112, 179)]  # of heads or classes; the first seven can be told apart by the colour-blind


def colorize(values, size, low=0.0, high=None, scale=HEAT, smooth=False):
    """Map [h, w] -> RGB image of `size`, (width, height) in pixels.

    Args:
        low, high: values at the ends of the scale; high None is the largest value.
        scale: RGB colours at equal distances.
        smooth: from patch to patch, bilinear.
    """
    high = values.max() if high is None else high
    kind = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    x = np.asarray(Image.fromarray(np.asarray(values, np.float32)).resize(size, kind))
    levels = (255 * ((x - low) / max(high - low, 1e-12)).clip(0, 1)).round().astype(np.uint8)
    places = np.linspace(0, 255, len(scale))
    colors = np.stack([np.interp(range(256), places, channel) for channel in zip(*scale)], axis=-1)
    return Image.fromarray(colors.round().astype(np.uint8)[levels])


def resize_to_fit(picture, side):
    """The picture, smaller or larger, as it fits into side x side pixels."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(edge * scale)) for edge in picture.size], Image.Resampling.LANCZOS)


def resize_mask(mask, size):
    """bool [h, w] -> mask image of `size`, (width, height)."""
    return Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(size, Image.Resampling.NEAREST)


def highlight_mask(picture, mask):
    """The picture where the mask is, bool [h, w]; grey and dark elsewhere."""
    shade = ImageOps.colorize(ImageOps.grayscale(picture), (0, 0, 0), (90, 90, 90))
    return Image.composite(picture, shade, resize_mask(mask, picture.size))


def colorize_heads(picture, attention, masks):
    """What each head attends to, in its colour over the grey picture (Caron et al. 2021, figure 3).

    Where the masks of several heads meet it is the head's that gives the patch the largest share of its maximum.

    Args:
        attention: [heads, h, w].
        masks: bool [heads, h, w].
    """
    share = attention / attention.max(axis=(1, 2), keepdims=True).clip(1e-12)
    strongest = np.where(masks, share, -1).argmax(axis=0)
    colors = np.array(COLORS, np.uint8)[strongest % len(COLORS)]
    colors = Image.fromarray(colors).resize(picture.size, Image.Resampling.NEAREST)
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.composite(Image.blend(grey, colors, 0.65), grey, resize_mask(masks.any(axis=0), picture.size))


def components_to_rgb(components, size, low, high):
    """Three components of each patch, [h, w, 3] -> RGB image of `size`; low and high are the ends of each, [3]."""
    x = ((components - low) / (high - low).clip(1e-12)).clip(0, 1)
    return Image.fromarray((255 * x).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


if __name__ == "__main__":
    values = np.arange(12.0).reshape(3, 4)
    image = colorize(values, (40, 30))
    print(f"map {values.shape} -> picture {image.size}, from {image.getpixel((0, 0))} to {image.getpixel((39, 29))}")
