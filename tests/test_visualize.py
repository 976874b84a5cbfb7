import json
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from torchvision.transforms import functional as TF

import export
import train
import visualize
from augment import IMAGENET_MEAN, IMAGENET_STD, MultiCrop
from common import cli
from common.weights import load_backbone, save_model
from data.folders import ImageFolder
from data.shapes import Shapes
from data.video import VideoWriter, open_video
from plotting import attention, embedding, sheet
from plotting.draw import COLORS, SIGNED, colorize, draw_overlay, draw_side_by_side
from vit import VisionTransformer

GAP = 8


def run(*argv):
    argv = [str(x) for x in argv]
    device = ["--device", "cpu"] if argv[0] not in ("run", "crops") else []
    visualize.main(visualize.parse_args(argv + device))


def write_video(path, count):
    with VideoWriter(path, 25) as writer:
        for i in range(count):
            writer.write(str(i), Shapes("train", count, 64)[i][0].crop((0, 0, 64, 48)))
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder with an image of 60 x 40 pixels and, in a folder below, one of 50 x 50."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, size, i in (("a.png", (60, 40), 0), ("below/b.png", (50, 50), 1)):
        Shapes("train", 8, 64)[i][0].resize(size).save(folder / name)
    return folder


def resized(image, height, width):
    x = TF.to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    return TF.normalize(x, IMAGENET_MEAN, IMAGENET_STD)[None]


# ---- attention ----

def test_maps_equal_the_cls_row_of_the_attention_matrix(model, photos, capsys):
    network, path = model
    run("attention", photos, "--ckpt", path, "--image_size", 48, "--raw", "--separate", "--width", 640)
    output = path.with_suffix(".attention")
    for name, height, width in (("a.png", 48, 72), ("below_b.png", 48, 48)):
        image = Image.open(photos / name.replace("_", "/"))
        with torch.no_grad():
            expected = network.get_last_selfattention(resized(image, height, width))[0, :, 0, 1:]
        expected = expected.view(4, height // 8, width // 8).numpy()
        found = np.load(output / f"{name}.npy")
        assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6
        for head in range(4):
            drawn = Image.open(output / f"{name}.head{head + 1}.attention.png")
            assert drawn.size == image.size and np.array_equal(drawn, colorize(expected[head], image.size))
    assert "a.png: 4 heads of 9 x 6 patches" in capsys.readouterr().out
    page = np.asarray(Image.open(output / "a.png.attention.png"))
    side = (640 - GAP) // 6 - GAP  # 640 pixels: image, mean and four heads
    assert page.shape[1] == 640
    expected = np.asarray(colorize(np.load(output / "a.png.npy")[3], (side - 6, round(side * 40 / 60) - 6)))
    left = GAP + 5 * (side + GAP)
    top = next(y for y in range(20, 120) if (page[y, left:left + side] == COLORS[3]).all())  # the frame of head 4
    assert np.array_equal(page[top + 3:top + 3 + len(expected), left + 3:left + side - 3], expected)
    assert (page[GAP:GAP + 16, GAP:300] < 100).any()  # the title


def test_few_patches_of_a_photo_are_noted_once(model, photos, tmp_path, capsys):
    for name in ("large.png", "larger.png"):
        Image.new("RGB", (500, 400)).save(tmp_path / name)
    files = photos / "a.png", tmp_path / "large.png", tmp_path / "larger.png"
    line = "NOTE: the model sees 11 x 9 patches of large.png; set --image_size 240 for a finer map"
    for task in ("attention", "features"):
        run(task, *files, "--ckpt", model[1])
        assert [text for text in capsys.readouterr().out.splitlines() if "NOTE" in text] == [line]
        run(task, *files, "--ckpt", model[1], "--image_size", 240)
        assert "NOTE" not in capsys.readouterr().out
    export.main(export.parse_args(["--ckpt", str(model[1])]))
    capsys.readouterr()
    run("attention", files[1], "--ckpt", model[1].with_suffix(".onnx"))
    assert "sees 4 x 4 patches of large.png; export with --image_size 240 for" in capsys.readouterr().out
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (500, 400)).save(tmp_path / "frames" / "0.png")
    run("video", tmp_path / "frames", tmp_path / "out", "--ckpt", model[1])
    assert line.replace("large.png", "each frame") in capsys.readouterr().out
    image = Image.new("RGB", (1000, 1000))
    assert [attention.note_coarse_map("a", image, (rows, 20), 8) for rows in (14, 15)] == [True, False]


