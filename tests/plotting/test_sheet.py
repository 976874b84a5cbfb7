import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from augment import MultiCrop
from data.shapes import Shapes
from evaluation.masks import threshold_attention
from plotting import sheet
from plotting.draw import COLORS, colorize, colorize_heads, highlight_mask
from plotting.sheet import cell_side, contact_sheet, describe_view, draw_attention_sheet, wrap_text

FILLS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 0)]
LINE = 18  # pixels of a line of text in a small sheet


def test_each_image_is_in_its_cell():
    sizes = (400, 200), (50, 90), (180, 60), (10, 700)
    cells = [(Image.new("RGB", size, color), "caption") for size, color in zip(sizes, FILLS)]
    sheet = contact_sheet([*cells[:3], None, cells[3]], columns=3, legend="legend")
    heights = 90 + 2 + LINE, 180 + 2 + LINE  # 400 x 200 -> 180 x 90; 10 x 700 -> 3 x 180
    assert sheet.size == (3 * 188 + 8, sum(heights) + 2 + LINE + 4 * 8)
    for color, column, row, (width, height) in zip(FILLS, (0, 1, 2, 1), (0, 0, 0, 1),
                                                   ((180, 90), (50, 90), (180, 60), (3, 180))):
        left, top = 8 + column * 188, 8 + row * (heights[0] + 8)
        pixels = np.asarray(sheet)[top:top + height, left:left + width]
        assert np.abs(pixels.astype(int) - color).max() <= 1
        caption = np.asarray(sheet.crop((left, top + height, left + 180, top + height + 2 + LINE)))
        right_gap = np.asarray(sheet.crop((left + 180, top, left + 188, top + heights[row])))
        assert (caption < 100).any() and (right_gap == 255).all()
    empty = np.asarray(sheet.crop((0, 8 + heights[0], 8 + 180, sheet.height - 8 - LINE - 2)))
    legend = np.asarray(sheet.crop((0, sheet.height - 8 - LINE, 8 + 180, sheet.height)))
    assert (empty == 255).all() and (legend < 100).any()


def test_the_font_grows_with_the_images():
    heights = [contact_sheet([(Image.new("RGB", (10, 10)), "name")], side=side).height - 10 - 2 - 2 * 8
               for side in (100, 224, 480)]
    assert heights == [LINE, LINE, 39]


def test_captions_are_wrapped_to_the_cell():
    font = ImageFont.load_default(14)
    assert wrap_text("short\nname", font, 100) == ["short name"] and wrap_text("", font, 100) == [""]
    lines = wrap_text("head 1, maximum 3.1% of the attention", font, 100)
    assert len(lines) > 1 and " ".join(lines) == "head 1, maximum 3.1% of the attention"
    assert all(font.getlength(line) <= 100 for line in lines)
    (name,) = wrap_text("long" * 50, font, 100)
    assert name.endswith("…") and 80 < font.getlength(name) <= 100
    assert contact_sheet([(Image.new("RGB", (10, 10)), "")] * 4, 4, cell_side(1000, 4)).width == 1000


def test_empty_cells_only():
    assert contact_sheet([None, None], side=50).size == (2 * 58 + 8, 2 * 8)


@pytest.mark.parametrize("heads", [1, 3, 6, 12, 17])
def test_every_head_is_on_the_sheet(heads, monkeypatch):
    cells = []
    monkeypatch.setattr(sheet, "contact_sheet", lambda new, *args, **kwargs: cells.extend(new))
    maps = np.random.default_rng(0).random((heads, 3, 4), dtype=np.float32)
    all_masks = threshold_attention(torch.from_numpy(np.stack([maps.mean(axis=0), *maps])).flatten(1), 0.6)
    draw_attention_sheet("a.png", Shapes("train", 8, 40)[0][0], maps, all_masks.view(-1, 3, 4).numpy(), 0.6, 1000)
    captions = [cell and cell[1] for cell in cells]
    image, drawn = cells[0][0], [cell and np.asarray(cell[0], int) for cell in cells]

    def mass_of(values):
        order = np.argsort(-values, axis=None)
        before = np.concatenate(([0], values.ravel()[order].cumsum()[:-1])) / values.sum()
        mask = np.zeros(values.size, bool)
        mask[order[before < 0.6]] = True
        return mask.reshape(values.shape)
    masks, mean = np.stack([mass_of(values) for values in maps]), maps.mean(axis=0)
    assert captions[1] == f"mean, max {mean.max():.1%}" and captions[2] == "mask of the mean"
    assert np.array_equal(drawn[1], colorize(mean, image.size))
    assert np.array_equal(drawn[2], highlight_mask(image, mass_of(mean)))
    assert np.array_equal(drawn[3], colorize_heads(image, maps, masks))
    inside = image.width - 6, image.height - 6
    for head in range(heads):  # its map, then its mask
        i = 6 + 2 * head
        assert captions[i:i + 2] == [f"head {head + 1}, max {maps[head].max():.1%}", f"mask of head {head + 1}"]
        assert np.array_equal(drawn[i][3:-3, 3:-3], colorize(maps[head], inside))
        assert drawn[i][0, 0].tolist() == list(COLORS[head % 16])
        assert np.array_equal(drawn[i + 1], highlight_mask(image, masks[head]))


def test_describe_view():
    view = MultiCrop(solarize=1, blur=(1, 1, 1), flip=1, grayscale=1, jitter=1).sample(100, 50, key=1)[1]
    words = describe_view(view, Image.new("RGB", (100, 50)))
    left, top, right, bottom = view.box
    assert words[0] == f"{(right - left) * (bottom - top) / 50:.0f}%"
    assert words[1:] == ["flip", "jitter", "gray", f"blur {view.blur:.1f}", "solarize"]
