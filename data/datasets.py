"""Datasets by name: everything that --data_path accepts, as RGB images with labels.

    data = open_data("/data/imagenet")      # train/ and val/ with one folder per class
    data = open_data("/photos")             # any folder of images, labels not needed
    data = open_data("cifar10:/root")       # torchvision dataset, downloaded to /root if missing
    data = open_data("shapes")              # built-in generated images with labels and masks
    data = open_data("/data/train-{0000..1023}.tar")    # shards, see data/shards.py
    data = open_data(["/photos", "/more"])  # one after the other, classes united by name
    image, label = data.train[0]            # PIL image in RGB; class index, or -1 without labels

Indexing a corrupt image raises `ImageReadError`; data/loaders.py skips such images.
"""

import bisect
import hashlib
import inspect
import itertools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data.archives import is_url
from data.folders import HELD_OUT, TRAIN, DataError, ImageFolder, are_parts, describe_paths, stat_file
from data.images import to_rgb, wrap_decode_errors
from data.shapes import Shapes
from data.shards import ShardDataset, is_source, split_parts

SHAPES = r"shapes(:\d+)?"  # the only data that is opened, or published as it is, because a model file names it


class Data(NamedTuple):
    """Images for training, and labeled splits for evaluation, which are None for data without labels.

    Where the data has no held-out split, every tenth training image is in `val`, and `train_labeled` is the rest.
    """

    train: Dataset  # all training images, with or without labels
    train_labeled: Dataset | None  # labeled training images: the reference of k-NN, the training set of classifiers
    val: Dataset | None  # labeled held-out images: accuracies are computed on these
    path: str | list[str]  # absolute --data_path, valid from any working directory
    note: str  # "50,000 images of 10 classes in /data/train, 10,000 held out in /data/val"


def open_data(data_path: str | Sequence[str], download: bool = True, output_dir: str | None = None,
              value_range: tuple[float, float] | None = None, val_path: str | Sequence[str] | None = None,
              cache_dir: str | None = None, channels: int | None = None) -> Data:
    """Open the dataset that --data_path names.

    Args:
        data_path: one, or several to be concatenated.
        download: allow torchvision to download; False for a data_path that comes from a file.
        output_dir: folder to which the command writes; not searched for images.
        value_range: black and white of images of more than 8 bits, see `ImageFolder`.
        val_path: held-out images in folders or shards, in place of those that are found beside the others.
        cache_dir: folder for the indices of shards, see data/shards.py.
        channels: of folders and shards whose images are read as tensors, see `read_image`; None: RGB.

    Raises:
        DataError: there is no such dataset, or no image in it can be read.
    """
    parts, ranges = [], {}
    for paths in group_shards(data_path):
        parts.append(open_paths(paths, download, output_dir, value_range, cache_dir, channels, not val_path))
        if found := getattr(parts[-1].train, "value_range", None):
            ranges.setdefault(tuple(found), describe_paths(paths))
    if len(ranges) > 1:
        found = " and ".join(f"{low:g} to {high:g} in {where}" for (low, high), where in ranges.items())
        raise DataError(f"the images have values of {found}: set their black and white by --value_range LOW HIGH")
    value_range = value_range or next(iter(ranges), None)
    data = concatenate(parts) if len(parts) > 1 else parts[0]
    if val_path:
        classes = getattr(data.train, "classes", None)
        if not classes:
            raise DataError(f"--val_path {describe_paths(val_path)}: the training images have no labels")
        options = dict(classes=classes, value_range=value_range, channels=channels)
        val = [keep_labeled(open_images(paths, output_dir, cache_dir, **options)) for paths in group_shards(val_path)]
        val = ConcatImages(val, [classes] * len(val), classes) if len(val) > 1 else val[0]
        return data._replace(val=val, note=f"{data.note}, {len(val):,} held out in {describe_paths(val_path)}")
    if data.train_labeled is None or data.val is not None:
        return data
    labeled = data.train_labeled
    return data._replace(
        train_labeled=Subset(labeled, np.flatnonzero(np.arange(len(labeled)) % 10)),
        val=Subset(labeled, range(0, len(labeled), 10)),
        note=f"{data.note}, every tenth held out for evaluation")


