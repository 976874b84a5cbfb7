import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import EpsImagePlugin, Image, features
from torchvision.transforms import functional as TF

from augment import MultiCrop
from data.datasets import DataError, ImageFolder, TorchvisionDataset, data_name, open_data
from data.folders import PathTable
from data.images import DECODERS, ImageReadError, is_image, read_image
from data.shapes import Shapes
from data.video import open_video
from evaluation.knn import knn_classifier


def save_images(root, *names, color=(200, 100, 50)):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), color).save(path)


# ---- folders ----

def test_train_and_val_folders(tmp_path):
    save_images(tmp_path, "train/cat/1.jpg", "train/cat/deep/2.JPEG", "train/dog/3.png", "val/cat/4.jpg",
                "val/dog/5.webp")
    for root in (tmp_path, tmp_path / "train"):
        data = open_data(str(root))
        assert len(data.train) == len(data.train_labeled) == 3 and len(data.val) == 2
        assert data.train.classes == ["cat", "dog"] and [data.val[i][1] for i in range(2)] == [0, 1]
        assert data.note == f"3 images of 2 classes in {tmp_path / 'train'}, 2 held out in {tmp_path / 'val'}"


def test_names_of_datasets(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, name in (("/data/photos", "photos"), ("/data/photos/", "photos"), ("/data/imagenet/train", "imagenet"),
                       (".", tmp_path.name[:40]), ("/", "data"), ("a:b", "a:b"), ("cifar10:/data", "cifar10"),
                       ("shapes", "shapes"), ("shapes:96", "shapes-96")):
        assert data_name(path) == name


def test_every_tenth_image_is_held_out_without_a_val_folder(tmp_path):
    save_images(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.train_labeled), len(data.val)) == (20, 18, 2)
    assert not set(data.train_labeled.indices) & set(data.val.indices)
    assert "every tenth held out" in data.note


def test_flat_and_nested_folders_have_no_labels(tmp_path):
    save_images(tmp_path / "flat", "b.jpg", "a.jpg", ".hidden.jpg")
    save_images(tmp_path / "mixed", "a.jpg", "more/b.jpg", "more/and/c.jpg", "other/d.bmp")
    save_images(tmp_path / "one", "only/a.jpg")
    for name, count in (("flat", 2), ("mixed", 4), ("one", 1)):
        data = open_data(str(tmp_path / name))
        assert len(data.train) == count and data.train.classes is None and data.val is None
        assert data.train[0][1] == -1


@pytest.mark.parametrize("train, val", [
    ("train", "val"), ("train", "valid"), ("train", "validation"), ("train", "dev"), ("Train", "Test"),
    ("Training", "Testing"), ("TRAIN", "VALID")])
