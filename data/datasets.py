"""Images in: what `--data_path` can name, and how a file becomes a correct RGB picture.

    data = open_data("/data/imagenet")      # train/ and val/ with one folder per class
    data = open_data("/photos")             # any tree of pictures; no labels needed
    data = open_data("cifar10:/root")       # a torchvision set by name, downloaded there if missing
    data = open_data("shapes")              # generated pictures with labels and masks; no file needed
    image, label = data.train[0]            # PIL image in RGB, class index or -1

Indexing raises `Unreadable` for a file that cannot be decoded; whoever iterates decides. This file needs
torch, torchvision and Pillow.
"""

import colorsys
import contextlib
import inspect
import math
import os
import random
import warnings
from typing import NamedTuple

import torch
import torchvision
from PIL import Image, ImageOps

EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoders that a file's content may ask for
MAX_ASPECT = 100  # longer side over shorter: the shorter is resized to the crop, and the longer grows with it


class DataError(ValueError):
    """No usable data where it was looked for; the message names the place and what would be right."""


class Unreadable(OSError):
    """One picture that cannot be decoded; the message names it and says why."""


class Data(NamedTuple):
    """Pictures to train on, and two labelled parts to judge features with (None where there are no labels)."""

    train: object
    bank: object
    queries: object
    path: str  # what was opened, so that any folder can open it again
    note: str  # one line on where the parts come from


# ---- pictures ----

