import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from augment import MultiCrop
from data.shapes import Shapes
from evaluation.masks import mask_mean_and_heads
from plotting import sheet
from plotting.draw import COLORS, HEAT, SIGNED, colorize, colorize_heads, highlight_mask
from plotting.sheet import (
    cell_side,
    choose_columns,
    contact_sheet,
    describe_model,
    describe_view,
    draw_attention_sheet,
    draw_color_bar,
    draw_crops,
    draw_features,
    draw_nearest,
    draw_swatch,
    draw_text,
    load_font,
    resize_to_width,
    wrap_text,
)

FILLS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 0)]
GAP, LINE = 8, 16  # pixels; height of a line of text of 12 pixels


@pytest.fixture
def grids(monkeypatch):
    """The cells, columns and legend of the last contact sheet."""
    recorded = {}

    def record(grids, width, title="", legend=()):
        recorded.update(cells=[cell for cells, _ in grids for cell in cells], title=title, legend=legend,
                        columns=[columns for _, columns in grids])
        return contact_sheet(grids, width, title, legend)
    monkeypatch.setattr(sheet, "contact_sheet", record)
    return recorded


def test_each_image_is_in_its_cell():
    sizes = (180, 90), (50, 90), (180, 60), (3, 180)
    cells = [(Image.new("RGB", size, color), "caption") for size, color in zip(sizes, FILLS)]
    page = contact_sheet([(cells[:3], 3), (cells[3:], 2)], 3 * 188 + 8, legend=["legend"])
    heights = 90 + 4 + LINE, 180 + 4 + LINE
    assert page.size == (3 * 188 + 8, sum(heights) + LINE + 5 * GAP)
    for color, column, row, (width, height) in zip(FILLS, (0, 1, 2, 0), (0, 0, 0, 1), sizes):
        left, top = GAP + column * 188, GAP + 2 + row * (heights[0] + GAP)
        pixels = np.asarray(page)[top:top + height, left:left + width]
        assert (pixels == color).all()
        caption = np.asarray(page.crop((left, top + height + 2, left + 180, top + height + 2 + LINE)))
        right_gap = np.asarray(page.crop((left + 180, top, left + 188, top + height)))
        assert (caption < 100).any() and (right_gap == 255).all()
    pixels = np.asarray(page)
    assert (pixels[:, :GAP] == 255).all() and (pixels[:, -GAP:] == 255).all() and (pixels[:GAP] == 255).all()
    assert (np.asarray(page.crop((0, page.height - GAP - GAP - LINE, 188, page.height))) < 100).any()  # the legend


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (3, 3), (5, 5), (8, 4), (10, 5), (12, 4), (14, 5), (18, 6)])
def test_columns_leave_few_cells_empty_and_fill_the_page(count, columns):
    assert choose_columns(count, 1000) == columns
    side = cell_side(1000, columns)
    assert 1000 - columns < columns * (side + GAP) + GAP <= 1000
    assert choose_columns(count, 200) <= 2  # captions stay readable


def test_the_font_grows_with_the_page():
    assert [load_font(width).size for width in (200, 1000, 2800)] == [12, 14, 40]


