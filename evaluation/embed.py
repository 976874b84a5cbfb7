"""Features of images in a file for other programs: .npy, .csv, .parquet or .safetensors, with the names of the images.

    count = write_features("features.parquet", images, extract, origin)

A row of the file is an image that can be read, in the order of the images:

- .npy: float32 [M, D], and the names in PATH.names.json, a list
- .safetensors: "features", float32 [M, D], and the names in PATH.names.json
- .csv: "file", "feature_1", ..., "feature_D"
- .parquet: "file", "features" (a list of D float32)

Features are extracted in parts, which are image indices in the folder PATH.parts until the file is complete. So memory
holds one part, and the same call resumes.
"""

import contextlib
import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from common.distributed import is_rank_zero
from common.files import atomic_write, create_folder, remove_temporaries
from data.datasets import DataError
from evaluation.image_index import load_index, update_index

PART = 10_000  # images


def write_features(path, images, extract, origin, log=print):
    """Extract features of images and write them to a file; all ranks must call this.

    Args:
        path: output file; its ending is one of WRITERS. Rank 0 writes it.
        images: dataset with `name` and `stat`, as ConcatImages.
        extract: see `update_index`.
        origin: {name: plain value} that the features depend on; parts of another origin are not used.

    Returns:
        number of images that can be read.

    Raises:
        DataError: no image can be read.
        ModuleNotFoundError: .parquet without pyarrow.
    """
    write, folder = WRITERS[os.path.splitext(path)[1].lower()], f"{path}.parts"
    if write is write_parquet:
        import pyarrow.parquet  # noqa: F401 (missing: before images are read)
    digest = hashlib.sha256(json.dumps(origin | {"ckpt": None}, sort_keys=True).encode()).hexdigest()[:8]
    if is_rank_zero():
        create_folder(folder)
    files, count = [], 0
    try:
        for start in range(0, len(images), PART):
            files.append(os.path.join(folder, f"{digest}-{start:09}.safetensors"))
            part = ImageRange(images, start, min(start + PART, len(images)))
            features, _ = update_index(files[-1], part, extract, log)
            if len(features):
                count, dim = count + len(features), features.shape[1]
    finally:
        if is_rank_zero():
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # which is empty after an error in the first part
    if not count:
        if is_rank_zero():
            remove_parts(folder)
        raise DataError(f"{path}: not written, 0 of {len(images)} images can be read")
    if is_rank_zero():
        if write in (write_npy, write_safetensors):
            atomic_write(f"{path}.names.json", lambda temporary: write_names(temporary, lambda: map(read_part, files)))
        atomic_write(path, lambda temporary: write(temporary, lambda: map(read_part, files), (count, dim)))
        remove_parts(folder)
    return count


class ImageRange(Dataset):
    """Images start to stop of a dataset, with the keys and stamps of an image index."""

    def __init__(self, images, start, stop):
        self.images, self.numbers = images, range(start, stop)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.images[self.numbers[i]]

    def key(self, i):
        """The number of image i, and its name, which several may have."""
        return f"{self.numbers[i]} {self.images.name(self.numbers[i])}"

    def stat(self, i):
        return self.images.stat(self.numbers[i])


def remove_parts(folder):
    """Remove all parts in a folder, also of other features, and the folder unless it holds anything else."""
    pattern = f"{'[0-9a-f]' * 8}-{'[0-9]' * 9}.safetensors"
    remove_temporaries(folder, pattern)
    for path in Path(folder).glob(pattern):
        path.unlink()
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def read_part(path):
    """Names of the images in a part, and their features [M, D], in the order of the images."""
    features, files, _ = load_index(path)
    numbers, names = zip(*(key.split(" ", 1) for key, *_ in files)) if files else ((), ())
    order = np.argsort([*map(int, numbers)])  # images that have changed since come last in an index
    return [names[i] for i in order], features.numpy()[order]


# ---- file formats: path, function that returns (names, features) of each part, shape of all features ----

def write_npy(path, read_parts, shape):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
        file.writelines(features.astype("<f4").tobytes() for _, features in read_parts())


def write_safetensors(path, read_parts, shape):
    # save_file needs all features in memory
    header = {"features": dict(dtype="F32", shape=shape, data_offsets=[0, 4 * shape[0] * shape[1]])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(features.astype("<f4").tobytes() for _, features in read_parts())


def write_names(path, read_parts):
    """Write the names of the images as a JSON list, in the order of the rows."""
    with open(path, "w", encoding="ascii") as file:
        separator = "[\n"
        for names, _ in read_parts():
            for name in names:
                file.write(separator + json.dumps(name))
                separator = ",\n"
        file.write("\n]\n")


def write_csv(path, read_parts, shape):
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", *(f"feature_{i}" for i in range(1, 1 + shape[1]))])
        for names, features in read_parts():
            writer.writerows([name, *(f"{x:.9g}" for x in row)] for name, row in zip(names, features.tolist()))


def write_parquet(path, read_parts, shape):
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("file", pyarrow.string()), ("features", pyarrow.list_(pyarrow.float32(), shape[1]))])
    with parquet.ParquetWriter(path, schema) as writer:
        for names, features in read_parts():
            # Parquet holds UTF-8, which names of files need not be
            names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
            columns = names, pyarrow.FixedSizeListArray.from_arrays(features.ravel(), shape[1])
            writer.write_table(pyarrow.table([*columns], schema=schema))


WRITERS = {".npy": write_npy, ".parquet": write_parquet, ".csv": write_csv, ".safetensors": write_safetensors}
