"""Datasets inside archives: a memory-mapped index of their images, built once.

    images = ShardDataset(["/data/in1k/train-{0000..1023}.tar"])
    image, label = images[0]                      # PIL image in RGB; class index, or -1 without labels

    python -m data.shards index /data/in1k --output /data/in1k/train.shardindex     # stays beside the shards

A source is a shard, a folder of shards, a brace pattern, the URL of a tar, or an index. Shards are .tar files in
WebDataset layout (KEY.jpg with KEY.cls, or `label` in KEY.json), with one folder per class, or with one tar per class
inside as ILSVRC2012_img_train.tar; .zip files of the same layouts; .parquet files of the `datasets` library; .csv and
.txt files with lines `path` or `path,label`. data/archives.py reads them.

The index is one file of arrays: a record per image, the keys, a header. Forked workers share its pages, and nothing
per image is a Python object. It is kept in the user's cache folder, or where its owner put it beside the shards.
"""

import contextlib
import functools
import glob
import hashlib
import importlib
import itertools
import json
import multiprocessing.pool
import os
import re
import shutil
import tempfile
from collections import Counter

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from common.distributed import count_cores
from common.files import atomic_write, check_file
from data.archives import MAX_TEXT, MEMBER, PATH, is_url, read_at, read_member, scan_shard, stat_shard
from data.folders import (
    HELD_OUT,
    TRAIN,
    DataError,
    are_parts,
    compare_classes,
    describe_passed_over,
    describe_paths,
    iter_images,
    stat_file,
)
from data.images import EXTENSIONS, find_common_range, open_image, read_image, read_or_message, wrap_decode_errors
from data.workers import DataLoader

INDEX_ENDING = ".shardindex"
FOLDER_ENDINGS = (".tar", ".parquet", ".zip", ".tar.gz", ".tgz")
ENDINGS = (*FOLDER_ENDINGS, ".csv", ".txt")
MAGIC = b"images 3"
MAX_SHARDS = 200_000
MAX_CORRUPT_AT_START = 1000
SCAN_MINUTES = 24 * 60  # of a shard, which may be a tar of all images on a slow disk


def get_stamp(shard):
    """What is the same as long as a shard, and what counts as an image in it, does not change."""
    return shard["path"], shard["size"], shard["version"], shard.get("arrays", False)


# ---- sources ----

def is_source(path: str) -> bool:
    """Whether a path names shards. A folder of shards holds no images, nor do folders in it."""
    if not os.path.isdir(path):
        return is_url(path) or path.lower().endswith((INDEX_ENDING, *ENDINGS))
    return not any(iter_images(path, Counter())) and bool(find_shards(path))


def find_shards(source: str) -> list[str]:
    """Absolute paths, or URLs, of the shards of a source; [] for a folder that holds none.

    Raises:
        DataError: a shard is missing, or of no known kind.
    """
    if source.endswith(INDEX_ENDING):
        return [shard["path"] for shard in ShardIndex.open(source).shards]
    if os.path.isdir(source):
        files = sorted(entry.path for entry in os.scandir(os.path.abspath(source))
                       if entry.is_file() and not entry.name.startswith("."))
        found = {ending: [file for file in files if file.lower().endswith(ending)] for ending in FOLDER_ENDINGS}
        kinds = [ending for ending in found if found[ending]]
        if len(kinds) > 1:
            raise DataError(f"{source}: holds shards of several kinds ({', '.join(kinds)}), name those to use, as "
                            f"{os.path.join(source, '*' + kinds[0])}")
        return found[kinds[0]] if kinds else []
    paths = [source] if os.path.exists(source) else sorted(glob.glob(source)) or expand_braces(source)
    if not is_url(source):
        paths = [os.path.abspath(path) for path in paths]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise DataError(f"{source}: {len(missing)} of {len(paths)} shards do not exist or are no files, the first "
                            f"is {missing[0]}")
    for path in paths:
        if not path.lower().partition("?" if is_url(path) else "\0")[0].endswith(".tar" if is_url(path) else ENDINGS):
            raise DataError(f"{path}: unknown kind of shard, known are .tar .zip .parquet .csv .txt, and .tar at URLs")
    return paths


