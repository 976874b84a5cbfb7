"""Pictures and videos with masks: the layouts of VOC2012 and DAVIS, and the built-in shapes.

    for item in open_masked("/data/VOC2012"): image, objects, void = item       # or "shapes", or a folder of DAVIS
    for name, frames in find_sequences("/data/DAVIS").items(): mask = mask_of(frames[0])
    values, palette, void = read_mask(mask, (854, 480))
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from data.datasets import DataError, open_data
from data.images import ImageReadError, read_image, wrap_decode_errors

VOID = 255  # in a mask with a palette: pixels that nobody labelled


class FallibleDataset(torch.utils.data.Dataset):
    """read(entry) of each entry; in place of one that is Unreadable the message that says why."""

    def __init__(self, entries, read):
        self.entries, self.read = entries, read

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        try:
            return self.read(self.entries[i])
        except ImageReadError as error:
            return str(error)


def open_masks(data_path, at_most=None):
    """The pictures with masks that a name or a folder holds: shapes[:PIXELS], VOC2012, or the frames of DAVIS.

    Args:
        at_most: no more than these, evenly spread.

    Returns:
        a set of RGB [3, H, W] in [0, 1], objects bool [O, H, W], and unlabelled pixels bool [H, W].

    Raises:
        DataError: nothing of these is there.
    """
    if not os.path.exists(data_path) and data_path.partition(":")[0] == "shapes":
        shapes = open_data(data_path).val
        entries, read = range(len(shapes)), partial(read_shape, shapes)
    else:
        entries, read = voc_files(data_path) or davis_files(data_path), read_files
    count = min(at_most or len(entries), len(entries))
    return FallibleDataset([entries[i * len(entries) // count] for i in range(count)], read)


def voc_files(data_path):
    """(picture, mask) of VOC's validation part; None if the folder has another layout."""
    for root in (Path(data_path), Path(data_path, "VOC2012"), Path(data_path, "VOCdevkit", "VOC2012")):
        if (root / "SegmentationClass").is_dir():
            return [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
                    for name in read_names(root / "ImageSets" / "Segmentation" / "val.txt")]
    return None


def davis_files(data_path):
    """(frame, mask) of all frames that have one."""
    frames = [frame for frames in find_sequences(data_path).values() for frame in frames]
    pairs = [(frame, mask_path(frame)) for frame in frames if mask_path(frame).is_file()]
    if not pairs:
        raise DataError(f"{data_path}: none of its {len(frames)} frames has a mask; the first of them would be "
                        f"{mask_path(frames[0])}")
    return pairs


def read_shape(shapes, i):
    image, mask = shapes.render(i)
    return TF.to_tensor(image), mask[None], torch.zeros_like(mask)


def read_files(files):
    """A picture and its mask, each value of which is an object, or in VOC a class of objects."""
    image = read_image(files[0])
    values, _, void = read_mask(files[1], image.size)
    found = np.unique(values[values > 0])
    if not len(found):
        raise ImageReadError(f"{files[1]}: holds no object")
    return TF.to_tensor(image), torch.from_numpy(values == found[:, None, None]), torch.from_numpy(void)


def read_mask(path, size):
    """A mask as it is stored: object numbers uint8 [H, W], palette, and unlabelled pixels bool [H, W], which are 0.

    Numbers are those of a palette or of grey levels; what has neither, colours or 16 bits, may show one object.

    Args:
        size: (width, height) that it must have, pixels.

    Raises:
        Unreadable: no mask of that size is there.
    """
    with wrap_decode_errors(str(path)):
        if not path.is_file():
            raise ValueError("no such file")
        with Image.open(path) as image:
            indexed = image.mode == "P"
            palette = image.getpalette() if indexed else [level for level in range(256) for _ in "RGB"]
            if image.mode not in ("P", "L"):
                image = one_object(image)
            values = np.array(image)
        height, width = values.shape
        if (width, height) != size:
            raise ValueError(f"the mask is {width} x {height} pixels, its picture {size[0]} x {size[1]}")
    void = (values == VOID) & indexed
    values[void] = 0
    return values, palette, void


def one_object(image):
    """Image of any other mode -> black and white; ValueError if it has more than one level or colour but black."""
    deep = image.mode[0] in "IF"
    levels = np.array(image if deep else image.convert("L" if image.mode == "1" else "RGB"))
    levels = levels.reshape(*levels.shape[:2], -1)
    seen = levels[levels.any(axis=-1)]
    if (seen != seen[:1]).any():
        raise ValueError(f"{image.mode} with more than one level or colour; expected a palette, or grey levels of 8 "
                         f"bits")
    return Image.fromarray(levels.any(axis=-1).astype(np.uint8) * 255)


def save_mask(path, values, palette):
    """Write object numbers [H, W] as DAVIS does, an indexed PNG."""
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(palette)
    image.save(path)


def read_names(path):
    """The first word of each line of a list.

    Raises:
        DataError: there is none.
    """
    names = [line.split()[0] for line in path.read_text(errors="replace").splitlines() if line.strip()] \
        if path.is_file() else []
    if not names:
        raise DataError(f"{path}: expected a list of names")
    return names


def find_sequences(root, names=None):
    """{name: paths of its frames in order}: all of a folder in the layout of DAVIS, or those named.

    Raises:
        DataError: there is no such layout, or no sequence of a name.
    """
    folders = [path for name in ("480p", "Full-Resolution") if (path := Path(root, "JPEGImages", name)).is_dir()]
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    if not folders:
        raise DataError(f"{root}: expected JPEGImages/480p/SEQUENCE/FRAME.jpg and Annotations/480p/SEQUENCE/FRAME.png")
    names = names or sorted(path.name for path in folders[0].glob("[!.]*") if path.is_dir())
    if not names:
        raise DataError(f"{folders[0]}: no folder of frames in it")
    sequences = {name: sorted(folders[0].joinpath(name).glob("[!.]*.jpg"), key=frame_number) for name in names}
    empty = [name for name, frames in sequences.items() if not frames]
    if empty:
        raise DataError(f"{folders[0]}: no frames (*.jpg) in {', '.join(empty[:5])}")
    return sequences


def frame_number(path):
    """What frames are ordered by: their number, or their name."""
    return int(path.stem) if path.stem.isdecimal() else 0, path.name


def mask_path(frame):
    """Where the layout of DAVIS keeps the mask of a frame."""
    resolution, sequence, _ = frame.parts[-3:]
    return frame.parents[3] / "Annotations" / resolution / sequence / f"{frame.stem}.png"


if __name__ == "__main__":
    pictures = open_masks("shapes", at_most=4)
    for image, objects, _ in map(pictures.__getitem__, range(len(pictures))):
        print(f"picture {list(image.shape)}, {len(objects)} object on {objects.float().mean():.0%} of it")