def test_text_is_wrapped_to_its_width():
    font = ImageFont.load_default(14)
    assert wrap_text("short\nname", font, 100) == ["short name"] and wrap_text("", font, 100) == [""]
    caption = "head 1, max 51.7% of attention on one patch"
    lines = wrap_text(caption, font, 100)
    assert len(lines) > 1 and " ".join(lines) == caption
    assert all(font.getlength(line) <= 100 for line in lines)
    (name,) = wrap_text("IMG_" + "0" * 60 + "_17.jpg", font, 100)
    assert name.startswith("IMG_") and name.endswith("17.jpg") and "…" in name and 80 < font.getlength(name) <= 100
    for text, width in ((caption, 60), (caption, 190), ("long" * 50, 190), ("", 50)):
        tile = np.asarray(draw_text(text, font, width).convert("L"))
        assert tile.shape[1] <= width and len(tile) == 18 * len(wrap_text(text, font, width))
        dark = np.argwhere(tile < 128)
        for line in range(len(tile) // 18 if text else 0):  # every line is drawn, none reaches over the edge
            box = font.getbbox(wrap_text(text, font, width)[line])
            rows = dark[(dark[:, 0] >= 18 * line) & (dark[:, 0] < 18 * line + 18)]
            assert len(rows) and rows[:, 1].max() < box[2] <= width


def test_a_color_bar_has_the_ends_of_its_scale_between_their_values():
    for scale in (HEAT, SIGNED):
        drawn, font = np.asarray(draw_color_bar("0%", "1", 1000, scale)), load_font(1000)
        low, high = (np.asarray(draw_text(text, font, 1000)) for text in ("0%", "1"))
        assert np.array_equal(drawn[:, :low.shape[1]], low) and np.array_equal(drawn[:, -high.shape[1]:], high)
        bar = drawn[8]
        left = np.flatnonzero((bar == scale[0]).all(axis=1))[0]
        assert tuple(bar[left + 199]) == scale[-1] and tuple(bar[left + 200]) == (255, 255, 255)
        assert np.abs(bar[left + 99].astype(int) - scale[2]).max() <= 3  # the middle
        assert abs(left - (font.getlength("0%") + 4)) <= 2


def test_a_swatch_has_its_color_beside_its_label():
    swatch = np.asarray(draw_swatch((10, 200, 30), "head 3", 1000))
    assert swatch.shape[:2] == (18, 14 + 4 + round(load_font(1000).getlength("head 3")) + 1)
    assert (swatch[:14, :14] == (10, 200, 30)).all() and (swatch[:, 14:18] == 255).all()
    assert (swatch[:, 18:] < 100).any()


def test_descriptions_of_models(tmp_path):
    origin = dict(ckpt=str(tmp_path / "demo" / "teacher.safetensors"), untrained=False)
    assert describe_model(origin, dict(arch="vit_tiny"), 8) == (
        "demo/teacher.safetensors (vit_tiny, patches of 8 x 8 pixels)")
    assert describe_model(origin | dict(untrained=True), dict(backbone=dict(arch="resnet18"))) == (
        "demo/teacher.safetensors, random weights (resnet18)")
    for name in ("dino_vits16", "hf:me/demo"):  # not in the current folder
        assert describe_model(dict(ckpt=name, untrained=True), dict(arch="a")) == f"{name}, random weights (a)"


@pytest.mark.parametrize("heads, size", [(1, (64, 48)), (3, (30, 80)), (6, (40, 40)), (12, (64, 48)), (17, (10, 90))])
def test_every_head_is_on_the_sheet_above_its_mask(heads, size, grids):
    maps = np.random.default_rng(0).random((heads, 3, 4), dtype=np.float32)
    all_masks = mask_mean_and_heads(torch.from_numpy(maps), 0.6)
    photo = Shapes("train", 8, 40)[0][0].resize(size)
    page = draw_attention_sheet("a.png", photo, maps, all_masks.numpy(), 0.6, 1000, "vit (p 8)")
    (columns,), cells = grids["columns"], grids["cells"]
    assert page.width == 1000 and grids["title"] == "Attention of vit (p 8)"
    assert len(cells) == 1 + (heads > 1) + heads and -len(cells) % columns <= 1
    side = cell_side(1000, columns)
    image = resize_to_width(photo, side)
    assert image.width == side if size[1] <= 2 * size[0] else image.height == 2 * side

    def mass_of(values):
        order = np.argsort(-values, axis=None)
        before = np.concatenate(([0], values.ravel()[order].cumsum()[:-1])) / values.sum()
        mask = np.zeros(values.size, bool)
        mask[order[before < 0.6]] = True
        return mask.reshape(values.shape)
    masks, inside = np.stack([mass_of(values) for values in maps]), (image.width - 6, image.height - 6)
    kinds = [(f"mean of {heads} heads", maps.mean(axis=0), (255, 255, 255))] * (heads > 1)
    kinds += [(f"head {i}", values, color) for i, values, color in zip(itertools.count(1), maps, COLORS + COLORS)]
    first = np.asarray(cells[0][0])
    assert cells[0][1] == "a.png; below, the masks of all heads"
    assert np.array_equal(first[:image.height], image)
    assert np.array_equal(first[image.height + 2:], colorize_heads(image, maps, masks))
    for (drawn, caption), (label, values, color) in zip(cells[1:], kinds):
        assert caption == (f"{label}, max {100 * values.max():.1f}% of attention on one patch, "
                           f"60% on {mass_of(values).sum()}")
        drawn = np.asarray(drawn)
        assert drawn.shape == (2 * image.height + 2, image.width, 3)
        assert tuple(drawn[0, 0]) == color and np.array_equal(drawn[3:image.height - 3, 3:-3], colorize(values, inside))
        assert np.array_equal(drawn[image.height + 2:], highlight_mask(image, mass_of(values)))
    text, bar, _, *swatches = grids["legend"]
    assert "4 x 3 patches" in text and "60%" in text and "8.33%" in text  # of 12 patches
    assert [swatch.getpixel((2, 2)) for swatch in swatches] == (COLORS + COLORS)[:heads]
    assert (np.asarray(bar) == HEAT[-1]).all(axis=-1).any()


def test_features_are_drawn_beside_their_image(grids):
    images = [(Image.new("RGB", size, (9, 200, 9)), f"{size}") for size in ((60, 40), (50, 50), (30, 50))]
    tokens = [torch.randn(h, w, 8, generator=torch.Generator().manual_seed(0)) for h, w in ((4, 6), (5, 5), (5, 3))]
    for count, patch, columns in ((1, None, 2), (2, None, 4), (3, None, 2), (3, (1, 2), 3)):
        page = draw_features(images[:count], tokens[:count], 1000, "vit", patch)
        assert grids["columns"] == [columns] and page.width == 1000
        parts = 3 if patch else 2
        assert len(grids["cells"]) == count * parts and len(grids["cells"]) % columns == 0
        for i, (drawn, _) in enumerate(grids["cells"]):
            width, height = images[i // parts][0].size
            side = cell_side(1000, columns)
            assert drawn.size == (side, round(side * height / width))
        assert [caption for _, caption in grids["cells"]][::parts] == [name for _, name in images[:count]]
    bar = np.asarray(grids["legend"][-1])
    assert (bar == SIGNED[0]).all(axis=-1).any() and (bar == SIGNED[-1]).all(axis=-1).any()


def test_boxes_are_numbered_and_kinds_told_apart(grids):
    multicrop, photo = MultiCrop(global_size=32, local_size=16, local_number=5), Image.new("RGB", (90, 60), "white")
    draw_crops("a.png", multicrop, photo, (0, "a.png"), 1000)
    labels = [caption.partition(":")[0] for _, caption in grids["cells"]]
    assert labels == ["a.png", "G1", "G2", "L1", "L2", "L3", "L4", "L5"] and grids["columns"] == [3, 5]
    blue, orange = COLORS[4], COLORS[0]
    assert [drawn.getpixel((0, 0)) for drawn, _ in grids["cells"][1:]] == [blue] * 2 + [orange] * 5
    boxes, scale = np.asarray(grids["cells"][0][0]).astype(int), cell_side(1000, 3) / 90
    for i, view in enumerate(multicrop.sample(90, 60, (0, "a.png"))):
        left, top, right, bottom = (round(edge * scale) for edge in view.box)
        width = round(load_font(1000).getlength(labels[i + 1])) + 4
        corners = [(x, y) for y in (top, bottom - 17) for x in (left, right - width)]
        tags = [boxes[max(0, y):y + 17, max(0, x):x + width] for x, y in corners]  # one of them is filled
        color = blue if i < 2 else orange
        assert max((tag == color).all(axis=-1).mean() for tag in tags if tag.size) > 0.5
    assert [item.getpixel((2, 2)) for item in grids["legend"][:2]] == [blue, orange]
    draw_crops("a.png", MultiCrop(global_size=32, local_number=0), photo, 0, 1000)
    assert len(grids["cells"]) == 3 and len(grids["legend"]) == 2


def test_nearest_images_are_central_squares(grids):
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    page = draw_nearest(["query", "b"], ["query: q.png", "1: cosine 0.900 b.png"], lambda file: wide, 600, "vit")
    assert page.width == 600 and [caption for _, caption in grids["cells"]] == ["query: q.png", "1: cosine 0.900 b.png"]
    side = cell_side(600, 2)
    for i, (drawn, _) in enumerate(grids["cells"]):
        pixels = np.asarray(drawn)[5:-5, 5:-5]
        assert drawn.size == (side, side) and (pixels == (0, 0, 255)).all(axis=-1).mean() > 0.97
        assert (drawn.getpixel((0, 0)) == COLORS[4]) == (i == 0)  # the query is framed


def test_describe_view():
    view = MultiCrop(solarize=1, blur=(1, 1, 1), flip=1, grayscale=1, jitter=1).sample(100, 50, key=1)[1]
    words = describe_view(view, Image.new("RGB", (100, 50)))
    left, top, right, bottom = view.box
    assert words[0] == f"{(right - left) * (bottom - top) / 50:.0f}%"
    assert words[1:] == ["flip", "jitter", "gray", f"blur {view.blur:.1f}", "solarize"]
