"""What should be found: the layouts of Copydays and of revisited Oxford and Paris.

    originals, blocks = read_copydays("/data/copydays")            # paths, {"strong": (queries, positives), ...}
    truth = read_landmarks("/data/roxford5k/gnd_roxford5k.pkl")    # paths, boxes, and what is easy, hard and junk
"""

import os
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.datasets import DataError, ImageFolder


def list_images(folder):
    """Paths of all pictures below a folder, in order."""
    return [os.path.join(folder, name) for name in ImageFolder(str(folder)).files]


def read_copydays(root):
    """The originals, and for each kind of copy its pictures and the originals that each should find.

    A copy's name begins with the same four characters as its original's.

    Returns:
        paths, and {"strong", "jpegqual/3", "crops/10", ...: (paths, list of numbers of originals for each)}.

    Raises:
        DataError: another layout, or a copy without an original.
    """
    root = Path(root)
    originals = list_images(root / "original")
    folders = [folder for pattern in ("strong", "jpegqual/[!.]*", "crops/[!.]*") for folder in root.glob(pattern)
               if folder.is_dir()]
    if not folders:
        raise DataError(f"{root}: expected strong/, jpegqual/N/ or crops/N/ beside original/")
    numbers, blocks = {}, {}
    for i, path in enumerate(originals):
        numbers.setdefault(os.path.basename(path)[:4], []).append(i)
    for folder in sorted(folders, key=lambda x: (x.name != "strong", x.parent.name, x.name.zfill(9))):
        copies = list_images(folder)
        lost = [path for path in copies if os.path.basename(path)[:4] not in numbers]
        if lost:
            raise DataError(f"{lost[0]}: no picture in {root / 'original'} has a name with the same first four "
                            f"characters")
        blocks[str(folder.relative_to(root))] = copies, [numbers[os.path.basename(path)[:4]] for path in copies]
    return originals, blocks


class Landmarks(NamedTuple):
    """A ground-truth file of revisited Oxford or Paris."""

    name: str
    database: list  # paths
    queries: list  # paths
    boxes: list  # (left, top, right, bottom) of each query's landmark, pixels
    answers: list  # {"easy", "hard", "junk": numbers of pictures in the database} of each query


def read_landmarks(path):
    """Read a ground-truth file as published (Radenovic et al. 2018), with its pictures in jpg/ beside it.

    Raises:
        DataError: not such a file, or pictures that it names are missing.
    """
    try:
        with open(path, "rb") as file:
            truth = PlainUnpickler(file, encoding="latin1").load()
        database, queries = ([path.parent / "jpg" / f"{name}.jpg" for name in truth[key]]
                             for key in ("imlist", "qimlist"))
        boxes = [[round(float(side)) for side in np.ravel(answer["bbx"])] for answer in truth["gnd"]]
        answers = [{name: np.ravel(answer[name]).astype(int).tolist() for name in ("easy", "hard", "junk")}
                   for answer in truth["gnd"]]
        named = {i for answer in answers for part in answer.values() for i in part}
        if not queries or len(answers) != len(queries) or named - set(range(len(database))):
            raise ValueError("its parts do not fit each other")
        if any(len(box) != 4 or box[0] >= box[2] or box[1] >= box[3] for box in boxes):
            raise ValueError("a box is none")
    except Exception as error:  # a pickle may hold anything
        raise DataError(f"{path}: not the ground truth of revisited Oxford or Paris "
                        f"({type(error).__name__}: {error})") from None
    missing = [picture for picture in (*database, *queries) if not picture.is_file()]
    if missing:
        raise DataError(f"{path}: {len(missing)} of the pictures that it names are missing; the first: {missing[0]}")
    return Landmarks(path.stem.removeprefix("gnd_"), list(map(str, database)), list(map(str, queries)), boxes, answers)


class PlainUnpickler(pickle.Unpickler):
    """Takes plain values and numpy arrays alone: a pickle that asks for more could run anything."""

    ALLOWED = {"numpy": ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer"), "_codecs": ("encode",),
               "builtins": ("bytes",), "__builtin__": ("bytes",)}  # the last ones are how Python 2 pickled arrays

    def find_class(self, module, name):
        if name in self.ALLOWED.get(module.partition(".")[0], ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"asks for {module}.{name}")
