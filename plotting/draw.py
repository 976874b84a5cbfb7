"""Color maps, masks and head overlays for patch grids.

    colorize(attention[0], image.size).save("head1.png")        # [h, w] -> dark to light
    highlight_mask(image, mask)                                 # grayscale and dark outside the mask
    overlay_mask(image, mask, COLORS[0])                        # tinted inside the mask, and its outline
    colorize_heads(image, attention, masks)                     # one color per head

Each patch becomes a square of one color. This file needs numpy and Pillow only.
"""

import numpy as np
from PIL import Image, ImageFilter, ImageOps

HEAT = (0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)  # sequential, "inferno"
SIGNED = (5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)  # diverging, "RdBu", white is 0
COLORS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167), (240, 228, 66),
          (136, 34, 85), (51, 34, 136), (153, 153, 51), (102, 17, 0), (68, 170, 153), (231, 41, 138), (102, 166, 30),
          (170, 68, 153), (117, 112, 179)]  # of heads or classes; the first seven are safe for color-blind readers


def colorize(values, size, low=0.0, high=None, scale=HEAT, smooth=False):
    """Map [h, w] -> RGB image of `size`, (width, height) in pixels.

    Args:
        low, high: values at the ends of the scale; high None is the largest value.
        scale: RGB colors at equal distances.
        smooth: bilinear interpolation between patches.
    """
    high = values.max() if high is None else high
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    x = np.asarray(Image.fromarray(np.asarray(values, np.float32)).resize(size, resampling))
    levels = (255 * ((x - low) / max(high - low, 1e-12)).clip(0, 1)).round().astype(np.uint8)
    anchors = np.linspace(0, 255, len(scale))
    colors = np.stack([np.interp(range(256), anchors, channel) for channel in zip(*scale)], axis=-1)
    return Image.fromarray(colors.round().astype(np.uint8)[levels])


def resize_mask(mask, size):
    """bool [h, w] -> mask image of `size`, (width, height)."""
    return Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(size, Image.Resampling.NEAREST)


def highlight_mask(image, mask):
    """The image inside the mask, bool [h, w]; grayscale and dark outside."""
    shade = ImageOps.colorize(ImageOps.grayscale(image), (0, 0, 0), (90, 90, 90))
    return Image.composite(image, shade, resize_mask(mask, image.size))


def overlay_mask(image, mask, color, opacity=0.4):
    """The image, tinted inside a mask, bool [h, w], with the outline of the mask in full color."""
    mask = resize_mask(mask, image.size)
    interior = mask.filter(ImageFilter.MinFilter(2 * max(2, min(image.size) // 200) + 1))
    alpha = Image.composite(mask.point(lambda value: round(opacity * value)), mask, interior)
    return Image.composite(Image.new("RGB", image.size, color), image, alpha)


def colorize_heads(image, attention, masks):
    """Overlay of all heads, one color each, on the grayscale image (Caron et al. 2021, figure 3).

    Where masks of several heads overlap, the head with the largest attention relative to its own maximum is drawn.

    Args:
        attention: [heads, h, w].
        masks: bool [heads, h, w].
    """
    relative = attention / attention.max(axis=(1, 2), keepdims=True).clip(1e-12)
    strongest = np.where(masks, relative, -1).argmax(axis=0)
    colors = np.array(COLORS, np.uint8)[strongest % len(COLORS)]
    colors = Image.fromarray(colors).resize(image.size, Image.Resampling.NEAREST)
    gray = ImageOps.grayscale(image).convert("RGB")
    return Image.composite(Image.blend(gray, colors, 0.65), gray, resize_mask(masks.any(axis=0), image.size))


def draw_side_by_side(frame, values, top):
    """Frame of a video, and its attention [h, w] beside it; `top` is the end of the color scale."""
    return Image.fromarray(np.hstack([frame, colorize(values, frame.size, high=top)]))


def draw_overlay(frame, values, top):
    """Attention [h, w] over the grayscale frame, see `draw_side_by_side`."""
    gray = ImageOps.grayscale(frame).convert("RGB")
    opacity = colorize(values, frame.size, high=top, scale=((0, 0, 0), (220, 220, 220)), smooth=True).convert("L")
    return Image.composite(colorize(values, frame.size, high=top, smooth=True), gray, opacity)


def components_to_rgb(components, size, low, high):
    """Three components per patch, [h, w, 3] -> RGB image of `size`; low and high, [3], become 0 and 255."""
    x = ((components - low) / (high - low).clip(1e-12)).clip(0, 1)
    return Image.fromarray((255 * x).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def escape_text(names):
    """Text that matplotlib draws as it is: "$" would begin a formula, and file names need not be Unicode."""
    return [name.replace("$", r"\$").encode(errors="replace").decode() for name in names]