def open_paths(paths, download, output_dir, value_range, cache_dir, channels, find_held_out):
    """Data of one path, or of several shards."""
    name, _, argument = paths[0].partition(":")
    if os.path.exists(paths[0]) or is_source(paths[0]):
        return open_files(paths, output_dir, value_range, cache_dir, channels, find_held_out)
    if channels:
        raise DataError(f"{paths[0]}: no folder or shard, where images of {channels} channel(s) must be")
    if is_shapes(paths[0]):
        return open_shapes(argument)
    if argument:
        return open_torchvision(name, argument, download, value_range)
    raise DataError(f"{paths[0]}: no such folder, shard, torchvision set (NAME:ROOT) or 'shapes'")


def is_shapes(path):
    """Whether a path names the built-in images, shapes[:PIXELS], and no file or folder."""
    return str(path).partition(":")[0] == "shapes" and not os.path.exists(path)


def data_name(data_path: str | Sequence[str]) -> str:
    """Name of a dataset for file names: cifar10 of cifar10:/data, shapes-96 of shapes:96, the folder of a path."""
    if not isinstance(data_path, str):
        return f"{data_name(data_path[0])}+{len(data_path) - 1}"
    name, _, argument = data_path.partition(":")
    if argument and not os.path.exists(data_path) and not is_url(data_path):
        return f"{name}-{argument}" if argument.isdecimal() else name
    parent, name = os.path.split(os.path.abspath(data_path))
    if not os.path.isdir(data_path) and is_source(data_path):
        name = re.split(r"[{.]", name)[0].rstrip("-_")
    return (os.path.basename(parent) if name.lower() in TRAIN else name)[:40] or "data"


def trained_data_path(args, info):
    """Path of the data that a model was trained on, "" if unknown or untrusted.

    A path in somebody else's model file is opened only if the user passes it.
    """
    path = info.get("data_path") or ""
    return path if not args.ckpt or re.fullmatch(SHAPES, str(path)) else ""


def trained_val_path(args, info):
    """Path of the held-out data of the newest run, unless the user names data or a model."""
    return args.val_path or (None if args.data_path or args.ckpt else info.get("val_path"))


def open_data_of_model(args, info, ckpt, what="images", default="", output_dir=None):
    """Data that --data_path names, or that a model was trained on, read as the model takes it.

    Args:
        info: description of the model, see `open_backbone`.
        what: the images are for, in the message.
        default: data of a model whose own are unknown or untrusted.
        output_dir: see `open_data`.

    Raises:
        DataError: see `open_data`, or no data are known.
    """
    data_path = args.data_path or trained_data_path(args, info) or default
    if not data_path:
        raise DataError(f"{ckpt}: trained on {info.get('data_path') or 'unknown data'}; name {what} with --data_path")
    return open_data(data_path, bool(args.data_path), output_dir, info.get("value_range"), trained_val_path(args, info),
                     args.cache_dir, info["channels"])


def make_absolute(paths):
    """One path, or several, as valid from any working directory."""
    if isinstance(paths, str):
        return paths if is_url(paths) else os.path.abspath(paths)
    return [*map(make_absolute, paths)]


# ---- several datasets as one, and parts of one ----

def group_shards(paths):
    """One or several paths -> lists of one, or of consecutive shards in one folder, as a shell makes of a pattern."""
    def key(item):
        number, path = item
        is_shard = is_url(path) or (os.path.isfile(path) and is_source(path))
        return (os.path.dirname(path), os.path.splitext(path)[1].lower()) if is_shard else number
    paths = [paths] if isinstance(paths, str) else paths
    return [[path for _, path in group] for _, group in itertools.groupby(enumerate(paths), key)]


