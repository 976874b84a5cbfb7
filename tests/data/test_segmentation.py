import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import DataError
from data.images import ImageReadError
from data.segmentation import (
    build_loader,
    find_boxes,
    find_masks,
    find_sequences,
    mask_path,
    read_mask,
    save_mask,
)
from data.shapes import Shapes

PALETTE = [0, 0, 0, 200, 0, 0, 0, 200, 0] + [9] * 759


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(PALETTE)
    image.save(path)


@pytest.fixture
def voc(tmp_path):
    """Three images in the layout of VOC2012, two of them in its validation list."""
    values = np.zeros((20, 30), np.uint8)
    values[2:9, 3:11], values[12:18, 5:25], values[2:9, 11:13] = 1, 15, 255  # two classes, an unlabeled rim
    for name in ("2007_000001", "2007_000002", "2007_000003"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", np.full((20, 30, 3), 90, np.uint8))
        write(tmp_path / "SegmentationClass" / f"{name}.png", values, "P")
    listed = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("\ufeff2007_000001\n2007_000003\n\n", "utf-8")  # a byte-order mark, as of editors of Windows
    return tmp_path, values


def test_voc(voc):
    root, values = voc
    entries, read = find_masks(str(root))
    assert len(entries) == 2
    image, objects, void = read(entries[1])
    assert image.shape == (3, 20, 30) and image.mean() == pytest.approx(90 / 255, abs=0.01)
    assert (objects.numpy() == [values == 1, values == 15]).all() and (void.numpy() == (values == 255)).all()
    (root / "SegmentationClass" / "2007_000003.png").unlink()
    (root / "JPEGImages" / "2007_000001.jpg").write_bytes(b"bad")
    corrupt, missing = build_loader(entries, read)
    assert "2007_000001.jpg: " in corrupt and "2007_000003.png: No such file" in missing
    nested = root.parent / "devkit"
    (nested / "VOCdevkit").mkdir(parents=True)
    (nested / "VOCdevkit" / "VOC2012").symlink_to(root)
    assert len(find_masks(str(nested))[0]) == 2


def test_voc_boxes(voc, tmp_path):
    """The first pixel of VOC is 1, and the last is in the box."""
    root, _ = voc
    assert find_boxes(str(root)) is None
    listed = root / "ImageSets" / "Main" / "trainval.txt"
    listed.parent.mkdir()
    listed.write_text("2007_000001\n2007_000002\n2007_000003\n")
    (root / "Annotations").mkdir()
    for name, objects in (("1", "<object><name>cat</name><bndbox><xmin>3</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20"
                                "</ymax></bndbox><part><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
                                "</bndbox></part></object>" * 2), ("2", ""), ("3", "<object><bndbox>")):
        (root / "Annotations" / f"2007_00000{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    entries, read = find_boxes(str(root), num_images=9)
    (image, boxes), (_, none), message = build_loader(entries, read)
    assert image.shape == (3, 20, 30) and boxes.tolist() == [[2, 0, 30, 20]] * 2 and none.shape == (0, 4)
    assert "2007_000003.xml: mismatched tag" in message
    assert len(find_boxes(str(root), num_images=2)[0]) == 2


def test_folders_of_images(tmp_path):
    """Without masks if that is allowed, else with those in masks/, of the held-out part."""
    for name in ("b.jpg", "nested/a.png"):
        write(tmp_path / name, np.full((20, 30, 3), 90, np.uint8))
    with pytest.raises(DataError, match="expected images/ beside masks/ or annotations/, or the layout of VOC2012 or "
                                        "DAVIS, or 'shapes'; masks of any images need --write DIR"):
        find_masks(str(tmp_path))
    with pytest.raises(DataError, match="missing: no such folder, or no image found"):
        find_masks(str(tmp_path / "missing"), None, True)
    entries, read = find_masks(str(tmp_path), None, True)
    assert entries == [(tmp_path / "b.jpg", None), (tmp_path / "nested" / "a.png", None)]
    image, objects, void = read(entries[0])
    assert image.shape == (3, 20, 30) and objects.shape == (0, 20, 30) and void.shape == (20, 30) and not void.any()
    for part, size in (("train", 20), ("val", 10)):
        write(tmp_path / "set" / "images" / part / "c.png", np.full((size, size, 3), 90, np.uint8))
        write(tmp_path / "set" / "masks" / part / "c.png", np.diag(np.arange(size) % 3).astype(np.uint8))
    entries, read = find_masks(str(tmp_path / "set"))
    assert len(entries) == 1 and read(entries[0])[1].sum(dim=(1, 2)).tolist() == [3, 3]


def test_shapes():
    entries, read = find_masks("shapes:48", num_images=7)
    assert len(entries) == 7
    image, objects, void = read(entries[1])
    assert image.shape == (3, 48, 48) and objects.shape == (1, 48, 48) and not void.any()
    expected, mask = Shapes("test", 2000, 48).render(285)  # evenly spread: 2,000 / 7
    assert objects[0].equal(mask)
    assert (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


def test_davis(tmp_path):
    values = np.zeros((20, 30), np.uint8)
    values[2:9, 3:11], values[12:18, 5:25] = 1, 2
    for i in range(3):
        write(tmp_path / "JPEGImages" / "480p" / "b" / f"{i:05}.jpg", np.full((20, 30, 3), 90, np.uint8))
        write(tmp_path / "JPEGImages" / "480p" / "a" / f"{i:05}.jpg", np.full((20, 30, 3), 90, np.uint8))
    write(tmp_path / "Annotations" / "480p" / "b" / "00001.png", values, "P")
    write(tmp_path / "Annotations" / "480p" / "a" / "00000.png", (values == 1).astype(np.uint8) * 255)
    sequences = find_sequences(str(tmp_path))
    assert list(sequences) == ["a", "b"] and [path.name for path in sequences["a"]] == [f"{i:05}.jpg" for i in range(3)]
    assert list(find_sequences(str(tmp_path), ["b"])) == ["b"]
    assert mask_path(sequences["b"][1]) == tmp_path / "Annotations" / "480p" / "b" / "00001.png"
    (_, binary, _), (_, objects, _) = build_loader(*find_masks(str(tmp_path)))  # the frames that have masks
    assert binary.shape == (1, 20, 30) and (binary[0].numpy() == (values == 1)).all()
    assert (objects.numpy() == [values == 1, values == 2]).all()
    with pytest.raises(DataError, match="no frames .* in c"):
        find_sequences(str(tmp_path), ["a", "c"])
    with pytest.raises(DataError, match="Annotations: expected JPEGImages/480p/SEQUENCE"):
        find_sequences(str(tmp_path / "Annotations"))


def test_frames_are_sorted_by_number_without_hidden_files(tmp_path):
    folder = tmp_path / "JPEGImages" / "480p"
    for name in ("12.jpg", "2.jpg", "0.jpg", "._0.jpg"):
        write(folder / "b" / name, np.zeros((4, 4, 3), np.uint8))
    for name in ("frame_b.jpg", "frame_a.jpg"):
        write(folder / "a" / name, np.zeros((4, 4, 3), np.uint8))
    (folder / ".checkpoints").mkdir()
    sequences = find_sequences(str(tmp_path))
    assert {name: [frame.name for frame in frames] for name, frames in sequences.items()} == {
        "a": ["frame_a.jpg", "frame_b.jpg"], "b": ["0.jpg", "2.jpg", "12.jpg"]}


def test_rgb_and_16_bit_masks_may_have_one_object(tmp_path):
    two = np.zeros((20, 30, 3), np.uint8)
    two[2:9], two[12:15] = (0, 100, 0), (196, 0, 0)  # of equal luminance
    deep = np.zeros((20, 30), np.uint16)
    deep[2:9], deep[12:15] = 300, 400
    for array in (two, deep):
        write(tmp_path / "mask.png", array)
        with pytest.raises(ImageReadError, match="more than one color"):
            read_mask(tmp_path / "mask.png", (30, 20))
        array[12:15] = 0
        write(tmp_path / "mask.png", array)
        values, _, _ = read_mask(tmp_path / "mask.png", (30, 20))
        assert (values == 255).sum() == 7 * 30 and (values[2:9] == 255).all()


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB"])
def test_masks_of_any_mode_are_written_as_read(tmp_path, mode):
    truth = np.zeros((20, 30), np.uint8)
    truth[2:9, 3:11] = 2 if mode == "P" else 255
    image = Image.fromarray(truth)
    if mode == "P":
        image.putpalette(PALETTE)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    values, palette, void = read_mask(tmp_path / "mask.png", (30, 20))
    assert (values == truth).all() and not void.any()
    save_mask(tmp_path / "again.png", torch.from_numpy(values).long().numpy(), palette)
    with Image.open(tmp_path / "again.png") as again:
        assert again.mode == "P" and (np.asarray(again) == truth).all()
        assert (np.asarray(again.convert("RGB")) == np.asarray(image.convert("RGB"))).all()
    with pytest.raises(ImageReadError, match="mask.png: the mask has 30 x 20 pixels, its image 20 x 30"):
        read_mask(tmp_path / "mask.png", (20, 30))


def test_unlabeled_pixels_are_void(tmp_path):
    truth = np.full((4, 4), 255, np.uint8)
    truth[0] = 1
    write(tmp_path / "mask.png", truth, "P")
    values, _, void = read_mask(tmp_path / "mask.png", (4, 4))
    assert values.sum() == 4 and (void == (truth == 255)).all()
