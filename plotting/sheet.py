"""Contact sheet: images with captions in a grid.

    contact_sheet([(image, "query"), (other, "0.873  dog.jpg")], legend="cosine similarity").save("sheet.png")

This file needs Pillow only.
"""

from PIL import Image, ImageDraw, ImageFont

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
    tiles = [add_caption(shrink_to_fit(cell[0], side), cell[1], side, font) if cell else EMPTY for cell in cells]
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


def shrink_to_fit(image, side):
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def add_caption(image, caption, width, font):
    """The image with its caption below, `width` pixels wide."""
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
        line = f"{lines[-1]} {word}".strip()
        if font.getlength(line) <= width:
            lines[-1] = line
        else:
            lines.append(word)
    return lines
