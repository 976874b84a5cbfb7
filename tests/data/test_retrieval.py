import os
import pickle

import numpy as np
import pytest
from PIL import Image

from data.datasets import DataError
from data.folders import ImageFiles
from data.images import read_image
from data.retrieval import read_copydays, read_landmarks


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


# ---- Copydays ----

def test_layout_of_copydays(tmp_path):
    root = tmp_path / "copydays"
    for i in range(12):
        for folder in ("original", "jpegqual/5", "jpegqual/75", "crops/80", "crops/10"):
            save_image(root / folder / f"{2000 + i}00.jpg")
        for n in range(1, 5):
            save_image(root / "strong" / f"{2000 + i}{n:02}.jpg")
    (root / "jpegqual" / ".DS_Store").write_text("")
    (root / "crops" / "notes.txt").write_text("")
    originals, blocks = read_copydays(root)
    assert list(blocks) == ["strong", "crops/10", "crops/80", "jpegqual/5", "jpegqual/75"] and len(originals) == 12
    assert blocks["strong"][1] == [[i // 4] for i in range(48)] and blocks["crops/10"][1] == [[i] for i in range(12)]
    save_image(root / "strong" / "999901.jpg")
    with pytest.raises(DataError, match="999901.jpg: no image in .*original has a name with the same first four"):
        read_copydays(root)
    save_image(root / "original" / "200201.jpg")
    with pytest.raises(DataError, match="200200.jpg: another original has the same first four characters"):
        read_copydays(root)
    save_image(tmp_path / "half" / "original" / "200000.jpg")
    with pytest.raises(DataError, match="expected strong/, jpegqual/N/ or crops/N/ beside original/"):
        read_copydays(tmp_path / "half")


# ---- Oxford and Paris ----

@pytest.fixture
def oxford(tmp_path):
    """Ten images, three queries, ground truth as published."""
    root = tmp_path / "roxford5k"
    for i in range(13):
        save_image(root / "jpg" / f"p{i}.jpg")
    none = np.array([], dtype=int)
    gnd = [dict(bbx=[10.2, 5.0, 70.0, 50.7], easy=np.array([1, 2]), hard=np.array([5]), junk=np.array([0, 7])),
           dict(bbx=[0.0, 0.0, 90.0, 61.0], easy=none, hard=np.array([3, 4]), junk=none),
           dict(bbx=[5.0, 5.0, 60.0, 60.0], easy=np.array([8]), hard=none, junk=np.array([9]))]
    return root, dict(gnd=gnd, imlist=[f"p{i}" for i in range(10)], qimlist=["p10", "p11", "p12"])


@pytest.mark.parametrize("protocol", range(6))
def test_ground_truth_of_any_pickle_protocol(oxford, protocol):
    root, truth = oxford
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=protocol))
    database, queries, boxes, relevance = read_landmarks(root / "gnd_roxford5k.pkl")
    assert relevance[0] == dict(easy=[1, 2], hard=[5], junk=[0, 7]) and boxes[0] == [10, 5, 70, 51]
    assert len(database) == 10 and queries[2].endswith("p12.jpg")


class Call:
    """Unpickling it calls a function with an argument."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class HostileType:
    """A numpy.dtype whose state holds pointers, which numpy itself would follow."""

    def __init__(self, code, *state):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, *self.state, -1, -1, 0)


def hostile_number(*state):
    return Call(np._core.multiarray.scalar, HostileType(*state), b"A" * 8)


POINTERS = "|", None, ("a",), {"a": (np.dtype("O"), 0)}


@pytest.mark.parametrize("damage, words", [
    (lambda truth: truth | dict(imlist=[hostile_number("V8", *POINTERS)]), r"numpy.dtype \|V8 is not allowed"),
    (lambda truth: truth | dict(imlist=[hostile_number("i8", "O,", None, None, None)]), "dtype O,i8 is not allowed"),
    (lambda truth: truth | dict(imlist=[np.array([os.system])]), "posix.system is not allowed"),
    (lambda truth: truth | dict(imlist=np.array(["p1", None])), r"numpy.dtype \|O8 is not allowed"),
    (lambda truth: Call(bytes, 9), "TypeError"),
    (lambda truth: Call(os.system, "echo broken into > broken"), "UnpicklingError: posix.system is not allowed"),
    (lambda truth: Call(eval, "open('broken', 'w')"), "UnpicklingError: builtins.eval is not allowed"),
    (lambda truth: Call(np.save, "broken", 1), "UnpicklingError: numpy.save is not allowed"),
    (lambda truth: truth | dict(gnd=[truth["gnd"][0] | dict(bbx=[50.0, 5, 10])] * 3), "not the ground truth"),
    (lambda truth: [1, 2], "TypeError"),
    (lambda truth: truth | dict(qimlist=["p10", "p11", "lost"]), "1 of its images are missing"),
])
def test_invalid_ground_truth(oxford, monkeypatch, damage, words):
    root, truth = oxford
    monkeypatch.chdir(root)
    file = root / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(damage(truth)))
    with pytest.raises(DataError, match=words):
        read_landmarks(file)
    file.write_bytes(b"cnumpy.f2py.__main__\ndtype\n.")  # a name below it runs a command line
    with pytest.raises(DataError, match="numpy.f2py.__main__.dtype is not allowed"):
        read_landmarks(file)
    assert not (root / "broken").exists() and not (root / "broken.npy").exists()


def test_boxes_ignore_the_exif_orientation(tmp_path):
    image = Image.new("RGB", (90, 40))
    image.paste((255, 255, 255), (60, 10, 80, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    path = str(tmp_path / "rotated.png")
    image.save(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6 and read_image(path).size == (40, 90)
    crop, label = ImageFiles([path], [(60, 10, 80, 30)], upright=False)[0]
    assert crop.size == (20, 20) and crop.getextrema() == ((255, 255),) * 3 and label == -1
    assert ImageFiles([path], [(80, 30, 200, 99)], upright=False)[0][0].size == (10, 10)  # clipped to the image
    for box in ((95, 0, 99, 9), (50, 5, 10, 30), (5, 5, 5, 30)):  # outside, reversed, empty
        with pytest.raises(OSError, match=r"rotated.png: the box \(.*\) is empty or outside of \(90, 40\)"):
            ImageFiles([path], [box], upright=False)[0]
