import functools
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as TF

import augment
from augment import BatchMultiCrop, EvalTransform, MultiCrop, View, render, render_channels, sample_box, to_pixels
from data.images import read_image
from data.shapes import Shapes

PLAIN = View(size=32, box=(10, 5, 70, 50), flip=False, jitter=(), grayscale=False, blur=0.0, solarize=False)
TORCHVISION = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast, "saturation": TF.adjust_saturation,
          "hue": TF.adjust_hue}


def render_ours(image, view):
    """PIL image -> [3, s, s] float32 in 0 to 255."""
    return render(to_pixels(image).permute(2, 0, 1).unsqueeze(0), view)[0]


def render_pillow(image, view):
    """The same with torchvision and Pillow, as in the reference implementation."""
    left, top, right, bottom = view.box
    x = TF.resized_crop(image, top, left, bottom - top, right - left, [view.size] * 2, TF.InterpolationMode.BICUBIC)
    x = TF.hflip(x) if view.flip else x
    for name, amount in view.jitter:
        x = TORCHVISION[name](x, amount)
    x = TF.rgb_to_grayscale(x, num_output_channels=3) if view.grayscale else x
    x = x.filter(ImageFilter.GaussianBlur(view.blur)) if view.blur else x
    x = ImageOps.solarize(x) if view.solarize else x
    return TF.pil_to_tensor(x).float()


def sorted_differences(image, **params):
    """Absolute differences between ours and Pillow, sorted; both start from the same crop."""
    cropped = TF.resized_crop(image, 5, 10, 45, 60, [64, 64], TF.InterpolationMode.BICUBIC)
    view = PLAIN._replace(size=64, box=(0, 0, 64, 64), **params)
    return (render_ours(cropped, view) - render_pillow(cropped, view)).abs().flatten().sort().values


def test_crop_equals_torchvision_bicubic(scene):
    for size in (16, 32, 64, 100):  # smaller and larger than the box
        view = PLAIN._replace(size=size)
        difference = (render_ours(scene, view) - render_pillow(scene, view)).abs()
        assert difference.max() <= 1 and difference.mean() < 0.02


@pytest.mark.parametrize("name, amounts", [("brightness", (0.6, 1.0, 1.4)), ("contrast", (0.6, 1.0, 1.4)),
                                           ("saturation", (0.8, 1.0, 1.2))])
def test_jitter_equals_pillow(scene, name, amounts):
    for amount in amounts:
        assert sorted_differences(scene, jitter=((name, amount),)).max() == 0


@pytest.mark.parametrize("turn", (-0.5, -0.1, -0.003, 0.0, 0.07, 0.1, 0.5))
def test_hue_equals_pillow_up_to_rounding(scene, turn):
    difference = sorted_differences(scene, jitter=(("hue", turn),))
    assert difference.mean() < 0.01 and difference[-25] == 0  # of 12,288


def test_hue_of_extreme_colors():
    """All of 0, 1, 127, 254, 255 in each channel: grays, black, white, ties of the largest channel."""
    levels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    pixels = torch.cartesian_prod(levels, levels, levels).view(1, 125, 3)
    image = Image.frombytes("RGB", (125, 1), pixels.numpy().tobytes())
    for turn in (-0.3, 0.0, 0.1):
        difference = augment.adjust_hue(pixels.permute(2, 0, 1)[None].float(), turn)[0] - TF.pil_to_tensor(
            TF.adjust_hue(image, turn))
        assert difference.abs().max() <= 1


def test_grayscale_of_every_color_and_means_that_end_in_one_half():
    colors = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8)] * 3).view(4096, 4096, 3)
    image = Image.frombytes("RGB", (4096, 4096), colors.numpy().tobytes())
    gray = augment.to_grayscale(colors.permute(2, 0, 1).float()).byte()
    assert torch.equal(gray, TF.pil_to_tensor(image.convert("L")))
    halves = Image.new("RGB", (2, 1), (10, 10, 10))
    halves.putpixel((1, 0), (11, 11, 11))
    x = TF.pil_to_tensor(halves)[None].float()
    assert torch.equal(augment.adjust_contrast(x, 1.4)[0].byte(), TF.pil_to_tensor(TF.adjust_contrast(halves, 1.4)))


