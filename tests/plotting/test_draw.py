import colorsys

import numpy as np
import pytest
from PIL import Image

from plotting.draw import (
    COLORS,
    HEAT,
    SIGNED,
    colorize,
    colorize_heads,
    components_to_rgb,
    draw_overlay,
    highlight_mask,
    overlay_mask,
)


def lightness(color):
    """L* of CIE 1976, of sRGB."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in color]
    luminance = np.dot(linear, (0.2126, 0.7152, 0.0722))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.009 else 903.3 * luminance


def test_each_patch_is_one_square():
    values = np.array([[0, 1, 2], [3, 4, 2]], np.float32)
    image = colorize(values, (30, 20))
    assert image.size == (30, 20)
    for row, column in np.ndindex(2, 3):
        square = np.asarray(image)[10 * row:10 * row + 10, 10 * column:10 * column + 10].reshape(-1, 3)
        assert (square == square[0]).all()
        assert np.abs(square[0] - np.array(HEAT[int(values[row, column])], int)).max() <= 3  # five anchors, five values


def test_lightness_increases_with_the_value():
    image = colorize(np.linspace(0, 1, 200)[None], (200, 1))
    found = [lightness(image.getpixel((x, 0))) for x in range(200)]
    assert (np.diff(found) > -0.3).all() and found[0] < 1 and found[-1] > 97
    steps = np.diff(found[::20])
    assert steps.min() > 6 and steps.max() < 15  # nearly uniform


def test_scale_and_range():
    values = np.array([[-1.0, 0.0, 1.0, 5.0]])
    image = colorize(values, (4, 1), -1.0, 1.0, SIGNED)
    assert [image.getpixel((x, 0)) for x in (0, 2, 3)] == [SIGNED[0], SIGNED[-1], SIGNED[-1]]
    assert min(image.getpixel((1, 0))) > 240
    assert colorize(np.zeros((2, 2)), (4, 4)).getpixel((0, 0)) == HEAT[0]  # no division by zero


def test_smooth_is_bilinear():
    values = np.array([[0.0, 1.0]])
    image = colorize(values, (80, 2), scale=((0, 0, 0), (255, 255, 255)), smooth=True)
    found = [image.getpixel((x, 0))[0] for x in range(80)]
    expected = 255 * ((np.arange(80) + 0.5) / 40 - 0.5).clip(0, 1)
    assert np.abs(found - expected).max() <= 1.5


def test_highlight_mask():
    image = Image.new("RGB", (4, 2), (200, 100, 50))
    drawn = highlight_mask(image, np.array([[True, False], [False, True]]))
    assert [drawn.getpixel(place) for place in ((0, 0), (1, 0), (2, 1), (3, 1))] == [(200, 100, 50)] * 4
    shade = drawn.getpixel((3, 0))
    assert len(set(shade)) == 1 and shade[0] < 60


@pytest.mark.parametrize("heads", [3, 16, 20])
def test_each_head_has_its_color(heads):
    rng = np.random.default_rng(0)
    attention, masks = rng.random((heads, 3, 5)), rng.random((heads, 3, 5)) < 2 / heads
    attention[1] *= 100  # a head with large values does not cover the others
    image = Image.new("RGB", (50, 30), (10, 250, 120))
    gray = image.convert("L").getpixel((0, 0))
    drawn = colorize_heads(image, attention, masks)
    for row, column in np.ndindex(3, 5):
        color, best = None, -1.0
        for head in range(heads):
            share = attention[head, row, column] / attention[head].max()
            if masks[head, row, column] and share > best:
                color, best = COLORS[head % len(COLORS)], share
        expected = [gray] * 3 if color is None else [0.35 * gray + 0.65 * c for c in color]
        found = drawn.getpixel((10 * column + 5, 10 * row + 5))
        assert np.abs(np.array(found) - expected).max() <= 1.5


def test_head_colors_differ():
    hues = [colorsys.rgb_to_hsv(*(c / 255 for c in color)) for color in COLORS]
    assert len(set(COLORS)) == 16 and min(saturation for _, saturation, _ in hues) > 0.3
    distances = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(COLORS) for b in COLORS[:i]]
    assert min(distances) > 40


def test_components_as_rgb():
    components = np.array([[[0.0, -1.0, 2.0], [1.0, 3.0, 4.0]]])
    image = components_to_rgb(components, (2, 1), np.array([0.0, -1.0, 3.0]), np.array([2.0, 1.0, 4.0]))
    assert image.getpixel((0, 0)) == (0, 0, 0) and image.getpixel((1, 0)) == (128, 255, 255)


def test_an_overlay_is_tinted_and_outlined():
    image = Image.new("RGB", (60, 40), (200, 100, 50))
    mask = np.zeros((4, 6), bool)
    mask[1:3, 1:4] = True  # x from 10 to 40, y from 10 to 30
    drawn = np.asarray(overlay_mask(image, mask, (0, 0, 200))).astype(int)
    outside = np.ones((40, 60), bool)
    outside[10:30, 10:40] = False
    assert (drawn[outside] == (200, 100, 50)).all()
    for y, x in ((10, 25), (29, 25), (20, 10), (20, 39), (11, 11)):  # two pixels wide
        assert tuple(drawn[y, x]) == (0, 0, 200)
    assert (np.abs(drawn[12:28, 12:38] - (0.6 * 200, 0.6 * 100, 0.6 * 50 + 0.4 * 200)) <= 1).all()
    assert tuple(np.asarray(overlay_mask(image, mask, (0, 0, 200), opacity=0))[20, 25]) == (200, 100, 50)


def test_the_overlay_shows_the_gray_frame_without_attention():
    frame = Image.new("RGB", (40, 40), (250, 250, 0))
    values = np.zeros((4, 4), np.float32)
    values[0, 0] = 1
    image = draw_overlay(frame, values, 1.0)
    assert image.getpixel((39, 39)) == frame.convert("L").convert("RGB").getpixel((0, 0))
    assert image.getpixel((1, 1))[2] < 0.8 * image.getpixel((1, 1))[0]  # light yellow over gray
