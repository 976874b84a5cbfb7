import struct

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as TF

from augment import MultiCrop
from data import datasets as data
from data.datasets import DataError, ImageFolder, TorchvisionDataset, open_data
from data.images import ImageReadError, read_image
from data.shapes import Shapes
from evaluation.knn import knn_classifier


def plant(root, *names, color=(200, 100, 50)):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), color).save(path)


# ---- trees ----

def test_train_and_val(tmp_path):
    plant(tmp_path, "train/cat/1.jpg", "train/cat/deep/2.JPEG", "train/dog/3.png", "val/cat/4.jpg", "val/dog/5.webp")
    for root in (tmp_path, tmp_path / "train"):
        found = open_data(str(root))
        assert len(found.train) == len(found.train_labeled) == 3 and len(found.val) == 2
        assert found.train.classes == ["cat", "dog"] and [found.val[i][1] for i in range(2)] == [0, 1]


def test_labels_without_a_held_out_part(tmp_path):
    plant(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    found = open_data(str(tmp_path))
    assert (len(found.train), len(found.train_labeled), len(found.val)) == (20, 18, 2)
    assert not set(found.train_labeled.indices) & set(found.val.indices)
    assert "every tenth" in found.note


def test_flat_and_nested_folders_have_no_labels(tmp_path):
    plant(tmp_path / "flat", "b.jpg", "a.jpg", ".hidden.jpg")
    plant(tmp_path / "mixed", "a.jpg", "more/b.jpg", "more/and/c.jpg", "other/d.bmp")
    plant(tmp_path / "one", "only/a.jpg")
    for name, count in (("flat", 2), ("mixed", 4), ("one", 1)):
        found = open_data(str(tmp_path / name))
        assert len(found.train) == count and found.train.classes is None and found.val is None
        assert found.train[0][1] == -1


def test_a_test_folder_with_other_classes_is_not_used(tmp_path):
    plant(tmp_path, "train/cat/1.jpg", "train/dog/3.png", "val/flat1.jpg", "val/flat2.jpg")
    assert "val has other classes; k-NN asks every tenth" in open_data(str(tmp_path)).note


def test_a_class_called_train_is_a_class(tmp_path):
    plant(tmp_path, "car/1.jpg", "train/2.jpg", "plane/3.jpg")
    assert open_data(str(tmp_path)).train.classes == ["car", "plane", "train"]


def test_links_and_hidden_folders(tmp_path):
    plant(tmp_path / "root", "cat/1.jpg", "dog/2.jpg", ".thumbs/3.jpg", "dog/.cache/4.jpg")
    plant(tmp_path, "elsewhere/5.jpg")
    (tmp_path / "root" / "dog" / "again").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "bird").symlink_to(tmp_path / "elsewhere")
    tree = ImageFolder(str(tmp_path / "root"))
    assert tree.files == ["bird/5.jpg", "cat/1.jpg", "dog/2.jpg"] and tree.classes == ["bird", "cat", "dog"]


@pytest.mark.parametrize("make, data_path, words", [
    (lambda p: None, "{}/missing", "no such folder"),
    (lambda p: None, "{}", "no picture found.*\\.jpg"),
    (lambda p: (p / "notes.txt").write_text("x"), "{}", "no picture found"),
    (lambda p: None, "cifar9:{}", "no set named 'cifar9'"),
    (lambda p: None, "imagenet:{}", "torchvision cannot open it"),
    (lambda p: None, "shapes:3", "from 16 to 1024"),
    (lambda p: (p / "file").write_text("x"), "{}/file", "no such folder"),
])
def test_what_is_not_there_is_named(tmp_path, make, data_path, words):
    make(tmp_path)
    with pytest.raises(DataError, match=words):
        open_data(data_path.format(tmp_path))


# ---- pictures ----