def test_default_size_is_in_proportion_to_the_trained_size(model, photos):
    export.main(export.parse_args(["--ckpt", str(model[1]), "--dynamic", "size"]))
    for file in (model[1], model[1].with_suffix(".onnx")):
        run("attention", photos / "a.png", "--ckpt", file, "--raw", "--output_dir", photos / "out")
        assert np.load(photos / "out" / "a.png.npy").shape == (4, 9, 14)  # 480 / 224 of 32 pixels in patches of 8
    run("features", photos / "a.png", "--ckpt", model[1])
    page = np.asarray(Image.open(model[1].with_suffix(".features.png")))
    side = (1000 - GAP) // 2 - GAP
    row = page[GAP + 60, 2 * GAP + side:2 * GAP + 2 * side]
    assert 10 < len(np.unique(row, axis=0)) <= 14  # patches in a row


@pytest.mark.parametrize("flags, size", [
    (["--dynamic", "size"], None), (["--dynamic", "size", "--normalize", "nhwc"], None), ([], (32, 32)),
    (["--image_size", "24", "48", "--heads", "mean", "--precision", "mixed"], (24, 48))])
def test_attention_of_an_onnx_file(model, photos, flags, size):
    network, path = model
    onnx = photos / "model.onnx"
    export.main(export.parse_args(["--ckpt", str(path), "--output", str(onnx), *flags]))
    run("attention", photos / "a.png", "--ckpt", onnx, "--raw", *([] if size else ["--image_size", 48]))
    found = np.load(photos / "model.attention" / "a.png.npy")
    image = Image.open(photos / "a.png")
    if size:
        height, width = size  # the crop it was exported for
        scale = max(width / 60, height / 40) / 0.875
        shorter = round(40 * scale)
        image = image.resize((int(shorter * 60 / 40), shorter), Image.Resampling.BICUBIC)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        x = resized(image.crop((left, top, left + width, top + height)), height, width)
    else:
        x = resized(image, 48, 72)
    with torch.no_grad():
        expected = network.get_last_selfattention(x)[0, :, 0, 1:].unflatten(1, (x.shape[2] // 8, -1))
    expected = expected.mean(dim=0, keepdim=True) if "mean" in flags else expected
    assert found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() < (1e-3 if "mixed" in flags else 1e-5)


def test_errors_of_onnx_files(model, photos, exit_message):
    onnx = photos / "model.onnx"
    export.main(export.parse_args(["--ckpt", str(model[1]), "--output", str(onnx)]))
    image = photos / "a.png"
    assert "takes 32 x 32 pixels; leave --image_size out" in exit_message(
        run, "attention", image, "--ckpt", onnx, "--image_size", 64)
    for flags in (["--untrained"], ["--checkpoint_key", "teacher"]):
        assert "do not apply to an ONNX file" in exit_message(run, "attention", image, "--ckpt", onnx, *flags)
    sizes = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    save_model(photos / "gray.safetensors", {f"backbone.{k}": v for k, v in VisionTransformer(**sizes).state_dict(
        ).items()}, dict(backbone=sizes))
    export.main(export.parse_args(["--ckpt", str(photos / "gray.safetensors")]))
    assert "expected 1 channels" in exit_message(run, "attention", image, "--ckpt", photos / "gray.onnx")
    Image.open(image).convert("L").save(photos / "gray.png")
    run("attention", photos / "gray.png", "--ckpt", photos / "gray.onnx", "--output_dir", photos)
    assert (photos / "gray.png.attention.png").exists()
    (photos / "text.onnx").write_text("not a model")
    assert "text.onnx: not a file of export.py" in exit_message(run, "attention", image, "--ckpt", photos / "text.onnx")


def test_corrupt_images_are_skipped(model, photos, exit_message, capsys):
    (photos / "c.png").write_bytes(b"not an image")
    names = [photos / "gone.png", photos, photos / "a.png"]
    flags = "--ckpt", model[1], "--image_size", 16, "--output_dir", photos / "out"
    with pytest.raises(SystemExit) as stop:
        cli.run_command(lambda args: run("attention", *names, *flags), lambda: None, visualize.DataError)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "2 skipped, the first: " in printed.err
    assert "gone.png: No such file" in printed.out and "c.png: cannot identify" in printed.out
    assert sorted(path.name for path in (photos / "out").iterdir()) == [
        "a.png.5.attention.png", "a.png.attention.png", "below_b.png.attention.png"]
    (photos / "empty").mkdir()
    assert "empty: no " in exit_message(run, "attention", photos / "empty", *flags)
    assert "shapes:5: SIZE must be" in exit_message(run, "attention", "shapes:5", *flags)


def test_outputs_do_not_become_inputs(model, photos, exit_message):
    flags = "--ckpt", model[1], "--image_size", 16
    for _ in range(2):
        run("attention", photos, *flags, "--output_dir", photos / "out")
        run("crops", photos, "--output_dir", photos / "out")
        assert {path.name for path in (photos / "out").iterdir()} == {
            "a.png.attention.png", "below_b.png.attention.png", "a.png.crops.png", "below_b.png.crops.png"}
    run("attention", photos / "a.png", *flags, "--output_dir", photos / "one", "--separate")
    run("features", photos / "a.png", *flags, "--output_dir", photos / "one")
    assert len(list((photos / "one").iterdir())) == 6  # a sheet, four heads, features
    assert list(ImageFolder(str(photos)).files) == ["a.png", "below/b.png"]
    assert "lies in it" in exit_message(run, "video", photos, photos / "below" / "out", *flags)
    for task in (["attention", photos, *flags], ["crops", photos]):
        assert "choose another --output_dir" in exit_message(run, *task, "--output_dir", photos)


def test_long_file_names(model, tmp_path):
    name = "\U0001f600" * 60 + ".png"  # 244 bytes, and no ending fits
    Image.new("RGB", (16, 16)).save(tmp_path / name)
    run("attention", tmp_path / name, "--ckpt", model[1], "--image_size", 16, "--separate")
    assert len(list(model[1].with_suffix(".attention").iterdir())) == 5


def test_images_of_one_pixel_width(model, tmp_path):
    Image.new("RGB", (300, 3), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    for task in ("attention", "features"):
        run(task, tmp_path / "wide.png", tmp_path / "dot.png", "--ckpt", model[1], "--image_size", 8, "--width", 200)
    assert len(list(model[1].with_suffix(".attention").iterdir())) == 2
    run("crops", tmp_path / "dot.png", "--output_dir", tmp_path / "new")
    assert (tmp_path / "new" / "dot.png.crops.png").exists()


def test_built_in_shapes(model, tmp_path):
    run("attention", "shapes:40", "--ckpt", model[1], "--image_size", 40, "--untrained")
    assert len(list(model[1].with_suffix(".untrained.attention").iterdir())) == 4


@pytest.fixture
def cells(monkeypatch):
    """The cells of the last contact sheet."""
    cells = []

    def record_cells(grids, *args, **kwargs):
        cells[:] = [cell for grid, _ in grids for cell in grid]
        return contact_sheet(grids, *args, **kwargs)
    contact_sheet = sheet.contact_sheet
    monkeypatch.setattr(sheet, "contact_sheet", record_cells)
    return cells


# ---- video ----

def test_video_of_a_folder(model, tmp_path, exit_message):
    network, path = model
    (tmp_path / "in").mkdir()
    for i in range(6):
        Shapes("train", 8, 48)[i][0].save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "3.png").write_bytes(b"not an image")
    line = exit_message(run, "video", tmp_path / "in", tmp_path / "out", "--ckpt", path, "--image_size", 48)
    assert "1 skipped, the first: " in line and "3.png" in line
    frames = dict(open_video(tmp_path / "out").frames)
    assert list(frames) == [f"{i}.png" for i in (0, 1, 2, 4, 5)]
    top = 0.0
    for name, drawn in frames.items():
        image = Image.open(tmp_path / "in" / name)
        with torch.no_grad():
            mean = network.get_last_selfattention(resized(image, 48, 48))[0, :, 0, 1:].mean(dim=0).view(6, 6).numpy()
        top = max(mean.max(), 0.95 * top)
        assert np.array_equal(np.asarray(drawn)[:, :48], image)
        assert np.abs(np.asarray(drawn, int)[:, 48:] - np.asarray(colorize(mean, (48, 48), high=top), int)).max() <= 3


def test_the_color_scale_of_a_video_falls_slowly(model, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "in" / f"{i}.png")
    bright = iter([0.8, 0.2, 0.77])
    frame, drawn, origin = Image.new("RGB", (16, 16), (0, 0, 0)), [], dict(patch_size=8)

    def extract_attention(image):
        value = next(bright)
        return frame, np.array([[[0.0, 9.0]], [[0.0, value]]], np.float32)
    monkeypatch.setattr(attention, "open_attention", lambda args, rgb_only: (extract_attention, origin))
    for layout in ("side", "overlay"):
        bright = iter([0.8, 0.2, 0.77])
        run("video", tmp_path / "in", tmp_path / layout, "--head", 2, "--layout", layout)
        for (_, image), value, top in zip(open_video(tmp_path / layout).frames, (0.8, 0.2, 0.77), (0.8, 0.76, 0.77)):
            values = np.array([[0.0, value]], np.float32)
            draw = draw_overlay if layout == "overlay" else draw_side_by_side
            made = draw(frame, values, top)
            drawn.append(np.asarray(made).max())
            assert np.abs(np.asarray(image, int) - np.asarray(made, int)).max() <= 2
    assert drawn[0] > drawn[1] and drawn[3] > drawn[4]


def test_video_file_to_video_file(model, tmp_path):
    clip = write_video(tmp_path / "in.mp4", 8)
    run("video", clip, tmp_path / "out.mp4", "--ckpt", model[1], "--image_size", 16, "--layout", "overlay", "--head", 2)
    made = open_video(tmp_path / "out.mp4")
    assert made.rate == open_video(clip).rate and [image.size for _, image in made.frames] == [(64, 48)] * 8
    run("video", clip, tmp_path / "side.mp4", "--ckpt", model[1], "--image_size", 16)
    assert [image.size for _, image in open_video(tmp_path / "side.mp4").frames] == [(128, 48)] * 8
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "0.png")
    run("video", tmp_path / "in", tmp_path / "slow.mp4", "--ckpt", model[1], "--image_size", 16, "--fps", 7)
    assert open_video(tmp_path / "slow.mp4").rate == 7


def test_frames_are_not_kept_in_memory(model, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / "in" / f"{i}.png")
    alive, most, read = [], [], visualize.open_video

    def watch(path):
        clip = read(path)

        def frames():
            for name, image in clip.frames:
                alive.append(weakref.ref(image))
                most.append(sum(other() is not None for other in alive))
                yield name, image
        return clip._replace(frames=frames())
    monkeypatch.setattr(visualize, "open_video", watch)
    run("video", tmp_path / "in", tmp_path / "out.mp4", "--ckpt", model[1], "--image_size", 16)
    assert len(most) == 40 and max(most) <= 4


def test_a_point_in_a_corrupt_first_image_is_refused(photos, model, tmp_path, exit_message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrupt.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    line = exit_message(run, "features", "corrupt.png", "good.png", "--point", 3, 3, "--ckpt", model[1])
    assert "--point lies in the first image, which cannot be read: corrupt.png" in line
    assert not model[1].with_name("teacher.features.png").exists()


def test_errors_of_videos(model, tmp_path, exit_message, monkeypatch):
    clip = write_video(tmp_path / "in.mp4", 3)
    flags = "--ckpt", model[1]
    assert "is the input" in exit_message(run, "video", clip, clip, *flags)
    line = exit_message(run, "video", clip, tmp_path / "x.mp4", "--head", 9, *flags)
    assert "--head 9: the model has 4 heads" in line
    assert "no such" in exit_message(run, "video", tmp_path / "no.mp4", tmp_path / "x.mp4", *flags).lower()
    assert "ends with .mp4" in exit_message(run, "video", clip, tmp_path / "x.doc", *flags)
    (tmp_path / "file").write_text("")
    assert "file: is a file: name a folder" in exit_message(run, "video", clip, tmp_path / "file" / "x.mp4", *flags)
    assert "is a file, expected a folder" in exit_message(run, "video", clip, tmp_path / "file", *flags)
    assert clip.stat().st_size > 500 and not (tmp_path / "x.mp4").exists()
    monkeypatch.setitem(sys.modules, "av", None)
    line = exit_message(run, "video", clip, tmp_path / "x.mp4", *flags)
    assert line.endswith("av is not installed: pip install av")


# ---- features ----

def test_components_are_those_of_all_images(model, photos, capsys):
    network, path = model
    run("features", photos, "--ckpt", path, "--image_size", 48, "--point", 39, 26, "--width", 1204)
    out = capsys.readouterr().out
    assert "2 images -> " in out and "NOTE" not in out  # the images have no more pixels
    tokens = []
    for name, width in (("a.png", 72), ("below/b.png", 48)):
        with torch.no_grad():
            x = network.get_intermediate_layers(resized(Image.open(photos / name), 48, width))[0][0, 1:]
        tokens.append(x.double().view(6, width // 8, 32))
    flat = torch.cat([x.flatten(0, 1) for x in tokens]).numpy()
    pca = PCA(3).fit(flat)
    signs = np.sign(pca.components_[np.arange(3), np.abs(pca.components_).argmax(axis=1)])
    components = pca.transform(flat) * signs
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    expected = (255 * ((components - low) / (high - low)).clip(0, 1)).round()
    page, side = np.asarray(Image.open(path.with_suffix(".features.png")), int), (1204 - GAP) // 3 - GAP
    tops = [y for y in range(1, len(page)) if (page[y, GAP:GAP + side] < 255).any(axis=-1).all()
            and not (page[y - 1, GAP:GAP + side] < 255).any(axis=-1).all()]  # of the images, which fill their width
    assert len(tops) == 2
    anchor = F.normalize(tokens[0][3, 5], dim=0)  # 26 of 40 rows, 39 of 60 columns
    left = GAP
    for x, top, h, part in zip(tokens, tops, (round(side * 40 / 60), side), np.split(expected, [54])):
        for row, column in np.ndindex(*x.shape[:2]):
            y, place = top + int((row + 0.5) * h / x.shape[0]), int((column + 0.5) * side / x.shape[1])
            found = page[y, left + side + GAP + place]
            assert np.abs(found - part[row * x.shape[1] + column]).max() <= 1
            if top == tops[0] and (row, column) == (3, 5):
                continue  # partly below the box
            cosine = (F.normalize(x[row, column], dim=0) @ anchor).item()
            color = colorize(np.array([[cosine]]), (1, 1), -1, 1, SIGNED).getpixel((0, 0))
            assert np.abs(page[y, left + 2 * (side + GAP) + place] - color).max() <= 3
    for left in (GAP, GAP + 2 * (side + GAP)):  # row 3 of 6 and column 5 of 9 are framed
        marked = (page[tops[0]:tops[1], left:left + side] == (255, 255, 0)).all(axis=-1)
        found = [extent for axis in (1, 0) for extent in np.flatnonzero(marked.any(axis=axis))[[0, -1]]]
        w, h = side / 9, side * 40 / 60 / 6
        assert np.abs(np.array(found) - (3 * h, 4 * h, 5 * w, 6 * w)).max() < 4


def test_errors_of_features(model, photos, exit_message):
    flags = "--ckpt", model[1], "--image_size", 16
    assert "--point 60 0: the first image has 60 x 40 pixels" in exit_message(
        run, "features", photos / "a.png", "--point", 60, 0, *flags)
    assert "--point 0 40: the first image has" in exit_message(
        run, "features", photos / "a.png", "--point", 0, 40, *flags)
    assert "1 skipped" in exit_message(run, "features", photos / "gone.png", *flags)
    line = exit_message(run, "features", photos / "a.png", photos / "gone.png", *flags)
    assert "1 skipped, the first: " in line
    assert model[1].with_suffix(".features.png").exists()


# ---- embedding ----

def test_embedding_of_a_folder(model, tmp_path, exit_message, monkeypatch):
    _, path = model
    for i in range(24):
        file = tmp_path / "set" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Shapes("train", 24, 32)[i][0].save(file)
    (tmp_path / "set" / "cat" / "99.png").write_bytes(b"not an image")
    drawn = {}

    def record_scatter(points, labels, names, colors, title):
        figure = plot_scatter(points, labels, names, colors, title)
        drawn.update(points=points, labels=labels, names=names, title=title, figure=figure)
        return figure
    plot_scatter = embedding.plot_scatter
    monkeypatch.setattr(embedding, "plot_scatter", record_scatter)
    flags = "embedding", "--ckpt", path, "--num_workers", 0
    line = exit_message(run, *flags, "--data_path", tmp_path / "set")
    assert "1 skipped, the first: " in line and "99.png" in line
    title = "t-SNE of 24 images, features of one/teacher.safetensors (vision transformer, patches of 8 x 8 pixels)"
    assert drawn["names"] == ["cat", "dog"] and drawn["title"] == title
    assert drawn["labels"].tolist() == [0] * 12 + [1] * 12 and len(drawn["points"]) == 24
    assert Image.open(path.parent / "teacher.embedding.png").width >= 1000
    assert Image.open(path.parent / "teacher.embedding.thumbnails.png").width == 1200 + 2 * GAP
    run(*flags, "--data_path", tmp_path / "set" / "dog")  # no classes
    assert drawn["names"] == [f"cluster {i}" for i in range(1, 9)]
    assert drawn["title"].endswith("k-means clusters of the features")
    assert drawn["labels"].bincount().tolist() == sorted(drawn["labels"].bincount().tolist(), reverse=True)
    run(*flags, "--data_path", "shapes", "--num_images", 40)
    assert drawn["names"] == list(Shapes.classes) and len(set(drawn["labels"].tolist())) == 8
    red, cyan = (dots.get_facecolor()[0][:3] for dots in (drawn["figure"].axes[0].collections[i] for i in (1, 5)))
    assert red[0] > 0.8 > 0.2 > red[2] and cyan[2] > 0.8 > 0.2 > cyan[0]  # classes of shapes are hues


def test_thumbnails_are_the_images_of_their_points(model, tmp_path, monkeypatch):
    opened = {}

    def record_images(points, labels, names, colors, load_image, title):
        opened.update({i: (load_image(i), labels[i].item()) for i in range(len(points))})
        return Image.new("RGB", (1, 1))
    monkeypatch.setattr(embedding, "plot_thumbnails", record_images)
    run("embedding", "--ckpt", model[1], "--num_images", 30, "--num_workers", 0)
    test = Shapes("test", 2000, 32)
    pixels = {image.tobytes(): label for image, label in (test[i] for i in range(2000))}
    assert len(opened) == 30 and all(pixels[image.tobytes()] == label for image, label in opened.values())


def test_animation_of_a_run(small_shapes, tmp_path, monkeypatch, exit_message, capsys):
    folder = tmp_path / "tiny"
    flags = ("--arch vit_tiny --patch_size 8 --embed_dim 32 --depth 1 --num_heads 2 --out_dim 64 --hidden_dim 32 "
             "--global_crops_size 32 --local_crops_number 0 --batch_size_per_gpu 64 --warmup_epochs 0 --lr 0.1 "
             "--momentum_teacher 0.5 --device cpu --num_workers 0 --knn_every 0 --saveckp_freq 2 --output_dir").split()
    train.main(train.parse_args([*flags, str(folder), "--epochs", "1"]))
    line = exit_message(run, "embedding", "--run", folder)
    assert "tiny: saved epochs: 1, an animation needs two: train with --saveckp_freq 1" in line
    assert "--run missing: no such folder" in exit_message(run, "embedding", "--run", "missing")
    train.main(train.parse_args([*flags, str(folder), "--epochs", "3"]))
    (folder / "checkpoint0001 (copy).pth").write_bytes(b"")
    seen = {}

    def record(name):
        function = getattr(embedding, name)

        def call(*args):
            seen[name] = args, function(*args)
            if name == "draw_frames":
                seen[name] = args, [*seen[name][1]]
            return seen[name][1]
        monkeypatch.setattr(embedding, name, call)
    record("embed_sequence")
    record("draw_frames")
    run("embedding", "--run", folder, "--num_workers", 0)
    assert "t-SNE of 60 images, epoch 1, epoch 2 -> " in capsys.readouterr().out
    (features, _), (layouts, _) = seen["embed_sequence"]
    val = Shapes("test", 60, 32)
    x = torch.stack([TF.normalize(TF.to_tensor(val[i][0]), IMAGENET_MEAN, IMAGENET_STD) for i in range(60)])
    for name, found in zip(("checkpoint0001.pth", "teacher.safetensors"), features, strict=True):
        with torch.no_grad():
            expected = load_backbone(folder / name, "teacher")[0](x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (features[0] - features[1]).abs().max() > 0.01
    (drawn, captions, labels, names, _, title), frames = seen["draw_frames"]
    assert drawn is layouts and captions == ["epoch 1", "epoch 2"] and title == "t-SNE of 60 images, tiny"
    assert labels.tolist() == [val[i][1] for i in range(60)] and names == list(Shapes.classes)
    with Image.open(folder / "teacher.embedding.gif") as gif:
        assert gif.n_frames == len(frames) == 13 and gif.info["loop"] == 0
        for i, (frame, is_layout) in enumerate(frames):
            gif.seek(i)
            assert is_layout == (i in (0, 12)) and gif.info["duration"] == (800 if is_layout else 50)
            difference = np.abs(np.asarray(gif.convert("RGB"), int) - np.asarray(frame)).max(axis=-1)
            assert np.median(difference) <= 1 and (difference > 50).mean() < 1e-4
    visualize.write_animation(tmp_path / "a.mp4", frames)
    assert len([*open_video(tmp_path / "a.mp4").frames]) == 2 * 16 + 11
    line = exit_message(run, "embedding", "--run", folder, "--output", tmp_path / "a.png")
    assert "expected a file that ends with .gif, .mp4" in line
    torch.save({"fixed": {}}, folder / "checkpoint.pth")
    assert "checkpoint.pth: is not of train.py" in exit_message(run, "embedding", "--run", folder)
    for wrong in ("--run a --untrained", "--output a.gif"):
        with pytest.raises(SystemExit):
            run("embedding", *wrong.split())


# ---- training ----

def test_runs(tmp_path, exit_message, capsys):
    for name, loss in (("one", 3.0), ("two", 4.0)):
        (tmp_path / name).mkdir()
        records = [dict(epoch=0, step=step, loss=loss / (step + 1), images_per_sec=9.0, data_time=0.1, step_time=0.3)
                   for step in range(3)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run("run", tmp_path / "one")
    assert Image.open(tmp_path / "one" / "curves.png").width == 1548
    (tmp_path / "two" / "log.jsonl").rename(tmp_path / "two.jsonl")
    run("run", tmp_path / "one", tmp_path / "two.jsonl", "--output", tmp_path / "both.svg", "--against", "seconds",
        "--knn", "50")
    out = capsys.readouterr().out
    assert "1.000" in out and "1.333" in out and "two k-NN 50%: 0 of 1 runs" in out
    assert "<svg" in (tmp_path / "both.svg").read_text()
    assert "no such log; name the folder of a run" in exit_message(run, "run", tmp_path / "three")
    for name in ("both.doc", "both", "one"):
        assert "expected a file that ends with .png" in exit_message(
            run, "run", tmp_path / "one", "--output", tmp_path / name)


def test_crops_equal_those_of_training(photos, tmp_path, capsys, cells):
    flags = tmp_path / "flags.txt"
    flags.write_text("--lr 0.1\n--data_path somewhere\n--global_crops_size 48  # small\n--local_crops_size 16\n"
                     "--local_crops_number 3\n--local_crops_scale 0.1 0.2\n--views device\n--blur 0 0 1\n")
    run("crops", photos / "a.png", "--flags", flags, "--seed", 5, "--output_dir", tmp_path, "--width", 808)
    side = 800 // 3 - GAP  # of all: two global crops beside the image, three local ones below
    multicrop = MultiCrop(48, (0.4, 1), 16, (0.1, 0.2), 3, blur=(0, 0, 1))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    crops = [cell[0] for cell in cells[1:] if cell]
    assert Image.open(tmp_path / "a.png.crops.png").width == 808 and len(crops) == 5
    for crop, view in zip(crops, multicrop(Image.open(photos / "a.png"), (5, "a.png"))):
        pixels = (255 * (view * std + mean)).round().byte()
        assert crop.width == side
        scale = (side - 6) / view.shape[2]  # within a frame of three pixels
        for y, x in ((2, 3), (10, 12)):
            place = int(3 + (x + 0.5) * scale), int(3 + (y + 0.5) * scale)
            assert np.abs(np.array(crop.getpixel(place)) - pixels[:, y, x].numpy()).max() <= 1
    assert "5 crops -> " in capsys.readouterr().out
    boxes = np.asarray(cells[0][0], int)
    for view, color in zip(multicrop.sample(60, 40, (5, "a.png")), [COLORS[4]] * 2 + [COLORS[0]] * 3):
        x, y = (round(view.box[i] * side / 60) for i in (0, 1))
        near = boxes[max(0, y - 1):y + 3, max(0, x - 1):x + 3].reshape(-1, 3)
        assert (near == color).all(axis=1).any() or (near == COLORS[0]).all(axis=1).any()  # unless it is drawn over
    left = np.flatnonzero((boxes == COLORS[4]).all(axis=-1).any(axis=0))[0]
    assert abs(left - min(view.box[0] for view in multicrop.sample(60, 40, (5, "a.png"))[:2]) * side / 60) <= 2


def test_crops_of_the_paper(tmp_path, monkeypatch, exit_message, cells):
    monkeypatch.chdir(tmp_path)
    run("crops", "shapes:64")
    assert Image.open("shapes_64_0.crops.png").width == 1000 and len(list(tmp_path.iterdir())) == 4
    assert [caption.partition(":")[0] for _, caption in cells] == [
        "shapes_64_3", "G1", "G2", *(f"L{i}" for i in range(1, 9))]
    assert "No such file" in exit_message(run, "crops", "gone.png")
    for text in ("--global_crops_scale 0.9 0.1", "--color_jitter 0 0 0 0.9", "--data_path 'unclosed", "--blur 0 0"):
        (tmp_path / "flags.txt").write_text(text)
        with pytest.raises(SystemExit) as stop:
            run("crops", "shapes", "--flags", tmp_path / "flags.txt")
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        run("crops", "shapes", "--flags", "gone.txt")
