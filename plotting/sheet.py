"""Contact sheets: images with captions in a grid; attention maps, patch features and crops of images.

    contact_sheet([(image, "query"), (other, "0.873  dog.jpg")], legend="cosine similarity").save("sheet.png")
    draw_attention_sheet("dog.jpg", image, maps, masks, mass=0.6, width=1000)    # maps [heads, h, w]
    draw_features([(image, "dog.jpg")], [tokens], width=1000)           # tokens [h, w, D]
    draw_crops(multicrop, image, key=(seed, "dog.jpg"), width=1000)

The width of a sheet is in pixels.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from plotting.draw import COLORS, SIGNED, colorize, colorize_heads, components_to_rgb, highlight_mask, resize_to_fit
from plotting.embedding import principal_components

GAP = 8  # pixels
EMPTY = Image.new("RGB", (0, 0))


def contact_sheet(cells, columns=6, side=180, legend=""):
    """Images with captions -> one RGB image.

    Args:
        cells: (PIL image, caption) each, or None for an empty cell, row by row. An image is shrunk to fit into side x
            side pixels, never enlarged; a caption is wrapped to that width.
        legend: text below all rows.
    """
    font = ImageFont.load_default(max(14, side // 16))
    columns = min(columns, len(cells))
    width = columns * (side + GAP) + GAP
    tiles = [add_caption(*cell, side, font) if cell else EMPTY for cell in cells]
    rows = [tiles[first:first + columns] for first in range(0, len(tiles), columns)]
    rows += [[add_caption(EMPTY, legend, width - 2 * GAP, font)]] if legend else []
    heights = [max(tile.height for tile in row) + GAP for row in rows]
    sheet, top = Image.new("RGB", (width, GAP + sum(heights)), "white"), GAP
    for row, height in zip(rows, heights):
        for i, tile in enumerate(row):
            sheet.paste(tile, (GAP + i * (side + GAP), top))
        top += height
    return sheet


def cell_side(width, columns):
    """Largest side of the images in a sheet of so many pixels and columns."""
    return (width - GAP) // columns - GAP


def add_caption(image, caption, width, font):
    """The image, shrunk to fit into width x width pixels, with its caption below."""
    image = image.copy()
    image.thumbnail((width, width), Image.Resampling.LANCZOS)
    lines, line_height = wrap_text(caption, font, width), round(1.3 * font.size)
    tile = Image.new("RGB", (width, image.height + 2 + len(lines) * line_height), "white")
    tile.paste(image)
    for i, line in enumerate(lines):
        ImageDraw.Draw(tile).text((0, image.height + 2 + i * line_height), line, "black", font)
    return tile


def wrap_text(text, font, width):
    """Lines of at most `width` pixels; a longer word is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-2] + "…"
        if font.getlength(f"{lines[-1]} {word}".strip()) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


# ---- attention ----

def draw_attention_sheet(name, image, maps, masks, mass, width):
    """Contact sheet of maps [heads, h, w]: image, mean of the heads, overlay of all; then map and mask of each head.

    Args:
        masks: bool [1 + heads, h, w], of the mean and of each head.
        mass: share of the attention that a mask keeps.
    """
    side, mean, (mean_mask, *masks) = cell_side(width, 6), maps.mean(axis=0), masks
    image = resize_to_fit(image, side)
    cells = [(image, name), (colorize(mean, image.size), f"mean, max {mean.max():.1%}"),
             (highlight_mask(image, mean_mask), "mask of the mean"),
             (colorize_heads(image, maps, np.stack(masks)), "masks of all heads"), None, None]
    for i, (values, mask, color) in enumerate(zip(maps, masks, itertools.cycle(COLORS)), start=1):
        framed = ImageOps.expand(colorize(values, [max(1, edge - 6) for edge in image.size]), 3, color)
        cells += [(framed, f"head {i}, max {values.max():.1%}"), (highlight_mask(image, mask), f"mask of head {i}")]
    return contact_sheet(cells, 6, side, legend=(
        "Attention of the CLS token in the last block, per head and mean of all heads: black is 0, light yellow the "
        f"maximum of the map. A mask keeps {mass:.0%} of the attention. Frame colors match the overlay of all masks."))


# ---- features ----

def draw_features(images, tokens, width, patch=None):
    """Contact sheet of patch features: principal components as RGB, and cosine similarity to one patch.

    Args:
        images: (PIL image, name) each.
        tokens: patch features of each, [h, w, D].
        patch: (row, column) in the first image, or None to leave similarities out.
    """
    columns = 6 if len(images) > 1 else 3 if patch else 2
    side, cells = cell_side(width, columns), []
    legend = "PCA as RGB: first three principal components of the patch features of all images."
    components = principal_components(torch.cat([x.flatten(0, 1) for x in tokens]), 3).numpy()
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    for (image, name), x in zip(images, tokens):
        image = resize_to_fit(image, side)
        part, components = np.split(components, [x[..., 0].numel()])
        colors = components_to_rgb(part.reshape(*x.shape[:2], 3), image.size, low, high)
        cells += [(image, name), (colors, "PCA as RGB")]
        if patch:
            cosine = F.cosine_similarity(x, tokens[0][patch], dim=-1).numpy()
            cells.append((colorize(cosine, image.size, -1.0, 1.0, SIGNED), "cosine similarity"))
    if patch:
        legend += " Cosine similarity to the patch in the yellow box: blue -1, white 0, red 1."
        (row, column), (h, w) = patch, tokens[0].shape[:2]
        for image, _ in (cells[0], cells[2]):
            a, b = image.width / w, image.height / h
            box = [column * a - 2, row * b - 2, (column + 1) * a + 1, (row + 1) * b + 1]
            ImageDraw.Draw(image).rectangle(box, outline="yellow", width=2)
    return contact_sheet(cells, columns, side, legend)


# ---- crops ----

def draw_crops(multicrop, image, key, width):
    """Contact sheet of the crops of one image; the global crops fill their cells, the local ones are in proportion.

    Args:
        multicrop: see `augment.MultiCrop`.
        key: seed of the crops.
    """
    views, side = multicrop.sample(*image.size, key), cell_side(width, 4)
    boxes, scale, cells = resize_to_fit(image, side), side / views[0].size, []
    for i, (view, x) in enumerate(zip(views, multicrop(image, key))):
        pixels = (x * multicrop.std + multicrop.mean).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        resampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
        crop = Image.fromarray(pixels).resize([max(1, round(view.size * scale))] * 2, resampling)
        kind = f"global {i + 1}" if i < 2 else f"local {i - 1}"
        cells.append((crop, f"{kind}: {', '.join(describe_view(view, image))}"))
        box = [edge * boxes.width / image.width for edge in view.box]
        ImageDraw.Draw(boxes).rectangle(box, outline=COLORS[i < 2], width=2)
    return contact_sheet([(boxes, "boxes: global blue, local orange"), *cells[:2], None, *cells[2:]], 4, side, legend=(
        "Percent: area of the box relative to the image. Jitter: color jitter. Blur: sigma in pixels of the crop."))


def describe_view(view, image):
    """Area of a crop relative to the image, and the names of its augmentations."""
    left, top, right, bottom = view.box
    area = (right - left) * (bottom - top) / (image.width * image.height)
    used = {"flip": view.flip, "jitter": view.jitter, "gray": view.grayscale, f"blur {view.blur:.1f}": view.blur,
            "solarize": view.solarize}
    return [f"{area:.0%}", *(name for name, value in used.items() if value)]