def open_rgb(path, reduction=None, upright=True):
    """Decode a file as a person would see it: upright, in RGB, transparency on white.

    Args:
        reduction: (width, height) -> by what power of two the picture may be reduced; a JPEG is not decoded further.
        upright: False leaves it as it lies in the file, whatever EXIF says.

    Raises:
        Unreadable: the file is missing, damaged, not a picture, or too large or too long to be one.
    """
    with decoding(path):
        if not os.path.isfile(path):  # a pipe of that name would be waited for
            raise ValueError("not a file")
        with Image.open(path, formats=FORMATS) as image:
            width, height = picture(image).size
            factor = reduction(width, height) if reduction else 1
            image.draft(None, (width // factor, height // factor))  # a JPEG: to 1/8 at most, and never below these
            factor = factor * image.width // width
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
            return image.reduce(factor) if factor > 1 else image


@contextlib.contextmanager
def decoding(name):
    """Whatever goes wrong within becomes Unreadable, and so does a picture above twice Image.MAX_IMAGE_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # cameras have 108 million pixels
            yield
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise Unreadable(f"{name}: {error or type(error).__name__}") from None


def picture(image):
    """The image, if it has the form of a picture; raises ValueError if it is more of a line."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels is more of a line than a picture")
    return image


def to_rgb(image):
    """PIL image of any mode -> RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # deep grey, which Pillow's own conversion would clip at 255
        grey = image.convert("F")
        ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((top for top in ranges if grey.getextrema()[1] <= top), 65535)
        return grey.point(lambda value: value * (255 / white) + 0.5).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
    train = ImageTree(train_root)
    if train.classes is None:
        return Data(train, None, None, root, f"{len(train):,} pictures in {train_root}, no labels")
    note = f"{len(train):,} pictures of {len(train.classes)} classes in {train_root}"
    for test_root in held_out:
        test = ImageTree(test_root)
        if test.classes == train.classes:
            return Data(train, train, test, root, f"{note}, {len(test):,} held out in {test_root}")
        note += f"; {test_root} has other classes"
    return Data(train, *split_labels(train), root, f"{note}; k-NN asks every tenth about the others")


def split_labels(images):
    """Two parts of one labelled set: nine tenths to look labels up in, every tenth to ask about."""
    every_tenth = range(0, len(images), 10)
    others = [i for i in range(len(images)) if i % 10]
    return torch.utils.data.Subset(images, others), torch.utils.data.Subset(images, every_tenth)


class ImageTree(torch.utils.data.Dataset):
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
            except Unreadable as error:
                last = error
        raise DataError(f"{self.root}: none of its {len(self)} pictures can be read; the last is {last}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.open_reduced(i)

    def open_reduced(self, i, reduction=None):
        """Picture i, reduced on the way (see open_rgb), and its label."""
        return open_rgb(os.path.join(self.root, self.files[i]), reduction), self.labels[i]


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
        train, *test = (TorchvisionSet(kind(root, **part, **download)) for part in parts)
    except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
        raise DataError(f"{name}:{root}: torchvision cannot open it: {' '.join(str(error).split())}") from None
    path, note = f"{name}:{os.path.abspath(root)}", f"torchvision's {kind.__name__}: {len(train):,} pictures"
    if train[0][1] == -1:
        return Data(train, None, None, path, f"{note}, no labels that are classes")
    if test:
        return Data(train, train, test[0], path, f"{note}, {len(test[0]):,} held out")
    return Data(train, *split_labels(train), path, f"{note}; k-NN asks every tenth about the others")


class TorchvisionSet(torch.utils.data.Dataset):
    """A torchvision set as (RGB image, class index)."""

    def __init__(self, images):
        self.images = images
        self.classes = getattr(images, "classes", None)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with decoding(f"{type(self.images).__name__} {i}"):
            image, label = self.images[i][:2]
            image = to_rgb(picture(image))
        single = isinstance(label, int) or (isinstance(label, torch.Tensor) and label.numel() == 1)
        return image, int(label) if single else -1


# ---- the built-in pictures ----

def open_shapes(argument):
    """`shapes` or `shapes:SIZE`: 10,000 generated pictures of SIZE pixels (32), and 2,000 more held out."""
    if argument and not (argument.isdecimal() and 16 <= int(argument) <= 1024):
        raise DataError(f"shapes:{argument}: the side of the pictures must be a number of pixels from 16 to 1024")
    size = int(argument or 32)
    train, test = Shapes("train", 10_000, size), Shapes("test", 2_000, size)
    return Data(train, train, test, f"shapes:{size}", f"built-in shapes: {len(train):,} pictures of "
                f"{len(train.classes)} classes, {size} pixels, {len(test):,} held out")


class Shapes(torch.utils.data.Dataset):
    """Generated pictures: one to three objects of one hue on a ground, with label and mask.

    The class is the hue. Everything else is a nuisance drawn from (part, index) alone: number, outline,
    place, size, turn, stripes, shade, ground, light and noise. The mean colour of every picture is set to one
    drawn without regard to the class, so it says nothing about the label: only the objects against their
    ground do.

    Args:
        part: "train" or "test"; the two never share a picture.
        length: number of pictures.
        size: side, pixels.
    """

    classes = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")
    colors = [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(label / 8, 0.85, 0.85)) for label in range(8)]

    def __init__(self, part, length, size):
        self.part, self.length, self.size = part, length, size

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.render(i)[0], self.label(i)

    def label(self, i):
        return i % len(self.classes)

    def mask(self, i):
        """Where the objects are: bool [size, size]."""
        return self.render(i)[1]

    def render(self, i):
        """Picture i and its mask: RGB image of size x size, bool [size, size]."""
        if not 0 <= i < self.length:
            raise IndexError(f"picture {i} of {self.length}")
        rng = random.Random(f"shapes/{self.part}/{i}")
        axis = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        y, x = axis.view(-1, 1), axis.view(1, -1)  # the picture spans [-1, 1] both ways
        picture = (rng.uniform(0.2, 0.8) + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y).expand(3, -1, -1)
        mask = torch.zeros(self.size, self.size)
        for _ in range(rng.randint(1, 3)):
            dx, dy = x - rng.uniform(-0.7, 0.7), y - rng.uniform(-0.7, 0.7)
            inside = self.radius(rng, torch.atan2(dy, dx)) * rng.uniform(0.3, 0.5) - torch.hypot(dx, dy)
            cover = (inside * self.size / 2 + 0.5).clamp(0, 1)  # anti-aliased over one pixel
            turn = rng.uniform(0, math.pi)
            stripes = torch.sin(rng.uniform(4, 16) * (dx * math.cos(turn) + dy * math.sin(turn))) / 2 + 0.5
            hue = (self.label(i) + rng.uniform(-0.15, 0.15)) / len(self.classes)
            color = torch.tensor(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0)))
            picture = torch.lerp(picture, color.view(3, 1, 1) * (1 - rng.uniform(0.1, 0.6) * stripes), cover)
            mask = mask.maximum(cover)

        tint = torch.tensor([rng.uniform(0.35, 0.65) for _ in range(3)])
        picture = picture + (tint - picture.mean(dim=(1, 2))).view(3, 1, 1)  # the mean colour is now the tint
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        picture = picture + rng.uniform(0, 0.06) * torch.randn(picture.shape, generator=noise)
        pixels = (picture * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        return Image.frombytes("RGB", (self.size, self.size), pixels.numpy().tobytes()), mask > 0.5

    @staticmethod
    def radius(rng, angle):
        """Distance from centre to outline in each direction: a disc, triangle, square or star, turned at random."""
        corners = rng.choice((0, 3, 4, 5))
        if corners == 0:
            return torch.ones_like(angle)
        sector = 2 * math.pi / corners
        off = (angle + rng.uniform(0, sector)) % sector - sector / 2  # angle from the middle of a side
        if corners == 5:
            return 1.3 - 1.6 * off.abs() / sector
        return math.cos(sector / 2) / torch.cos(off) * {3: 1.5, 4: 1.25}[corners]


if __name__ == "__main__":
    data = open_data("shapes")
    print(data.note)
    for i in range(4):
        image, label = data.train[i]
        print(f"picture {i}: {image.mode} {image.size}, {data.train.classes[label]}, "
              f"object on {data.train.mask(i).float().mean():.0%} of it")
