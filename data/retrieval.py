"""Retrieval benchmarks: the layouts of Copydays and of revisited Oxford and Paris.

    originals, blocks = read_copydays("/data/copydays")            # paths, {"strong": (queries, positives), ...}
    database, queries, boxes, relevance = read_landmarks("/data/roxford5k/gnd_roxford5k.pkl")
"""

import os
import pickle
from pathlib import Path

import numpy as np

from common.checkpoint import NumberType, read_number
from common.files import check_file
from data.datasets import DataError, ImageFolder


def list_images(folder):
    """Sorted paths of all images below a folder."""
    return [os.path.join(folder, name) for name in ImageFolder(str(folder)).files]


def read_copydays(root):
    """Originals, and for each kind of copy its images and the originals that each should retrieve.

    The name of a copy begins with the same four characters as that of its original.

    Returns:
        paths, and {"strong", "jpegqual/3", "crops/10", ...: (paths, list of indices of originals for each)}.

    Raises:
        DataError: another layout, or a copy without an original.
    """
    root = Path(root)
    originals, blocks = list_images(root / "original"), {}
    indices = {os.path.basename(path)[:4]: [i] for i, path in enumerate(originals)}
    if len(indices) < len(originals):
        first = next(path for i, path in enumerate(originals) if indices[os.path.basename(path)[:4]] != [i])
        raise DataError(f"{first}: another original has the same first four characters in its name, which copies "
                        f"share: rename it and its copies")
    folders = [folder for pattern in ("strong", "crops/[!.]*", "jpegqual/[!.]*")
               for folder in sorted(root.glob(pattern), key=lambda path: path.name.zfill(9)) if folder.is_dir()]
    if not folders:
        raise DataError(f"{root}: expected strong/, jpegqual/N/ or crops/N/ beside original/")
    for folder in folders:
        copies = list_images(folder)
        positives = [indices.get(os.path.basename(path)[:4]) for path in copies]
        if None in positives:
            raise DataError(f"{copies[positives.index(None)]}: no image in {root / 'original'} has a name with the "
                            f"same first four characters")
        blocks[str(folder.relative_to(root))] = copies, positives
    return originals, blocks


def read_landmarks(path):
    """Ground truth of revisited Oxford or Paris as published (Radenovic et al. 2018), with images in jpg/ beside it.

    Returns:
        database paths, query paths, the box of each query's landmark (left, top, right, bottom; pixels), and the
        relevance of database images for each query: {"easy", "hard", "junk": indices}.

    Raises:
        DataError: not such a file, or images are missing.
    """
    try:
        with open(check_file(path), "rb") as file:
            truth = PlainUnpickler(file, encoding="latin1").load()
        database, queries = ([str(path.parent / "jpg" / f"{name}.jpg") for name in truth[key]]
                             for key in ("imlist", "qimlist"))
        boxes = [[round(float(side)) for side in np.reshape(query["bbx"], 4)] for query in truth["gnd"]]
        relevance = [{level: np.ravel(query[level]).astype(int).tolist() for level in ("easy", "hard", "junk")}
                     for query in truth["gnd"]]
    except Exception as error:  # a pickle may hold anything
        raise DataError(f"{path}: not the ground truth of revisited Oxford or Paris "
                        f"({type(error).__name__}: {error})") from None
    missing = [image for image in (*database, *queries) if not os.path.isfile(image)]
    if missing:
        raise DataError(f"{path}: {len(missing)} of its images are missing; the first: {missing[0]}")
    return database, queries, boxes, relevance


class NumberList(list):
    """Stand-in for numpy.ndarray while unpickling: its numbers."""

    def __setstate__(self, state):
        _, _, number_type, _, content = state
        self[:] = number_type.read(content)


class PlainUnpickler(pickle.Unpickler):
    """Unpickler of plain values and, as lists, arrays of numbers. It calls nothing of other modules."""

    STAND_INS = {
        "numpy.dtype": NumberType, "numpy.ndarray": NumberList, "numpy.core.multiarray.scalar": read_number,
        "numpy.core.multiarray._reconstruct": lambda *_: NumberList(),
        "numpy.core.numeric._frombuffer": lambda content, number_type, *_: number_type.read(content),
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # this and the next: bytes, for Python 2
        "builtins.bytes": lambda: b"", "__builtin__.bytes": lambda: b""}

    def find_class(self, module, name):
        try:
            return self.STAND_INS[f"{module.replace('_core', 'core')}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None