def expand_braces(pattern: str) -> list[str]:
    """"a-{00..11}.{tar,zip}" -> its 24 names, as shells do."""
    match = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    first, last, alternatives = match.groups()
    options, names = alternatives.split(",") if alternatives else range(int(first), int(last) + 1), {}
    width = max(len(first), len(last)) if first and first.startswith("0") and first != "0" else 0
    for option in options:
        option = option if alternatives else str(option).zfill(width)
        names |= dict.fromkeys(expand_braces(pattern[:match.start()] + option + pattern[match.end():]))
        if len(names) > MAX_SHARDS:
            break
    if not 0 < len(names) <= MAX_SHARDS:
        raise DataError(f"{pattern}: {match[0]} makes it 0 shards, or more than {MAX_SHARDS:,}")
    return list(names)


def find_part(path):
    """Part of a dataset in the name of a shard, and its other words: in1k-train-7.tar -> "train", [in, k, tar]."""
    words = re.findall("[a-z]+", os.path.basename(path).lower())
    part = next((word for word in words if word in (*TRAIN, *HELD_OUT)), None)
    return part, [word for word in words if word != part]


def split_parts(sources):
    """Parts of a dataset by the names of its shards.

    Returns:
        name of the training part; the shards of each held-out part beside it, whose other words are the same; the
        number of shards that are in neither. None, [], 0 if there are no such parts.
    """
    shards, is_folder = [path for source in sources for path in find_shards(source)], os.path.isdir(sources[0])
    parts = {part for part, _ in map(find_part, shards)}
    part = next((part for part in TRAIN if part in parts), None)
    if part is None or is_url(shards[0]) or (len(parts) > 1 and not is_folder):
        return None, [], 0
    if not is_folder:
        folder, ending = os.path.split(shards[0])[0], os.path.splitext(shards[0])[1]
        shards = sorted(glob.glob(os.path.join(glob.escape(folder), f"*{ending}")))
    found = {path: find_part(path) for path in shards}
    words = next(words for name, words in found.values() if name == part)
    held_out = [[path for path in shards if found[path] == (name, words)] for name in HELD_OUT]
    if not any(held_out):
        return None, [], 0
    num_others = len(shards) - sum(map(len, held_out)) - sum(name == part for name, _ in found.values())
    return part, [*filter(None, held_out)], num_others * is_folder


def list_shards(sources, part=None, arrays=False):
    """[{path, size, version}] of all shards of some sources, or of those whose names state a part.

    Args:
        arrays: see `scan_shard`; with them it is an item of each too.
    """
    paths = [path for source in sources for path in find_shards(source) if part in (None, find_part(path)[0])]
    if not paths:
        raise DataError(f"{describe_paths(sources)}: no shards ({' '.join(FOLDER_ENDINGS[:3])})")
    if any(path.lower().endswith(".parquet") for path in paths):
        importlib.import_module("pyarrow")  # here, because the error of a worker does not have the name of the package
    options = {"arrays": True} if arrays else {}
    with multiprocessing.pool.ThreadPool(16) as pool:  # whose threads end with the command
        return [dict(path=path, size=size, version=version, **options)
                for path, (size, version) in zip(paths, pool.imap(stat_shard, paths))]


# ---- index ----

