"""Datasets by name: everything that --data_path accepts, as RGB images with labels.

    data = open_data("/data/imagenet")      # train/ and val/ with one folder per class
    data = open_data("/photos")             # any folder of images, labels not needed
    data = open_data("cifar10:/root")       # torchvision dataset, downloaded to /root if missing
    data = open_data("shapes")              # built-in generated images with labels and masks
    image, label = data.train[0]            # PIL image in RGB; class index, or -1 without labels

Indexing a corrupt image raises `ImageReadError`; data/loaders.py skips such images.
"""

import hashlib
import inspect
import os
import re
from typing import NamedTuple

import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data.folders import HELD_OUT, TRAIN, DataError, ImageFolder
from data.images import to_rgb, wrap_decode_errors
from data.shapes import Shapes


class Data(NamedTuple):
    """Images for training, and labeled splits for evaluation, which are None for data without labels.

    Where the data has no held-out split, every tenth training image is in `val`, and `train_labeled` is the rest.
    """

    train: Dataset  # all training images, with or without labels
    train_labeled: Dataset | None  # labeled training images: the reference of k-NN, the training set of classifiers
    val: Dataset | None  # labeled held-out images: accuracies are computed on these
    path: str  # absolute --data_path, valid from any working directory
    note: str  # "50,000 images of 10 classes in /data/train, 10,000 held out in /data/val"


def open_data(data_path: str, download: bool = True, output_dir: str | None = None,
              value_range: tuple[float, float] | None = None) -> Data:
    """Open the dataset that --data_path names.

    Args:
        download: allow torchvision to download; False for a data_path that comes from a file.
        output_dir: folder to which the command writes; not searched for images.
        value_range: black and white of images of more than 8 bits, see `ImageFolder`.

    Raises:
        DataError: there is no such dataset, or no image in it can be read.
    """
    name, _, argument = data_path.partition(":")
    if os.path.exists(data_path):
        return open_folder(data_path, output_dir, value_range)
    if name == "shapes":
        return open_shapes(argument)
    if argument:
        return open_torchvision(name, argument, download, value_range)
    raise DataError(f"{data_path}: no such folder, torchvision set (NAME:ROOT) or 'shapes'")


def data_name(data_path: str) -> str:
    """Name of a dataset for file names: cifar10 of cifar10:/data, shapes-96 of shapes:96, the folder of a path."""
    name, _, argument = data_path.partition(":")
    if argument and not os.path.exists(data_path):
        return f"{name}-{argument}" if argument.isdecimal() else name
    parent, name = os.path.split(os.path.abspath(data_path))
    return (os.path.basename(parent) if name.lower() in TRAIN else name)[:40] or "data"


def trained_data_path(args, info):
    """Path of the data that a model was trained on, "" if unknown or untrusted.

    A path in somebody else's model file is opened only if the user passes it.
    """
    path = str(info.get("data_path", ""))
    return path if not args.ckpt or re.fullmatch(r"shapes(:\d+)?", path) else ""


def hold_out_every_tenth(train, path, note):
    """Data of a labeled dataset without a held-out split."""
    val, rest = range(0, len(train), 10), [i for i in range(len(train)) if i % 10]
    return Data(train, Subset(train, rest), Subset(train, val), path, f"{note}, every tenth held out for evaluation")


# ---- folders ----

def open_folder(root, output_dir=None, value_range=None):
    """A folder of images; `train` beside `val` or the like is found whether root is that folder or the one above."""
    root = os.path.abspath(root)
    parent = os.path.dirname(root) if os.path.basename(root).lower() in TRAIN else root
    parts = {name.lower(): os.path.join(parent, name) for name in next(os.walk(parent), ("", [], []))[1]}
    held_out = [parts[name] for name in HELD_OUT if name in parts]
    train_root = parts.get("train", parts.get("training", root)) if held_out and parent == root else root
    held_out = held_out if train_root != parent else []  # they are not parts without one for training
    train = ImageFolder(train_root, output_dir, value_range=value_range)
    values = ", values {:g} (black) to {:g} (white)".format(*train.value_range) if train.value_range else ""
    if train.classes is None:
        note = f"{len(train):,} images in {train_root}{train.passed_over}{values}, no labels"
        return Data(train, None, None, root, ", not used: ".join([note, *held_out]))
    note = f"{len(train):,} images of {len(train.classes)} classes in {train_root}{train.passed_over}{values}"
    for path in held_out:
        try:
            val = ImageFolder(path, output_dir, train.classes, train.value_range)
            return Data(train, train, val, root, f"{note}, {len(val):,} held out in {path}{val.passed_over}")
        except DataError as error:
            note += f", not used: {error}"
    return hold_out_every_tenth(train, root, note)


