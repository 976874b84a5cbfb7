import concurrent.futures
import csv
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import re
import socketserver
import struct
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import evaluate
import retrieve
import train
import visualize
from common.cli import run_command
from data import archives, shards
from data.archives import scan_shard
from data.datasets import DataError, ImageFolder, data_name, group_shards, hash_images, name_image, open_data
from data.images import ImageReadError
from data.shards import ShardDataset, ShardIndex, expand_braces, find_shards, open_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino"


def jpeg(value=0, size=(24, 16)):
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


IMAGES = [(f"{name}/{i}.jpg", jpeg(10 * k + i)) for k, name in enumerate(("cat", "dog", "emu")) for i in range(4)]


def tar_bytes(files, **options):
    """tar of (name, data) or TarInfo without data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for entry in files:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                name, data = entry
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def zip_bytes(files, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return file.getvalue()


def special(name, kind, target="/etc/passwd"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def write_parquet(path, rows, features=None, **options):
    """rows: (bytes, path, label)."""
    data = [dict(bytes=data, path=name) for data, name, _ in rows]
    image = pa.array(data, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table(dict(image=image, label=pa.array([label for *_, label in rows])))
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps(dict(info=dict(features=features)))})
    pq.write_table(table, path, **options)


def read_all(images):
    return [(image.tobytes(), label) for image, label in images]


def stat_files(root):
    return {path: ((status := path.stat()).st_size, status.st_mtime_ns) for path in root.rglob("*")}


# ---- the same images in every form ----

def make_folder(root):
    for name, data in IMAGES:
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    return root / "folder"


def make_tars(root):
    (root / "tars").mkdir()
    for i in range(3):
        (root / "tars" / f"{i}.tar").write_bytes(tar_bytes(IMAGES[4 * i:4 * i + 4]))
    return root / "tars"


def make_webdataset(root):
    for i in range(2):
        files = [(f"{name.replace('/', '_')[:-4]}.{ending}", data) for name, image in IMAGES[6 * i:6 * i + 6]
                 for ending, data in (("cls", name[:3].encode()), ("jpg", image), ("txt", b"a caption"))]
        (root / f"{i:05}.tar").write_bytes(tar_bytes(files, format=tarfile.PAX_FORMAT))
    return root / "{00000..00001}.tar"


def make_json(root):
    files = [(f"./{i:03}.{ending}", data) for i, (name, image) in enumerate(IMAGES) for ending, data in
             (("jpg", image), ("seg.png", jpeg(0)), ("json", json.dumps(dict(label=name[:3])).encode()))]
    (root / "json.tar").write_bytes(tar_bytes(files, format=tarfile.GNU_FORMAT))
    return root / "json.tar"


def make_nested(root):
    inner = [(f"{name}.tar", tar_bytes((file, data) for file, data in IMAGES if file.startswith(name)))
             for name in ("cat", "dog", "emu")]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    return root / "ILSVRC2012_img_train.tar"


def make_long_names(root):
    files = [(f"{name[:3]}/{'deep/' * 60}{'ü' * 40}{name[4:]}", data) for name, data in IMAGES]
    (root / "long.tar").write_bytes(tar_bytes(files, format=tarfile.PAX_FORMAT, encoding="utf-8"))
    return root / "long.tar"


def make_zip(root, method=zipfile.ZIP_DEFLATED):
    files = []
    for name, data in IMAGES:
        entry = zipfile.ZipInfo(name)
        entry.compress_type, entry.extra = method, struct.pack("<HH4s", 0x7777, 4, b"more")
        files.append((entry, data))
    (root / "images.zip").write_bytes(zip_bytes(files))
    return root / "images.zip"


def make_parquet(root):
    names = ["cat", "dog", "emu"]
    (root / "parquet").mkdir()
    for i in range(2):
        write_parquet(root / "parquet" / f"{i}.parquet", [(data, name, names.index(name[:3])) for name, data in
                      IMAGES[6 * i:6 * i + 6]], dict(label=dict(names=names)), row_group_size=4)
    return root / "parquet"


def make_binary_parquet(root):
    table = pa.table(dict(id=range(12), label=[name[:3] for name, _ in IMAGES], jpg=[data for _, data in IMAGES]))
    pq.write_table(table, root / "binary.parquet", row_group_size=5)
    return root / "binary.parquet"


def make_list(root):
    make_folder(root)
    with open(root / "list.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((f"folder/{name}", name[:3]) for name, _ in IMAGES)])
    return root / "list.csv"


MAKERS = [make_tars, make_webdataset, make_json, make_nested, make_long_names, make_zip,
          partial(make_zip, method=zipfile.ZIP_STORED), make_parquet, make_binary_parquet, make_list]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: getattr(make, "__name__", "make_stored_zip"))
def test_same_images_as_a_folder(tmp_path, make, cache):
    (tmp_path / "data").mkdir()
    folder = ImageFolder(str(make_folder(tmp_path)))
    source = make(tmp_path / "data")
    before = stat_files(tmp_path / "data")
    images = ShardDataset([str(source)])
    assert len(images) == 12 and images.classes == folder.classes == ["cat", "dog", "emu"]
    assert read_all(images) == read_all(folder) and images.labels.tolist() == folder.labels.tolist()
    assert images.read_reduced(5, lambda width, height: 2)[0].size == (12, 8)
    assert images.read_reduced(5, lambda width, height: 2)[0].tobytes() == \
        folder.read_reduced(5, lambda width, height: 2)[0].tobytes()
    assert stat_files(tmp_path / "data") == before  # nothing beside the data
    assert len(os.listdir(cache)) == 1


def test_sources_are_concatenated_and_classes_united_by_name(tmp_path):
    sources = [str(make(tmp_path)) for make in (make_tars, make_parquet, make_list, make_folder)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "more.tar").write_bytes(tar_bytes([("ant/1.jpg", jpeg(50)), ("emu/2.jpg", jpeg(51))]))
    (tmp_path / "unlabeled.tar").write_bytes(tar_bytes([("1.jpg", jpeg(52))]))
    files = [(f"{i}.{ending}", data) for i, label in enumerate((b"dog", b"-1", b"yak")) for ending, data in
             (("jpg", jpeg(60 + i)), ("cls", label))]
    (tmp_path / "partly.zip").write_bytes(zip_bytes(files))
    sources += [str(tmp_path / name) for name in ("a/more.tar", "unlabeled.tar", "partly.zip")]
    data = open_data(sources)
    assert data.train.classes == ["cat", "dog", "emu", "ant", "yak"] and data.path == sources
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] * 4 + [3, 2, -1, 1, -1, 4]
    assert [label for _, label in data.train] == labels
    pixels = [image.tobytes() for image, _ in ImageFolder(sources[3])]
    assert [image.tobytes() for image, _ in data.train][:48] == pixels * 4
    labels = [label for label in labels if label >= 0]
    assert [label for _, label in data.val] == labels[::10]
    assert [label for _, label in data.train_labeled] == [label for i, label in enumerate(labels) if i % 10]
    assert name_image(data.val, 1) == f"{sources[0]}/2.tar/emu/2.jpg"
    assert name_image(data.train, 47) == f"{sources[3]}/emu/3.jpg"
    assert data.train.read_reduced(5, lambda width, height: 2)[0].size == (12, 8)
    assert f"1 images in {sources[5]}, no labels; 3 images of 2 classes in {sources[6]}, 1 without a label" in data.note


def test_hash_of_shards_and_folders(tmp_path):
    """Of the names and sizes of shards and, beside them, of the files of a folder."""
    sources = [str(make(tmp_path)) for make in (make_tars, make_folder)]
    sizes = [os.path.getsize(os.path.join(sources[0], name)) for name in ("0.tar", "1.tar", "2.tar")]
    text = "0.tar\0001.tar\0002.tar" + "".join(f"{size} " for size in sizes)
    text += "\0".join(name for name, _ in IMAGES) + "".join(f"{len(data)} " for _, data in IMAGES)
    assert hash_images(open_data(sources).train) == dict(
        num_images=24, sha256=hashlib.sha256(text.encode()).hexdigest())


def test_hash_of_a_folder_with_a_dangling_link(tmp_path):
    """As of git-annex without the content: it is one more image that cannot be read."""
    folder = make_folder(tmp_path)
    (folder / IMAGES[0][0]).unlink()
    (folder / IMAGES[0][0]).symlink_to(tmp_path / "missing")
    text = "\0".join(name for name, _ in IMAGES) + "".join(f"{len(data)} " for _, data in IMAGES[1:])
    assert hash_images(open_data(str(folder)).train) == dict(
        num_images=12, sha256=hashlib.sha256(text.encode()).hexdigest())


def test_shards_of_a_pattern_that_the_shell_expands_are_one_source(tmp_path, cache):
    folder = make_tars(tmp_path)
    data = open_data([str(folder / f"{i}.tar") for i in range(3)])
    assert isinstance(data.train, ShardDataset) and data.train.classes == ["cat", "dog", "emu"]
    assert len(list(cache.iterdir())) == 1
    assert group_shards(["/a", "/a", "https://x/1.tar", "https://x/2.tar", "https://y/1.tar", str(folder)]) == [
        ["/a"], ["/a"], ["https://x/1.tar", "https://x/2.tar"], ["https://y/1.tar"], [str(folder)]]


@pytest.mark.parametrize("train, val, source", [
    ("train.tar", "val.tar", "train.tar"), ("train.tar", "val.tar", ""), ("in1k_train_0.tar", "in1k_val_0.tar", ""),
    ("train-0.tar", "validation-0.tar", "train-{0..0}.tar"), ("Train/0.tar", "val/0.tar", ""),
    ("train/0.tar", "test/0.tar", "train")])
def test_held_out_parts_beside_shards(tmp_path, train, val, source):
    root = tmp_path / "in1k"
    for name, files in ((train, IMAGES[1:]), (val, [IMAGES[0], IMAGES[8]])):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(tar_bytes(files))
    data = open_data(str(root / source))
    assert data.train is data.train_labeled and len(data.train) == 11 and [label for _, label in data.val] == [0, 2]
    assert data.note.startswith("11 images of 3 classes in ") and ", 2 held out in " in data.note
    assert data_name(str(root / source)) == "in1k"
    other = open_data(str(root / source), val_path=str(make_parquet(tmp_path)))
    assert len(other.train) == 11 and len(other.val) == 12 and other.note.count("held out") == 1


def test_a_held_out_part_that_does_not_fit_is_noted(tmp_path):
    (tmp_path / "train.tar").write_bytes(tar_bytes(IMAGES))
    (tmp_path / "val.tar").write_bytes(tar_bytes([("1.jpg", jpeg())]))
    data = open_data(str(tmp_path / "train.tar"))
    assert "not used: " in data.note and "(images without labels)" in data.note and len(data.val) == 2
    (tmp_path / "train.tar").write_bytes(tar_bytes([("1.jpg", jpeg())]))
    with pytest.raises(DataError, match="--val_path .*: the training images have no labels"):
        open_data(str(tmp_path / "train.tar"), val_path=str(make_folder(tmp_path)))
    with pytest.raises(DataError, match="are not those of the training images"):
        open_data(str(tmp_path / "folder"), val_path=str(tmp_path / "val.tar"))


def test_parts_are_of_one_dataset(tmp_path):
    for name in ("cifar-train-0", "cifar-test-0", "mnist-train-0", "mnist-test-0", "cifar-extra-0"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(IMAGES))
    data = open_data(str(tmp_path / "cifar-train-0.tar"))
    assert data.note.endswith(f"12 held out in {tmp_path}/cifar-test-0.tar")
    for name in ("mnist-train-0", "mnist-test-0"):
        (tmp_path / f"{name}.tar").unlink()
    assert open_data(str(tmp_path)).note.startswith(
        f"12 images of 3 classes in {tmp_path} (1 other shards not used), 12 held out in ")


def test_folders_of_several_kinds_and_compressed_shards(tmp_path):
    for name, message in (("a.tar.gz", "a.tar.gz: a compressed tar has no random access, decompress it .gunzip"),
                          ("b.tar", f"{tmp_path}: holds shards of several kinds .\\.tar, .*name those to use")):
        (tmp_path / name).write_bytes(gzip.compress(TWO) if name.endswith("gz") else TWO)
        with pytest.raises(DataError, match=message):
            open_data(str(tmp_path))
    assert len(open_data(str(tmp_path / "*.tar")).train) == 2  # in quotes


def test_folders_of_images_beside_archives_stay_folders(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "backup.zip").write_bytes(zip_bytes(IMAGES[:3]))
    assert open_data(str(folder)).note.startswith(f"12 images of 3 classes in {folder} (passed over 1: 1 .zip)")
    shards = make_tars(tmp_path)
    for name in ("README.md", "logs/scan.txt", ".cache/1.jpg"):
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_bytes(jpeg(0) if name.endswith("jpg") else b"none")
    assert open_data(str(shards)).note.startswith(f"12 images of 3 classes in {shards},")


def test_deep_images_in_shards_have_one_range(tmp_path):
    (tmp_path / "deep").mkdir()
    for i, high in enumerate((400, 4000)):
        values = np.arange(24 * 16).reshape(16, 24) * (high / 383)
        Image.fromarray(values.astype("uint16")).save(tmp_path / "deep" / f"{i}.png")
    files = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "deep").iterdir())]
    (tmp_path / "deep.tar").write_bytes(tar_bytes(files))
    folder, shard = (open_data(str(tmp_path / name)).train for name in ("deep", "deep.tar"))
    assert folder.value_range == shard.value_range == (0, 4095) and read_all(folder) == read_all(shard)
    assert shard[0][0].getextrema()[0] == (0, 25)
    for i in range(300):  # a few deep ones among JPEGs
        (tmp_path / "deep" / f"a{i:03}.jpg").write_bytes(jpeg(i % 9))
        files.append((f"a{i:03}.jpg", jpeg(i % 9)))
    (tmp_path / "mixed.tar").write_bytes(tar_bytes(sorted(files)))
    assert ShardDataset([str(tmp_path / "mixed.tar")]).value_range == (0, 4095)
    assert ImageFolder(str(tmp_path / "deep")).value_range == (0, 4095)
    both = open_data([str(make_zip(tmp_path)), str(tmp_path / "deep.tar"), str(tmp_path / "deep")])
    assert both.train.value_range == (0, 4095) and read_all(both.train)[12:14] == read_all(shard)
    assert open_data(str(tmp_path / "deep.tar"), value_range=(0, 400)).train[0][0].getextrema()[0] == (0, 255)


def test_classes_of_another_set(tmp_path):
    (tmp_path / "val.tar").write_bytes(tar_bytes([("emu/1.jpg", jpeg()), ("cat/1.jpg", jpeg())]))
    (tmp_path / "flat.tar").write_bytes(tar_bytes([("1.jpg", jpeg())]))
    images = ShardDataset([str(tmp_path / "val.tar")], classes=["cat", "dog", "emu"])
    assert images.labels.tolist() == [2, 0] and images[0][1] == 2 and images.classes == ["cat", "dog", "emu"]
    with pytest.raises(DataError, match="its classes \\(emu\\) are not those of the training images \\(cat, "):
        ShardDataset([str(tmp_path / "val.tar")], classes=["cat", "dog"])
    with pytest.raises(DataError, match="its classes \\(images without labels\\) are not"):
        ShardDataset([str(tmp_path / "flat.tar")], classes=["cat", "dog"])


@pytest.mark.parametrize("files, classes, labels", [
    ([("a/1.jpg", 0), ("b/2.jpg", 0)], ["a", "b"], [0, 1]),
    ([("a/1.jpg", 0), ("2.jpg", 0)], None, [-1, -1]),
    ([("a/1.jpg", 0), ("a/b/2.jpg", 0)], None, [-1, -1]),
    ([("./train/a/1.jpg", 0), ("./train/b/2.jpg", 0), ("./train/b/c/3.jpg", 0)], ["a", "b"], [0, 1, 1]),
    ([("train/a/1.jpg", 0), ("train/2.jpg", 0)], None, [-1, -1]),
    ([("9/1.jpg", 0), ("10/2.jpg", 0)], ["10", "9"], [1, 0]),  # as folders
    ([("a/1.jpg", 0), ("a/1.cls", b"10\n"), ("b/2.jpg", 0), ("b/2.cls", b" 9")], ["9", "10"], [1, 0]),
    ([("1.jpg", 0), ("1.json", b'{"label": 3}'), ("2.jpg", 0), ("2.json", b"{}")], ["3"], [0, -1]),
    ([("1.cls", b"x"), ("1.jpg", 0), ("2.cls", b"-1"), ("2.jpg", 0)], ["x"], [0, -1]),
    ([("cat.1.jpg", 0), ("cat.2.jpg", 0)], None, [-1, -1]),
    ([("1.left.jpg", 0), ("1.right.png", 0), ("1.cls", b"y")], ["y"], [0, 0])])
def test_labels_of_tars(tmp_path, files, classes, labels):
    (tmp_path / "a.tar").write_bytes(tar_bytes((name, data or jpeg()) for name, data in files))
    images = ShardDataset([str(tmp_path / "a.tar")])
    assert images.classes == classes and images.labels.tolist() == labels
    missing = labels.count(-1) if classes else 0
    assert images.passed_over == (f", {missing} without a label" if missing else "")


def test_parts_in_one_archive_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_bytes([("Train/cat/1.jpg", jpeg()), ("val/cat/2.jpg", jpeg())]))
    with pytest.raises(DataError, match="a.zip: holds the parts Train, val of a dataset, pack each into shards of its"):
        ShardDataset([str(tmp_path / "a.zip")])


def test_order_of_files_in_archives(tmp_path):
    """In a zip it does not matter; in a tar an image and its label are neighbors, or the label is counted."""
    files = [("1.jpg", jpeg(1)), ("0.jpg", jpeg(0)), ("0.cls", b"b"), ("1.cls", b"a")]
    (tmp_path / "a.zip").write_bytes(zip_bytes(files))
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    images = ShardDataset([str(tmp_path / "a.zip")])
    assert images.classes == ["a", "b"] and images.labels.tolist() == [1, 0] and images.passed_over == ""
    images = ShardDataset([str(tmp_path / "a.tar")])
    assert images.labels.tolist() == [-1, 0]
    assert images.passed_over == " (passed over 1: 1 label(s) without an image beside), 1 without a label"


def test_lists_of_paths(tmp_path):
    names = ["a.jpg", "b c.jpg", 'd,"e".jpg', "ü.jpg", os.fsdecode(b"\xff.jpg")]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(jpeg(i))
    (tmp_path / "plain.txt").write_bytes(b'a.jpg\r\n\r\nb c.jpg\n"d,""e"".jpg"\n' + "ü.jpg\n".encode() + b"\xff.jpg\n")
    (tmp_path / "columns.csv").write_text("id,Label,File_Name\n7,x,a.jpg\n8,,b c.jpg\n9,y," + str(tmp_path / "ü.jpg"))
    (tmp_path / "labels.csv").write_text("a.jpg,1\nb c.jpg, 0\nü.jpg,1,2,3\n")
    plain, columns, labels = (ShardDataset([str(tmp_path / name)]) for name in
                              ("plain.txt", "columns.csv", "labels.csv"))
    assert [plain.index.read(i)[1] for i in range(5)] == names and plain.classes is None
    assert [plain[i][0].tobytes() for i in range(5)] == \
        [Image.open(tmp_path / name).convert("RGB").tobytes() for name in names]
    assert columns.classes == ["x", "y"] and columns.labels.tolist() == [0, -1, 1] and len(read_all(columns)) == 3
    assert labels.classes == ["0", "1"] and labels.labels.tolist() == [1, 0]
    assert labels.passed_over == " (passed over 1: 1 line(s) that are not path,label)"


@pytest.mark.parametrize("ending, line, head", [
    (".txt", "Smith, John/1.jpg", ""), (".txt", "Smith, John/1.jpg", "path"), (".csv", '"Smith, John/1.jpg"', ""),
    (".txt", "1.jpg, cat", ""), (".csv", "1.jpg,cat", " Image_Path , class"),
    (".csv", "cat,other,1.jpg,7,8", "label,image,file_name,width,height"), (".csv", "x,1.jpg,cat", "image,path,label")])
def test_commas_and_columns_of_lists(tmp_path, ending, line, head):
    (tmp_path / f"list{ending}").write_text("\n".join([head] * bool(head) + [line]))
    index = open_index([str(tmp_path / f"list{ending}")])
    assert [index.read(i)[1] for i in range(len(index))][:1] == ["Smith, John/1.jpg" if "Smith" in line else "1.jpg"]
    assert index.classes == (["cat"] if "cat" in line else [])


@pytest.mark.parametrize("head", ["filepaths,labels", "img,label", "img"])
def test_unknown_columns_of_lists(tmp_path, head):
    (tmp_path / "list.csv").write_text(f"{head}\n1.jpg,cat\n")
    with pytest.raises(DataError, match=f"line 1, '{head}', is no image and names no column of path, "):
        open_index([str(tmp_path / "list.csv")])
    (tmp_path / "1.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.csv").write_text("path,species\n1.jpg,cat\n")
    images = ShardDataset([str(tmp_path / "list.csv")])
    assert images.classes is None and "1 column(s), none of them label, class, class_name" in images.passed_over
    (tmp_path / "1").write_bytes(jpeg(0))
    (tmp_path / "list.csv").write_text("1,cat\n")
    assert ShardDataset([str(tmp_path / "list.csv")]).classes == ["cat"]


def test_brace_patterns(tmp_path):
    assert expand_braces("a-{08..11}.tar") == [f"a-{i:02}.tar" for i in range(8, 12)]
    assert expand_braces("{1..3}{a,b}") == ["1a", "1b", "2a", "2b", "3a", "3b"]
    assert expand_braces("{0..2}/{0..2}") == [f"{i}/{j}" for i in range(3) for j in range(3)]
    assert expand_braces("{000..1000}")[::500] == ["0000", "0500", "1000"]
    assert expand_braces("plain{}{a}{1..}") == ["plain{}{a}{1..}"]
    assert expand_braces("{a,{b,c}{0..1}}.tar") == ["a.tar", "b0.tar", "b1.tar", "c0.tar", "c1.tar"]
    for pattern in ("{5..1}.tar", "{0..99999999999999}.tar", "{0..9}" * 7):
        with pytest.raises(DataError, match="0 shards, or more than 200,000"):
            expand_braces(pattern)
    (tmp_path / "a{0..1}.tar").write_bytes(tar_bytes(IMAGES))
    assert find_shards(str(tmp_path / "a{0..1}.tar")) == [str(tmp_path / "a{0..1}.tar")]
    (tmp_path / "b0.tar").write_bytes(tar_bytes(IMAGES))
    with pytest.raises(DataError, match=r"2 of 3 shards do not exist or are no files, the first is .*b1\.tar"):
        find_shards(str(tmp_path / "b{0..2}.tar"))
    with pytest.raises(DataError, match="unknown kind of shard"):
        find_shards(__file__)
    assert find_shards(os.path.dirname(__file__)) == []


# ---- commands ----

CPU = ["--device", "cpu", "--num_workers", "0"]
TINY = [*CPU, *("--arch vit_tiny --patch_size 8 --embed_dim 16 --depth 1 --num_heads 2 --out_dim 16 --hidden_dim 16 "
                "--global_crops_size 16 --local_crops_size 8 --local_crops_number 2 --warmup_epochs 0 --lr 0.01 "
                "--precision fp32 --batch_size_per_gpu 4 --knn_every 1").split()]


def save_state_of_run(folder, source, *flags):
    """Weights after a run of train.py, and its log without times, which holds the k-NN accuracies."""
    train.main(train.parse_args([*TINY, "--output_dir", str(folder), "--data_path", str(source), *flags]))
    weights = {name: load_file(folder / f"{name}.safetensors") for name in ("student", "teacher")}
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "knn_top1", "knn_top5", "eval", "step")
    return weights, [{name: record[name] for name in names if name in record} for record in records]


@pytest.mark.parametrize("epochs", [2, pytest.param(17, marks=pytest.mark.slow)])  # of 3 steps
def test_training_is_the_same_from_every_form(tmp_path, epochs):
    forms = [make_folder, make_tars, make_webdataset, make_json, make_nested, make_zip, make_parquet, make_list]
    results = [save_state_of_run(tmp_path / make.__name__, make(tmp_path), "--epochs", str(epochs), "--log_every", "1")
               for make in forms]
    expected, log = results[0]
    assert sum("loss" in record for record in log) == 3 * epochs and sum("knn_top1" in record for record in log) > 2
    for make, (weights, other_log) in zip(forms, results):
        assert other_log == log, make
        for name in ("student", "teacher"):
            assert all(torch.equal(value, weights[name][key]) for key, value in expected[name].items()), make


def test_several_paths_and_held_out_shards_in_every_command(tmp_path, capsys):
    """train.py keeps one path as text and several as a list, and the other commands find them in its model file."""
    tars, table = make_tars(tmp_path), make_parquet(tmp_path)
    flags = ["--epochs", "1", "--val_path", str(table), "--cache_dir", str(tmp_path / "indices")]
    save_state_of_run(tmp_path / "run", tars / "0.tar", str(make_zip(tmp_path)), *flags)
    assert f"4 images in {tars}/0.tar, no labels; 12 images of 3 classes in {tmp_path}/images.zip; 3 classes in all, " \
        f"12 held out in {table}" in capsys.readouterr().out
    again = train.parse_args([f"@{tmp_path / 'run' / 'flags.txt'}"])
    assert again.data_path == (f"{tars}/0.tar", f"{tmp_path}/images.zip") and again.val_path == str(table)
    assert len(list((tmp_path / "indices").iterdir())) == 3
    save_state_of_run(tmp_path / "run", *again.data_path, *flags[:1], "2", *flags[2:])
    printed = capsys.readouterr().out
    assert "resuming at step 4 of 8" in printed and printed.count("changed since") == 1

    ckpt = str(tmp_path / "run" / "teacher.safetensors")
    found = []
    for source in (["--data_path", str(tars), "--val_path", str(table)],
                   ["--data_path", str(make_folder(tmp_path)), "--val_path", str(tmp_path / "folder")]):
        evaluate.main(evaluate.parse_args(["knn", "--ckpt", ckpt, *CPU, *source, "--nb_knn", "3", "--save_predictions",
                                           "--output_dir", str(tmp_path / "knn")]))
        path = max((tmp_path / "knn").glob("*.json"), key=os.path.getmtime)
        found.append(json.loads(path.read_text())["knn"]["3"])
    files = [[prediction.pop("file") for prediction in result["predictions"]] for result in found]
    assert found[0] == found[1] and files[1][5] == f"{tmp_path}/folder/dog/1.jpg"
    assert files[0][5] == f"{table}/0.parquet/dog/1.jpg"

    capsys.readouterr()
    for source in (tars, tmp_path / "folder"):
        for _ in range(2):
            retrieve.main(retrieve.parse_args(["search", "--ckpt", ckpt, *CPU, "--data_path", str(source), "--nearest",
                                               "3", str(tmp_path / "folder" / "dog" / "1.jpg")]))
    printed = capsys.readouterr().out
    assert "12 of 12 images indexed" in printed and f" 1.000  {tars}/1.tar/dog/1.jpg" in printed
    parts = printed.split(f"{tmp_path}/folder/dog/1.jpg:\n")[1:]
    nearest = [re.findall(r"[a-z]{3}/[0-9]\.jpg", part) for part in parts]
    assert nearest[0][1:3] == nearest[2][:2] and nearest[0] == nearest[1]  # of a folder, the query is left out

    visualize.main(visualize.parse_args(["attention", str(tars / "0.tar"), "--ckpt", ckpt, "--device", "cpu",
                                         "--output_dir", str(tmp_path / "attention")]))
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == [
        f"0.tar_cat_{i}.jpg.attention.png" for i in range(4)]


def test_packages_that_are_missing_are_one_line(tmp_path, exit_message, monkeypatch):
    for name, source in (("pyarrow", str(make_parquet(tmp_path))), ("fsspec", "https://127.0.0.1/a.tar")):
        monkeypatch.setitem(sys.modules, name, None)
        line = exit_message(train.main, train.parse_args([*TINY, "--data_path", source, "--output_dir",
                                                          str(tmp_path / "run")]))
        assert f"{name} is not installed: pip install {name}" in line


# ---- hostile and corrupt archives ----

def corrupt_header(data):
    at = data.index(b"dog/0.jpg")
    return data[:at] + b"\xff" * 300 + data[at + 300:]


def huge_member(name, size):
    """A tar header that declares more bytes than any file has."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def extended_header(content, size=None):
    member = tarfile.TarInfo("header")
    member.size, member.type = size or len(content), tarfile.XHDTYPE
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse(name):
    """A PAX sparse file that would be 99 TB."""
    member = tarfile.TarInfo(name)
    member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999999999"}
    return tar_bytes([member], format=tarfile.PAX_FORMAT)