def concatenate(parts):
    """One Data of several, with their classes united by name; what has no names of classes has no labels."""
    names = [getattr(part.train, "classes", None) for part in parts]
    classes = list(dict.fromkeys(itertools.chain.from_iterable(filter(None, names))))

    def join(split):
        kept = [(getattr(part, split), own) for part, own in zip(parts, names)]
        kept = [(images, own) for images, own in kept if images is not None and (own or split == "train")]
        return ConcatImages(*zip(*kept), classes) if kept else None

    train, is_whole = join("train"), all(part.train is part.train_labeled for part in parts)
    paths = [path for part in parts for path in ([part.path] if isinstance(part.path, str) else part.path)]
    note = "; ".join(part.note for part in parts) + f"; {len(classes)} classes in all" * bool(classes)
    return Data(train, train if is_whole and classes else join("train_labeled"), join("val"), paths, note)


class ConcatImages(Dataset):
    """Several datasets, one after the other, with one list of classes.

    Args:
        parts: datasets.
        part_classes: for each, the names of its classes, None for one without labels.
        classes: all names.
    """

    def __init__(self, parts, part_classes, classes):
        number = {name: i for i, name in enumerate(classes)}
        self.parts, self.ends = parts, [*itertools.accumulate(map(len, parts))]
        self.class_maps = [[*(number[name] for name in own), -1] if own else None for own in part_classes]
        self.classes = classes or None
        self.value_range = next(filter(None, (getattr(part, "value_range", None) for part in parts)), None)

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        return self.read_reduced(i)

    def find(self, i):
        """Number of the part that image i is in, and its index there."""
        i = range(len(self))[i]
        part = bisect.bisect_right(self.ends, i)
        return part, i - self.ends[part] + len(self.parts[part])

    def read_reduced(self, i, reduction=None):
        """Image i, downsampled while decoding by `reduction` (see read_image) where its dataset can, and its label."""
        part, i = self.find(i)
        image, label = read_reduced(self.parts[part], i, reduction)
        return image, self.class_maps[part][label] if self.class_maps[part] else -1

    def name(self, i):
        part, i = self.find(i)
        return name_image(self.parts[part], i)

    def stat(self, i):
        """List of plain values that changes when image i does; [] if it has no file."""
        part, i = self.find(i)
        return self.parts[part].stat(i) if hasattr(self.parts[part], "stat") else []


def keep_labeled(images):
    """The images of a dataset that have labels."""
    return Subset(images, np.flatnonzero(images.labels >= 0)) if getattr(images, "unlabeled", 0) else images


def read_reduced(images, i, reduction=None):
    """Image i of any dataset, downsampled by `reduction`, while decoding if its dataset can, and its label."""
    while isinstance(images, Subset):
        images, i = images.dataset, images.indices[i]
    if hasattr(images, "read_reduced"):
        return images.read_reduced(i, reduction)
    image, label = images[i]
    factor = reduction(*image.size) if reduction else 1
    return image.reduce(factor) if factor > 1 else image, label


def name_image(images, i):
    """Path of image i of any dataset; its index in one that has no files."""
    while isinstance(images, Subset):
        images, i = images.dataset, images.indices[i]
    return images.name(i) if hasattr(images, "name") else i


# ---- folders and shards ----

def open_images(paths, output_dir=None, cache_dir=None, **options):
    """One folder of images, or shards, as a dataset; for the options see `ImageFolder` and `ShardDataset`."""
    if is_source(paths[0]):
        return ShardDataset(paths, cache_dir, **options)
    return ImageFolder(paths[0], output_dir, **options)