def test_jitter_is_applied_in_order(scene):
    jitter = (("contrast", 1.4), ("hue", 0.1), ("brightness", 0.6))
    assert sorted_differences(scene, jitter=jitter).mean() < 0.01
    view = PLAIN._replace(jitter=jitter)
    assert (render_ours(scene, view) - render_pillow(scene, view._replace(jitter=jitter[::-1]))).abs().mean() > 1


def test_flip_grayscale_solarize_equal_pillow(scene):
    for params in (dict(flip=True), dict(solarize=True), dict(grayscale=True)):
        assert sorted_differences(scene, **params).max() == 0


@pytest.mark.parametrize("sigma", (0.1, 0.4, 0.8, 1.3, 1.42, 2.0, 5.0))
def test_blur_equals_pillow_up_to_rounding(scene, sigma):
    difference = sorted_differences(scene, blur=sigma)
    assert difference.mean() < 0.1 and difference.max() <= 2


@pytest.fixture(scope="module")
def images(request):
    """The images in the folder --images, generated ones without it."""
    folder = request.config.getoption("--images")
    if folder:
        return [read_image(path) for path in sorted(Path(folder).rglob("*.[jJ]*"))[:200]]
    return [Shapes("test", 24, 300)[i][0].crop((0, 0, 300, 160 + 4 * i)) for i in range(24)]


def test_crops_equal_pillow_on_workers_and_in_batches(images):
    """Ten crops of each image by the same parameters: mean difference below 0.1 of 255, 999 of 1000 at most 4."""
    multicrop, batch = MultiCrop(), BatchMultiCrop()
    on_worker, in_batch = [], []
    for first in range(0, len(images), 8):
        some = images[first:first + 8]
        pixels, params = zip(*(batch.prepare(image, key=first + i) for i, image in enumerate(some)))
        crops = batch(torch.cat(pixels), torch.stack(params))
        for i, image in enumerate(some):
            for v, view in enumerate(multicrop.sample(*image.size, key=first + i)):
                expected = render_pillow(image, view)
                on_worker.append((render_ours(image, view) - expected).abs().flatten())
                in_batch.append((crops[v][i] * multicrop.std + multicrop.mean - expected).abs().flatten())
    for differences in (torch.cat(on_worker), torch.cat(in_batch)):
        assert differences.mean() < 0.1
        assert differences.kthvalue(int(0.999 * len(differences))).values <= 4


