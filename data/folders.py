"""Images below a folder, with its direct subfolders as classes, what else lies there is counted; or a list of files.

    images = ImageFolder("/data/imagenet/train")
    image, label = images[0]                        # PIL image in RGB; class index, or -1 without labels
    image, _ = ImageFiles(paths, boxes)[0]          # cropped to its box
"""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from data.images import (
    DECODERS,
    ImageReadError,
    find_common_range,
    is_image,
    open_image,
    read_image,
    read_or_message,
)

TRAIN, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "dev", "test", "testing")  # in lower case
SYSTEM_FOLDERS = ("@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "lost+found", "__macosx")
OUTPUT_ENDINGS = (  # of infer.py, retrieve.py and visualize.py
    ".attention.png", ".nearest.png", ".crops.png", ".features.png", ".embedding.png", ".thumbnails.png")


class DataError(ValueError):
    """Missing or unusable data; the message names the path and what was expected there."""


class ImageFolder(Dataset):
    """All images below a folder, sorted by path; its direct subfolders are the classes.

    There are no labels (-1 for every image) if images lie outside of subfolders, in fewer than two of them, or only in
    some that are named like parts of a dataset (train, test). Hidden files and folders, folders of systems and runs,
    files that are no images, and outputs of other commands are skipped and counted in `passed_over`.

    Args:
        output_dir: folder to which the command writes; not searched.
        classes: the classes, if they are those of another folder; this one may lack some, but have no others.
        value_range: black and white of images of more than 8 bits (see `read_image`); None to find one for all of them.
        channels: see `read_image`.

    Raises:
        DataError: no such folder, no images in it, none that can be read, some outside of the given classes, or
            outputs would be written among them.
    """

    def __init__(self, root: str, output_dir: str | None = None, classes: list[str] | None = None,
                 value_range: tuple[float, float] | None = None, channels: int | None = None):
        if output_dir and os.path.realpath(output_dir) == os.path.realpath(root):
            raise DataError(f"{root}: outputs would be written among the images, choose another --output_dir")
        self.root, files = root, sorted(iter_images(root, passed_over := Counter(), output_dir, channels))
        self.passed_over = describe_passed_over(passed_over)
        if not files:
            raise DataError(f"{root}: no such folder, or no image found in it or below{self.passed_over}")
        folders = [file[:max(file.find(os.sep), 0)] for file in files]  # "" for images outside of subfolders
        names = sorted(set(folders))
        if not classes and len(names) > 1 and names[0] and not are_parts(names):
            classes = names
        elif classes and not set(names) <= set(classes):
            raise DataError(f"{root}: {compare_classes(names, classes)}")
        self.classes, class_index = classes, {name: i for i, name in enumerate(classes or [])}
        self.files, self.labels = PathTable(files), np.array([class_index.get(name, -1) for name in folders], np.int32)
        self.channels, self.value_range = channels, value_range or find_common_range(
            range(len(self)), lambda i: None if channels else open_image(self.name(i)), self.name, channels)
        if all(isinstance(last := read_or_message(self.__getitem__, i), str) for i in range(len(self))):
            raise DataError(f"{root}: none of its {len(self)} images can be read; the last: {last}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.read_reduced(i)

    def read_reduced(self, i, reduction=None):
        """Image i, downsampled while decoding by `reduction` (see read_image), and its label."""
        image = read_image(self.name(i), reduction, value_range=self.value_range, channels=self.channels)
        return image, int(self.labels[i])

    def name(self, i):
        """Path of image i."""
        return os.path.join(self.root, self.key(i))

    def key(self, i):
        """Path of image i, relative to the folder."""
        return self.files[i]

    def stat(self, i):
        """List of numbers that changes when image i does."""
        return stat_file(self.name(i))


class ImageFiles(Dataset):
    """(RGB image, -1 in place of a label) of image files.

    Args:
        boxes: crop of each image (left, top, right, bottom), pixels.
        upright, value_range, channels: see `read_image`.
    """

    def __init__(self, paths, boxes=None, upright=True, value_range=None, channels=None):
        self.paths, self.boxes = paths, boxes
        self.options = dict(upright=upright, value_range=value_range, channels=channels)

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        """Path of image i."""
        return self.paths[i]

    def stat(self, i):
        """List of numbers that changes when image i does."""
        return stat_file(self.paths[i])

    def __getitem__(self, i):
        image = read_image(self.paths[i], **self.options)
        if self.boxes:
            left, top, right, bottom = self.boxes[i]
            box = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ImageReadError(f"{self.paths[i]}: the box {self.boxes[i]} is empty or outside of {image.size}")
            image = image.crop(box)
        return image, -1


class PathTable(Sequence):
    """A sequence of paths in one array. Forked workers share it, while they copy a list page by page as they read."""

    def __init__(self, paths: list[str]):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.content = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return os.fsdecode(self.content[self.ends[i]:self.ends[i + 1]].tobytes())


def are_parts(names):
    """Whether all folders are named like parts of a dataset (train, test)."""
    return {*map(str.lower, names)} <= {*TRAIN, *HELD_OUT}


def stat_file(path):
    """[size in bytes, modification time in ns] of a file; [] if it is missing."""
    try:
        return [(status := os.stat(path)).st_size, status.st_mtime_ns]
    except OSError:
        return []


def iter_images(root, passed_over, output_dir=None, channels=None):
    """Yield the path of each image below root, relative to it, and count what is passed over: {kind: number}."""
    for parent, names in walk_folders(root, passed_over, output_dir):
        for name in names:
            path, is_output = os.path.join(parent, name), name.lower().endswith(OUTPUT_ENDINGS)
            if not name.startswith(".") and not is_output and is_image(path, channels):
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


def describe_paths(paths):
    """One path, or the first of several and their number."""
    return paths if isinstance(paths, str) else f"{paths[0]}" + f" and {len(paths) - 1} more" * (len(paths) > 1)


def compare_classes(names, classes):
    """What is wrong with held-out classes that are not all among those of the training images."""
    others = ", ".join(sorted(set(names) - {*classes, ""})[:3]) or "images without labels"
    return f"its classes ({others}) are not those of the training images ({', '.join(list(classes)[:3])})"