def test_every_mode_is_correct_rgb(tmp_path, scene):
    expected = TF.pil_to_tensor(scene).int()

    def opened(name, image, **how):
        image.save(tmp_path / name, **how)
        result = read_image(tmp_path / name)
        assert result.mode == "RGB" and result.size == image.size
        return TF.pil_to_tensor(result).int()

    grey = scene.convert("L")
    assert (opened("rgb.png", scene) == expected).all()
    assert (opened("grey.png", grey) == TF.pil_to_tensor(grey).int()).all()
    assert (opened("bits.png", grey.convert("1")).unique() == torch.tensor([0, 255])).all()
    palette = scene.quantize(64)
    assert (opened("palette.png", palette) == TF.pil_to_tensor(palette.convert("RGB")).int()).all()
    assert (opened("cmyk.jpg", scene.convert("CMYK"), quality=100) - expected).abs().float().mean() < 3
    deep = Image.frombytes("I;16", grey.size, struct.pack(f"<{97 * 61}H", *(v * 257 for v in grey.tobytes())))
    assert (opened("deep.png", deep) == TF.pil_to_tensor(grey).int()).all()
    assert (opened("int.tif", grey.convert("I")) == TF.pil_to_tensor(grey).int()).all()
    unit = grey.convert("F").point(lambda value: value * (1 / 255) + 0)
    assert (opened("unit.tif", unit) == TF.pil_to_tensor(grey).int()).all()


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    image.save(tmp_path / "a.png")
    shown = [read_image(tmp_path / "a.png").getpixel((x, 0)) for x in range(3)]
    assert shown == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]
    image.convert("RGB").save(tmp_path / "key.png", transparency=(0, 0, 0))
    assert read_image(tmp_path / "key.png").getpixel((2, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=1)
    assert [read_image(tmp_path / "p.png").getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
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


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_reduced_while_it_is_read(tmp_path, scene, mode, factor, orientation):
    """A JPEG is decoded at 1/8 at most, and anything else reduced afterwards: all near to reducing it whole."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (970, 611) if orientation == 1 else (976, 608)  # else the odd rest would be at the other end
    stored = scene.resize(size, Image.Resampling.BICUBIC).convert(mode)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    asked = []

    def reduction(*size):
        asked.append(size)
        return factor

    expected = read_image(tmp_path / "a.jpg").reduce(factor)
    result = read_image(tmp_path / "a.jpg", reduction)
    assert result.size == expected.size and result.mode == "RGB" and sorted(asked[0]) == sorted(size)
    if orientation == 1 and factor <= 8:  # the decoder did it
        with Image.open(tmp_path / "a.jpg") as drafted:
            drafted.draft(None, tuple(side // factor for side in size))
            assert result.tobytes() == drafted.convert("RGB").tobytes()
    difference = (TF.pil_to_tensor(result).int() - TF.pil_to_tensor(expected)).abs().float()
    assert difference.mean() < 1.5
    stored.convert("RGB").save(tmp_path / "a.png", exif=exif)
    whole = read_image(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", reduction).tobytes() == whole.reduce(factor).tobytes()


def test_an_mpo_of_a_camera_is_decoded_reduced(tmp_path, scene):
    large = scene.resize((976, 608))
    large.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[scene])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert read_image(tmp_path / "a.jpg", lambda width, height: 4).size == (244, 152)


def test_a_picture_of_108_million_pixels(tmp_path, scene):
    """As telephones take them; on the way to its views it is never decoded whole."""
    Image.new("RGB", (12_000, 9_000), (200, 100, 50)).save(tmp_path / "a.jpg")
    multicrop = MultiCrop()
    image = read_image(tmp_path / "a.jpg", multicrop.reduction)
    assert image.size == (3000, 2250) and len(multicrop(image, key=0)) == 10


def test_unreadable_files_are_named(tmp_path, scene, monkeypatch):
    scene.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", whole[:len(whole) // 2])):
        (tmp_path / f"{name}.jpg").write_bytes(content)
        with pytest.raises(ImageReadError, match=f"{name}.jpg: ."):
            read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(ImageReadError, match="missing.jpg"):
        read_image(tmp_path / "missing.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 97 * 61 / 2 - 1)
    with pytest.raises(ImageReadError, match="decompression bomb"):
        read_image(tmp_path / "whole.jpg")


# ---- sets by name ----

def test_sets_of_torchvision_are_checked_too(tmp_path, scene, monkeypatch):
    for name, image in (("line", Image.new("RGB", (3000, 1))), ("whole", scene)):
        (tmp_path / "class").mkdir(exist_ok=True)
        image.save(tmp_path / "class" / f"{name}.png")
    images = TorchvisionDataset(torchvision.datasets.ImageFolder(tmp_path))
    with pytest.raises(ImageReadError, match="ImageFolder 0: 3000 x 1 pixels is more of a line"):
        images[0]
    assert images[1][0].size == scene.size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    with pytest.raises(ImageReadError, match="ImageFolder 1: .*decompression bomb"):
        images[1]


def test_a_torchvision_set_by_name(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        pixels = bytes(range(196)) * 4 * count
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    found = open_data(f"mnist:{tmp_path}")
    assert len(found.train) == 4 and len(found.val) == 2
    image, label = found.train[3]
    assert image.mode == "RGB" and image.size == (28, 28) and label == 3 and image.getpixel((5, 0)) == (5, 5, 5)
    assert found.path == f"mnist:{tmp_path}"


def test_imagenet_through_torchvision(tmp_path):
    for part in ("train", "val"):
        plant(tmp_path, f"{part}/n01440764/a.JPEG", f"{part}/n01443537/b.JPEG")
    names = {"n01440764": ("tench",), "n01443537": ("goldfish",)}
    torch.save((names, list(names)), tmp_path / "meta.bin")
    found = open_data(f"imagenet:{tmp_path}")
    assert len(found.train) == 2 and len(found.val) == 2 and found.val[1][1] == 1


def test_torchvision_sets_without_parts_or_classes(tmp_path, monkeypatch):
    class Whole(torch.utils.data.Dataset):
        def __init__(self, root):
            self.root = root

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return Image.new("L", (4, 4)), i % 2 if self.root == "labels" else torch.zeros(40)

    monkeypatch.setattr(data.torchvision.datasets, "EuroSAT", Whole)
    found = open_data("eurosat:labels")
    assert len(found.train_labeled) == 18 and len(found.val) == 2
    assert open_data("eurosat:attributes").val is None


# ---- the built-in pictures ----

def test_shapes_depend_on_part_and_index_alone():
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
        assert mask.shape == (64, 64) and mask.dtype == torch.bool and torch.equal(mask, shapes.mask(i))
        assert 0.02 < mask.float().mean() < 0.7
        x = TF.to_tensor(image)
        inside, outside = x[:, mask], x[:, ~mask]
        assert (inside.mean(dim=1) - outside.mean(dim=1)).abs().max() > 0.04 or inside.std() > outside.std()


def test_shapes_labels_are_not_in_the_mean_colour():
    def mean_colours(part, count):
        shapes = Shapes(part, count, 32)
        x = torch.stack([TF.to_tensor(shapes[i][0]).mean(dim=(1, 2)) for i in range(count)])
        return x - 0.5, torch.arange(count) % len(shapes.classes), len(shapes.classes)

    bank, bank_labels, classes = mean_colours("train", 3000)
    queries, labels, _ = mean_colours("test", 1000)
    chance = 100 / classes
    top1 = max(top1 for top1, _ in knn_classifier(bank, bank_labels, queries, labels).values())
    assert top1 < chance + 4 * 100 * (1 / classes * (1 - 1 / classes) / 1000) ** 0.5  # four standard deviations
    logits = torch.cat((bank, bank**2, torch.ones(3000, 1)), 1)
    weights = torch.linalg.lstsq(logits, torch.nn.functional.one_hot(bank_labels).float()).solution
    fitted = (torch.cat((queries, queries**2, torch.ones(1000, 1)), 1) @ weights).argmax(1)
    assert 100 * (fitted == labels).float().mean() < chance + 4 * 100 * (1 / classes * (1 - 1 / classes) / 1000) ** 0.5