class ShardIndex:
    """Where each image lies, in memory-mapped arrays.

    Arrays are for whole sets. `read` takes single images from the file instead: a process that touches the arrays at
    random seems to hold all of them, 5 GB for 10^8 images.

    Attributes:
        members: data.archives.MEMBER [N].
        shards: [{path, size, version, count, passed_over}], and "arrays" of those with .npy files as images.
        names: the table that `name` of a member refers to: [is_label, name].
        classes: names of the classes, sorted; [] without labels.
        unlabeled: number of images without a label.
    """

    def __init__(self, members, keys, file, shards, names, classes, unlabeled):
        self.members, self.keys, self.file = members, keys, file
        self.shards, self.names, self.classes, self.unlabeled = shards, names, classes, unlabeled
        self.starts = [0, *itertools.accumulate(shard["count"] for shard in shards)]

    @classmethod
    def open(cls, path: str, digest: str | None = None) -> "ShardIndex":
        """Map an index file.

        Args:
            digest: see `digest_shards`, if it must be that one.

        Raises:
            DataError: it is missing or no complete index of this version.
        """
        try:
            file = open(check_file(path), "rb", buffering=0)  # noqa: SIM115, stays open for `read`
            is_index = file.read(len(MAGIC)) == MAGIC
            tail = file.seek(-8 - len(MAGIC), os.SEEK_END)
            start = int.from_bytes(file.read(8), "little")
            if not is_index or file.read() != MAGIC:
                raise ValueError("incomplete, or no index of this version")
            file.seek(start)
            header = check_header(json.loads(file.read(tail - start)))
            count = sum(shard["count"] for shard in header["shards"])
            key_start = len(MAGIC) + count * MEMBER.itemsize
            members = np.memmap(file, MEMBER, "r", len(MAGIC), count).view(np.ndarray)
            keys = np.memmap(file, np.uint8, "r", key_start, start - key_start).view(np.ndarray)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}: {error}") from None
        for shard in header["shards"]:
            if not is_url(shard["path"]):
                shard["path"] = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), shard["path"]))
        if digest not in (None, digest_shards(header["shards"])):
            raise DataError(f"{path}: another command has rebuilt it")
        return cls(members, keys, file, **header)

    def __reduce__(self):  # spawned workers map the same file
        return ShardIndex.open, (self.file.name, digest_shards(self.shards))

    def __len__(self):
        return len(self.members)

    def read(self, i: int) -> tuple[np.void, str]:
        """Member and key of image i."""
        i = range(len(self))[i]
        first, size = max(i - 1, 0), MEMBER.itemsize
        members = np.frombuffer(read_at(self.file, (i + 1 - first) * size, len(MAGIC) + first * size), MEMBER)
        start, end = members["key_end"][0].item() if i else 0, members["key_end"][-1].item()
        shard, label = members["shard"][-1], members["label"][-1]
        if not (0 <= shard < len(self.shards) and label < len(self.classes) and 0 <= end - start < MAX_TEXT):
            raise DataError(f"{self.file.name}: corrupt at image {i}, delete it")
        key = read_at(self.file, end - start, len(MAGIC) + self.members.nbytes + start)
        return members[-1], key.decode("utf-8", "surrogateescape")

    def lacks_formats(self, *numbers):
        """Whether files were passed over, in all shards or some, that can be read today, as by pillow-heif."""
        shards = [self.shards[number] for number in numbers] or self.shards
        return any(kind in EXTENSIONS for shard in shards for kind in shard["passed_over"])

    def part(self, number):
        """What scan_shard returned for one shard."""
        start, end = self.starts[number:number + 2]
        key_start, key_end = (self.members["key_end"][i - 1].item() if i else 0 for i in (start, end))
        members = self.members[start:end].copy()
        members["key_end"] -= key_start
        used, members["name"] = np.unique(members["name"].clip(0, len(self.names) - 1), return_inverse=True)
        names = [tuple(self.names[name]) for name in used]
        return members, self.keys[key_start:key_end].tobytes(), names, Counter(self.shards[number]["passed_over"])


def digest_shards(shards):
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def check_header(header):
    """Header of an index; raises ValueError or the like unless it has all fields, of the right types."""
    is_right = all(isinstance(shard["path"], str) and shard["count"] >= 0 and isinstance(shard["version"], (int, str))
                   and all(isinstance(count, int) for count in shard["passed_over"].values()) and shard["size"] >= 0
                   for shard in header["shards"])
    is_right &= all(isinstance(name, str) for _, name in header["names"]) and header["unlabeled"] >= 0
    classes = header["classes"]
    if not is_right or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("corrupt")
    return {name: header[name] for name in ("shards", "names", "classes", "unlabeled")}