def open_files(paths, output_dir=None, value_range=None, cache_dir=None, channels=None, find_held_out=True):
    """A folder of images, or shards; `train` beside `val` or the like is found whether the path is `train` or above."""
    paths = make_absolute(paths)
    root, held_out, num_others, options = paths[0], [], 0, dict(value_range=value_range, channels=channels)
    if os.path.isdir(root):
        parent = os.path.dirname(root) if os.path.basename(root).lower() in TRAIN else root
        parts = {name.lower(): os.path.join(parent, name) for name in next(os.walk(parent), ("", [], []))[1]}
        held_out = [[parts[name]] for name in HELD_OUT if name in parts]
        has_parts = held_out or are_parts(name for name in parts if name[0] != ".")  # --val_path may be elsewhere
        train_root = parts.get("train", parts.get("training", root)) if has_parts and parent == root else root
        held_out = held_out if train_root != parent else []  # they are not parts without one for training
        paths = [train_root]
    if is_source(paths[0]) and not held_out:
        options["part"], held_out, num_others = split_parts(paths)
    train = open_images(paths, output_dir, cache_dir, **options)
    values = ", values {:g} (black) to {:g} (white)".format(*train.value_range) if train.value_range else ""
    others = f" ({num_others} other shards not used)" if num_others else ""
    where, path = f"{describe_paths(paths)}{train.passed_over}{others}{values}", paths if len(paths) > 1 else root
    if train.classes is None:
        note = f"{len(train):,} images in {where}, no labels"
        return Data(train, None, None, path, ", not used: ".join([note, *map(describe_paths, held_out)]))
    labeled, note = keep_labeled(train), f"{len(train):,} images of {len(train.classes)} classes in {where}"
    for other in held_out if find_held_out else ():
        try:
            val = open_images(other, output_dir, cache_dir, classes=train.classes, value_range=train.value_range,
                              channels=channels)
        except DataError as error:
            note += f", not used: {error}"
        else:
            note += f", {len(val):,} held out in {describe_paths(other)}{val.passed_over}"
            return Data(train, labeled, keep_labeled(val), path, note)
    return Data(train, labeled, None, path, note)


def hash_images(images, samples=1000):
    """Number of images and, of folders and shards, SHA-256 of the names of files and of the sizes of some.

    Of a Subset, the SHA-256 of all images.
    """
    count = len(images)
    while isinstance(images, Subset):
        images = images.dataset
    digest = hashlib.sha256()
    for part in getattr(images, "parts", [images]):
        if isinstance(part, ImageFolder):
            sample = range(0, len(part), -(-len(part) // samples))  # of all it takes minutes on a network disk
            names, sizes = part.files, [size for i in sample for size in stat_file(part.name(i))[:1]]
        elif isinstance(part, ShardDataset):
            names, sizes = ([shard[key] for shard in part.index.shards] for key in ("path", "size"))
            names = map(os.path.basename, names)
        else:
            return dict(num_images=count)
        digest.update("\0".join(names).encode(errors="surrogateescape") + b"".join(b"%d " % size for size in sizes))
    return dict(num_images=count, sha256=digest.hexdigest())


# ---- torchvision and built-in shapes ----

SPLITS = {"imagenet": ("train", "val"), "imagenette": ("train", "val"), "places365": ("train-standard", "val"),
          "oxfordiiitpet": ("trainval", "test")}  # where torchvision's splits are not train and test


def open_torchvision(name, root, download=True, value_range=None):
    """A dataset of torchvision.datasets by its case-insensitive name; its test split is held out."""
    path, known = f"{name}:{os.path.abspath(root)}", {known.lower(): known for known in torchvision.datasets.__all__}
    if name.lower() not in known:
        raise DataError(f"{name}:{root}: torchvision has no dataset {name!r}, and there is no such folder")
    kind = getattr(torchvision.datasets, known[name.lower()])
    accepted = {name for base in kind.__mro__ for name in inspect.signature(base).parameters
                if issubclass(base, torchvision.datasets.MNIST) or base is kind}  # QMNIST passes some of MNIST's on
    flags = {"download": True} if download and "download" in accepted else {}
    splits = [{}]
    if "train" in accepted:
        splits = [{"train": True}, {"train": False}]
    elif "split" in accepted:
        splits = [{"split": split} for split in SPLITS.get(name.lower(), ("train", "test"))]
    try:
        train, *val = (TorchvisionDataset(kind(root, **split, **flags), value_range) for split in splits)
        count, has_labels = len(train), train[0][1] != -1
    except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
        raise DataError(f"{name}:{root}: torchvision cannot open it: {' '.join(str(error).split())}") from None
    note = f"{count:,} images of torchvision's {kind.__name__}"
    if not has_labels:
        return Data(train, None, None, path, f"{note}, no class labels")
    if val:
        return Data(train, train, val[0], path, f"{note}, {len(val[0]):,} held out")
    return Data(train, train, None, path, note)


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
