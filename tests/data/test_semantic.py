import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import DataError
from data.images import ImageReadError
from data.loaders import build_train_loader
from data.segmentation import find_masks
from data.semantic import SemanticCrop, open_semantic
from data.shapes import Shapes
from evaluation.setup import list_class_names


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 0, 0] + [9] * 762)
    image.save(path)


def read_labels(images, i):
    return np.asarray(images[i][0][1])


MASK = np.tile(np.array([[0, 1, 1, 2, 255]], np.uint8), (4, 1))
PHOTO = np.full((4, 5, 3), 90, np.uint8)


def test_shapes():
    data = open_semantic("shapes:48")
    assert len(data.train_labeled) == 10_000 and len(data.val) == 2000
    assert data.train.classes == ["background", "red", "amber", "lime", "green", "cyan", "blue", "violet", "pink"]
    (image, labels), _ = data.val[10]
    expected, mask = Shapes("test", 2000, 48).render(10)
    assert image.tobytes() == expected.tobytes()
    assert (np.asarray(labels) == 3 * mask.numpy()).all() and mask.any()  # 10 % 8 is lime


@pytest.mark.parametrize("augmented", [False, True])
def test_voc(tmp_path, augmented):
    """VOC2012 as it is distributed, and with the masks of SBD, which are in another folder, 8-bit gray levels."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b", "c"):
        write(root / "JPEGImages" / f"{name}.jpg", PHOTO)
        write(root / "SegmentationClass" / f"{name}.png", MASK, "P")
    write(root / "JPEGImages" / "d.jpg", PHOTO)
    write(root / "SegmentationClassAug" / "d.png", MASK)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, text in [("train", "a\nb\n"), ("val", "c\n")] + [("trainaug", "a\nb\nd\n")] * augmented:
        (lists / f"{name}.txt").write_text(text)
    for path in (tmp_path, root):
        data = open_semantic(str(path))
        assert [len(data.train), len(data.val), len(data.train.classes)] == [2 + augmented, 1, 21]
        assert data.train.classes[15] == "person" and data.val.name(0).endswith("c.jpg")
        for images in (data.train, data.val):
            assert (read_labels(images, len(images) - 1) == MASK).all()
    (lists / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="Segmentation.val.txt: is empty, expected a name on each line"):
        open_semantic(str(root))


def test_ade20k(tmp_path):
    """0 is unlabeled, and class 1 is wall, the first."""
    for part in ("training", "validation"):
        write(tmp_path / "images" / part / "ADE_1.jpg", PHOTO)
        write(tmp_path / "annotations" / part / "ADE_1.png", np.where(MASK == 255, 150, MASK))
    names = [f"{i}\t0.1\t5\t5\t{'wall' if i == 1 else 'screen' if i > 148 else f'name {i}'}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]) + "\n")
    data = open_semantic(str(tmp_path))
    assert len(data.train.classes) == 150 and data.train.classes[0] == "wall"
    assert list_class_names(data)[148:] == ["screen (148)", "screen (149)"]
    for images in (data.train, data.val):
        assert read_labels(images, 0)[0].tolist() == [255, 0, 0, 1, 149]
    assert [path.parent.name for path, _ in find_masks(str(tmp_path))[0]] == ["validation"]


def test_folder_of_images_and_masks(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            write(tmp_path / "images" / part / "nested" / f"{i}.jpg", PHOTO)
            write(tmp_path / "masks" / part / "nested" / f"{i}.png", MASK, "P")
    (tmp_path / "masks" / "train" / "nested" / "1.png").unlink()
    data = open_semantic(str(tmp_path))
    assert [len(data.train), len(data.val)] == [2, 2] and "train (1 more have no mask)" in data.note
    assert data.train.classes == ["0", "1", "2"] and (read_labels(data.val, 1) == MASK).all()
    write(tmp_path / "masks" / "val" / "nested" / "0.png", MASK == 1)  # none but 0 and 1
    (tmp_path / "masks" / "val" / "nested" / "1.png").write_bytes(b"bad")
    (tmp_path / "classes.txt").write_text("sky\ncat\n")
    with pytest.raises(DataError, match=r"classes.txt: names classes 0 to 1, but masks hold 2 \(2 of 4\): add names"):
        open_semantic(str(tmp_path))
    (tmp_path / "classes.txt").write_text("sky\ncat\ndog\nbird\n")
    data = open_semantic(str(tmp_path))
    assert data.train.classes == ["sky", "cat", "dog", "bird"] and data.note.endswith(" 4 classes")
    write(tmp_path / "masks" / "val" / "nested" / "0.png", np.full_like(MASK, 4))  # changed since
    with pytest.raises(DataError, match="0.jpg: its mask has class 4, but the names are of 0 to 3"):
        data.val[0]
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(DataError, match="classes.txt: 0 names of classes, expected 1 to 254"):
        open_semantic(str(tmp_path))


def test_folder_without_parts(tmp_path):
    for i in range(20):
        write(tmp_path / "images" / f"{i:02}.png", PHOTO)
        write(tmp_path / "annotations" / f"{i:02}.png", MASK)
    data = open_semantic(str(tmp_path))
    assert [len(data.train_labeled), len(data.val)] == [18, 2] and data.note.endswith("every tenth held out")
    names = {images.dataset.name(i) for images in (data.train_labeled, data.val) for i in images.indices}
    assert len(names) == 20


def test_other_folders_and_masks(tmp_path):
    with pytest.raises(DataError, match="expected images/ beside masks/ or annotations/"):
        open_semantic(str(tmp_path))
    write(tmp_path / "images" / "a.jpg", PHOTO)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="none of its 1 images has a mask; expected .*masks.a.png"):
        open_semantic(str(tmp_path))
    for array, message in ((PHOTO, "mode RGB; expected class indices"), (MASK[:3], "5 x 3 pixels, its image 5 x 4")):
        write(tmp_path / "masks" / "a.png", array)
        with pytest.raises(ImageReadError, match=message):
            open_semantic(str(tmp_path)).train[0]


def test_black_and_white_masks_have_two_classes(tmp_path):
    """Also with two names in classes.txt; as soon as another class occurs in one of the masks, 255 is unlabeled."""
    for part in ("train", "val"):
        write(tmp_path / "images" / part / "a.jpg", PHOTO)
        write(tmp_path / "masks" / part / "a.png", np.where(MASK == 1, 255, 0))
    for names in ("0 255", "sky cat"):
        data = open_semantic(str(tmp_path))
        assert data.train.classes == names.split() and data.note.endswith(", 2 classes")
        for images in (data.train, data.val):
            assert (read_labels(images, 0) == (MASK == 1)).all()
        (tmp_path / "classes.txt").write_text("sky\ncat\n")
    (tmp_path / "classes.txt").write_text("sky\ncat\ndog\n")
    with pytest.raises(DataError, match="classes.txt: 3 names of classes, but the masks hold 0 and 255 alone"):
        open_semantic(str(tmp_path))
    write(tmp_path / "masks" / "val" / "a.png", np.where(MASK == 1, 255, MASK % 255))  # classes 0 and 2
    for names in (["sky", "cat", "dog"], ["0", "1", "2"]):
        data = open_semantic(str(tmp_path))
        assert data.train.classes == names and read_labels(data.train, 0)[0].tolist() == [0, 255, 255, 0, 0]
        (tmp_path / "classes.txt").unlink(missing_ok=True)
    for part in ("train", "val"):
        write(tmp_path / "masks" / part / "a.png", np.full_like(MASK, 255))
    with pytest.raises(DataError, match="its masks hold nothing but 255, which is unlabeled"):
        open_semantic(str(tmp_path))


def test_classes_that_do_not_occur(tmp_path):
    """A single class is an error, also beside unlabeled pixels; the largest value is named, and missing ones."""
    for i in range(3):
        write(tmp_path / "images" / f"{i}.jpg", PHOTO)
        write(tmp_path / "masks" / f"{i}.png", np.zeros_like(MASK))
    for _ in range(2):  # without and with names
        with pytest.raises(DataError, match=f"{tmp_path.name}: its masks hold no class but 0, expected two or more"):
            open_semantic(str(tmp_path))
        (tmp_path / "classes.txt").write_text("sky\ncat\n")
    (tmp_path / "classes.txt").unlink()
    for i in range(3):
        write(tmp_path / "masks" / f"{i}.png", np.where(MASK == 255, 255, 7))
    with pytest.raises(DataError, match="hold no class but 7"):
        open_semantic(str(tmp_path))
    write(tmp_path / "masks" / "0.png", np.where(MASK == 255, 254, MASK))
    data = open_semantic(str(tmp_path))
    assert len(data.train.classes) == 255
    assert data.note.endswith("every tenth held out\nNOTE: no mask holds 3, 4, 5, 6, 8, ..., and 1 the largest, 254: "
                              f"name the classes in {tmp_path / 'classes.txt'}, or correct it")
    write(tmp_path / "masks" / "0.png", np.where(MASK == 255, 6, MASK))
    assert "\nNOTE: no mask holds 3, 4, 5, and 2 the largest, 7:" in open_semantic(str(tmp_path)).note


def test_crops_of_image_and_mask_are_the_same(tmp_path):
    """The class of each pixel is its color, also where they are flipped; edges are blurred in the image alone."""
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 8, (6, 8)), np.ones((10, 10), int))
    for i in range(6):
        write(tmp_path / "images" / f"{i}.png", np.repeat(30 * classes[..., None], 3, axis=2))
        write(tmp_path / "masks" / f"{i}.png", classes)
    (tmp_path / "images" / "3.png").write_bytes(b"bad")
    images, crop = open_semantic(str(tmp_path)).train, SemanticCrop(64, (0.2, 0.5), [0, 0, 0], [1, 1, 1])
    loader = build_train_loader(images, crop, [[(epoch, i) for i in range(6)] for epoch in range(3)], seed=0)
    flips = set()
    for epoch, ((crops, labels), _, corrupt) in enumerate(loader):
        assert crops.shape == (6, 3, 64, 64) and labels.shape == (6, 64, 64) and labels.dtype == torch.uint8
        colors = 255 * crops[:, 0] / 30
        assert ((colors - labels).abs() < 0.02).float().mean() > 0.6 and len(corrupt) == 1
        assert ((colors.flip(-1) - labels).abs() < 0.02).float().mean() < 0.4
        flips |= {view.flip for i in range(6) for view in crop.multicrop.sample(80, 60, (0, epoch, i))}
    assert flips == {False, True}