GOOD = IMAGES[:4]
TWO = tar_bytes([("cat/0.jpg", IMAGES[0][1]), ("dog/0.jpg", IMAGES[4][1])])
EVIL = b"not an image"


def without_end(data):
    """A tar without the zeros at its end."""
    return data[:-(-len(data.rstrip(b"\0")) // 512) * 512]


FIRST = without_end(tar_bytes([GOOD[0]]))
BAD_TARS = {  # kind: (content, images that are indexed, what is passed over or raised)
    "truncated in a file": (FIRST + FIRST[:600], 1, "1 corrupt or truncated: a.tar"),
    "truncated in a header": (FIRST + FIRST[:100], 1, "1 corrupt or truncated: a.tar"),
    "corrupt header": (corrupt_header(TWO), 1, "1 corrupt or truncated: a.tar"),
    "wrong checksum": (FIRST + b"x" + FIRST[1:], 1, "1 corrupt or truncated: a.tar"),
    "no end": (FIRST, 1, ""),
    "two tars": (TWO + TWO, 2, "1 corrupt or truncated: a.tar"),
    "zeros inside": (FIRST + bytes(3000) + TWO, 1, "1 corrupt or truncated: a.tar"),
    "small negative size": (FIRST + huge_member("a.jpg", -1) + bytes(1024), 1, "1 corrupt or truncated: a.tar"),
    "slow extended header": (FIRST + extended_header(b"1" * 10**6), 1, "1 corrupt or truncated: a.tar"),
    "global headers": (tar_bytes(GOOD, format=tarfile.PAX_FORMAT, pax_headers={f"k{i}": "v" for i in range(900)}), 4,
                       ""),
    "label of 5,000 digits": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.cls", b"9" * 5000)]), 5, ""),
    "empty": (b"", 0, "no image in 1 shard(s) (passed over 1: 1 corrupt or truncated: a.tar)"),
    "empty tar": (bytes(10240), 0, "no image in 1 shard(s)"),
    "no tar": (b"GIF89a" * 1000, 0, "no image in 1 shard(s) (passed over 1: 1 corrupt or truncated: a.tar)"),
    "html": (b"<html>not found</html>", 0, "(passed over 1: 1 corrupt or truncated: a.tar)"),
    "gzip": (b"\x1f\x8b\x08\0" + TWO, 0, "a compressed tar has no random access, decompress it (gunzip)"),
    "zstd": (b"\x28\xb5\x2f\xfd" + TWO, 0, "decompress it (unzstd)"),
    "parent names": (tar_bytes([*GOOD, ("../../x.jpg", jpeg()), ("a/../../x.jpg", jpeg())]), 4, "2 unsafe name(s)"),
    "absolute names": (tar_bytes([*GOOD, ("/etc/x.jpg", jpeg()), ("//x.jpg", jpeg())]), 4, "2 unsafe name(s)"),
    "links": (tar_bytes([*GOOD, special("a.jpg", tarfile.SYMTYPE), special("b.jpg", tarfile.LNKTYPE, "cat/0.jpg")]),
              4, "2 link(s), device(s), sparse file(s)"),
    "devices": (tar_bytes([*GOOD, special("a.jpg", tarfile.FIFOTYPE), special("b.jpg", tarfile.CHRTYPE),
                           special("c.jpg", tarfile.BLKTYPE)]), 4, "3 link(s), device(s), sparse file(s)"),
    "sparse": (without_end(tar_bytes(GOOD)) + sparse("a.jpg"), 4, "1 link(s), device(s), sparse file(s)"),
    "huge member": (FIRST + huge_member("a.jpg", 2**62) + bytes(1024), 1, "1 corrupt or truncated: a.tar"),
    "huge directory": (FIRST + huge_member("a/", 2**62) + bytes(1024), 1, "1 corrupt or truncated: a.tar"),
    "huge extended header": (FIRST + extended_header(b"", 2**60) + bytes(512), 1, "1 corrupt or truncated: a.tar"),
    "negative size": (FIRST + huge_member("a.jpg", -1000) + bytes(1024), 1, "1 corrupt or truncated: a.tar"),
    "hidden": (tar_bytes([*GOOD, (".x.jpg", EVIL), ("cat/._0.jpg", EVIL), (".git/a.jpg", EVIL)]), 4, "3 hidden"),
    "folders of systems": (tar_bytes([*GOOD, ("__MACOSX/cat/0.jpg", EVIL)]), 4, "1 __MACOSX/"),
    "other files": (tar_bytes([*GOOD, ("a.mp3", EVIL), ("README", EVIL), ("a.mp3.exe", EVIL)]), 4,
                    "3: 1 .mp3, 1 without ending, 1 .exe"),
    "label that is no text": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.cls", b"\xff\xfe")]), 5, "1 corrupt .cls"),
    "huge label": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.cls", bytes(2**20 + 1))]), 5, "1 corrupt .cls"),
    "label that is no JSON": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.json", b"{'label'")]), 5, "1 corrupt .json"),
    "label in a list": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.json", b"[1, 2]")]), 5, "1 corrupt .json"),
    "nested JSON": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.json", b"[" * 10**5)]), 5, "1 corrupt .json"),
    "label of many classes": (tar_bytes([*GOOD, ("a.jpg", jpeg()), ("a.json", b'{"label": [1, 2]}')]), 5, ""),
    "tar in tar in tar": (tar_bytes([("a.tar", tar_bytes([("b.tar", TWO), GOOD[0]]))]), 1, "1 .tar"),
    "corrupt tar inside": (tar_bytes([("a.tar", corrupt_header(TWO)), ("b.tar", EVIL * 100), ("c.tar", TWO)]), 3,
                           "1 corrupt or truncated: a.tar in a.tar, 1 corrupt or truncated: b.tar in a.tar"),
    "tar inside without end": (tar_bytes([("a.tar", FIRST), ("b.tar", FIRST)]), 2, ""),
    "names of any bytes": (tar_bytes([*GOOD, ("\udcff\n\x1b[31m.jpg", jpeg())]), 5, ""),
}


def patch(data, signature, offset, value):
    """Overwrite bytes after every record of a zip that starts with `signature`."""
    for match in re.finditer(re.escape(signature), data):
        data = data[:match.start() + offset] + value + data[match.start() + offset + len(value):]
    return data


LOCAL, CENTRAL = b"PK\3\4", b"PK\1\2"
BOMB = zip_bytes([*GOOD, ("a.jpg", bytes(10**7))])
STORED_ZIP = zip_bytes(GOOD, zipfile.ZIP_STORED)
link = zipfile.ZipInfo("a.jpg")
link.external_attr, link.create_system = 0o120777 << 16, 3
BAD_ZIPS = {
    "encrypted": (patch(patch(zip_bytes(GOOD), CENTRAL, 8, b"\1"), LOCAL, 6, b"\1"), 0,
                  "(passed over 4: 4 encrypted or compressed otherwise)"),
    "bzip2": (zip_bytes(GOOD[:2], zipfile.ZIP_BZIP2), 0, "(passed over 2: 2 encrypted or compressed otherwise)"),
    "truncated": (zip_bytes(GOOD)[:-100], 0, "(passed over 1: 1 corrupt or truncated: a.zip)"),
    "no zip": (EVIL * 100, 0, "(passed over 1: 1 corrupt or truncated: a.zip)"),
    "empty": (b"", 0, "(passed over 1: 1 corrupt or truncated: a.zip)"),
    "link": (zip_bytes([*GOOD, (link, "/etc/passwd")]), 4, "1 link(s), device(s), sparse file(s)"),
    "parent and absolute names": (zip_bytes([*GOOD, ("../x.jpg", EVIL), ("/x.jpg", EVIL), ("..\\x.jpg", EVIL)]), 4,
                                  "3 unsafe name(s)"),
    "backslashes": (zip_bytes((name.replace("/", "\\"), data) for name, data in IMAGES), 12, ""),
    "no local headers": (patch(zip_bytes(GOOD), LOCAL, 0, b"XX"), 0, "(passed over 4: 4 corrupt or truncated)"),
    "sizes that disagree": (patch(STORED_ZIP, CENTRAL, 24, struct.pack("<I", 99)), 0, "4: 4 corrupt or truncated"),
    "beyond the end": (patch(STORED_ZIP, CENTRAL, 20, struct.pack("<II", 10**8, 10**8)), 0, "4 corrupt or truncated"),
    "overlapping": (patch(patch(STORED_ZIP, CENTRAL, 42, bytes(4)), CENTRAL, 20,
                          struct.pack("<II", *[len(STORED_ZIP) // 2] * 2)), 0, "1 corrupt or truncated: a.zip"),
    "huge": (patch(zip_bytes(GOOD), CENTRAL, 24, b"\xff\xff\xff\xfe"), 0, "(passed over 4: 4 file(s) above 512 MB)"),
}


def check_bad_shard(path, content, count, message):
    path.parent.mkdir()
    path.write_bytes(content)
    before = sorted(path.parent.iterdir())
    if count:
        images = ShardDataset([str(path)])
        assert len(images) == count and message in images.passed_over
        assert images.passed_over or not message
        for i in range(count):
            assert images[i][0].size == (24, 16)
    else:
        with pytest.raises(DataError) as error:
            ShardDataset([str(path)])
        assert message in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("kind", BAD_TARS)
def test_bad_tars(tmp_path, kind):
    check_bad_shard(tmp_path / "data" / "a.tar", *BAD_TARS[kind])


def test_headers_of_gigabytes_are_not_read(tmp_path):
    header = tarfile.TarInfo("header")
    header.size, header.type = 2**30, tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(FIRST + header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "a.tar", 2**31)
    tracemalloc.start()
    members, _, _, passed_over = scan_shard(str(tmp_path / "a.tar"))
    assert len(members) == 1 and passed_over == {"corrupt or truncated: a.tar": 1}
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


@pytest.mark.parametrize("kind", BAD_ZIPS)
def test_bad_zips(tmp_path, kind):
    check_bad_shard(tmp_path / "data" / "a.zip", *BAD_ZIPS[kind])


@pytest.mark.parametrize("kind", ["truncated", "no parquet", "corrupt pages", "no images", "empty"])
def test_bad_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    write_parquet(path, [(data, name, 0) for name, data in IMAGES])
    content = path.read_bytes()
    if kind == "no images":
        pq.write_table(pa.table(dict(text=["a"], label=[0])), path)
    else:
        half = len(content) // 2
        path.write_bytes({"truncated": content[:-100], "no parquet": EVIL * 50, "empty": b"",
                          "corrupt pages": content[:4] + bytes(half) + content[4 + half:]}[kind])
    with pytest.raises(DataError, match="no column of images" if kind == "no images" else
                       "1 corrupt or truncated: a.parquet|none of the first 12 images can be read"):
        ShardDataset([str(path)])


def test_labels_and_metadata_of_parquet(tmp_path):
    """Missing labels are NaN for pandas; what is no metadata of `datasets` is ignored."""
    path = tmp_path / "a.parquet"
    for metadata in ("[]", "{", '{"info": {"features": {"label": {"names": 3}}}}'):
        table = pa.table(dict(image=[data for _, data in IMAGES[:3]], label=[1.0, float("nan"), 0.0]))
        pq.write_table(table.replace_schema_metadata(dict(huggingface=metadata)), path)
        images = ShardDataset([str(path)])
        assert images.classes == ["0", "1"] and images.labels.tolist() == [1, -1, 0]


@pytest.mark.parametrize("build", [lambda: pa.nulls(2**21 + 1, pa.binary()), lambda: pa.array([bytes(2**29 + 1)])])
def test_row_groups_of_gigabytes_are_refused(tmp_path, build):
    """Less than a MB of file."""
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("image", pa.binary())]), compression="zstd",
                          use_dictionary=False, write_statistics=False) as writer:
        writer.write_table(pa.table(dict(image=build())), row_group_size=2**24)
    with pytest.raises(DataError, match="a.parquet: .* in one row group, write it with row_group_size=100"):
        ShardDataset([str(tmp_path / "a.parquet")])


@pytest.mark.parametrize("content, message", [
    (b"", "no image in 1 shard"), (b"path,label\n", "no image in 1 shard"),
    (b"missing.jpg\n", "none of the first 1 images can be read; the last: .*missing.jpg: No such file"),
    (bytes(range(256)) * 10, "line 1, .*x00.* is no image and names no column"),
    (b'"' + b"x" * 200_000, "corrupt or truncated"),
    ("a.jpg\n".encode("utf-16"), "line 1, .*a.x00.* is no image and names no column"),
    (b"pipe.jpg\n", "not a regular file"),
    (b"a.jpg,b,c,d\n" * 3, "passed over 3: 3 line")])
def test_bad_lists(tmp_path, content, message):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ShardDataset([str(tmp_path / "a.csv")])


def test_images_that_cannot_be_read_raise_image_read_error(tmp_path):
    files = [*GOOD, ("dog/evil\n\udcff.jpg", EVIL), ("dog/cut.jpg", jpeg(1)[:300]), ("dog/wide.png", png(3000, 1))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    (tmp_path / "b.zip").write_bytes(BOMB.replace(struct.pack("<I", 10**7), struct.pack("<I", 2000)))
    write_parquet(tmp_path / "c.parquet", [(GOOD[0][1], "a", 0), (None, "b", 1), (b"", "c", -1)])
    images = ShardDataset([str(tmp_path / name) for name in ("a.tar", "b.zip", "c.parquet")])
    messages = {}
    for i in range(len(images)):
        try:
            images[i]
        except ImageReadError as error:
            messages[i] = str(error)
    assert messages.keys() == {4, 5, 6, 7, 13, 14} and all(message.isprintable() for message in messages.values())
    assert f"{tmp_path}/a.tar/dog/evil??.jpg: cannot identify" in messages[4] and "3000 x 1 pixels" in messages[6]
    assert messages[7].endswith("b.zip/a.jpg: does not inflate to 2000 bytes")
    assert messages[13].endswith("c.parquet/b: null")
    with pytest.raises(IndexError):
        images[len(images)]


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_shards_that_change_while_they_are_read(tmp_path):
    path = make_tars(tmp_path) / "1.tar"
    images = ShardDataset([str(tmp_path / "tars")])
    before = path.stat().st_mtime_ns
    os.truncate(path, 3000)
    for times, message in (((before, before), "1.tar: truncated, 0 of "), ((1, 1), "the shard has changed since")):
        os.utime(path, ns=times)
        archives.open_file.cache_clear()
        with pytest.raises(ImageReadError, match=f"1.tar/dog/3.jpg: .*{message}"):
            images[7]
    path.unlink()
    with pytest.raises(ImageReadError, match="1.tar/dog/0.jpg: .*no such shard"):
        images[4]
    assert images[8][1] == 2
    path.write_bytes(tar_bytes(IMAGES[:4]))  # while the files of the old index are open
    again = ShardDataset([str(tmp_path / "tars")])
    assert [again[i][0] for i in range(4, 8)] == [images[i][0] for i in range(4)]


# ---- index ----

def test_only_changed_shards_are_scanned_again(tmp_path, monkeypatch):
    folder, scanned = make_tars(tmp_path), []
    monkeypatch.setattr(shards, "scan_shard", lambda path, arrays: (
        scanned.append(os.path.basename(path)) or scan_shard(path)))
    first = read_all(ShardDataset([str(folder)], num_workers=1))
    assert scanned == ["0.tar", "1.tar", "2.tar"]
    assert read_all(ShardDataset([str(folder)], num_workers=1)) == first and len(scanned) == 3
    (folder / "1.tar").write_bytes(tar_bytes([("dog/x.jpg", jpeg(77)), ("yak/x.jpg", jpeg(78)), ("dog/x.txt", EVIL)]))
    (folder / "3.tar").write_bytes(tar_bytes(IMAGES[:1]))
    images = ShardDataset([str(folder)], num_workers=1)
    assert scanned[3:] == ["1.tar", "3.tar"] and images.classes == ["cat", "dog", "emu", "yak"]
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 3, 2, 2, 2, 2, 0]
    assert images.passed_over == " (passed over 1: 1 .txt)"
    assert read_all(images)[:4] == first[:4]
    assert [images.index.read(i)[1] for i in (5, 6)] == ["yak/x.jpg", "emu/0.jpg"]
    (folder / "1.tar").unlink()
    images = ShardDataset([str(folder)], num_workers=1)
    assert images.classes == ["cat", "emu"] and images.labels.tolist() == [0] * 4 + [1] * 4 + [0] and len(scanned) == 5
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes())  # of another time
    assert len(ShardDataset([str(folder)], num_workers=1)) == 9 and scanned[5:] == ["0.tar"]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-5], lambda data: data[:100], lambda data: b"", lambda data: b"x" + data[1:],
    lambda data: data.replace(b'"passed_over": {}', b'"passed_over": ""'),
    lambda data: data.replace(b'"classes": [', b'"classes": [7, '),
    lambda data: data.replace(b'"path": "', b'"path": 7, "'),
    lambda data: data.replace(b'"shards"', b'"shard5"'), lambda data: data.replace(b'"count": 4', b'"count": 5000'),
    lambda data: data[:-16] + b"\xff" * 8 + data[-8:], lambda data: EVIL * 1000])
def test_corrupt_indices_are_rebuilt(tmp_path, cache, damage):
    source = str(make_tars(tmp_path))
    first = read_all(ShardDataset([source], num_workers=1))
    path, = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(DataError):
        ShardIndex.open(str(path))
    assert read_all(ShardDataset([source], num_workers=1)) == first and path.read_bytes() == content


@pytest.mark.parametrize("field, value", [
    ("shard", 9), ("shard", -1), ("label", 9), ("key_end", 2**40), ("key_end", 0)])
def test_forged_indices_are_one_line(tmp_path, field, value):
    index = ShardDataset([str(make_tars(tmp_path))]).index
    content = bytearray(Path(index.file.name).read_bytes())
    members = np.frombuffer(content, archives.MEMBER, len(index), len(shards.MAGIC))
    members[field][7] = value
    Path(index.file.name).write_bytes(content)
    with pytest.raises(DataError, match="corrupt at image 7, delete it"):
        read_all(ShardDataset([str(tmp_path / "tars")]))


def test_index_beside_the_shards(tmp_path, cache, capsys, exit_message):
    folder = make_tars(tmp_path)
    path = folder / "train.shardindex"
    run_command(shards.index, lambda: shards.parse_args(["index", str(folder), "--output", str(path)]), DataError)
    assert capsys.readouterr().out == f"{path}: 12 images, 3 classes, 3 shards\n"
    assert str(tmp_path).encode() not in path.read_bytes()
    os.rename(folder, tmp_path / "moved")
    for source in ("moved", "moved/train.shardindex", "moved/{0..2}.tar"):
        images = ShardDataset([str(tmp_path / source)])
        assert images.index.file.name == str(tmp_path / "moved" / "train.shardindex") and images[4][1] == 1
    assert not cache.exists()
    (tmp_path / "moved" / "2.tar").unlink()
    assert len(ShardDataset([str(tmp_path / "moved")])) == 8 and cache.exists()
    with pytest.raises(DataError, match="2.tar: no such shard"):
        ShardDataset([str(tmp_path / "moved" / "train.shardindex")])
    (tmp_path / "moved" / "train.shardindex").write_bytes(EVIL)
    assert len(ShardDataset([str(tmp_path / "moved")])) == 8
    with pytest.raises(DataError, match="train.shardindex: "):
        ShardDataset([str(tmp_path / "moved" / "train.shardindex")])
    with pytest.raises(SystemExit):
        shards.parse_args(["index", str(folder), "--output", "train.bin"])
    assert "--output train.bin: must end in .shardindex" in capsys.readouterr().err


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="the index cannot be written .Not a directory., choose another folder"):
        ShardDataset([str(make_tars(tmp_path))], cache_dir=str(tmp_path / "file" / "cache"))