def test_names_of_held_out_parts(tmp_path, train, val):
    save_images(tmp_path, *(f"{train}/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)), f"{val}/cat/1.png",
                f"{val}/dog/2.png")
    for root in (tmp_path, tmp_path / train):
        data = open_data(str(root))
        assert data.train.classes == data.val.classes == ["cat", "dog"] and data.train_labeled is data.train
        assert [data.val[i][1] for i in range(2)] == [0, 1]
        assert data.note == f"6 images of 2 classes in {tmp_path / train}, 2 held out in {tmp_path / val}"


@pytest.mark.parametrize("files, labels", [(["b/1.png", "c/2.png"], [1, 2]), (["c/1.png", "c/2.png"], [2, 2])])
def test_held_out_part_may_lack_classes(tmp_path, files, labels):
    """Labels are those of the training images' class names, also where a single class is left."""
    save_images(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", *(f"val/{file}" for file in files))
    data = open_data(str(tmp_path))
    assert [data.val[i][1] for i in range(2)] == labels and data.val.classes == ["a", "b", "c"]
    assert data.note.endswith(f"2 held out in {tmp_path / 'val'}")


@pytest.mark.parametrize("files, reason", [
    (["1.jpg", "2.jpg"], "are not those of the training images"),
    (["cat/1.jpg", "fish/2.jpg"], "are not those of the training images"),
    (["cat/1.jpg", "2.jpg"], "are not those of the training images"),
    ([], "no image found in it or below (passed over 1: 1 .csv)")])
def test_unusable_held_out_part_is_noted(tmp_path, files, reason):
    save_images(tmp_path, "train/cat/1.jpg", "train/dog/3.png", *(f"val/{file}" for file in files))
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "val" / "labels.csv").write_text("file,label")
    data = open_data(str(tmp_path))
    assert f", not used: {tmp_path / 'val'}: " in data.note and reason in data.note
    assert data.note.endswith("every tenth held out for evaluation") and len(data.val) == 1
    save_images(tmp_path, "Test/dog/1.jpg")
    data = open_data(str(tmp_path))
    assert reason in data.note and data.note.endswith(f"1 held out in {tmp_path / 'Test'}") and data.val[0][1] == 1


def test_names_of_parts_are_never_all_classes(tmp_path):
    save_images(tmp_path / "flat", "train/1.jpg", "valid/2.jpg")
    data = open_data(str(tmp_path / "flat"))
    assert data.train.classes is None and list(data.train.files) == ["1.jpg"]
    assert data.note == f"1 images in {tmp_path}/flat/train, no labels, not used: {tmp_path}/flat/valid"
    save_images(tmp_path / "held_out", "valid/cat/1.jpg", "Test/cat/2.jpg", "Test/dog/3.jpg")
    for images in (open_data(str(tmp_path / "held_out")).train, ImageFolder(str(tmp_path / "held_out"))):
        assert images.classes is None and len(images) == 3 and images[0][1] == -1
    assert open_data(str(tmp_path / "held_out")).note == f"3 images in {tmp_path}/held_out, no labels"


def test_class_named_train_is_a_class(tmp_path):
    save_images(tmp_path, "car/1.jpg", "train/2.jpg", "plane/3.jpg")
    assert open_data(str(tmp_path)).train.classes == ["car", "plane", "train"]


def test_symbolic_links_and_hidden_folders(tmp_path):
    save_images(tmp_path / "root", "cat/1.jpg", "dog/2.jpg", ".thumbs/3.jpg", "dog/.cache/4.jpg")
    save_images(tmp_path, "elsewhere/5.jpg")
    (tmp_path / "root" / "dog" / "again").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "bird").symlink_to(tmp_path / "elsewhere")
    images = ImageFolder(str(tmp_path / "root"))
    assert list(images.files) == ["bird/5.jpg", "cat/1.jpg", "dog/2.jpg"] and images.classes == ["bird", "cat", "dog"]


def test_links_between_class_folders_change_no_label(tmp_path):
    """Each class keeps its images whatever is linked where: to a class, below one, to root or to what holds it."""
    names = [f"{c}/{path}" for c in "abc" for path in ("1.png", "below/2.png", "below/deep/3.png")]
    save_images(tmp_path, *(f"root/{name}" for name in names), "beside/4.png")
    root = tmp_path / "root"
    for link, target in {"a/m": "../b", "a/n": "../c/below", "a/0": "../b/below/deep", "b/below/0": "../../c",
                         "c/below/up": "..", "c/root": "../..", "0": "b/below", "b/home": "../../.."}.items():
        (root / link).symlink_to(target)
    images = ImageFolder(str(root))
    assert list(images.files) == names and images.classes == ["a", "b", "c"]
    assert images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    (root / "d").symlink_to("../beside")  # data sets are linked together
    (root / "e").symlink_to("../beside")
    (root / ".store").mkdir()
    save_images(root, ".store/5.png")
    (root / "f").symlink_to(".store")
    images = ImageFolder(str(root))
    assert list(images.files) == [*names, "d/4.png", "f/5.png"] and images.classes == ["a", "b", "c", "d", "f"]


