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
from collections import Counter
from typing import NamedTuple

import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data.images import DECODERS, find_common_range, is_image, read_image, read_or_message, to_rgb, wrap_decode_errors
from data.shapes import Shapes


class DataError(ValueError):
    """Missing or unusable data; the message names the path and what was expected there."""


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

TRAIN, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "dev", "test", "testing")  # in lower case
SYSTEM_FOLDERS = ("@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "lost+found", "__macosx")
OUTPUT_ENDINGS = (  # of infer.py, retrieve.py and visualize.py
    ".attention.png", ".nearest.png", ".crops.png", ".features.png", ".embedding.png", ".thumbnails.png")


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


class ImageFolder(Dataset):
    """All images below a folder, sorted by path; its direct subfolders are the classes.

    There are no labels (-1 for every image) if images lie outside of subfolders, in fewer than two of them, or only in
    some that are named like parts of a dataset (train, test). Hidden files and folders, folders of systems and runs,
    files that are no images, and outputs of other commands are skipped and counted in `passed_over`.

    Args:
        output_dir: folder to which the command writes; not searched.
        classes: the classes, if they are those of another folder; this one may lack some, but have no others.
        value_range: black and white of images of more than 8 bits (see `read_image`); None to find one for all of them.

    Raises:
        DataError: no such folder, no images in it, none that can be read, some outside of the given classes, or
            outputs would be written among them.
    """

    def __init__(self, root: str, output_dir: str | None = None, classes: list[str] | None = None,
                 value_range: tuple[float, float] | None = None):
        if output_dir and os.path.realpath(output_dir) == os.path.realpath(root):
            raise DataError(f"{root}: outputs would be written among the images, choose another --output_dir")
        self.root, self.files = root, sorted(iter_images(root, passed_over := Counter(), output_dir))
        self.passed_over = describe_passed_over(passed_over)
        if not self.files:
            raise DataError(f"{root}: no such folder, or no image found in it or below{self.passed_over}")
        self.value_range = value_range or find_common_range(root, self.files)
        folders = [file[:max(file.find(os.sep), 0)] for file in self.files]  # "" for images outside of subfolders
        names = sorted(set(folders))
        if not classes and len(names) > 1 and names[0] and set(map(str.lower, names)) - {*TRAIN, *HELD_OUT}:
            classes = names
        elif classes and not set(names) <= set(classes):
            raise DataError(f"{root}: holds images outside of the folders of the training classes")
        self.classes, class_index = classes, {name: i for i, name in enumerate(classes or [])}
        self.labels = [class_index.get(name, -1) for name in folders]
        if all(isinstance(last := read_or_message(self.__getitem__, i), str) for i in range(len(self))):
            raise DataError(f"{root}: none of its {len(self)} images can be read; the last: {last}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.read_reduced(i)

    def read_reduced(self, i, reduction=None):
        """Image i, downsampled while decoding by `reduction` (see read_image), and its label."""
        path = os.path.join(self.root, self.files[i])
        return read_image(path, reduction, value_range=self.value_range), self.labels[i]


def iter_images(root, passed_over, output_dir=None):
    """Yield the path of each image below root, relative to it, and count what is passed over: {kind: number}."""
    for parent, names in walk_folders(root, passed_over, output_dir):
        for name in names:
            path, is_output = os.path.join(parent, name), name.lower().endswith(OUTPUT_ENDINGS)
            if not name.startswith(".") and not is_output and is_image(path):
                yield os.path.relpath(path, root)
            else:
                ending = "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without ending"
                passed_over["output(s) of other commands" if is_output else ending] += 1


def walk_folders(root, passed_over, output_dir):
    """Yield (folder, names of its files) for root and all below.

    Links to folders are followed after the others, so that images keep their own path, and not to where root lies in.
    """
    home, starts, seen = os.path.realpath(root), [root], {os.path.realpath(output_dir)} if output_dir else set()
    for start in starts:  # root, then links
        for parent, folders, names in os.walk(start, True, lambda _: passed_over.update(["unreadable folder(s)"]),
                                              followlinks=True):
            real = os.path.realpath(parent)
            if real in seen or home.startswith(os.path.join(real, "")):
                folders.clear()
                continue
            seen.add(real)
            kept = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)
                    if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS
                    and not os.path.isfile(os.path.join(parent, name, "log.jsonl"))}  # a run, which may hold plots
            passed_over.update(f"{name}/" for name in folders if name not in kept)
            folders[:] = [name for name, path in kept.items() if path == os.path.join(real, name)]
            starts += [os.path.join(parent, name) for name in kept if name not in folders]
            yield parent, names


def describe_passed_over(counts):
    """" (passed over 102: 100 .heic, 2 hidden)", the most frequent kinds first; "" if there is nothing."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(8))
    hint = "; pip install pillow-heif for .heic" * (".heic" in counts and "HEIF" not in DECODERS)
    return f" (passed over {counts.total():,}: {kinds}{hint})" if counts else ""


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