def build(source):
    images = ShardDataset([source], num_workers=2)
    return images.index.file.name, read_all(images)


def test_two_builders_at_a_time(tmp_path, cache):
    """Each builds with two processes of its own."""
    source = str(make_webdataset(tmp_path))
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, context) as executor:
        results = list(executor.map(build, [source] * 4))
    assert all(result == results[0] for result in results) and len(results[0][1]) == 12
    assert os.listdir(cache) == [os.path.basename(results[0][0])]


def test_arrays_are_mapped_and_shared(tmp_path):
    images = ShardDataset([str(make_tars(tmp_path))])
    for array in (images.index.members, images.index.keys, images.labels):
        base = array
        while not isinstance(base, np.memmap):
            base = base.base
        assert base.mode == "r" and not array.flags.writeable
    assert len(pickle.dumps(images)) < 500
    copy = pickle.loads(data := pickle.dumps(images.index))
    assert copy.read(7) == images.index.read(7) and len(copy) == 12
    assert copy.read(-1)[1] == "emu/3.jpg" and copy.read(0)[1] == "cat/0.jpg"
    os.utime(images.index.file.name)
    assert len(pickle.loads(data)) == 12
    (tmp_path / "tars" / "1.tar").write_bytes(tar_bytes(IMAGES[:1]))
    assert len(ShardDataset([str(tmp_path / "tars")])) == 9 and images.index.read(7)[1] == "dog/3.jpg"
    with pytest.raises(DataError, match="another command has rebuilt it"):
        pickle.loads(data)


