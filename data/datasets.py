"""Images in: what `--data_path` can name, and how a file becomes a correct RGB picture.

    data = open_data("/data/imagenet")      # train/ and val/ with one folder per class
    data = open_data("/photos")             # any tree of pictures; no labels needed
    data = open_data("cifar10:/root")       # a torchvision set by name, downloaded there if missing
    data = open_data("shapes")              # generated pictures with labels and masks; no file needed
    image, label = data.train[0]            # PIL image in RGB, class index or -1

Indexing raises `Unreadable` for a file that cannot be decoded; whoever iterates decides. This file needs
torch, torchvision and Pillow.
"""

import inspect
import os
from typing import NamedTuple

import torch
import torchvision

from data.images import EXTENSIONS, ImageReadError, check_aspect, read_image, to_rgb, wrap_decode_errors
from data.shapes import Shapes


class DataError(ValueError):
    """No usable data where it was looked for; the message names the place and what would be right."""


class Data(NamedTuple):
    """Pictures to train on, and two labelled parts to judge features with (None where there are no labels)."""

    train: object
    train_labeled: object  # labeled images that features are compared with
    val: object  # labeled images to evaluate on
    path: str  # what was opened, so that any folder can open it again
    note: str  # one line on where the parts come from


# ---- what --data_path can name ----

def open_data(data_path, download=True):
    """Open the pictures that `data_path` names.

    Args:
        download: whether a torchvision set may be fetched to its ROOT; not for a name that a file gave.

    Raises:
        DataError: nothing usable is there.
    """
    name, _, argument = data_path.partition(":")
    if os.path.exists(data_path):
        return open_folder(data_path)
    if name == "shapes":
        return open_shapes(argument)
    if argument:
        return open_torchvision(name, argument, download)
    raise DataError(f"{data_path}: no such folder, torchvision set (NAME:ROOT) or 'shapes'")


def open_folder(root):
    """A tree of pictures; `train` with `val` or `test` beside it is recognised, from within and from above."""
    root = os.path.abspath(root)
    parent = os.path.dirname(root) if os.path.basename(root) == "train" else root
    train_root = os.path.join(parent, "train")
    held_out = [path for part in ("val", "test") if os.path.isdir(path := os.path.join(parent, part))]
    if not (held_out and os.path.isdir(train_root)):
        train_root, held_out = root, []
    train = ImageFolder(train_root)
    if train.classes is None:
        return Data(train, None, None, root, f"{len(train):,} pictures in {train_root}, no labels")
    note = f"{len(train):,} pictures of {len(train.classes)} classes in {train_root}"
    for test_root in held_out:
        test = ImageFolder(test_root)
        if test.classes == train.classes:
            return Data(train, train, test, root, f"{note}, {len(test):,} held out in {test_root}")
        note += f"; {test_root} has other classes"
    return Data(train, *hold_out_every_tenth(train), root, f"{note}; k-NN asks every tenth about the others")


def hold_out_every_tenth(images):
    """Two parts of one labelled set: nine tenths to look labels up in, every tenth to ask about."""
    every_tenth = range(0, len(images), 10)
    others = [i for i in range(len(images)) if i % 10]
    return torch.utils.data.Subset(images, others), torch.utils.data.Subset(images, every_tenth)


class ImageFolder(torch.utils.data.Dataset):
    """All pictures below a folder, in sorted order; the folders directly below it are the classes.

    Without at least two such folders, or with pictures beside them, there are no labels: each is -1. Names
    that begin with a dot are passed over.
    """

    def __init__(self, root):
        if not os.path.isdir(root):
            raise DataError(f"{root}: no such folder")
        self.root = root
        self.files = sorted(os.path.relpath(os.path.join(folder, name), root)
                            for folder, names in walk(root) for name in names
                            if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        if not self.files:
            raise DataError(f"{root}: no picture found in it or below (looked for {' '.join(EXTENSIONS)})")
        tops = [file.partition(os.sep)[0] for file in self.files]
        labelled = len(set(tops)) > 1 and all(os.sep in file for file in self.files)
        self.classes = sorted(set(tops)) if labelled else None
        index = {name: i for i, name in enumerate(self.classes or [])}
        self.labels = [index.get(top, -1) for top in tops]
        self.require_one_readable()

    def require_one_readable(self):
        for i in range(len(self)):
            try:
                return self[i]
            except ImageReadError as error:
                last = error
        raise DataError(f"{self.root}: none of its {len(self)} pictures can be read; the last is {last}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.read_reduced(i)

    def read_reduced(self, i, reduction=None):
        """Picture i, reduced on the way (see open_rgb), and its label."""
        return read_image(os.path.join(self.root, self.files[i]), reduction), self.labels[i]


def walk(root):
    """(folder, names of files) of every folder below root, once each though links may lead to it again."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".")] if real not in seen else []
        if real not in seen:
            yield folder, names
        seen.add(real)


SPLITS = {"imagenet": ("train", "val"), "imagenette": ("train", "val"), "places365": ("train-standard", "val"),
          "oxfordiiitpet": ("trainval", "test")}  # where torchvision's parts are not named train and test


def open_torchvision(name, root, download=True):
    """A set of torchvision.datasets by its name in any case; its test part is held out."""
    known = {known.lower(): known for known in torchvision.datasets.__all__}
    if name.lower() not in known:
        raise DataError(f"{name}:{root}: torchvision has no set named {name!r}, and there is no such folder")
    kind = getattr(torchvision.datasets, known[name.lower()])
    accepted = inspect.signature(kind).parameters
    download = {"download": True} if download and "download" in accepted else {}
    if "train" in accepted:
        parts = [{"train": True}, {"train": False}]
    elif "split" in accepted:
        parts = [{"split": split} for split in SPLITS.get(name.lower(), ("train", "test"))]
    else:
        parts = [{}]
    try:
        train, *test = (TorchvisionDataset(kind(root, **part, **download)) for part in parts)
    except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
        raise DataError(f"{name}:{root}: torchvision cannot open it: {' '.join(str(error).split())}") from None
    path, note = f"{name}:{os.path.abspath(root)}", f"torchvision's {kind.__name__}: {len(train):,} pictures"
    if train[0][1] == -1:
        return Data(train, None, None, path, f"{note}, no labels that are classes")
    if test:
        return Data(train, train, test[0], path, f"{note}, {len(test[0]):,} held out")
    return Data(train, *hold_out_every_tenth(train), path, f"{note}; k-NN asks every tenth about the others")


class TorchvisionDataset(torch.utils.data.Dataset):
    """A torchvision set as (RGB image, class index)."""

    def __init__(self, images):
        self.images = images
        self.classes = getattr(images, "classes", None)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with wrap_decode_errors(f"{type(self.images).__name__} {i}"):
            image, label = self.images[i][:2]
            image = to_rgb(check_aspect(image))
        single = isinstance(label, int) or (isinstance(label, torch.Tensor) and label.numel() == 1)
        return image, int(label) if single else -1


def open_shapes(argument):
    """`shapes` or `shapes:SIZE`: 10,000 generated pictures of SIZE pixels (32), and 2,000 more held out."""
    if argument and not (argument.isdecimal() and 16 <= int(argument) <= 1024):
        raise DataError(f"shapes:{argument}: the side of the pictures must be a number of pixels from 16 to 1024")
    size = int(argument or 32)
    train, test = Shapes("train", 10_000, size), Shapes("test", 2_000, size)
    return Data(train, train, test, f"shapes:{size}", f"built-in shapes: {len(train):,} pictures of "
                f"{len(train.classes)} classes, {size} pixels, {len(test):,} held out")