def hash_images(images, samples=1000):
    """Number of images and, of a folder, SHA-256 of their paths below it and of the sizes of some: plain values."""
    if not isinstance(images, ImageFolder):
        return dict(num_images=len(images))
    digest = hashlib.sha256("\0".join(images.files).encode(errors="surrogateescape"))
    for file in images.files[::-(-len(images) // samples)]:  # not of all, which takes minutes on a network disk
        digest.update(b"%d " % os.path.getsize(os.path.join(images.root, file)))
    return dict(num_images=len(images), sha256=digest.hexdigest())


# ---- torchvision and built-in shapes ----

SPLITS = {"imagenet": ("train", "val"), "imagenette": ("train", "val"), "places365": ("train-standard", "val"),
          "oxfordiiitpet": ("trainval", "test")}  # where torchvision's splits are not train and test


def open_torchvision(name, root, download=True, value_range=None):
    """A dataset of torchvision.datasets by its case-insensitive name; its test split is held out."""
    path, known = f"{name}:{os.path.abspath(root)}", {known.lower(): known for known in torchvision.datasets.__all__}
    if name.lower() not in known:
        raise DataError(f"{name}:{root}: torchvision has no dataset {name!r}, and there is no such folder")
    kind = getattr(torchvision.datasets, known[name.lower()])
    accepted = inspect.signature(kind).parameters
    flags = {"download": True} if download and "download" in accepted else {}
    splits = [{}]
    if "train" in accepted:
        splits = [{"train": True}, {"train": False}]
    elif "split" in accepted:
        splits = [{"split": split} for split in SPLITS.get(name.lower(), ("train", "test"))]
    try:
        train, *val = (TorchvisionDataset(kind(root, **split, **flags), value_range) for split in splits)
    except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
        raise DataError(f"{name}:{root}: torchvision cannot open it: {' '.join(str(error).split())}") from None
    note = f"{len(train):,} images of torchvision's {kind.__name__}"
    if train[0][1] == -1:
        return Data(train, None, None, path, f"{note}, no class labels")
    if val:
        return Data(train, train, val[0], path, f"{note}, {len(val[0]):,} held out")
    return hold_out_every_tenth(train, path, note)


class TorchvisionDataset(Dataset):
    """A torchvision dataset as (RGB image, class index, or -1 if its targets are not single classes)."""

    def __init__(self, images: Dataset, value_range: tuple[float, float] | None = None):
        self.images, self.classes, self.value_range = images, getattr(images, "classes", None), value_range

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with wrap_decode_errors(f"{type(self.images).__name__} {i}"):
            image, label = self.images[i][:2]
            image = to_rgb(image, self.value_range)
        is_class = isinstance(label, int) or (isinstance(label, Tensor) and label.numel() == 1)
        return image, int(label) if is_class else -1


def open_shapes(argument):
    """`shapes` or `shapes:SIZE`: 10,000 generated images of SIZE (32) pixels, and 2,000 held out."""
    if argument and not (argument.isdecimal() and 16 <= int(argument) <= 1024):
        raise DataError(f"shapes:{argument}: SIZE must be an integer from 16 to 1024 pixels")
    size = int(argument or 32)
    train, val = Shapes("train", 10_000, size), Shapes("test", 2_000, size)
    return Data(train, train, val, f"shapes:{size}", f"built-in shapes: {len(train):,} images of {len(train.classes)} "
                f"classes, {size} pixels, {len(val):,} held out")
