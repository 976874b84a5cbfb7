"""Images and videos with object masks: the layouts of VOC2012 and DAVIS, and the built-in shapes.

    entries, read = find_masks("/data/VOC2012")                 # or "shapes", or a folder with the layout of DAVIS
    image, objects, void = read(entries[0])
    for example in build_loader(entries, read): ...             # messages in place of corrupt files

    for name, frames in find_sequences("/data/DAVIS").items():
        mask, palette, void = read_mask(mask_path(frames[0]), size=(854, 480))
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common.files import read_text
from data.datasets import DataError, open_data
from data.images import ImageReadError, open_image, read_image, read_or_message, wrap_decode_errors
from data.workers import DataLoader

VOID = 255  # index of unlabeled pixels in a mask with a palette


def build_loader(entries, read, num_workers=0):
    """DataLoader that yields read(entry), one by one and in order, or the message if it raises ImageReadError."""
    return DataLoader(entries, batch_size=None, num_workers=num_workers, collate_fn=partial(read_or_message, read))


# ---- images with masks ----

def find_masks(data_path, num_images=None):
    """Images with object masks that `data_path` names: shapes[:PIXELS], VOC2012 (val), or the frames of DAVIS.

    Args:
        num_images: at most this many, evenly spread.

    Returns:
        a list of entries, and a function: entry -> image [3, H, W] in [0, 1], objects bool [O, H, W], void bool
        [H, W] (unlabeled pixels), which raises ImageReadError.

    Raises:
        DataError: none of these layouts.
    """
    if not os.path.exists(data_path) and data_path.partition(":")[0] == "shapes":
        shapes = open_data(data_path).val
        entries, read = range(len(shapes)), partial(read_shape, shapes)
    else:
        entries, read = find_voc_masks(data_path) or find_davis_masks(data_path), read_files
    count = min(num_images or len(entries), len(entries))
    return [entries[i * len(entries) // count] for i in range(count)], read


def find_voc_masks(data_path):
    """(image, mask) paths of the validation split of VOC2012; None if the folder has another layout."""
    for root in (Path(data_path), Path(data_path, "VOC2012"), Path(data_path, "VOCdevkit", "VOC2012")):
        if (root / "SegmentationClass").is_dir():
            return [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
                    for name in read_names(root / "ImageSets" / "Segmentation" / "val.txt")]
    return None


def find_davis_masks(data_path):
    """(frame, mask) paths of all frames that have a mask."""
    frames = [frame for frames in find_sequences(data_path).values() for frame in frames]
    pairs = [(frame, mask_path(frame)) for frame in frames if mask_path(frame).is_file()]
    if not pairs:
        raise DataError(f"{data_path}: none of its {len(frames)} frames has a mask; expected {mask_path(frames[0])}")
    return pairs


def read_shape(shapes, i):
    image, mask = shapes.render(i)
    return TF.to_tensor(image), mask[None], torch.zeros_like(mask)


def read_files(paths):
    """Image and mask file -> image, objects, void; in VOC an "object" is all objects of one class."""
    image = read_image(paths[0])
    mask, _, void = read_mask(paths[1], image.size)
    indices = np.unique(mask[mask > 0])
    if not len(indices):
        raise ImageReadError(f"{paths[1]}: has no object")
    return TF.to_tensor(image), torch.from_numpy(mask == indices[:, None, None]), torch.from_numpy(void)


# ---- mask files ----

def read_mask(path, size):
    """Mask file -> object indices uint8 [H, W], palette, and unlabeled pixels bool [H, W], whose index is 0.

    Indices are those of the palette, or gray levels. Other modes (RGB, 16 bits) may have one object.

    Args:
        size: expected (width, height) in pixels.

    Raises:
        ImageReadError: missing, corrupt, of another size, or ambiguous.
    """
    with wrap_decode_errors(path), open_image(path) as image:
        if image.size != size:
            raise ValueError(f"the mask has {image.width} x {image.height} pixels, its image {size[0]} x {size[1]}")
        indexed = image.mode == "P"
        palette = image.getpalette() if indexed else [level for level in range(256) for _ in "RGB"]
        mask = np.array(image) if image.mode in ("P", "L") else to_binary(image)
    void = (mask == VOID) & indexed
    mask[void] = 0
    return mask, palette, void


def to_binary(image):
    """Image of any mode -> uint8 [H, W], 0 and 255; ValueError if it has more than one color besides black."""
    pixels = np.array(image if image.mode[0] in "IF" else image.convert("RGB")).reshape(image.height, image.width, -1)
    colors = pixels[pixels.any(axis=-1)]
    if (colors != colors[:1]).any():
        raise ValueError(f"mode {image.mode} with more than one color; expected a palette, or 8-bit gray levels")
    return pixels.any(axis=-1).astype(np.uint8) * 255


def save_mask(path, mask, palette):
    """Write object indices [H, W] as an indexed PNG."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette)
    image.save(path)


# ---- layouts ----

def read_names(path):
    """First word of each line of a list file."""
    return [line.split()[0] for line in read_text(path).splitlines() if line.strip()]


def find_sequences(root, names=None):
    """Sequences of a folder with the layout of DAVIS, all or those named: {name: frame paths in order}.

    Raises:
        DataError: another layout, or a sequence without frames.
    """
    folder = Path(root, "JPEGImages", "480p")
    if not folder.is_dir():
        folder = folder.with_name("Full-Resolution")
    names = names or sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    if not names:
        raise DataError(f"{root}: expected JPEGImages/480p/SEQUENCE/FRAME.jpg and Annotations/480p/SEQUENCE/FRAME.png")
    sequences = {name: sorted(folder.joinpath(name).glob("[!.]*.jpg"), key=lambda path: path.name.zfill(20))
                 for name in names}  # "2.jpg" before "12.jpg"
    empty = [name for name, frames in sequences.items() if not frames]
    if empty:
        raise DataError(f"{folder}: no frames (*.jpg) in {', '.join(empty[:5])}")
    return sequences


def mask_path(frame):
    """Path of a frame's mask in the layout of DAVIS."""
    resolution, sequence, _ = frame.parts[-3:]
    return frame.parents[3] / "Annotations" / resolution / sequence / f"{frame.stem}.png"
