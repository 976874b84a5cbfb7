"""Semantic segmentation: images with a class for each pixel, and crops of both.

    data = open_semantic("/data/VOC2012")       # lists train and val, or trainaug and val
    data = open_semantic("/data/ADEChallengeData2016")
    data = open_semantic("/photos")             # images/ beside masks/ or annotations/, each with train/ and val/
    data = open_semantic("shapes")              # built-in; the background, and the class of the objects
    (image, labels), _ = data.train[0]          # RGB image; class indices as an 8-bit image, VOID where unlabeled

Indexing a corrupt image or mask raises `ImageReadError`; data/loaders.py skips such images. A class that has no name is
a `DataError`.
"""

import contextlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Subset

from augment import MultiCrop
from common.distributed import all_gather_objects, is_rank_zero
from common.files import read_text
from common.logger import progress_bar
from data.datasets import Data, DataError, is_shapes, open_data
from data.images import ImageReadError, open_image, read_image, wrap_decode_errors
from data.segmentation import VOID, find_parts, find_voc, list_voc_masks

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()


def open_semantic(data_path: str, value_range: tuple[float, float] | None = None) -> Data:
    """Open the images with masks that `data_path` names, see above.

    The names of classes are those of the set, or the lines of classes.txt in the folder, or the values that occur.
    Masks of a folder that all hold nothing but 0 and 255 have two classes. All ranks must call this. For
    value_range see `read_image`.

    Raises:
        DataError: none of these layouts, masks that hold one class or none, or classes.txt contradicts them.
    """
    if is_shapes(data_path):
        data = open_data(data_path)
        classes = ["background", *data.train.classes]
        parts = [SemanticImages(range(len(shapes)), partial(read_shape_classes, shapes), classes)
                 for shapes in (data.train, data.val)]
        return Data(parts[0], *parts, data.path, data.note)
    if root := find_voc(data_path, "SegmentationClass"):
        lists = root / "ImageSets" / "Segmentation"
        name = "trainaug" if (lists / "trainaug.txt").exists() else "train"
        train, val = (list_voc_masks(root, name) for name in (name, "val"))
        parts = (train, f"{len(train):,} images of {lists / name}.txt"), (val, f"{len(val):,} held out of val.txt")
        read, classes, note = read_pair, VOC_CLASSES, ""
    elif parts := find_parts(data_path):
        read, classes, note = resolve_classes(data_path, parts)
    else:
        raise DataError(f"{data_path}: no images with masks; expected images/ beside masks/ or annotations/, each with "
                        f"train/ and val/, or the layout of VOC2012, or 'shapes'")
    images = [SemanticImages(pairs, partial(read, value_range=value_range), classes) for pairs, _ in parts]
    path, found = str(Path(data_path).absolute()), ", ".join([*(of for _, of in parts), f"{len(classes)} classes"])
    if len(images) == 2:
        return Data(images[0], *images, path, found + note)
    labeled = np.arange(len(images[0]))
    return Data(images[0], Subset(images[0], labeled[labeled % 10 > 0]), Subset(images[0], labeled[::10]), path,
                f"{found}, every tenth held out{note}")


def resolve_classes(data_path, parts):
    """Function that reads an image and its mask, names of the classes, and a note, of the parts of `find_parts`."""
    ade, file = Path(data_path, "objectInfo150.txt"), Path(data_path, "classes.txt")
    if ade.is_file():
        return partial(read_pair, first_class=1), read_class_names(ade, first_line=1), ""
    classes = read_class_names(file) if file.is_file() else []
    counts = count_mask_values(parts)
    values = sorted(counts.keys() - {VOID})
    if counts and not values:
        raise DataError(f"{data_path}: its masks hold nothing but {VOID}, which is unlabeled")
    if values == [0] and VOID in counts:
        if len(classes) not in (0, 2):
            raise DataError(f"{file}: {len(classes)} names of classes, but the masks hold 0 and {VOID} alone: name "
                            f"two, or write class indices into the masks")
        return partial(read_pair, is_binary=True), classes or ["0", str(VOID)], ""
    if len(values) == 1:
        raise DataError(f"{data_path}: its masks hold no class but {values[0]}, expected two or more")
    if classes:
        total = sum(len(pairs) for pairs, _ in parts)
        others = [f"{value} ({counts[value]:,} of {total:,})" for value in values if value >= len(classes)]
        if others:
            raise DataError(f"{file}: names classes 0 to {len(classes) - 1}, but masks hold {', '.join(others[:5])}: "
                            f"add names, or correct the masks")
        return read_pair, classes, ""
    missing = [str(value) for value in range(max(values, default=0)) if value not in counts]
    note = missing and (f"\nNOTE: no mask holds {', '.join(missing[:5])}{', ...' * (len(missing) > 5)}, and "
                        f"{counts[values[-1]]:,} the largest, {values[-1]}: name the classes in {file}, or correct it")
    return read_pair, [str(i) for i in range(1 + max(values, default=0))], note or ""


