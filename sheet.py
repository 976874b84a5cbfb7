"""A contact sheet: pictures with captions, row by row.

    contact_sheet([(image, "query"), (other, "0.873  dog.jpg")]).save("sheet.png")

This file needs Pillow and nothing else.
"""

from PIL import Image, ImageDraw, ImageFont

GAP = 8  # pixels


def contact_sheet(pictures, columns=6, side=180):
    """RGB images with captions -> one RGB image.

    Args:
        pictures: (PIL image, text) each; an image is made smaller to fit into side x side pixels, never larger, and a
            text is cut to that width.
    """
    font = ImageFont.load_default(12)
    columns = min(columns, len(pictures))
    width, height = side + GAP, side + 24 + GAP
    sheet = Image.new("RGB", (columns * width + GAP, -(-len(pictures) // columns) * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(pictures):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        caption = " ".join(caption.split())
        if draw.textlength(caption, font) > side:
            while draw.textlength(caption + "…", font) > side:
                caption = caption[:-1]
            caption += "…"
        draw.text((left, top + side + 4), caption, "black", font)
    return sheet


if __name__ == "__main__":
    pictures = [(Image.new("RGB", (60 * i + 60, 90), color), color) for i, color in enumerate(("red", "green", "blue"))]
    print("three pictures in two columns:", contact_sheet(pictures, columns=2).size)
