import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from data.datasets import DataError
from evaluation import embed

NAMES = ["a,b.png", 'quote".png', "line\nbreak.png", "ü☃.png", "same.png", "same.png", "bad.png", "bad.png", "bad.png",
         "bad.png", os.fsdecode(b"latin\xe9.png")]
READABLE = [i for i, name in enumerate(NAMES) if name != "bad.png"]
FEATURES = torch.randn(len(NAMES), 3, generator=torch.Generator().manual_seed(0)) * 1e-3


class Images(torch.utils.data.Dataset):
    """Numbers for images; `changed` are those whose files have changed."""

    changed = ()

    def __len__(self):
        return len(NAMES)

    def __getitem__(self, i):
        return i

    def name(self, i):
        return NAMES[i]

    def stat(self, i):
        return [int(i in self.changed)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(path, ...) -> the images that were extracted, in parts of 3, the third of which has no readable image."""
    monkeypatch.setattr(embed, "PART", 3)
    monkeypatch.chdir(tmp_path)

    def write(path, images=None, stop_at=None, **origin):
        requested = []

        def extract(part):
            numbers = [part[i] for i in range(len(part))]
            if stop_at in numbers:
                raise KeyboardInterrupt
            requested.extend(numbers)
            good = [i for i, number in enumerate(numbers) if number in READABLE]
            features = FEATURES[[numbers[i] for i in good]] if good else torch.empty(0)
            return features, torch.tensor(good, dtype=torch.int64), ["bad.png"] * (len(numbers) - len(good))

        try:
            count = embed.write_features(path, images or Images(), extract, dict(ckpt="x") | origin, lambda text: None)
            assert count == len(READABLE)
        except KeyboardInterrupt:
            pass
        return requested
    return write


def test_every_format_holds_names_and_features(write):
    names, features = [NAMES[i] for i in READABLE], FEATURES[READABLE].numpy()
    for ending in ("npy", "safetensors", "csv", "parquet"):
        assert len(write(f"f.{ending}")) == len(NAMES)
        if ending in ("npy", "safetensors"):
            found = np.load("f.npy") if ending == "npy" else load_file("f.safetensors")["features"].numpy()
            with open(f"f.{ending}.names.json", encoding="utf-8") as file:
                assert json.load(file) == names
        elif ending == "csv":
            with open("f.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
                header, *rows = csv.reader(file)
            assert header == ["file", "feature_1", "feature_2", "feature_3"] and [row[0] for row in rows] == names
            found = np.array([row[1:] for row in rows], np.float64).astype(np.float32)
        else:
            table = parquet.read_table("f.parquet").to_pydict()
            assert table["file"] == [*names[:-1], "latin\\xe9.png"]
            found = np.array(table["features"], np.float32)
        assert found.dtype == np.float32 and np.array_equal(found, features)
    assert sorted(os.listdir()) == ["f.csv", "f.npy", "f.npy.names.json", "f.parquet", "f.safetensors",
                                    "f.safetensors.names.json"]


def test_names_of_two_files_of_one_stem_are_kept(write):
    class Others(Images):
        def name(self, i):
            return f"other {i}"

    write("f.npy")
    write("f.safetensors", Others())
    for name, of in (("f.npy", Images), ("f.safetensors", Others)):
        with open(f"{name}.names.json", encoding="utf-8") as file:
            assert json.load(file) == [of().name(i) for i in READABLE]


def test_a_missing_package_is_noticed_before_images_are_read(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(Images, "__getitem__", None)
    with pytest.raises(ModuleNotFoundError, match="pyarrow"):
        write("f.parquet")
    assert os.listdir() == []


def test_interrupted_extraction_resumes_with_the_next_part(write):
    """Also with a model file that has moved, not with other features; changed images are extracted again."""
    write("whole.npy")
    assert write("f.npy", stop_at=7) == [0, 1, 2, 3, 4, 5] and not os.path.exists("f.npy")
    assert write("f.npy", ckpt="moved", stop_at=10) == [6, 7, 8]
    assert write("f.npy", n_last_blocks=4, stop_at=3) == [0, 1, 2]
    changed = Images()
    changed.changed = [1, 9]
    assert write("f.npy", changed) == [1, 9, 10]
    for name in ("npy", "npy.names.json"):
        with open(f"f.{name}", "rb") as resumed, open(f"whole.{name}", "rb") as whole:
            assert resumed.read() == whole.read()
    assert not os.path.exists("f.npy.parts")


def test_files_of_others_in_the_folder_of_parts_are_kept(write):
    """Parts of killed and of other calls are removed, what else lies there is not."""
    kept = ["notes.txt", "00000000-1.safetensors", "teacher.safetensors"]
    write("f.npy", n_last_blocks=4, stop_at=3)
    os.mkdir("f.npy.parts/0123abcd-000000003.safetensors.abcdefgh.tmp")
    for name in kept:
        with open(f"f.npy.parts/{name}", "w") as file:
            file.write("of others")
    assert len(os.listdir("f.npy.parts")) == 5
    write("f.npy")
    assert sorted(os.listdir("f.npy.parts")) == sorted(kept)


def test_no_readable_image_is_an_error(write, monkeypatch):
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: NAMES.index("bad.png"))
    with pytest.raises(DataError, match="f.npy: not written, 0 of 11 images can be read"):
        write("f.npy")
    assert os.listdir() == []
    write("f.npy", stop_at=NAMES.index("bad.png"))  # the first
    assert os.listdir() == []