def read_class_names(file, first_line=0):
    """Names of the classes, the last column of each line."""
    names = [line.split("\t")[-1].strip() for line in read_text(file).splitlines()[first_line:] if line.strip()]
    if not 0 < len(names) < VOID:
        raise DataError(f"{file}: {len(names)} names of classes, expected 1 to {VOID - 1}")
    return names


def count_mask_values(parts):
    """{value: number of masks that hold it}, of rank 0; masks that cannot be read are left to the evaluation."""
    counts = Counter()
    if is_rank_zero():
        for _, path in progress_bar([pair for pairs, _ in parts for pair in pairs], unit="mask"):
            with contextlib.suppress(ImageReadError):
                counts.update(np.unique(read_labels(path)).tolist())
    return all_gather_objects(counts)[0]


class SemanticImages(Dataset):
    """Images with a class for each pixel: i -> ((RGB image, class indices as an 8-bit image), -1).

    Args:
        entries: sequence of whatever `read` takes.
        read: entry -> RGB image, class indices uint8 [H, W]; raises ImageReadError.
        classes: names.
    """

    def __init__(self, entries, read, classes):
        self.entries, self.read, self.classes = entries, read, list(classes)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        image, labels = self.read(self.entries[i])
        largest = labels[labels != VOID].max(initial=0)
        if largest >= len(self.classes):
            raise DataError(f"{self.name(i)}: its mask has class {largest}, but the names are of 0 to "
                            f"{len(self.classes) - 1}: correct the mask, or name more classes")
        return (image, Image.fromarray(labels)), -1

    def name(self, i):
        """Path of image i, or its index."""
        entry = self.entries[i]
        return str(entry[0]) if isinstance(entry, tuple) else str(entry)


def read_shape_classes(shapes, i):
    """Built-in image i -> RGB image, class indices."""
    image, mask = shapes.render(i)
    return image, mask.numpy().astype(np.uint8) * (1 + i % len(shapes.classes))


def read_pair(paths, first_class=0, is_binary=False, value_range=None):
    """Image and mask file -> RGB image, class indices uint8 [H, W].

    Args:
        first_class: index of class 0 in the file; what is below it is unlabeled.
        is_binary: 255 is class 1, not unlabeled.
        value_range: see `read_image`.
    """
    image = read_image(paths[0], value_range=value_range)
    labels = read_labels(paths[1])
    if labels.shape != (image.height, image.width):
        raise ImageReadError(f"{paths[1]}: the mask has {labels.shape[1]} x {labels.shape[0]} pixels, its image "
                             f"{image.width} x {image.height}")
    if is_binary:
        return image, labels // VOID
    if first_class:
        labels = np.where((labels < first_class) | (labels == VOID), VOID, labels - first_class).astype(np.uint8)
    return image, labels


def read_labels(path):
    """Mask file -> indices uint8 [H, W], of the palette or gray levels; raises ImageReadError for other modes."""
    with wrap_decode_errors(path), open_image(path) as image:
        if image.mode not in ("1", "L", "P"):
            raise ValueError(f"mode {image.mode}; expected class indices, as a palette or 8-bit gray levels")
        return np.array(image, np.uint8)


class SemanticCrop:
    """One random crop of an image, and the same of its classes: a transform for `MultiCropDataset`.

    Args:
        size, scale: side in pixels; range of the area relative to the image.
        mean, std: normalization.
    """

    reduction = None  # images are decoded in the size of their mask

    def __init__(self, size, scale, mean, std):
        self.multicrop = MultiCrop(size, scale, global_number=1, local_number=0, jitter=0, grayscale=0, blur=(0, 0, 0),
                                   mean=mean, std=std)

    def __call__(self, pair, key):
        """(RGB image, class indices) -> crop [3, s, s], normalized, and class indices uint8 [s, s]."""
        image, labels = pair
        crop, = self.multicrop(image, key)
        view, = self.multicrop.sample(*image.size, key)
        labels = labels.resize([view.size] * 2, Image.Resampling.NEAREST, view.box)
        return [crop, torch.from_numpy(np.array(ImageOps.mirror(labels) if view.flip else labels))]
