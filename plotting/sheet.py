"""Contact sheets: images with captions in a grid; attention maps, patch features, crops and nearest images.

    contact_sheet([([(image, "dog.jpg"), (other, "cat.jpg")], 2)], 1000, "title", ["text below"]).save("sheet.png")
    draw_attention_sheet("dog.jpg", image, maps, masks, mass=0.6, width=1000, model="vit_small")   # maps [heads, h, w]
    draw_features([(image, "dog.jpg")], [tokens], width=1000, model="vit_small")    # tokens [h, w, D]
    draw_crops("dog.jpg", multicrop, image, key=(seed, "dog.jpg"), width=1000)
    draw_nearest(["dog.jpg", "cat.jpg"], ["query", "0.87"], read_image, width=1200, model="vit_small")

The width of a sheet is in pixels. Cells are as large as it allows.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.hub import is_remote
from plotting.draw import COLORS, HEAT, SIGNED, colorize, colorize_heads, components_to_rgb, highlight_mask

GAP = 8  # pixels
FRAME = 3
GLOBAL, LOCAL = COLORS[4], COLORS[0]


# ---- layout ----

def contact_sheet(grids, width, title="", legend=()):
    """Images with captions -> one RGB image.

    Args:
        grids: (cells, columns) each, one below the other; a cell is (PIL image, caption). An image must not be wider
            than `cell_side`; a caption is wrapped to that.
        title: text above all.
        legend: texts and images below all, beside each other where they fit.
    """
    font, inner = load_font(width), width - 2 * GAP
    sheet = [draw_text(title, ImageFont.load_default(1.2 * font.size), inner)] if title else []
    for cells, columns in grids:
        side = cell_side(width, columns)
        tiles = [stack_images([Image.new("RGB", (side, 0)), image, draw_text(text, font, side)], 2)
                 for image, text in cells]
        rows = (tiles[first:first + columns] for first in range(0, len(tiles), columns))
        sheet += [stack_images(row, across=True) for row in rows]
    line = []
    for item in legend:
        tile = draw_text(item, font, inner) if isinstance(item, str) else item
        if line and sum(other.width + 2 * GAP for other in [*line, tile]) > width:
            sheet.append(stack_images(line, 2 * GAP, across=True))
            line = []
        line.append(tile)
    sheet += [stack_images(line, 2 * GAP, across=True)] if line else []
    return ImageOps.expand(stack_images([*sheet, Image.new("RGB", (inner, 0))], GAP), GAP, "white")


def stack_images(images, gap=GAP, across=False):
    """Images below each other, or beside each other, on white."""
    widths, heights = ([image.size[axis] for image in images] for axis in (0, 1))
    rest = gap * (len(images) - 1)
    size = (sum(widths) + rest, max(heights)) if across else (max(widths), sum(heights) + rest)
    stack, place = Image.new("RGB", size, "white"), 0
    for image in images:
        stack.paste(image, (place, 0) if across else (0, place))
        place += gap + (image.width if across else image.height)
    return stack


def load_font(width):
    """Font for a sheet of this width."""
    return ImageFont.load_default(max(12, width // 70))


def draw_text(text, font, width):
    """Black text on white, wrapped to a width in pixels."""
    lines, height = wrap_text(text, font, width), round(1.3 * font.size)
    tile = Image.new("RGB", (min(width, max(round(font.getlength(line)) + 1 for line in lines)), height * len(lines)),
                     "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(tile).text((0, i * height), line, "black", font)
    return tile


def wrap_text(text, font, width):
    """Lines of at most `width` pixels; the middle of a longer word is cut out."""
    lines = [""]
    for word in text.split():
        cut, kept = word, len(word)
        while kept and font.getlength(cut) > width:
            kept -= 1
            cut = word[:(kept + 1) // 2] + "…" + word[len(word) - kept // 2:]
        if font.getlength(f"{lines[-1]} {cut}".strip()) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {cut}".strip()
    return lines


def draw_swatch(color, label, width):
    """Entry of a legend: a square in a color, and what it stands for."""
    font = load_font(width)
    square = Image.new("RGB", [round(font.size)] * 2, tuple(color))
    return stack_images([square, draw_text(label, font, width // 2)], GAP // 2, across=True)


def draw_color_bar(low, high, width, scale=HEAT):
    """Entry of a legend: a color scale between the meanings of its ends."""
    font = load_font(width)
    bar = colorize(np.linspace(0, 1, width // 5)[None], (width // 5, round(font.size)), scale=scale)
    return stack_images([draw_text(low, font, width), bar, draw_text(high, font, width)], GAP // 2, across=True)


def choose_columns(count, width):
    """Four to six columns, fewer for fewer images: those that leave the fewest cells empty, and the fewest of those."""
    most = max(1, min(6, count, width // 100))
    return min(range(min(4, most), most + 1), key=lambda columns: -count % columns)


def cell_side(width, columns):
    """Width of a cell in a sheet of so many pixels and columns."""
    return (width - GAP) // columns - GAP


def resize_to_width(image, width):
    """The image in this width, unless it would then be more than twice as high."""
    scale = min(width / image.width, 2 * width / image.height)
    return image.resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.LANCZOS)


def describe_model(origin, info, patch_size=1):
    """"demo/teacher.safetensors (vit_small, patches of 16 x 16 pixels)", or the name of `is_remote`, for titles.

    Args:
        origin, info: see `open_backbone`.
    """
    arch = info.get("arch") or info.get("backbone", {}).get("arch", "vision transformer")
    name = origin["ckpt"] if is_remote(origin["ckpt"]) else "/".join(Path(origin["ckpt"]).resolve().parts[-2:])
    name += ", random weights" * bool(origin.get("untrained"))
    return f"{name} ({arch}, patches of {patch_size} x {patch_size} pixels)" if patch_size > 1 else f"{name} ({arch})"


# ---- attention ----

def draw_attention_sheet(name, image, maps, masks, mass, width, model):
    """Contact sheet of maps [heads, h, w]: image and overlay of all heads, mean of the heads, each head with its mask.

    Args:
        masks: bool [1 + heads, h, w], of the mean and of each head.
        mass: share of the attention that a mask keeps.
        model: description, for the title.
    """
    (heads, rows, columns), colors = maps.shape, itertools.cycle(COLORS)
    kinds = [(f"mean of {heads} heads", maps.mean(axis=0), masks[0], "white")] * (heads > 1)
    kinds += [(f"head {i}", *rest) for i, rest in enumerate(zip(maps, masks[1:], colors), start=1)]
    across = choose_columns(1 + len(kinds), width)
    image = resize_to_width(image, cell_side(width, across))
    overlay, inside = colorize_heads(image, maps, masks[1:]), [max(1, edge - 2 * FRAME) for edge in image.size]
    cells = [(stack_images([image, overlay], 2), f"{name}; below, the masks of all heads")]
    for label, values, mask, color in kinds:
        pair = ImageOps.expand(colorize(values, inside), FRAME, color), highlight_mask(image, mask)
        text = f"{label}, max {values.max():.1%} of attention on one patch, {mass:.0%} on {mask.sum()}"
        cells.append((stack_images(pair, 2), text))
    legend = [f"Attention of the CLS token to each of {columns} x {rows} patches in the last block. Below each map its "
              f"mask: the patches with the most attention that have {mass:.0%} of it. Spread evenly, a patch would get "
              f"{1 / (rows * columns):.2%}.", draw_color_bar("0%", "maximum of the map", width), "Head:",
              *(draw_swatch(color, str(i), width) for i, (*_, color) in enumerate(kinds[heads > 1:], start=1))]
    return contact_sheet([(cells, across)], width, f"Attention of {model}", legend)


# ---- features ----

def principal_components(x, n):
    """Projections on the n directions of largest variance: [M, D] -> float64 [M, n].

    The largest entry of each direction is positive, so that signs do not depend on the machine.
    """
    x = x.double() - x.double().mean(dim=0)
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -n:].flip(1)  # [D, n]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return x @ (directions * largest.sign())


def draw_features(images, tokens, width, model, patch=None):
    """Contact sheet of patch features: principal components as RGB, and cosine similarity to one patch.

    Args:
        images: (PIL image, name) each.
        tokens: patch features of each, [h, w, D].
        model: description, for the title.
        patch: (row, column) in the first image, or None to leave similarities out.
    """
    columns, cells = 3 if patch else 2 if len(images) % 2 else 4, []
    components = principal_components(torch.cat([x.flatten(0, 1) for x in tokens]), 3).numpy()
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    for (image, name), x in zip(images, tokens):
        image = resize_to_width(image, cell_side(width, columns))
        part, components = np.split(components, [x[..., 0].numel()])
        colors = components_to_rgb(part.reshape(*x.shape[:2], 3), image.size, low, high)
        cells += [(image, name), (colors, "PCA as RGB")]
        if patch:
            cosine = F.cosine_similarity(x, tokens[0][patch], dim=-1).numpy()
            cells.append((colorize(cosine, image.size, -1.0, 1.0, SIGNED), "cosine similarity to the marked patch"))
    legend = ["PCA as RGB: first three principal components of the patch features of all images, as red, green and "
              "blue. Similar colors are similar features."]
    if patch:
        legend += ["Cosine similarity to the patch in the yellow box:", draw_color_bar("-1", "1", width, SIGNED)]
        (row, column), (h, w) = patch, tokens[0].shape[:2]
        for image, _ in (cells[0], cells[2]):
            a, b = image.width / w, image.height / h
            box = [column * a - 2, row * b - 2, (column + 1) * a + 1, (row + 1) * b + 1]
            ImageDraw.Draw(image).rectangle(box, outline="yellow", width=2)
    return contact_sheet([(cells, columns)], width, f"Patch features of {model}", legend)


# ---- crops ----

def draw_crops(name, multicrop, image, key, width, show=lambda image: image):
    """Contact sheet of the crops of one image, and of the image with their boxes.

    Args:
        multicrop: see `augment.MultiCrop`.
        key: seed of the crops.
        show: tensor [C, H, W] in [0, 1] -> RGB image, if there are channels.
    """
    crops, image, tags = multicrop(image, key), show(image), []
    views, font = multicrop.sample(*image.size, key), load_font(width)
    across = choose_columns(len(views) - 2, width)
    boxes = ImageOps.contain(image, [cell_side(width, 3)] * 2, Image.Resampling.LANCZOS)
    draw, cells = ImageDraw.Draw(boxes), [(boxes, name)]
    for i, (view, x) in enumerate(zip(views, crops)):
        color, label, columns = (GLOBAL, f"G{i + 1}", 3) if i < 2 else (LOCAL, f"L{i - 1}", across)
        side = cell_side(width, columns)
        pixels = (x * multicrop.std + multicrop.mean).clamp(0, 255)
        if multicrop.channels:
            crop = show(pixels / 255)
        else:
            crop = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
        resampling = Image.Resampling.NEAREST if side > 2 * view.size else Image.Resampling.LANCZOS
        crop = crop.resize([max(1, side - 2 * FRAME)] * 2, resampling)
        cells.append((ImageOps.expand(crop, FRAME, color), f"{label}: {', '.join(describe_view(view, image))}"))
        left, top, right, bottom = box = [edge * boxes.width / image.width for edge in view.box]
        draw.rectangle(box, outline=color, width=3 if i < 2 else 2)
        w, h = font.getlength(label) + 4, 1.2 * font.size
        corners = [(x, y) for y in (top, bottom - h) for x in (left, right - w)]
        free = (place for place in corners if not any(np.all(np.abs(np.subtract(place, other)) < (w, h))
                                                      for other, *_ in tags))
        tags.append((next(free, corners[0]), w, h, label, color))
    for (x, y), w, h, label, color in tags:  # above all boxes
        draw.rectangle((x, y, x + w, y + h), fill=color)
        draw.text((x + 2, y), label, "white" if color == GLOBAL else "black", font)
    legend = [draw_swatch(color, f"{kind} crops, {view.size} x {view.size} pixels", width)
              for color, kind, view in ((GLOBAL, "global", views[0]), (LOCAL, "local", views[-1]))[:len(views) - 1]]
    legend.append("Percent: share of the image. Jitter: brightness, contrast, saturation, hue. Blur: sigma in pixels.")
    return contact_sheet([(cells[:3], 3), (cells[3:], across)], width, "Crops, and their boxes in the image", legend)


def describe_view(view, image):
    """Area of a crop relative to the image, and the names of its augmentations."""
    left, top, right, bottom = view.box
    area = (right - left) * (bottom - top) / (image.width * image.height)
    used = {"flip": view.flip, "jitter": view.jitter, "gray": view.grayscale, f"blur {view.blur:.1f}": view.blur,
            "solarize": view.solarize, "upside down": view.vertical_flip, f"rotated {90 * view.turns}°": view.turns}
    return [f"{area:.0%}", *(name for name, value in used.items() if value)]


# ---- nearest images ----

def draw_nearest(files, captions, read, width, model):
    """Contact sheet of a query and its nearest images, their central squares.

    Args:
        files: the query first, as `read` takes them: file -> PIL image.
        model: description, for the title.
    """
    across = choose_columns(len(files), width)
    side = cell_side(width, across)
    squares = [ImageOps.fit(read(file), [side] * 2) for file in files]
    squares[0] = ImageOps.expand(ImageOps.crop(squares[0], FRAME), FRAME, GLOBAL)
    return contact_sheet([([*zip(squares, captions)], across)], width, f"Nearest images by features of {model}",
                         ["Cosine similarity of CLS features; 1 is equal. Central square of each image."])