def open_index(sources: list[str], cache_dir: str | None = None, part: str | None = None,
               num_workers: int | None = None, arrays: bool = False) -> ShardIndex:
    """Open the index of all shards of some sources; build it, or the part of it whose shards have changed.

    Args:
        cache_dir: folder for the index; default: dino/ in the user's cache folder.
        part, arrays: see `list_shards`.

    Raises:
        DataError: no shards, no images in them, or the folder is not writable.
    """
    shards = list_shards(sources, part, arrays)
    cache_dir = cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dino")
    key = ["arrays"] * arrays + [part or ""]
    key += (source if is_url(source) else os.path.abspath(source) for source in sources)
    digest = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path, beside = os.path.join(cache_dir, digest + INDEX_ENDING), os.path.dirname(shards[0]["path"])
    previous = []
    for candidate in (path, *sorted(glob.glob(os.path.join(glob.escape(beside), f"*{INDEX_ENDING}"))),
                      *(source for source in sources if source.endswith(INDEX_ENDING))):
        with contextlib.suppress(DataError):  # a corrupt one is as good as none
            previous.append(ShardIndex.open(candidate))
            if [*map(get_stamp, previous[-1].shards)] == [*map(get_stamp, shards)] and not previous[-1].lacks_formats():
                return previous[-1]
    for index in (index for index in previous if index.file.name != path):
        print(f"{index.file.name}: of shards of other names, sizes or times, what is the same is taken from it")
    return build_index(path, shards, previous, num_workers)


