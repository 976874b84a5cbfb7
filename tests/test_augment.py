import math
import random

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from augment import MultiCrop, View, render, sample_box, to_tensor

PLAIN = View(size=32, box=(10, 5, 70, 50), flip=False, jitter=(), grey=False, blur=0.0, solarize=False)
IDENTITY = View(size=0, box=None, flip=False, jitter=(), grey=False, blur=0.0, solarize=False)


def same(a, b):
    return torch.equal(TF.pil_to_tensor(a), TF.pil_to_tensor(b))


def test_crop_is_torchvisions_bicubic(scene):
    assert same(render(scene, PLAIN), TF.resized_crop(scene, 5, 10, 45, 60, [32, 32], TF.InterpolationMode.BICUBIC))


@pytest.mark.parametrize("name, amounts, theirs", [
    ("brightness", (0.6, 1.0, 1.4), TF.adjust_brightness), ("contrast", (0.6, 1.0, 1.4), TF.adjust_contrast),
    ("saturation", (0.8, 1.0, 1.2), TF.adjust_saturation), ("hue", (-0.1, -0.003, 0.0, 0.07, 0.1, 0.5), TF.adjust_hue)])
def test_jitter_is_torchvisions(scene, name, amounts, theirs):
    cropped = render(scene, PLAIN)
    for amount in amounts:
        assert same(render(scene, PLAIN._replace(jitter=((name, amount),))), theirs(cropped, amount))


def test_jitter_is_applied_in_its_order(scene):
    cropped = render(scene, PLAIN)
    jitter = (("contrast", 1.4), ("hue", 0.1), ("brightness", 0.6))
    expected = TF.adjust_brightness(TF.adjust_hue(TF.adjust_contrast(cropped, 1.4), 0.1), 0.6)
    assert same(render(scene, PLAIN._replace(jitter=jitter)), expected)
    assert not same(render(scene, PLAIN._replace(jitter=jitter[::-1])), expected)


def test_flip_grey_blur_solarize_are_theirs(scene):
    cropped = render(scene, PLAIN)
    assert same(render(scene, PLAIN._replace(flip=True)), TF.hflip(cropped))
    assert same(render(scene, PLAIN._replace(grey=True)), TF.rgb_to_grayscale(cropped, num_output_channels=3))
    assert same(render(scene, PLAIN._replace(blur=1.3)), cropped.filter(ImageFilter.GaussianBlur(1.3)))
    assert same(render(scene, PLAIN._replace(solarize=True)), ImageOps.solarize(cropped, 128))


def test_everything_in_the_papers_order(scene):
    view = PLAIN._replace(flip=True, jitter=(("hue", 0.1),), grey=True, blur=0.7, solarize=True)
    x = TF.rgb_to_grayscale(TF.adjust_hue(TF.hflip(render(scene, PLAIN)), 0.1), num_output_channels=3)
    assert same(render(scene, view), TF.solarize(x.filter(ImageFilter.GaussianBlur(0.7)), 128))


def test_tensor_and_normalisation_are_torchvisions(scene):
    torch.testing.assert_close(to_tensor(scene), TF.to_tensor(scene), rtol=0, atol=0)
    expected = TF.normalize(TF.to_tensor(scene), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(MultiCrop().normalize(scene), expected, rtol=0, atol=1e-6)


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    rng, picture = random.Random(0), Image.new("RGB", (640, 427))
    for scale in ((0.05, 0.4), (0.4, 1.0)):
        ours = torch.tensor([sample_box(rng, 640, 427, scale, (3 / 4, 4 / 3)) for _ in range(4000)]).double()
        left, top, right, bottom = ours.unbind(1)
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 640 and bottom.max() <= 427
        theirs = [RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
        top_, left_, height_, width_ = torch.tensor(theirs).double().unbind(1)
        width, height = right - left, bottom - top
        pairs = [(width * height, width_ * height_), (width / height, width_ / height_), (left, left_), (top, top_)]
        for a, b in pairs:  # two-sample Kolmogorov-Smirnov, bound for p = 0.001
            grid = torch.cat((a, b)).sort().values
            below_a, below_b = (torch.searchsorted(x.sort().values, grid, right=True) for x in (a, b))
            assert (below_a - below_b).abs().max() / 4000 < 1.95 * math.sqrt(2 / 4000)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1)])
def test_extreme_pictures_get_torchvisions_central_box(size):
    top, left, height, width = RandomResizedCrop.get_params(Image.new("RGB", size), (0.9, 1.0), (3 / 4, 4 / 3))
    assert sample_box(random.Random(0), *size, (0.9, 1.0), (3 / 4, 4 / 3)) == (left, top, left + width, top + height)


def test_each_number_has_its_frequency():
    multicrop = MultiCrop(local_number=2)
    views = [multicrop.sample(100, 80, key=(0, 0, i)) for i in range(3000)]
    first, second, local = ([sample[v] for sample in views] for v in (0, 1, 2))

    def rate(views, happens):
        return sum(map(happens, views)) / len(views)

    near = 4 * math.sqrt(0.25 / 3000)  # four standard deviations at the widest
    for kind, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2), (local, 0.5, 0.0)):
        assert rate(kind, lambda v: v.blur > 0) == pytest.approx(blur, abs=near)
        assert rate(kind, lambda v: v.solarize) == pytest.approx(solarize, abs=near)
        assert rate(kind, lambda v: v.flip) == pytest.approx(0.5, abs=near)
        assert rate(kind, lambda v: v.grey) == pytest.approx(0.2, abs=near)
        assert rate(kind, lambda v: len(v.jitter) == 4) == pytest.approx(0.8, abs=near)
        assert rate(kind, lambda v: v.jitter[:1] != () and v.jitter[0][0] == "hue") == pytest.approx(0.2, abs=near)
    amounts = {name: [dict(v.jitter)[name] for v in first if v.jitter] for name in ("brightness", "saturation", "hue")}
    assert 0.6 <= min(amounts["brightness"]) < 0.61 and 1.39 < max(amounts["brightness"]) <= 1.4
    assert 0.8 <= min(amounts["saturation"]) < 0.81 and 0.099 < max(amounts["hue"]) <= 0.1
    assert 0.1 <= min(v.blur for v in first) < 0.12 and 1.98 < max(v.blur for v in first) <= 2.0


def test_equal_keys_equal_views(scene):
    multicrop = MultiCrop(64, local_size=32, local_number=3)
    a, b, c = (multicrop(scene, key=key) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 2)))
    assert [list(x.shape) for x in a] == [[3, 64, 64]] * 2 + [[3, 32, 32]] * 3
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0])
    assert not torch.equal(multicrop(scene)[0], multicrop(scene)[0])