def test_normalization_equals_torchvision(scene):
    expected = TF.normalize(TF.to_tensor(scene), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    result = MultiCrop().normalize(to_pixels(scene).permute(2, 0, 1).float())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


# ---- images that are taken, and those that are not ----

def test_tensors_give_the_crops_of_images(scene):
    """uint8, and floats in [0, 1], [3, H, W]."""
    multicrop, batch = MultiCrop(32, local_size=16, local_number=2), BatchMultiCrop(32, local_size=16, local_number=2)
    expected, (pixels, params) = multicrop(scene, key=5), batch.prepare(scene, key=5)
    for x in (TF.pil_to_tensor(scene), TF.to_tensor(scene), TF.to_tensor(scene).double()):
        assert all(map(torch.equal, multicrop(x, key=5), expected))
        assert all(map(torch.equal, batch.prepare(x, key=5), (pixels, params)))
        assert torch.equal(EvalTransform((61, 97))(x), EvalTransform((61, 97))(scene))
    assert to_pixels(torch.tensor([0.001, 0.003, 0.999]).view(3, 1, 1)).tolist() == [[[0, 1, 255]]]


@pytest.mark.parametrize("make, error, words", [
    (lambda image: image.convert("L"), ValueError, "mode L: use image.convert('RGB')"),
    (lambda image: image.convert("RGBA"), ValueError, "mode RGBA"),
    (lambda image: TF.pil_to_tensor(image.convert("L")), ValueError, "[1, 61, 97]"),
    (lambda image: TF.pil_to_tensor(image.convert("RGBA")), ValueError, "[4, 61, 97]"),
    (lambda image: TF.pil_to_tensor(image)[None], ValueError, "[1, 3, 61, 97]"),
    (to_pixels, ValueError, "[61, 97, 3]"),
    (lambda image: TF.pil_to_tensor(image).int(), TypeError, "torch.int32"),
    (lambda image: TF.pil_to_tensor(image).float(), ValueError, "floats in [0, 1], got 0 to 255"),
    (lambda image: TF.to_tensor(image) * torch.nan, ValueError, "got nan to nan"),
    (lambda image: to_pixels(image).numpy(), TypeError, "got ndarray"),
    (lambda image: "dog.jpg", TypeError, "got str")])
def test_other_images_are_refused_in_one_line(scene, make, error, words):
    for transform in (MultiCrop(), BatchMultiCrop().prepare, EvalTransform()):
        with pytest.raises(error) as raised:
            transform(make(scene))
        assert words in str(raised.value) and "\n" not in str(raised.value)


def test_other_pixels_are_refused(scene):
    pixels, params = BatchMultiCrop().prepare(scene)
    for wrong in (pixels.float(), TF.pil_to_tensor(scene)):
        with pytest.raises(TypeError, match=r"pixels of prepare, uint8 \[N, 3\], got torch"):
            BatchMultiCrop()(wrong, params[None])


def test_repr_shows_the_parameters():
    """It is the call that builds the same transform."""
    for transform in (MultiCrop(), MultiCrop(mean=(0, 0, 0)), BatchMultiCrop(32, local_number=0, blur=(0, 0, 0)),
                      BatchMultiCrop(compile=True), EvalTransform(), EvalTransform((32, 48), std=(1, 1, 1))):
        again = eval(repr(transform))
        assert repr(again) == repr(transform) and type(again) is type(transform)
    assert "compile=True" in repr(BatchMultiCrop(compile=True)) and "blur=(0, 0, 0)" in repr(MultiCrop(blur=(0, 0, 0)))
    assert repr(MultiCrop()).startswith("MultiCrop(global_size=224, global_scale=(0.4, 1.0), local_size=96, ")
    assert "mean=(0, 0, 0)" in repr(MultiCrop(mean=(0, 0, 0))) and again.size == (32, 48) and again.std == (1, 1, 1)


# ---- evaluation ----

@pytest.mark.parametrize("size", [(97, 61), (61, 97), (40, 300), (33, 20), (256, 256), (3, 200), (1, 1)])
def test_eval_transform_equals_torchvision(scene, size):
    """To the bit for PIL images; tensors are resized by torch, which is close."""
    image = scene.resize(size)
    for height, width in ((32, 32), (48, 24)):
        shorter = round(min(size) * (max(width / size[0], height / size[1]) / 0.875))
        expected = TF.center_crop(TF.resize(image, shorter, TF.InterpolationMode.BICUBIC), [height, width])
        expected = TF.normalize(TF.to_tensor(expected), augment.IMAGENET_MEAN, augment.IMAGENET_STD)
        transform = EvalTransform(height if height == width else (height, width))
        assert torch.equal(transform(image), expected)
        difference = (transform(TF.pil_to_tensor(image)) - expected).abs() * 58  # about, of 255
        assert difference.mean() < 0.5 and difference.max() < 12


# ---- batches ----

def crop_in_batch_and_one_by_one(multicrop, batch, images):
    pixels, params = zip(*(batch.prepare(image, key=i) for i, image in enumerate(images)))
    together = batch(torch.cat(pixels), torch.stack(params))
    each = [torch.stack(view) for view in zip(*(multicrop(image, key=i) for i, image in enumerate(images)))]
    return together, each


@pytest.mark.parametrize("chunk_bytes, compile", [
    (2**30, False), (2**21, False), pytest.param(2**30, "aot_eager", marks=pytest.mark.slow),
    pytest.param(2**30, True, marks=pytest.mark.slow)])
def test_batch_equals_images_one_by_one(scene, monkeypatch, chunk_bytes, compile):
    """Images of different sizes and shapes, in one chunk or several, eager or compiled."""
    monkeypatch.setattr(augment, "CHUNK_BYTES", chunk_bytes)
    if compile == "aot_eager":
        monkeypatch.setattr(augment, "compile_operation",
                            functools.cache(functools.partial(torch.compile, dynamic=True, backend="aot_eager")))
    arguments = dict(global_size=48, local_size=32, local_number=3, solarize=0.5, blur=(1.0, 0.5, 0.5))
    batch = BatchMultiCrop(**arguments, compile=bool(compile))
    images = [scene.resize((60 + 37 * (i % 5), 300 - 20 * i)) for i in range(12)] + [Image.new("RGB", (1, 1), "red")]
    operations, run = [], batch.run
    batch.run = lambda op, *args: operations.append(op) or run(op, *args)
    together, each = crop_in_batch_and_one_by_one(MultiCrop(**arguments), batch, images)
    assert [x.shape for x in together] == [x.shape for x in each]
    for a, b in zip(together, each):
        difference = (a - b).abs() * 58  # about, of 255
        assert difference.mean() < 0.05 and (difference > 4).float().mean() < 1e-3
    assert (operations.count(augment.crop_and_resize) > 2) == (chunk_bytes < 2**30)  # of two sizes


@pytest.mark.parametrize("chunk_bytes, compile", [(2**30, False), (2**20, False), pytest.param(
    2**30, True, marks=pytest.mark.slow)])
def test_batch_of_channels_equals_images_one_by_one(scene, monkeypatch, chunk_bytes, compile):
    """Without rounding: images of 5 channels whose differences are below 8 bits."""
    monkeypatch.setattr(augment, "CHUNK_BYTES", chunk_bytes)
    arguments = dict(global_size=48, local_size=32, local_number=3, blur=(1.0, 0.5, 0.5), vertical_flip=0.5,
                     rotate90=True, channels=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(1.0, 0.5, 0.25, 0.2, 1e-3))
    sizes = [(60 + 37 * (i % 5), 300 - 20 * i) for i in range(12)] + [(1, 1)]
    images = [torch.cat([TF.to_tensor(scene.resize(size)), torch.full((1, *size[::-1]), 0.3),
                         0.5 + 1e-3 * TF.to_tensor(scene.resize(size))[:1]]) for size in sizes]
    batch = BatchMultiCrop(**arguments, compile=compile)
    operations, run = [], batch.run
    batch.run = lambda op, *args: operations.append(op) or run(op, *args)
    together, each = crop_in_batch_and_one_by_one(MultiCrop(**arguments), batch, images)
    assert [x.shape for x in together] == [x.shape for x in each] == [(13, 5, 48, 48)] * 2 + [(13, 5, 32, 32)] * 3
    for a, b in zip(together, each):
        difference = ((a - b) * batch.std / 255).abs()  # of values in [0, 1]
        assert difference.max() < 2e-5 and difference.mean() < 1e-6 and a[:, 4].std() > 0.2
    assert (operations.count(augment.crop_and_resize) > 2) == (chunk_bytes < 2**30)  # of two sizes
    pixels, params = batch.prepare(images[0])
    with pytest.raises(TypeError, match=r"pixels of prepare, float32 \[N, 5\], got torch.uint8"):
        batch(pixels.byte(), params[None])


def test_autocast_does_not_change_batches(scene):
    batch = BatchMultiCrop(32, local_size=16, local_number=2)
    pixels, params = batch.prepare(scene, key=0)
    expected = batch(pixels, params[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, batch(pixels, params[None]), expected))


def test_crop_at_large_coordinates_loses_no_precision(scene):
    """The same content 17,000 pixels further to the right, or after 2^24 + 1 pixels of others, gives the same crop."""
    def crop(x, offset, width, left):
        params = torch.tensor([width, 61.0, left, 5.0, left + 60, 50.0, 0.0]).view(7, 1)
        return augment.crop_and_resize(x.reshape(-1, 3), torch.tensor([offset]), params, 32, 45, 8)

    x = to_pixels(scene)  # [61, 97, 3]
    near, far = crop(x, 0, 97, 10), crop(torch.nn.functional.pad(x, (0, 0, 17_000, 0)), 0, 17_097, 17_010)
    last = crop(torch.cat((torch.zeros(2**24 + 1, 3, dtype=torch.uint8), x.view(-1, 3))), 2**24 + 1, 97, 10)
    assert torch.equal(near, far) and torch.equal(near, last) and near.float().std() > 10


def test_global_and_local_crops_of_one_size(scene):
    arguments = dict(global_size=32, local_size=32, local_number=2)
    images = [scene, scene.rotate(90)]
    together, each = crop_in_batch_and_one_by_one(MultiCrop(**arguments), BatchMultiCrop(**arguments), images)
    assert len(together) == 4 and all((a - b).abs().mean() < 0.002 for a, b in zip(together, each))


def measure_peak(call, *args):
    """What call(*args) returns, and the most bytes that it had allocated at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call(*args)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return result, max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_memory_stays_below_the_limit(scene, monkeypatch):
    """Beyond the crops, as floats and as bytes, and two copies of the pixels."""
    batch, images = BatchMultiCrop(96, local_size=48, local_number=4), [scene.resize((300, 250))] * 40
    pixels, params = zip(*(batch.prepare(image, key=i) for i, image in enumerate(images)))
    pixels, params = torch.cat(pixels), torch.stack(params)
    for limit in (2**30, 2**25, 2**23):
        monkeypatch.setattr(augment, "CHUNK_BYTES", limit)
        crops, peak = measure_peak(batch, pixels, params)
        peak -= 5 * sum(x.numel() for x in crops) + 2 * pixels.numel()
        assert peak < limit and (peak > 2**25 or limit < 2**30)


def test_memory_of_channels_stays_below_the_limit(monkeypatch):
    """In each call of the resize, and of the operations behind it, for one size of crops."""
    batch, peaks = BatchMultiCrop(96, local_number=0, channels=10, mean=[0.5] * 10, std=[0.5] * 10), []

    def measure(call):
        def measured(*args):
            result, peak = measure_peak(call, *args)
            peaks.append(peak)
            return result
        return measured
    monkeypatch.setattr(augment, "CHUNK_BYTES", 2**24)
    monkeypatch.setattr(augment, "crop_and_resize", measure(augment.crop_and_resize))
    monkeypatch.setattr(batch, "apply_operations", measure(batch.apply_operations))
    pixels, params = batch.prepare(torch.rand(10, 250, 300), key=0)
    batch(pixels.repeat(12, 1), params.expand(12, -1, -1))
    assert 2**23 < peaks[0] < 2**24 and 2**23 < max(peaks[-3:]) < 2**24


@pytest.mark.slow
def test_images_of_other_sizes_compile_nothing_new(scene, monkeypatch):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(augment, "compile_operation", functools.cache(augment.compile_operation.__wrapped__))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    batch = BatchMultiCrop(48, local_size=32, local_number=3, compile=True)
    for width in (30, 17, 25):
        images = [scene.resize((width + i, 31 - i)) for i in range(4)]
        crop_in_batch_and_one_by_one(MultiCrop(32, local_size=16, local_number=3), batch, images)
        assert counter.frame_count == 1 + 5 + 6, width  # the crop, 5 operations of global and 6 of local crops
    monkeypatch.setattr(augment, "CHUNK_BYTES", 2**21)  # the resize in parts
    frames = []
    for widths in ((80, 300, 900), (90, 320, 1000)):
        for width in widths:
            crop_in_batch_and_one_by_one(MultiCrop(32, local_size=16, local_number=3), batch, [
                scene.resize((width + i, width - i)) for i in range(4)])
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] <= 12 + 2 * 3  # crops of each size, for images that shrink by up to 2, 8, 32


@pytest.mark.parametrize("width, height, factor", [
    (500, 400, 1), (3000, 2000, 1), (4032, 3024, 2), (12_000, 9_000, 4), (12_000, 120, 1), (1, 1, 1)])
def test_large_images_are_reduced(width, height, factor):
    multicrop = MultiCrop()
    assert multicrop.reduction(width, height) == factor
    for view in (view for i in range(50) for view in multicrop.sample(width // factor, height // factor, key=i)):
        left, top, right, bottom = view.box
        assert factor == 1 or min(right - left, bottom - top) >= 3 * view.size * 0.98


def test_reduced_image_gives_the_same_crops(images):
    """Crops so small that the images are reduced; compared with the same boxes on the full images."""
    multicrop = MultiCrop(global_size=16, local_size=5, local_number=4)
    differences = []
    for i, image in enumerate(images):
        factor = multicrop.reduction(*image.size)
        image = image.crop((0, 0, image.width // factor * factor, image.height // factor * factor))
        reduced = image.reduce(factor)
        assert factor > 1
        for view in multicrop.sample(*reduced.size, key=i):
            view = view._replace(jitter=(), solarize=False)
            full = view._replace(box=tuple(factor * x for x in view.box))
            differences.append((render_ours(reduced, view) - render_ours(image, full)).abs().flatten())
    differences = torch.cat(differences)
    assert differences.mean() < 1 and differences.kthvalue(int(0.999 * len(differences))).values <= 4


# ---- crop parameters ----

def test_boxes_have_the_distribution_of_torchvision():
    torch.manual_seed(0)
    rng, image = random.Random(0), Image.new("RGB", (640, 427))
    for scale in ((0.05, 0.4), (0.4, 1.0)):
        ours = torch.tensor([sample_box(rng, 640, 427, scale, (3 / 4, 4 / 3)) for _ in range(4000)]).double()
        left, top, right, bottom = ours.unbind(1)
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 640 and bottom.max() <= 427
        theirs = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
        top_, left_, height_, width_ = torch.tensor(theirs).double().unbind(1)
        width, height = right - left, bottom - top
        pairs = [(width * height, width_ * height_), (width / height, width_ / height_), (left, left_), (top, top_)]
        for a, b in pairs:  # two-sample Kolmogorov-Smirnov, bound for p = 0.001
            grid = torch.cat((a, b)).sort().values
            below_a, below_b = (torch.searchsorted(x.sort().values, grid, right=True) for x in (a, b))
            assert (below_a - below_b).abs().max() / 4000 < 1.95 * math.sqrt(2 / 4000)


def test_color_jitter_has_the_distribution_of_torchvision():
    torch.manual_seed(0)
    rng, multicrop, names = random.Random(0), MultiCrop(), list(TORCHVISION)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    a = [multicrop.sample_jitter(rng) for _ in range(4000)]
    b = [ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(4000)]
    for place, name in enumerate(names):  # two-sample Kolmogorov-Smirnov, bound for p = 0.001
        x = torch.tensor([dict(amounts)[name] for amounts in a]).double().sort().values
        y = torch.tensor([amounts[1 + place] for amounts in b]).double().sort().values
        grid = torch.cat((x, y))
        apart = torch.searchsorted(x, grid, right=True) - torch.searchsorted(y, grid, right=True)
        assert apart.abs().max() / 4000 < 1.95 * math.sqrt(2 / 4000), name
    orders = [[tuple(names.index(name) for name, _ in amounts) for amounts in a], [tuple(o[0].tolist()) for o in b]]
    counts = torch.tensor([[order.count(o) for o in sorted(set(order))] for order in orders]).double()
    chi_squared = ((counts[0] - counts[1]) ** 2 / counts.sum(dim=0)).sum()
    assert counts.shape == (2, 24) and chi_squared < 49.7  # p = 0.001 of 23 degrees of freedom


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1)])
def test_extreme_aspect_ratios_get_the_center_box_of_torchvision(size):
    top, left, height, width = RandomResizedCrop.get_params(Image.new("RGB", size), (0.9, 1.0), (3 / 4, 4 / 3))
    assert sample_box(random.Random(0), *size, (0.9, 1.0), (3 / 4, 4 / 3)) == (left, top, left + width, top + height)


def test_crop_parameters_have_their_probabilities_and_ranges():
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
        assert rate(kind, lambda v: v.grayscale) == pytest.approx(0.2, abs=near)
        assert rate(kind, lambda v: len(v.jitter) == 4) == pytest.approx(0.8, abs=near)
        assert rate(kind, lambda v: v.jitter[:1] != () and v.jitter[0][0] == "hue") == pytest.approx(0.2, abs=near)
    amounts = {name: [dict(v.jitter)[name] for v in first if v.jitter] for name in ("brightness", "saturation", "hue")}
    assert 0.6 <= min(amounts["brightness"]) < 0.61 and 1.39 < max(amounts["brightness"]) <= 1.4
    assert 0.8 <= min(amounts["saturation"]) < 0.81 and 0.099 < max(amounts["hue"]) <= 0.1
    assert 0.1 <= min(v.blur for v in first) < 0.12 and 1.98 < max(v.blur for v in first) <= 2.0


def test_equal_keys_give_equal_crops(scene):
    multicrop = MultiCrop(64, local_size=32, local_number=3)
    a, b, c = (multicrop(scene, key=key) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 2)))
    assert [list(x.shape) for x in a] == [[3, 64, 64]] * 2 + [[3, 32, 32]] * 3
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0])
    assert not torch.equal(multicrop(scene)[0], multicrop(scene)[0])


# ---- any number of channels, and images without a canonical orientation ----

def test_channels_are_cropped_as_by_pillow_and_not_rounded(scene):
    """Resize and blur of each channel are those of one in float; each has its own brightness and contrast."""
    x = torch.stack([TF.to_tensor(scene.rotate(17 * i).convert("F").point(lambda v: v / 255))[0] for i in range(5)])
    view = PLAIN._replace(flip=True)
    found = render_channels(x[None], view)[0]
    for band, plane in zip(found, x):
        expected = Image.fromarray(plane.numpy()).crop(view.box).resize((32, 32), 3).transpose(0)
        assert (band / 255 - TF.to_tensor(expected)[0].clamp(0, 1)).abs().max() < 1e-5
    assert (found - found.round()).abs().mean() > 0.1
    factors = 0.6, 0.8, 1.0, 1.2, 1.4
    bright = render_channels(x[None], view._replace(jitter=(("brightness", factors),)))[0]
    contrast = render_channels(x[None], view._replace(jitter=(("contrast", factors),)))[0]
    for i, factor in enumerate(factors):
        mean = found[i].mean()
        assert torch.allclose(bright[i], (factor * found[i]).clamp(0, 255), atol=1e-3)
        assert torch.allclose(contrast[i], ((found[i] - mean) * factor + mean).clamp(0, 255), atol=1e-3)
    blurred = render_channels(x[None], view._replace(blur=1.5))[0]
    expected = TF.gaussian_blur(found, 13, 1.5)
    assert (blurred - expected)[..., 4:-4, 4:-4].abs().max() < 2.5 and (blurred - found).abs().max() > 10


def test_multicrop_of_channels():
    """Two values below 8 bits apart stay apart, and parameters depend on the key only."""
    x = torch.full((5, 40, 50), 0.5)
    x[4, :, 25:] += 1e-4
    arguments = dict(global_size=32, local_size=16, local_number=2, channels=5, mean=(0.5,) * 5, std=(1e-4,) * 5)
    crops = MultiCrop(**arguments, jitter=0, blur=(0, 0, 0), global_scale=(1, 1))(x, key=0)
    assert [crop.shape[-1] for crop in crops] == [32, 32, 16, 16] and len(crops[0]) == 5
    assert crops[0][4].max() - crops[0][4].min() == pytest.approx(1, abs=0.2) and crops[0][:4].abs().max() < 1e-2
    multicrop = MultiCrop(**arguments)
    assert all(map(torch.equal, multicrop(x, key=1), multicrop(x, key=1)))
    views = [view for key in range(100) for view in multicrop.sample(50, 40, key)]
    jitters = [dict(view.jitter) for view in views if view.jitter]
    assert not any(view.grayscale or view.solarize for view in views) and 250 < len(jitters) < 370
    assert all(jitter.keys() == {"brightness", "contrast"} for jitter in jitters)
    factors = torch.tensor([jitter["brightness"] for jitter in jitters])
    assert factors.shape[1] == 5 and factors.min() > 0.6 and factors.max() < 1.4
    assert torch.corrcoef(factors.T).sub(torch.eye(5)).abs().max() < 0.25
    for image, error in ((x[:3], ValueError), (x.byte(), TypeError), (Image.new("RGB", (9, 9)), TypeError)):
        for transform in (multicrop, BatchMultiCrop(**arguments).prepare):
            with pytest.raises(error, match="expected"):
                transform(image)


def test_eval_transform_of_channels(scene):
    """Three channels as a tensor of channels are those of RGB, but for rounding to 8 bits."""
    image = TF.to_tensor(scene)
    for size in (32, (61, 97), (24, 40)):
        exact, rounded = EvalTransform(size, channels=3)(image), EvalTransform(size)(scene)
        difference = 255 * 0.224 * (exact - rounded).abs()
        assert difference.mean() < 0.5 and difference.max() < 4  # of 255; Pillow also clips between its two passes
    assert not torch.equal(EvalTransform(32, channels=3)(image), EvalTransform(32)(image))


@pytest.mark.parametrize("channels", [None, 5])
def test_a_model_can_be_trained_on_crops(scene, channels):
    """Crops are made in inference mode, whose tensors autograd refuses."""
    options = dict(channels=5, mean=(0.5,) * 5, std=(0.2,) * 5) if channels else {}
    multicrop = MultiCrop(32, local_size=16, **options)
    for crop in multicrop(torch.rand(5, 40, 60) if channels else scene):
        conv = torch.nn.Conv2d(channels or 3, 1, len(crop[0]))
        conv(crop).sum().backward()
        torch.testing.assert_close(conv.weight.grad[0], crop)


def test_rotations_and_vertical_flips(scene):
    """Each orientation equals Pillow's, is as frequent as the others, and leaves all other parameters as they were."""
    plain = render_ours(scene, PLAIN)
    for vertical, turns in itertools.product((False, True), range(4)):
        found = render_ours(scene, PLAIN._replace(vertical_flip=vertical, turns=turns))
        image = Image.fromarray(plain.byte().permute(1, 2, 0).numpy())
        expected = TF.pil_to_tensor((ImageOps.flip(image) if vertical else image).rotate(90 * turns))
        assert torch.equal(found, expected.float())
    multicrop = MultiCrop(32, local_number=2, local_size=16, vertical_flip=0.5, rotate90=True)
    views = [multicrop.sample(97, 61, key)[0] for key in range(800)]
    counts = torch.zeros(2, 4)
    for view in views:
        counts[int(view.vertical_flip), view.turns] += 1
    assert counts.min() > 65 and counts.max() < 140  # 100 +- 9
    assert [view._replace(vertical_flip=False, turns=0) for view in views] == [
        MultiCrop(32, local_number=2, local_size=16).sample(97, 61, key)[0] for key in range(800)]
    together, each = crop_in_batch_and_one_by_one(multicrop, BatchMultiCrop(
        32, local_number=2, local_size=16, vertical_flip=0.5, rotate90=True), [scene] * 16)
    for a, b in zip(together, each):
        assert (a - b).abs().mean() * 58 < 0.05