def look_up(images, count):
    """(resident, private) bytes that a forked process has more after `count` look-ups."""
    def measure():
        text = Path("/proc/self/smaps_rollup").read_text()
        return np.array([1024 * int(re.search(f"{name}: *([0-9]+)", text)[1]) for name in ("Rss", "Private_Dirty")])
    rng, before = np.random.default_rng(os.getpid()), measure()
    for i in rng.integers(0, len(images), count):
        member, key = images.read(i)
        assert key.endswith(f"{i:012}.jpg") and member["method"] == archives.PATH
    return measure() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from Linux's /proc")
def test_memory_of_forked_readers_does_not_grow(tmp_path):
    """A list of as many strings is copied page by page where their reference counts change: 30 MB in the same test."""
    (tmp_path / "a.txt").write_text("".join(f"{'folder/' * 10}{i:012}.jpg\n" for i in range(200_000)))
    index = open_index([str(tmp_path / "a.txt")])
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
        for resident, private in executor.map(look_up, [index] * 2, [30_000] * 2):
            assert resident < 3e6 and private < 2e6


# ---- URLs ----

class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges; `server.drop` connections are closed in mid-answer."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        first, last = (int(match[1]), min(int(match[2] or len(data)), len(data) - 1)) if match else (0, len(data) - 1)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        self.send_header("ETag", str(path.stat().st_mtime_ns))
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.sent += last + 1 - first
        self.server.requests += 1
        if self.server.drop > 0:
            self.server.drop -= 1
            self.wfile.write(data[first:(first + last) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[first:last + 1])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    handler = partial(RangeHandler, directory=tmp_path / "served")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.drop, server.sent, server.requests, server.ranges, server.daemon_threads = 0, 0, 0, True, True
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_tars_at_urls(tmp_path, server, monkeypatch):
    monkeypatch.setattr(archives, "URL_TRIES", 3)
    folder = make_folder(tmp_path)
    for i in range(2):
        (tmp_path / "served" / f"{i}.tar").write_bytes(tar_bytes(IMAGES[6 * i:6 * i + 6]))
    source = server.url + "/{0..1}.tar"
    images = ShardDataset([source], num_workers=1)
    assert read_all(images) == read_all(ImageFolder(str(folder)))
    server.sent = server.requests = 0
    images = ShardDataset([source])
    images[7]
    assert server.requests == 2 and server.sent == images.index.members["size"][[0, 7]].sum()  # that of __init__, and 7
    server.drop = 2
    assert read_all(images)[3][0] == read_all(ImageFolder(str(folder)))[3][0] and server.drop == 0
    server.drop = 10**6
    with pytest.raises(DataError, match="3 tries failed, the last: ") as error:  # ends the run
        images[2]
    assert "\n" not in str(error.value)
    server.drop = 0
    for i in range(2):
        (tmp_path / "served" / f"{i}.tar").write_bytes(tar_bytes(IMAGES[:4 + i]))
    images = ShardDataset([source], num_workers=2)  # the changed shards are scanned again
    loader = DataLoader(images, batch_size=3, num_workers=2, collate_fn=read_all)
    assert sum(loader, []) == read_all(images) and len(images) == 9


@pytest.mark.slow
def test_loaders_of_any_start_method(tmp_path):
    """Forked workers share the files, spawned ones open them."""
    images = ShardDataset([str(make(tmp_path)) for make in (make_tars, make_binary_parquet, make_zip)])
    expected = read_all(images)
    for method in ("fork", "spawn"):
        loader = DataLoader(images, batch_size=5, num_workers=2, collate_fn=read_all, multiprocessing_context=method)
        assert sum(loader, []) == expected, method


def test_urls_that_fail(tmp_path, server, monkeypatch):
    monkeypatch.setattr(archives, "URL_TRIES", 3)
    (tmp_path / "served" / "a.tar").write_bytes(tar_bytes(IMAGES))
    for url, message in ((f"{server.url}/b.tar", "3 tries failed, the last: FileNotFoundError"),
                         (f"{server.url}/a.zip", "unknown kind of shard"),
                         ("nonsense://a/b.tar", "nonsense://a/b.tar: Protocol not known: nonsense"),
                         ("http://127.0.0.1:9/a.tar", "3 tries failed, the last: ")):
        with pytest.raises(DataError, match=message) as error:
            ShardDataset([url])
        assert "\n" not in str(error.value)
    server.drop = 10**6
    with pytest.raises(DataError, match="a.tar: 3 tries failed"):
        ShardDataset([f"{server.url}/a.tar"])
    server.drop = 0
    assert len(ShardDataset([f"{server.url}/a.tar"])) == 12  # a scan that failed leaves no index
    server.ranges = False
    (tmp_path / "served" / "b.tar").write_bytes(tar_bytes(IMAGES))
    with pytest.raises(DataError, match="b.tar: the server does not support range requests"):
        ShardDataset([f"{server.url}/b.tar"])