def test_deep_images_have_one_range(tmp_path, scene):
    """Of all images and of the held-out part; 8-bit images among them keep their values."""
    gray = np.asarray(scene.convert("L")).astype("uint16")
    for part, name, factor in (("train", "a/1.png", 1), ("train", "a/2.tif", 4), ("train", "b/1.png", 16),
                               ("val", "a/1.png", 2), ("val", "b/1.png", 100)):
        path = tmp_path / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gray * factor).save(path)
    scene.save(tmp_path / "train" / "b" / "photo.png")
    scene.save(tmp_path / "train" / "b" / "photo.jpg")
    data = open_data(str(tmp_path))
    assert data.train.value_range == data.val.value_range == (0, 4095)
    assert ", values 0 (black) to 4095 (white), 2 held out" in data.note
    for images, index, factor in ((data.train, 0, 1), (data.train, 1, 4), (data.train, 2, 16), (data.val, 0, 2)):
        seen = np.asarray(images[index][0])[..., 0]
        assert (seen == np.floor(gray.astype(int) * factor * 255 / 4095 + 0.5)).all()
    assert data.train[4][0].tobytes() == scene.tobytes() == read_image(tmp_path / "train/b/photo.png").tobytes()
    data = open_data(str(tmp_path), value_range=(0, 255))
    assert data.train.value_range == data.val.value_range == (0, 255)
    assert (np.asarray(data.val[0][0])[..., 0] == (gray * 2).clip(0, 255)).all()
    save_images(tmp_path / "flat", "1.png")
    assert open_data(str(tmp_path / "flat")).train.value_range is None

    folders = [str(tmp_path / name) for name in ("train", "val", "flat")]
    with pytest.raises(DataError, match="0 to 4095 in .*train and 0 to 32767 in .*val: set .* by --value_range"):
        open_data(folders)
    data = open_data(folders, value_range=(0, 4095))
    assert data.train.value_range == (0, 4095) and len(data.train) == 8
    assert open_data(folders[::2]).train.value_range == (0, 4095)


def test_train_folder_without_others_has_labels(tmp_path):
    """So that --val_path may name held-out images elsewhere."""
    for folder in ("set/train/a", "set/train/b", "set/.cache/x", "elsewhere/a", "elsewhere/b"):
        save_images(tmp_path / folder, "1.png")
    data = open_data(str(tmp_path / "set"), val_path=str(tmp_path / "elsewhere"))
    assert data.train.classes == data.val.classes == ["a", "b"] and len(data.train) == len(data.val) == 2


def test_deep_frames_of_a_video_have_one_range(scene, tmp_path):
    gray = np.asarray(scene.convert("L")).astype("uint16")
    for i, factor in enumerate((1, 16)):
        Image.fromarray(gray * factor).save(tmp_path / f"{i}.png")
    for (_, frame), factor in zip(open_video(tmp_path).frames, (1, 16)):
        assert (np.asarray(frame)[..., 0] == np.floor(gray.astype(int) * factor * 255 / 4095 + 0.5)).all()


def test_deep_images_of_torchvision_take_the_given_range(scene, tmp_path):
    (tmp_path / "class").mkdir()
    gray = np.asarray(scene.convert("L")).astype("uint16")
    Image.fromarray(gray * 16).save(tmp_path / "class" / "1.png")
    images = torchvision.datasets.ImageFolder(tmp_path, loader=Image.open)
    seen = np.asarray(TorchvisionDataset(images, (0, 4080))[0][0])
    assert (seen == gray[..., None]).all()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name, kind", [
    ("a.gif", "GIF"), ("a.JFIF", "JPEG"), ("a.avif", "AVIF"), ("a.jp2", "JPEG2000"), ("a.j2k", "JPEG2000"),
    ("a.qoi", "QOI"), ("a.mpo", "MPO"), ("none", "JPEG"), ("none", "TIFF"), ("none", "AVIF"), ("none", "PPM"),
    ("a.jpg_large", "JPEG"), ("a.jpg~", "PNG"), ("IMG.2024", "WEBP"), ("a.jpg", "AVIF")])
