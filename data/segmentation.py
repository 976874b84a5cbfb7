"""Images and videos with masks or boxes: VOC, ADE20K, DAVIS, images/ beside masks/, and the built-in shapes.

    entries, read = find_masks("/data/VOC2012")                 # or "shapes", or a folder with another layout
    image, objects, void = read(entries[0])
    for example in build_loader(entries, read): ...             # messages in place of corrupt files

    entries, read = find_boxes("/data/VOCdevkit/VOC2007")
    image, boxes = read(entries[0])

    for name, frames in find_sequences("/data/DAVIS").items():
        mask, palette, void = read_mask(mask_path(frames[0]), size=(854, 480))
"""

from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common.files import read_text
from data.datasets import DataError, is_shapes, open_data
from data.folders import HELD_OUT, TRAIN, ImageFolder
from data.images import open_image, read_image, read_or_message, wrap_decode_errors
from data.workers import DataLoader

VOID = 255  # index of unlabeled pixels in a mask with a palette


def build_loader(entries, read, num_workers=0):
    """DataLoader that yields read(entry), one by one and in order, or the message if it raises ImageReadError."""
    return DataLoader(entries, batch_size=None, num_workers=num_workers, collate_fn=partial(read_or_message, read))


# ---- images with masks ----

def find_masks(data_path, num_images=None, allow_unlabeled=False, value_range=None):
    """Images with object masks that `data_path` names.

    shapes[:PIXELS]; VOC2012 (its validation list); images/ beside masks/ or annotations/ (their held-out part, if they
    have parts), as in ADE20K; or the frames of DAVIS.

    Args:
        num_images: at most this many, evenly spread.
        allow_unlabeled: take a folder of another layout as images without objects.
        value_range: see `read_image`.

    Returns:
        a list of entries, and a function: entry -> image [3, H, W] in [0, 1], objects bool [O, H, W], void bool
        [H, W] (unlabeled pixels), which raises ImageReadError.

    Raises:
        DataError: none of these layouts.
    """
    if is_shapes(data_path):
        shapes = open_data(data_path).val
        entries, read = range(len(shapes)), partial(read_shape_objects, shapes)
    else:
        if voc := find_voc(data_path, "SegmentationClass"):
            entries = list_voc_masks(voc, "val")
        elif parts := find_parts(data_path):
            entries = parts[-1][0]
        elif Path(data_path, "JPEGImages").is_dir():
            entries = find_davis_masks(data_path)
        elif allow_unlabeled:
            images = ImageFolder(data_path)
            entries = [(Path(images.name(i)), None) for i in range(len(images))]
        else:
            raise DataError(f"{data_path}: no images with masks; expected images/ beside masks/ or annotations/, or "
                            f"the layout of VOC2012 or DAVIS, or 'shapes'; masks of any images need --write DIR")
        read = partial(read_files, value_range=value_range)
    return spread(entries, num_images), read


