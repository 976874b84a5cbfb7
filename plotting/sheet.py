"""A contact sheet: pictures with captions, row by row.

    contact_sheet([(image, "query"), (other, "0.873  dog.jpg")]).save("sheet.png")

This file needs Pillow and nothing else.
"""

from PIL import Image, ImageDraw, ImageFont

GAP = 8  # pixels


def contact_sheet(pictures, columns=6, side=180):
    """RGB images with captions -> one RGB image.

    Args:
        pictures: (PIL image, text) each, or None for an empty place; an image is made smaller to fit into side x side
            pixels, never larger, and a text is cut to that width. Rows are as high as their highest picture.
    """
    font = ImageFont.load_default(max(12, side // 20))
    columns = min(columns, len(pictures))
    rows = [[picture and (fitted(picture[0], side), picture[1]) for picture in pictures[first:first + columns]]
            for first in range(0, len(pictures), columns)]
    heights = [max((picture[0].height for picture in row if picture), default=0) for row in rows]
    below = 2 * int(font.size)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, sum(heights) + len(rows) * (below + GAP) + GAP), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights):
        for left, picture in zip(range(GAP, sheet.width, side + GAP), row):
            if picture:
                image, caption = picture
                sheet.paste(image, (left, top))
                draw.text((left, top + height + 4), cut(caption, font, side), "black", font)
        top += height + below + GAP
    return sheet


def cell_side(width, columns):
    """Side of the pictures in a sheet of so many pixels and columns."""
    return (width - GAP) // columns - GAP


def fitted(image, side):
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def cut(caption, font, width):
    """A caption in one line of at most `width` pixels."""
    caption = " ".join(caption.split())
    if font.getlength(caption) > width:
        while caption and font.getlength(caption + "…") > width:
            caption = caption[:-1]
        caption += "…"
    return caption


if __name__ == "__main__":
    pictures = [(Image.new("RGB", (60 * i + 60, 90), color), color) for i, color in enumerate(("red", "green", "blue"))]
    print("three pictures in two columns:", contact_sheet(pictures, columns=2).size)