def test_images_are_recognized_by_their_content(tmp_path, scene, name, kind):
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(kind)
    if feature and not features.check(feature):
        pytest.skip(f"Pillow without {kind}")
    smooth = scene.resize((9, 6)).resize(scene.size)
    (tmp_path / name).write_bytes(encoded(smooth, kind))
    images = ImageFolder(str(tmp_path))
    assert list(images.files) == [name] and images.passed_over == ""
    difference = TF.pil_to_tensor(images[0][0]).int() - TF.pil_to_tensor(smooth).int()
    assert difference.abs().float().mean() < 10


def test_heic(tmp_path, scene):
    (tmp_path / "b.jpg").write_bytes(encoded(scene, "JPEG"))
    if "HEIF" not in DECODERS:
        (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        assert ImageFolder(str(tmp_path)).passed_over == " (passed over 1: 1 .heic; pip install pillow-heif for .heic)"
        return
    for name in ("a.HEIC", "none"):
        (tmp_path / name).write_bytes(encoded(scene, "HEIF"))
    images = ImageFolder(str(tmp_path))
    assert list(images.files) == ["a.HEIC", "b.jpg", "none"] and images[0][0].size == images[2][0].size == scene.size


def test_interpreted_formats_raw_and_text_files_are_no_images(tmp_path, scene):
    eps = encoded(scene, "EPS")
    assert Image.open(io.BytesIO(eps)).format == EpsImagePlugin.EpsImageFile.format  # Pillow alone would open it
    contents = {"a.eps": eps, "none": eps, "b.pdf": encoded(scene, "PDF"), "photo.nef": encoded(scene, "TIFF"),
                "Python.md": b"Python and other words", "BM.bin": b"BM" + bytes(50), "empty": b"", "a.txt": b"P1 1 1 0"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert not is_image(str(tmp_path / name)), name
    (tmp_path / "a.jpg").write_bytes(eps)
    with pytest.raises(DataError, match="none of its 1 images can be read; the last: .*cannot identify image file"):
        ImageFolder(str(tmp_path))


def test_what_is_passed_over_is_counted(tmp_path):
    save_images(tmp_path, "cat/1.jpg", "dog/2.jpg", "cat/@eaDir/1.jpg/thumb.jpg", "@eaDir/x.jpg", ".hidden.jpg",
                "$RECYCLE.BIN/y/1.jpg", "lost+found/z.jpg", "dog/.cache/1.jpg")
    for name in [f"cat/{i}.RAW" for i in range(12)] + ["cat/a.raw", "dog/LICENSE", "readme.txt"]:
        (tmp_path / name).write_text("x")
    data = open_data(str(tmp_path))
    assert list(data.train.files) == ["cat/1.jpg", "dog/2.jpg"] and data.train.classes == ["cat", "dog"]
    assert data.note.startswith(f"2 images of 2 classes in {tmp_path} (passed over 21: 13 .raw, 2 @eaDir/, ")
    for kind in ("1 $RECYCLE.BIN/", "1 lost+found/", "1 hidden", "1 .cache/", "1 without ending", "1 .txt"):
        assert kind in data.note
    for i in range(30):
        (tmp_path / f"x.{i}").write_text("x")
    assert "(passed over 51: 13 .raw, 2 @eaDir/, " in open_data(str(tmp_path)).note
    assert len(open_data(str(tmp_path)).train.passed_over) < 150


def test_folders_that_cannot_be_opened_are_counted(tmp_path):
    """One whose path is longer than systems allow, which root cannot open either."""
    save_images(tmp_path, "a.jpg")
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=folder)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = deeper
    os.close(folder)
    data = open_data(str(tmp_path))
    assert data.note == f"1 images in {tmp_path} (passed over 1: 1 unreadable folder(s)), no labels"


def test_files_of_known_endings_are_not_opened_by_the_scan(tmp_path):
    """Opening a named pipe would block; one of unknown ending is no image."""
    save_images(tmp_path, "a.jpg")
    for name in ("b.jpg", "c.gif", "d.txt", "e.json", "pipe"):
        os.mkfifo(tmp_path / name)
    images = ImageFolder(str(tmp_path))
    assert list(images.files) == ["a.jpg", "b.jpg", "c.gif"]
    assert sorted(images.passed_over[17:-1].split(", ")) == ["1 .json", "1 .txt", "1 without ending"]


def test_outputs_do_not_become_inputs(tmp_path):
    save_images(tmp_path, "a.jpg", "a.jpg.attention.png", "b/a.nearest.png", "b/A.Crops.PNG", "out/maps/a.jpg.png",
                "runs/one/curves.png", "runs/one/teacher.attention/a.jpg.png")
    (tmp_path / "runs" / "one" / "log.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for output_dir in (tmp_path / "out", tmp_path / "link"):
        data = open_data(str(tmp_path), output_dir=str(output_dir))
        assert list(data.train.files) == ["a.jpg"]
        assert data.note.endswith("(passed over 4: 3 output(s) of other commands, 1 one/), no labels")
    assert len(open_data(str(tmp_path), output_dir=str(tmp_path.parent)).train) == 2
    with pytest.raises(DataError, match="outputs would be written among the images, choose another --output_dir"):
        open_data(str(tmp_path), output_dir=f"{tmp_path}/out/..")


@pytest.mark.parametrize("make, data_path, message", [
    (lambda p: None, "{}/missing", "no such folder"),
    (lambda p: None, "{}", "no image found in it or below$"),
    (lambda p: (p / "notes.txt").write_text("x"), "{}", "no image found.*passed over 1: 1 .txt"),
    (lambda p: None, "cifar9:{}", "no dataset 'cifar9'"),
    (lambda p: None, "imagenet:{}", "torchvision cannot open it"),
    (lambda p: None, "fakedata:{}", "torchvision cannot open it"),
    (lambda p: None, "visiondataset:{}", "torchvision cannot open it"),
    (lambda p: None, "shapes:3", "from 16 to 1024"),
    (lambda p: (p / "file").write_text("x"), "{}/file", "no such folder"),
])
def test_missing_data_raises_data_error(tmp_path, make, data_path, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        open_data(data_path.format(tmp_path))


# ---- decoding ----

def test_every_image_mode_becomes_rgb(tmp_path, scene):
    expected = TF.pil_to_tensor(scene).int()

    def save_and_read(name, image, **options):
        image.save(tmp_path / name, **options)
        result = read_image(tmp_path / name)
        assert result.mode == "RGB" and result.size == image.size
        return TF.pil_to_tensor(result).int()

    gray = scene.convert("L")
    assert (save_and_read("rgb.png", scene) == expected).all()
    assert (save_and_read("gray.png", gray) == TF.pil_to_tensor(gray).int()).all()
    assert (save_and_read("bits.png", gray.convert("1")).unique() == torch.tensor([0, 255])).all()
    palette = scene.quantize(64)
    assert (save_and_read("palette.png", palette) == TF.pil_to_tensor(palette.convert("RGB")).int()).all()
    assert (save_and_read("cmyk.jpg", scene.convert("CMYK"), quality=100) - expected).abs().float().mean() < 3
    deep = Image.frombytes("I;16", gray.size, struct.pack(f"<{97 * 61}H", *(v * 257 for v in gray.tobytes())))
    assert (save_and_read("deep.png", deep) == TF.pil_to_tensor(gray).int()).all()
    assert (save_and_read("int.tif", gray.convert("I")) == TF.pil_to_tensor(gray).int()).all()
    unit = gray.convert("F").point(lambda value: value * (1 / 255) + 0)
    assert (save_and_read("unit.tif", unit) == TF.pil_to_tensor(gray).int()).all()


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    image.save(tmp_path / "a.png")
    pixels = [read_image(tmp_path / "a.png").getpixel((x, 0)) for x in range(3)]
    assert pixels == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]
    image.convert("RGB").save(tmp_path / "key.png", transparency=(0, 0, 0))
    assert read_image(tmp_path / "key.png").getpixel((2, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=1)
    assert [read_image(tmp_path / "p.png").getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (30, 20))
    upright.paste((255, 0, 0), (0, 0, 15, 10))  # red upper left
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").tobytes() == upright.tobytes()
    stored.convert("RGBA").save(tmp_path / "alpha.png", exif=exif)
    assert read_image(tmp_path / "alpha.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduction_while_decoding(tmp_path, scene, mode, factor, orientation):
    """JPEG is downsampled by up to 8 in the decoder, anything else afterwards; close to reducing the full image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (970, 611) if orientation == 1 else (976, 608)  # else the remainder would be at the other end
    stored = scene.resize(size, Image.Resampling.BICUBIC).convert(mode)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    sizes = []

    def reduction(*size):
        sizes.append(size)
        return factor

    expected = read_image(tmp_path / "a.jpg").reduce(factor)
    result = read_image(tmp_path / "a.jpg", reduction)
    assert result.size == expected.size and result.mode == "RGB" and sorted(sizes[0]) == sorted(size)
    if orientation == 1 and factor <= 8:  # by the decoder
        with Image.open(tmp_path / "a.jpg") as drafted:
            drafted.draft(None, tuple(side // factor for side in size))
            assert result.tobytes() == drafted.convert("RGB").tobytes()
    difference = (TF.pil_to_tensor(result).int() - TF.pil_to_tensor(expected)).abs().float()
    assert difference.mean() < 1.5
    stored.convert("RGB").save(tmp_path / "a.png", exif=exif)
    full = read_image(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", reduction).tobytes() == full.reduce(factor).tobytes()


def test_mpo_of_a_camera_is_reduced_while_decoding(tmp_path, scene):
    large = scene.resize((976, 608))
    large.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[scene])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert read_image(tmp_path / "a.jpg", lambda width, height: 4).size == (244, 152)


def test_image_of_108_million_pixels(tmp_path):
    """A phone's largest; on the way to its crops it is never decoded at full resolution."""
    Image.new("RGB", (12_000, 9_000), (200, 100, 50)).save(tmp_path / "a.jpg")
    multicrop = MultiCrop()
    image = read_image(tmp_path / "a.jpg", multicrop.reduction)
    assert image.size == (3000, 2250) and len(multicrop(image, key=0)) == 10


def test_corrupt_files_raise_image_read_error(tmp_path, scene, monkeypatch):
    scene.save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, corrupt in (("empty", b""), ("text", b"hello"), ("truncated", content[:len(content) // 2])):
        (tmp_path / f"{name}.jpg").write_bytes(corrupt)
        with pytest.raises(ImageReadError, match=f"{name}.jpg: ."):
            read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(ImageReadError, match="missing.jpg"):
        read_image(tmp_path / "missing.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 97 * 61 / 2 - 1)
    with pytest.raises(ImageReadError, match="decompression bomb"):
        read_image(tmp_path / "whole.jpg")


# ---- torchvision ----

def test_torchvision_images_are_checked_too(tmp_path, scene, monkeypatch):
    for name, image in (("line", Image.new("RGB", (3000, 1))), ("whole", scene)):
        (tmp_path / "class").mkdir(exist_ok=True)
        image.save(tmp_path / "class" / f"{name}.png")
    images = TorchvisionDataset(torchvision.datasets.ImageFolder(tmp_path))
    with pytest.raises(ImageReadError, match="ImageFolder 0: 3000 x 1 pixels, one side is more than 100"):
        images[0]
    assert images[1][0].size == scene.size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    with pytest.raises(ImageReadError, match="ImageFolder 1: .*decompression bomb"):
        images[1]


def test_torchvision_dataset_by_name(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        pixels = bytes(range(196)) * 4 * count
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    data = open_data(f"mnist:{tmp_path}")
    assert len(data.train) == 4 and len(data.val) == 2
    image, label = data.train[3]
    assert image.mode == "RGB" and image.size == (28, 28) and label == 3 and image.getpixel((5, 0)) == (5, 5, 5)
    assert data.path == f"mnist:{tmp_path}"


def test_imagenet_from_torchvision(tmp_path):
    for part in ("train", "val"):
        save_images(tmp_path, f"{part}/n01440764/a.JPEG", f"{part}/n01443537/b.JPEG")
    names = {"n01440764": ("tench",), "n01443537": ("goldfish",)}
    torch.save((names, list(names)), tmp_path / "meta.bin")
    data = open_data(f"imagenet:{tmp_path}")
    assert len(data.train) == 2 and len(data.val) == 2 and data.val[1][1] == 1


def test_torchvision_datasets_without_splits_or_classes(tmp_path, monkeypatch):
    class Unsplit(torch.utils.data.Dataset):
        def __init__(self, root):
            self.root = root

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return Image.new("L", (4, 4)), i % 2 if self.root == "labels" else torch.zeros(40)

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", Unsplit)
    data = open_data("eurosat:labels")
    assert len(data.train_labeled) == 18 and len(data.val) == 2
    assert open_data("eurosat:attributes").val is None


# ---- built-in shapes ----

def test_shapes_depend_on_part_and_index_only():
    train, again, test = Shapes("train", 100, 32), Shapes("train", 5000, 32), Shapes("test", 100, 32)
    train[3]
    assert train[17][0].tobytes() == again[17][0].tobytes() != test[17][0].tobytes()
    assert train[17][1] == 17 % len(train.classes)
    with pytest.raises(IndexError):
        train[100]


def test_shapes_masks_cover_the_object():
    shapes = Shapes("train", 60, 64)
    for i in range(60):
        image, mask = shapes.render(i)
        assert mask.shape == (64, 64) and mask.dtype == torch.bool
        assert 0.02 < mask.float().mean() < 0.7
        x = TF.to_tensor(image)
        inside, outside = x[:, mask], x[:, ~mask]
        assert (inside.mean(dim=1) - outside.mean(dim=1)).abs().max() > 0.04 or inside.std() > outside.std()


def test_shapes_mean_color_does_not_predict_the_class():
    def mean_colors(part, count):
        shapes = Shapes(part, count, 32)
        x = torch.stack([TF.to_tensor(shapes[i][0]).mean(dim=(1, 2)) for i in range(count)])
        return x - 0.5, torch.arange(count) % len(shapes.classes), len(shapes.classes)

    train, train_labels, classes = mean_colors("train", 3000)
    test, test_labels, _ = mean_colors("test", 1000)
    bound = 100 / classes + 4 * 100 * (1 / classes * (1 - 1 / classes) / 1000) ** 0.5  # chance + 4 standard deviations
    top1 = max(top1 for top1, _ in knn_classifier(train, train_labels, test, test_labels).values())
    assert top1 < bound
    inputs = torch.cat((train, train**2, torch.ones(3000, 1)), 1)
    weights = torch.linalg.lstsq(inputs, torch.nn.functional.one_hot(train_labels).float()).solution
    predicted = (torch.cat((test, test**2, torch.ones(1000, 1)), 1) @ weights).argmax(1)
    assert 100 * (predicted == test_labels).float().mean() < bound




def test_paths_are_one_array():
    names = ["a.jpg", "ü/b c.jpg", os.fsdecode(b"\xff.jpg"), "x" * 300]
    paths = PathTable(names)
    assert list(paths) == names and paths[-1] == names[3] and len(paths) == 4 and len(PathTable([])) == 0
    assert list(pickle.loads(pickle.dumps(paths))) == names
    with pytest.raises(IndexError):
        paths[4]
