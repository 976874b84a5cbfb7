import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import DataError
from data.images import ImageReadError
from data.segmentation import find_sequences, mask_path, open_masks, read_mask, save_mask
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
    """Three pictures in the layout of VOC2012, two of them in its validation list."""
    values = np.zeros((20, 30), np.uint8)
    values[2:9, 3:11], values[12:18, 5:25], values[2:9, 11:13] = 1, 15, 255  # two classes, a rim that nobody labelled
    for name in ("2007_000001", "2007_000002", "2007_000003"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", np.full((20, 30, 3), 90, np.uint8))
        write(tmp_path / "SegmentationClass" / f"{name}.png", values, "P")
    listed = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("2007_000001\n2007_000003\n\n")
    return tmp_path, values


def test_voc(voc):
    root, values = voc
    pictures = open_masks(str(root))
    assert len(pictures) == 2
    image, objects, void = pictures[1]
    assert image.shape == (3, 20, 30) and image.mean() == pytest.approx(90 / 255, abs=0.01)
    assert (objects.numpy() == [values == 1, values == 15]).all() and (void.numpy() == (values == 255)).all()
    (root / "SegmentationClass" / "2007_000003.png").unlink()
    assert "2007_000003.png: no such file" in pictures[1]
    (root / "JPEGImages" / "2007_000001.jpg").write_bytes(b"bad")
    assert "2007_000001.jpg" in pictures[0]
    nested = root.parent / "devkit"
    (nested / "VOCdevkit").mkdir(parents=True)
    (nested / "VOCdevkit" / "VOC2012").symlink_to(root)
    assert len(open_masks(str(nested))) == 2


def test_shapes():
    pictures = open_masks("shapes:48", at_most=7)
    assert len(pictures) == 7
    image, objects, void = pictures[1]
    assert image.shape == (3, 48, 48) and objects.shape == (1, 48, 48) and not void.any()
    picture, mask = Shapes("test", 2000, 48).render(285)  # evenly spread: a seventh of 2,000 on
    assert objects[0].equal(mask)
    assert (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() == picture.tobytes()


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
    pictures = open_masks(str(tmp_path))
    (_, binary, _), (_, objects, _) = pictures  # the frames that have masks
    assert binary.shape == (1, 20, 30) and (binary[0].numpy() == (values == 1)).all()
    assert (objects.numpy() == [values == 1, values == 2]).all()
    with pytest.raises(DataError, match="no frames .* in c"):
        find_sequences(str(tmp_path), ["a", "c"])
    for name, words in (("nothing", "no such folder"), ("JPEGImages", "expected JPEGImages/480p/SEQUENCE")):
        with pytest.raises(DataError, match=words):
            open_masks(str(tmp_path / name))


def test_frames_come_in_order_and_hidden_files_are_none(tmp_path):
    folder = tmp_path / "JPEGImages" / "480p"
    for name in ("12.jpg", "2.jpg", "0.jpg", "._0.jpg"):
        write(folder / "b" / name, np.zeros((4, 4, 3), np.uint8))
    for name in ("frame_b.jpg", "frame_a.jpg"):
        write(folder / "a" / name, np.zeros((4, 4, 3), np.uint8))
    (folder / ".checkpoints").mkdir()
    sequences = find_sequences(str(tmp_path))
    assert {name: [frame.name for frame in frames] for name, frames in sequences.items()} == {
        "a": ["frame_a.jpg", "frame_b.jpg"], "b": ["0.jpg", "2.jpg", "12.jpg"]}


def test_colours_and_deep_levels_may_show_one_object(tmp_path):
    two = np.zeros((20, 30, 3), np.uint8)
    two[2:9], two[12:15] = (0, 100, 0), (196, 0, 0)  # the same grey
    deep = np.zeros((20, 30), np.uint16)
    deep[2:9], deep[12:15] = 300, 400
    for array in (two, deep):
        write(tmp_path / "mask.png", array)
        with pytest.raises(ImageReadError, match="more than one level or colour"):
            read_mask(tmp_path / "mask.png", (30, 20))
        array[12:15] = 0
        write(tmp_path / "mask.png", array)
        values, _, _ = read_mask(tmp_path / "mask.png", (30, 20))
        assert (values == 255).sum() == 7 * 30 and (values[2:9] == 255).all()


@pytest.mark.parametrize("kind", ["P", "L", "1", "RGB"])
def test_masks_of_every_kind_are_written_as_they_were_read(tmp_path, kind):
    truth = np.zeros((20, 30), np.uint8)
    truth[2:9, 3:11] = 2 if kind == "P" else 255
    image = Image.fromarray(truth)
    if kind == "P":
        image.putpalette(PALETTE)
    else:
        image = image.convert(kind)
    image.save(tmp_path / "mask.png")
    values, palette, void = read_mask(tmp_path / "mask.png", (30, 20))
    assert (values == truth).all() and not void.any()
    save_mask(tmp_path / "again.png", torch.from_numpy(values).long().numpy(), palette)
    with Image.open(tmp_path / "again.png") as again:
        assert again.mode == "P" and (np.asarray(again) == truth).all()
        assert (np.asarray(again.convert("RGB")) == np.asarray(image.convert("RGB"))).all()  # looks the same
    with pytest.raises(ImageReadError, match="mask.png: the mask is 30 x 20 pixels, its picture 20 x 30"):
        read_mask(tmp_path / "mask.png", (20, 30))


def test_unlabelled_pixels_are_no_object(tmp_path):
    truth = np.full((4, 4), 255, np.uint8)
    truth[0] = 1
    write(tmp_path / "mask.png", truth, "P")
    values, _, void = read_mask(tmp_path / "mask.png", (4, 4))
    assert values.sum() == 4 and (void == (truth == 255)).all()