def spread(entries, count):
    """At most `count` of the entries, evenly spread; None for all."""
    count = min(count or len(entries), len(entries))
    return [entries[i * len(entries) // count] for i in range(count)]


def find_voc(data_path, folder):
    """Root of a VOC set that has a certain folder: `data_path`, or VOC2012 or VOC2007 in it; None if there is none."""
    roots = (Path(data_path, *parts) for parts in ((), ("VOC2012",), ("VOCdevkit", "VOC2012"), ("VOC2007",),
                                                   ("VOCdevkit", "VOC2007")))
    return next((root for root in roots if (root / folder).is_dir()), None)


def list_voc_masks(root, name):
    """(image, mask) paths of a list in ImageSets/Segmentation; masks are looked up in SegmentationClassAug too."""
    pairs = []
    for image in read_names(root / "ImageSets" / "Segmentation" / f"{name}.txt"):
        mask = root / "SegmentationClass" / f"{image}.png"
        if name == "trainaug" and not mask.exists():
            mask = root / "SegmentationClassAug" / mask.name
        pairs.append((root / "JPEGImages" / f"{image}.jpg", mask))
    return pairs


def find_parts(data_path):
    """Parts of images/ beside masks/ or annotations/: those of training and held-out images, or one of all.

    A mask has the path of its image and the ending .png.

    Returns:
        for each part a list of (image, mask) paths, and a note on it; None if the folder has another layout.

    Raises:
        DataError: no images in a part, or none with a mask.
    """
    images = Path(data_path, "images")
    masks = next((path for name in ("masks", "annotations") if (path := Path(data_path, name)).is_dir()), None)
    if not masks or not images.is_dir():
        return None
    names = {path.name.lower(): path.name for path in images.iterdir() if path.is_dir()}
    names = [next((names[name] for name in group if name in names), None) for group in (TRAIN, HELD_OUT)]
    parts = []
    for name in names if all(names) else [""]:
        files = ImageFolder(str(images / name)).files
        pairs = [(images / name / file, masks / name / Path(file).with_suffix(".png")) for file in files]
        found = [pair for pair in pairs if pair[1].is_file()]
        if not found:
            raise DataError(f"{images / name}: none of its {len(pairs)} images has a mask; expected {pairs[0][1]}")
        missing = f" ({len(pairs) - len(found):,} more have no mask)" * (len(found) < len(pairs))
        parts.append((found, f"{len(found):,} images in {images / name}{missing}"))
    return parts


def find_davis_masks(data_path):
    """(frame, mask) paths of all frames that have a mask."""
    frames = [frame for frames in find_sequences(data_path).values() for frame in frames]
    pairs = [(frame, mask_path(frame)) for frame in frames if mask_path(frame).is_file()]
    if not pairs:
        raise DataError(f"{data_path}: none of its {len(frames)} frames has a mask; expected {mask_path(frames[0])}")
    return pairs


def read_shape_objects(shapes, i):
    """Built-in image i -> image, objects, void; see `find_masks`."""
    image, mask = shapes.render(i)
    return TF.to_tensor(image), mask[None], torch.zeros_like(mask)


def read_files(paths, value_range=None):
    """Image and mask file -> image, objects, void; in VOC an "object" is all objects of one class."""
    image = read_image(paths[0], value_range=value_range)
    empty = np.zeros((image.height, image.width), np.uint8)
    mask, _, void = read_mask(paths[1], image.size) if paths[1] else (empty, None, empty > 0)
    objects = mask == np.unique(mask[mask > 0])[:, None, None]
    return TF.to_tensor(image), torch.from_numpy(objects), torch.from_numpy(void)


# ---- images with boxes ----

def find_boxes(data_path, num_images=None, value_range=None):
    """Images of a VOC set with the boxes of their objects, of its list trainval: entries and a function to read them.

    Returns:
        see `find_masks`; the function: entry -> image [3, H, W] in [0, 1], boxes [M, 4]. None for another layout.
    """
    root = find_voc(data_path, "Annotations")
    if not root or not (root / "ImageSets" / "Main").is_dir():
        return None
    names = read_names(root / "ImageSets" / "Main" / "trainval.txt")
    entries = [(root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml") for name in names]
    return spread(entries, num_images), partial(read_boxes, value_range=value_range)


def read_boxes(paths, value_range=None):
    """Image, and XML file of VOC -> image [3, H, W] in [0, 1], boxes [M, 4]: left, top, right, bottom in pixels.

    The first pixel of VOC is 1, and its boxes include the last: those here end before it.
    """
    image = TF.to_tensor(read_image(paths[0], value_range=value_range))
    with wrap_decode_errors(paths[1]):
        boxes = [[float(box.findtext(name)) - (name in ("xmin", "ymin")) for name in ("xmin", "ymin", "xmax", "ymax")]
                 for box in ElementTree.parse(paths[1]).iterfind("object/bndbox")]
    return image, torch.tensor(boxes).view(-1, 4)


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
    """First word of each line of a list file; DataError if there is none."""
    names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path}: is empty, expected a name on each line")
    return names


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
