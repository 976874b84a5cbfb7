import numpy as np
from PIL import Image, ImageFont

from plotting.sheet import cell_side, contact_sheet, cut

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 0)]


def test_each_picture_is_in_its_place():
    sizes = (400, 200), (50, 90), (180, 60), (10, 700)
    pictures = [(Image.new("RGB", size, color), "a picture with a name that is much too long")
                for size, color in zip(sizes, COLORS)]
    sheet = contact_sheet([*pictures[:3], None, pictures[3]], columns=3)
    heights = 90, 180  # 400 x 200 -> 180 x 90; 10 x 700 -> 3 x 180
    assert sheet.size == (3 * 188 + 8, sum(heights) + 2 * (24 + 8) + 8)
    for color, column, row, (width, height) in zip(COLORS, (0, 1, 2, 1), (0, 0, 0, 1),
                                                   ((180, 90), (50, 90), (180, 60), (3, 180))):
        left, top = 8 + column * 188, 8 + row * (90 + 24 + 8)
        picture = np.asarray(sheet)[top:top + height, left:left + width]
        assert np.abs(picture.astype(int) - color).max() <= 1
        if row == 0:
            assert (np.asarray(sheet)[top + height:top + 90, left:left + 180] == 255).all()
        below = top + heights[row]
        caption = np.asarray(sheet.crop((left, below, left + 180, below + 24)))
        beside = np.asarray(sheet.crop((left + 180, top, left + 188, below + 24)))
        assert (caption < 100).any() and (beside == 255).all()  # there is a caption, and it ends in time
    empty = np.asarray(sheet.crop((0, 8 + 90 + 24, 8 + 180, sheet.height)))
    assert (empty == 255).all()


def test_letters_grow_with_the_pictures():
    heights = [contact_sheet([(Image.new("RGB", (10, 10)), "name")], side=side).height - 10 - 2 * 8
               for side in (100, 240, 480)]
    assert heights == [24, 24, 48]


def test_captions_end_in_time():
    font = ImageFont.load_default(12)
    assert cut("short\nname", font, 100) == "short name"
    assert cut("long" * 50, font, 100).endswith("…") and 80 < font.getlength(cut("long" * 50, font, 100)) <= 100
    assert contact_sheet([(Image.new("RGB", (10, 10)), "")] * 4, 4, cell_side(1000, 4)).width == 1000


def test_nothing_but_empty_places():
    assert contact_sheet([None, None], side=50).size == (2 * 58 + 8, 24 + 2 * 8)