def build_index(path, shards, previous, num_workers=None, relative=False):
    """Write the index of shards to a file and open it.

    Args:
        shards: see list_shards.
        previous: list of indices, of which the parts are used whose shards have not changed; it is emptied.
        relative: write the paths relative to the file.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as members, tempfile.TemporaryFile(dir=folder) as keys:
            header = write_parts(members, keys, iter_parts(shards, previous, num_workers), relative and folder)
            classes, labels = choose_classes(header["names"], shards[0]["path"])
            previous.clear()  # Windows does not replace open files
            atomic_write(path, functools.partial(write_index, members, keys, header | dict(classes=classes), labels))
    except OSError as error:
        raise DataError(f"{path}: the index cannot be written ({error.strerror or error}), choose another folder "
                        f"({'--output' if relative else '--cache_dir'})") from None
    return ShardIndex.open(path)


def iter_parts(shards, previous, num_workers):
    """Yield each shard, and what scan_shard returns for it or a previous index holds; scans with several processes."""
    known = {get_stamp(shard): (index, i) for index in previous for i, shard in enumerate(index.shards)
             if not index.lacks_formats(i)}
    changed = [shard for shard in shards if get_stamp(shard) not in known]
    num_workers = min(num_workers or count_cores(), len(changed))
    scanned = iter(DataLoader(ScannedShards(changed), batch_size=None, collate_fn=pass_through,
                              num_workers=num_workers if num_workers > 1 else 0, timeout_minutes=SCAN_MINUTES))
    for shard in tqdm(shards, "index", unit="shard", leave=False, disable=None):
        index, i = known.get(get_stamp(shard), (None, 0))
        yield shard, *(index.part(i) if index else next(scanned))


class ScannedShards(Dataset):
    """What scan_shard returns for each shard of list_shards."""

    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, i):
        return scan_shard(self.shards[i]["path"], self.shards[i].get("arrays", False))


def pass_through(item):
    return item


def write_parts(members_file, keys_file, parts, relative_to=None):
    """Write members and keys to files, one part after the other; returns the header of the index."""
    shards, names, num_images, key_bytes, passed_over = [], {}, 0, 0, Counter()
    for shard, members, keys, own_names, own_passed_over in parts:
        rows = [names.setdefault(name, len(names)) for name in own_names]
        members["shard"], members["name"] = len(shards), np.array(rows, np.int32)[members["name"]]
        members["key_end"] += key_bytes
        members_file.write(members.tobytes())
        keys_file.write(keys)
        num_images, key_bytes = num_images + len(members), key_bytes + len(keys)
        shards.append(shard | dict(count=len(members), passed_over=own_passed_over))
        passed_over += own_passed_over
        if relative_to and not is_url(shard["path"]):
            shards[-1]["path"] = os.path.relpath(shard["path"], relative_to)
    if not num_images:
        raise DataError(f"{shard['path']}: no image in {len(shards)} shard(s){describe_passed_over(passed_over)}")
    return dict(shards=shards, names=list(names))


def write_index(members_file, keys_file, header, labels, path):
    """Write MAGIC, members with their labels, keys, JSON header, its offset (8 bytes), MAGIC."""
    unlabeled = 0
    members_file.seek(0), keys_file.seek(0)
    with open(path, "wb") as file:
        file.write(MAGIC)
        while data := members_file.read(MEMBER.itemsize * 2**20):
            members = np.frombuffer(bytearray(data), MEMBER)
            members["label"] = labels[members["name"]]
            unlabeled += int((members["label"] < 0).sum())
            file.write(members)
        shutil.copyfileobj(keys_file, file, 2**20)
        start = file.tell()
        file.write(json.dumps(header | dict(unlabeled=unlabeled)).encode())
        file.write(start.to_bytes(8, "little") + MAGIC)


def choose_classes(names, path):
    """[(is_label, name)] -> classes, class of each line or -1.

    Labels that are numbers are sorted as such. Folders are the classes where there are no labels, under the conditions
    of ImageFolder; a single folder that holds all others is left out.

    Raises:
        DataError: the folders are the parts of a dataset.
    """
    classes = {name for is_label, name in names if is_label}
    if not (has_labels := bool(classes)):
        folders = [name.split("/") for _, name in names]
        if len({top for top, *_ in folders}) == 1 and all(below for _, *below in folders):
            folders = [below for _, *below in folders]
        names = [(False, folder) for folder, *_ in folders]
        folders = {folder for _, folder in names}
        if len(folders) > 1 and are_parts(folders):
            raise DataError(f"{path}: holds the parts {', '.join(sorted(folders))} of a dataset, pack each into shards "
                            f"of its own")
        classes = folders if len(folders) > 1 and "" not in folders else set()
    are_numbers = has_labels and all(map(str.isdecimal, classes))
    classes = sorted(classes, key=lambda name: (int(name) if are_numbers else 0, name))
    number = {(has_labels, name): i for i, name in enumerate(classes)}
    return classes, np.array([number.get(line, -1) for line in names], np.int32)


# ---- dataset ----

class ShardDataset(Dataset):
    """All images in the shards of some sources, in their order.

    Args:
        sources: see find_shards.
        cache_dir, part: see open_index.
        classes: the classes, if they are those of another set; this one may lack some, but have no others.
        value_range: black and white of images of more than 8 bits (see `read_image`); None to find one for all of them.
        channels: see `read_image`.

    Attributes:
        classes: names of the classes; None without labels.
        labels: class of each image, or -1; memory-mapped unless `classes` differ from those of the sources.
        unlabeled: number of images without a label.
        passed_over: what is no image, and how many images have no label, as text; "" if there is nothing.

    Raises:
        DataError: missing or unusable shards, no images, none that can be read, other classes than the given ones.
    """

    def __init__(self, sources: list[str], cache_dir: str | None = None, classes: list[str] | None = None,
                 value_range: tuple[float, float] | None = None, part: str | None = None,
                 num_workers: int | None = None, channels: int | None = None):
        self.index = index = open_index(sources, cache_dir, part, num_workers, arrays=bool(channels))
        self.classes, self.class_map, self.unlabeled = classes or index.classes or None, None, index.unlabeled
        if classes and list(classes) != index.classes:
            if not index.classes or not set(index.classes) <= set(classes):
                raise DataError(f"{describe_paths(sources)}: {compare_classes(index.classes, classes)}")
            self.class_map = np.array([*map(list(classes).index, index.classes), -1])
        self.passed_over = describe_passed_over(sum((Counter(s["passed_over"]) for s in index.shards), Counter()))
        if index.classes and index.unlabeled:
            self.passed_over += f", {index.unlabeled:,} without a label"
        paths = [shard["path"] for shard in index.shards]
        self.root = None if any(map(is_url, paths)) else os.path.commonpath(map(os.path.dirname, paths))
        self.channels, open_file = channels, (lambda i: self.read_content(*self.find(i))) if channels else self.open
        self.value_range = value_range or find_common_range(range(len(self)), open_file, self.name, channels)
        first = range(min(len(self), MAX_CORRUPT_AT_START))
        if all(isinstance(last := read_or_message(self.__getitem__, i), str) for i in first):
            raise DataError(f"{describe_paths(sources)}: none of the first {len(first)} images can be read; the last: "
                            f"{last}")

    def __len__(self):
        return len(self.index)

    @property
    def labels(self):
        labels = self.index.members["label"]
        return labels if self.class_map is None else self.class_map[labels]

    def __getitem__(self, i):
        return self.read_reduced(i)

    def read_reduced(self, i, reduction=None):
        """Image i, downsampled while decoding by `reduction` (see read_image), and its label."""
        member, name = self.find(i)
        image = read_image(name, reduction, value_range=self.value_range, content=self.read_content(member, name),
                           channels=self.channels)
        return image, int(member["label"] if self.class_map is None else self.class_map[member["label"]])

    def open(self, i):
        """Image i, not decoded."""
        member, name = self.find(i)
        return open_image(name, self.read_content(member, name))

    def name(self, i):
        """Path of image i, or its place in a shard as SHARD/KEY."""
        return self.find(i)[1]

    def key(self, i):
        """Name of image i, relative to the folder of all shards."""
        return os.path.relpath(self.name(i), self.root) if self.root else self.name(i)

    def stat(self, i):
        """List of plain values that changes when image i does, or its shard."""
        member, name = self.find(i)
        shard = self.index.shards[member["shard"]]
        return stat_file(name) if member["method"] == PATH else [shard["size"], shard["version"]]

    def find(self, i):
        """data.archives.MEMBER of image i, and its name."""
        member, key = self.index.read(i)
        path = self.index.shards[member["shard"]]["path"]
        if member["method"] == PATH:
            return member, os.path.join(os.path.dirname(path), key)
        return member, "".join(letter if letter.isprintable() else "?" for letter in f"{path}/{key}")

    def read_content(self, member, name):
        """The bytes of an image, None for a file of its own."""
        shard = self.index.shards[member["shard"]]
        if is_url(shard["path"]):  # a connection that fails ends the run: no other images take the place of these
            return read_member(shard["path"], member)
        with wrap_decode_errors(name):
            return None if member["method"] == PATH else read_member(shard["path"], member, shard["version"])


# ---- command ----

def index(args):
    """write an index to a file; one beside the shards is used by every command"""
    built = build_index(args.output, list_shards(args.paths), [], relative=True)
    print(f"{args.output}: {len(built):,} images, {len(built.classes)} classes, {len(built.shards)} shards")


def parse_args(argv=None):
    from common import cli
    parser = cli.build_parser("python -m data.shards", __doc__)
    subparser = cli.add_subcommands(parser, {"index": index})["index"]
    subparser.add_argument("paths", nargs="+", metavar="PATH", help="shard, folder of shards, brace pattern or URL")
    subparser.add_argument("--output", required=True, metavar="FILE", help=f"file to write; NAME{INDEX_ENDING}")
    args = parser.parse_args(argv)
    if not args.output.endswith(INDEX_ENDING):
        parser.error(f"--output {args.output}: must end in {INDEX_ENDING}")
    return args


if __name__ == "__main__":
    from common import cli
    cli.run_command(index, parse_args, DataError)
