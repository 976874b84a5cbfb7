"""Images inside tar, zip and Parquet files and lists of paths: where they lie, and their bytes. Nothing is extracted.

    members, keys, names, passed_over = scan_shard("/data/train-0000.tar")
    data = read_member("/data/train-0000.tar", members[0])

Archives may come from anyone: links, devices, sparse and encrypted files, names with `..` and whatever declares more
than MAX_BYTES are passed over, and inflating stops at the size that the archive declares.
"""

import bisect
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import struct
import tarfile
import time
import zipfile
import zlib
from collections import Counter

import numpy as np

from data.folders import SYSTEM_FOLDERS, DataError, stat_file
from data.images import EXTENSIONS

MAX_BYTES = 2**29  # of a file in an archive, deflated or not
MAX_TEXT = 2**20  # bytes of a .cls, a .json or a line
MAX_HEADER = 2**15  # bytes of a tar's extended header, for which Python 3.11.9 takes time that is quadratic
MAX_ROWS = 2**21  # of a row group of Parquet
URL_TRIES, URL_SECONDS = 8, 60
PATH_COLUMNS = ("path", "file_name", "filename", "file_path", "filepath", "image_path", "image", "file")
LABEL_COLUMNS = ("label", "class", "class_name", "category")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}

STORED, DEFLATED, ROW, PATH = range(4)  # how an image is kept: bytes, deflated bytes, row of Parquet, file of its own
MEMBER = np.dtype([
    ("shard", "<i4"), ("method", "u1"),
    ("offset", "<i8"), ("size", "<u4"),  # bytes in the shard; offset is the row in Parquet
    ("length", "<u4"),  # bytes after inflation
    ("name", "<i4"), ("label", "<i4"),  # line of the table of names; class, or -1
    ("key_end", "<i8")])  # the key is between the end of the one before and this


def is_url(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE) is not None


# ---- reading ----

def read_member(path: str, member: np.void, version: int | None = None) -> bytes:
    """The bytes of an image of a shard.

    Args:
        member: MEMBER of scan_shard, of any method but PATH.
        version: of the shard when it was scanned, see `stat_shard`; None for any.

    Raises:
        OSError, ValueError, zlib.error: the shard is missing, truncated, corrupt, or of another version.
        DataError: a URL cannot be read.
    """
    method, offset, size, length = (member[field].item() for field in ("method", "offset", "size", "length"))
    if method == ROW:
        return read_row(path, version, offset)
    data = read_bytes(path, offset, size, version)
    return inflate(data, length) if method == DEFLATED else data


def stat_shard(path):
    """[bytes, version] of a shard: the time of its last change in nanoseconds or, of a URL, its tag and the like."""
    if is_url(path):
        info = call_url(path, lambda files, name: files.info(name))
        return [info["size"], str([info.get(key) for key in ("ETag", "Last-Modified", "LastModified", "mtime")])]
    if not (stamp := stat_file(path)):
        raise DataError(f"{path}: no such shard, or no permission to see it")
    return stamp


def read_bytes(path, offset, size, version=None):
    if is_url(path):
        data = call_url(path, lambda files, name: files.cat_file(name, start=offset, end=offset + size))
    else:
        data = read_at(open_file(os.getpid(), path, version), size, offset)
    if len(data) > size:
        raise DataError(f"{path}: the server does not support range requests")
    if len(data) < size:
        raise (DataError if is_url(path) else ValueError)(f"{path}: truncated, {len(data)} of {size} bytes")
    return data


def read_at(file, size, offset):
    """Bytes of an unbuffered file. Forked processes that share it do not disturb each other."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)  # on Windows, where processes do not share files
    return file.read(size)


def limit_open_files():
    """A quarter of the files that a process may open, but 10,000 at most."""
    try:
        import resource
    except ImportError:  # on Windows
        return 128
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 10_000 if limit == resource.RLIM_INFINITY else min(max(limit // 4, 16), 10_000)


@functools.lru_cache(maxsize=limit_open_files())
def open_file(process, path, version):
    """File that one process uses; closed when as many others were opened since it was used."""
    check_version(path, version)
    return open(path, "rb", buffering=0)


def check_version(path, version):
    if version not in (None, stat_shard(path)[1]):
        raise ValueError("the shard has changed since it was indexed")


def inflate(data, length):
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(data, length + 1)
    if len(data) != length or not inflater.eof:
        raise ValueError(f"does not inflate to {length} bytes")
    return data


def call_url(url, call):
    """call(file system of fsspec, path there), repeated after a pause while the connection fails."""
    import fsspec
    options = {}
    if url.startswith("http"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=URL_SECONDS)}
    for attempt in range(URL_TRIES):
        try:
            return call(*fsspec.core.url_to_fs(url, **options))
        except (ImportError, ValueError) as error:  # no such protocol, no range requests
            raise DataError(f"{url}: {error}") from None
        except Exception as error:  # every protocol has its own; fsspec has no file where no server answers
            message = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
            time.sleep(0.1 * 2**attempt)
    raise DataError(f"{url}: {URL_TRIES} tries failed, the last: {message}")


class UrlFile(io.RawIOBase):
    """Seekable file at a URL, read by range requests."""

    def __init__(self, url):
        self.url, self.position = url, 0
        self.size = call_url(url, lambda files, name: files.size(name))
        call_url(url, lambda files, name: files.open(name).read(1))  # ValueError if it is all that the server sends

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer):
        size = max(min(len(buffer), self.size - self.position), 0)
        buffer[:size] = read_bytes(self.url, self.position, size) if size else b""
        self.position += size
        return size


# ---- scanning ----

def scan_shard(path: str, arrays: bool = False) -> tuple[np.ndarray, bytes, list[tuple[bool, str]], Counter]:
    """Find the images of a shard.

    Args:
        arrays: whether .npy files in a tar or zip are images.

    Returns:
        members: MEMBER [N]; shard is 0 and label -1, which are for an index to fill in.
        keys: UTF-8 (surrogateescape) names of the images, one after the other.
        names: table of (is_label, name): a label, or else the two top folders of the image, "" if there are none.
        passed_over: {kind: number} of whatever else the shard holds.

    Raises:
        DataError: the shard cannot be read at present (permissions, network), or is a compressed tar.
    """
    keys, names, passed_over = bytearray(), {}, Counter()
    endings, ending = EXTENSIONS | {".npy"} if arrays else EXTENSIONS, os.path.splitext(path)[1].lower()
    scan = {".parquet": scan_parquet, ".csv": scan_list, ".txt": scan_list}.get(
        ending, functools.partial(scan_zip if ending == ".zip" else scan_tar, endings))

    def iter_members():
        try:
            for key, method, offset, size, length, name in scan(path, passed_over):
                keys.extend(key.encode("utf-8", "surrogateescape"))
                yield 0, method, offset, size, length, names.setdefault(name, len(names)), -1, len(keys)
        except (DataError, ImportError, MemoryError):
            raise
        except Exception as error:  # hostile archives raise nearly anything
            if isinstance(error, OSError) and error.errno:  # pyarrow raises OSError for corrupt files
                raise DataError(f"{path}: {error.strerror}") from None
            passed_over[f"corrupt or truncated: {os.path.basename(path)}"] += 1

    members = np.fromiter(iter_members(), MEMBER)
    return members, bytes(keys), list(names), passed_over


def scan_tar(endings, path, passed_over):
    with HeaderReader(UrlFile(path), 2**22) if is_url(path) else HeaderReader(io.FileIO(path)) as file:
        start = file.read(6)
        for magic, command in COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(f"{path}: a compressed tar has no random access, decompress it ({command})")
        end, name = file.seek(0, io.SEEK_END), os.path.basename(path)
        yield from group_samples(iter_tar(file, 0, end, name, passed_over), file, passed_over, endings)


class HeaderReader(io.BufferedReader):
    """File that reads no more than MAX_HEADER bytes at once, whatever a header declares."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size)


def iter_tar(file, start, end, tar_name, passed_over, label=None):
    """Yield (name, method, offset, size, length, label) of the files of a tar from `start` to `end` of a file.

    A tar inside gives its files, with its stem as their label.
    """
    try:
        file.seek(start)
        tar = tarfile.TarFile(fileobj=file)
        while (member := tar.next()) is not None and member.offset < end:
            tar.members.clear()  # would hold all of them
            tar.pax_headers.clear()  # and copy the global ones for each
            name, offset, size = member.name, member.offset_data, member.size
            is_file = member.isfile() and not member.issparse()
            leads_back = size < 0 or not member.offset < tar.offset < end + tarfile.BLOCKSIZE
            if leads_back or (is_file and offset + size > end):
                raise ValueError("truncated, or a negative size")
            if not is_file:
                passed_over["link(s), device(s), sparse file(s)"] += not member.isdir()
            elif label is None and name.lower().endswith(".tar"):
                name = os.path.basename(name)
                yield from iter_tar(file, offset, offset + size, f"{name} in {tar_name}", passed_over, name[:-4])
            elif accept_file(name, size, passed_over):
                yield name, STORED, offset, size, size, label
        file.seek(tar.offset)
        if member is None and tar.offset < end and any(io.BufferedReader.read(file, min(MAX_TEXT, end - tar.offset))):
            raise ValueError("corrupt header, or another tar behind this one")  # where tarfile ends without an error
    except (DataError, OSError, MemoryError):
        raise
    except Exception:  # the files before it are whole
        passed_over[f"corrupt or truncated: {tar_name}"] += 1


def scan_zip(endings, path, passed_over):
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        end = os.fstat(file.fileno()).st_size
        yield from group_samples(iter_zip(file, archive, end, passed_over), file, passed_over, endings)


def iter_zip(file, archive, end, passed_over):
    """Yield (name, method, offset, size, length, None) of the files of a zip."""
    methods = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    if sum(info.compress_size for info in archive.infolist() if info.header_offset + info.compress_size <= end) > end:
        raise ValueError("overlapping files")
    for info in sorted(archive.infolist(), key=lambda info: info.filename):  # a zip may hold its files in any order
        size, length = info.compress_size, info.file_size
        name = info.filename.replace("\\", "/")  # of archivers on Windows
        if info.flag_bits & 1 or info.compress_type not in methods:
            passed_over["encrypted or compressed otherwise"] += 1
        elif info.external_attr >> 28 == 0o12:  # S_IFLNK
            passed_over["link(s), device(s), sparse file(s)"] += 1
        elif not info.is_dir() and accept_file(name, max(size, length), passed_over):
            file.seek(info.header_offset)
            signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30).ljust(30))
            offset = info.header_offset + 30 + name_length + extra_length
            if signature != b"PK\3\4" or offset + size > end or (info.compress_type == 0 and size != length):
                passed_over["corrupt or truncated"] += 1
            else:
                yield name, methods[info.compress_type], offset, size, length, None


def accept_file(name, length, passed_over):
    """Whether a file in an archive has a plain name and size; counts it as passed over otherwise."""
    parts = name.removeprefix("./").split("/")
    system = next((part for part in parts[:-1] if part.lower() in SYSTEM_FOLDERS), None)
    kind = ("unsafe name(s)" if name.startswith("/") or ".." in parts else
            "hidden" if any(part.startswith(".") for part in parts) else
            f"{system}/" if system else
            f"file(s) above {MAX_BYTES >> 20} MB" if length > MAX_BYTES else None)
    passed_over.update([kind] if kind else [])
    return kind is None


def group_samples(files, shard, passed_over, endings):
    """Files of an archive -> (key, method, offset, size, length, name) of its images, see scan_shard.

    Consecutive files whose names agree up to the first dot of the base name are one sample, as in WebDataset.
    """
    files = ((name.removeprefix("./"), *rest) for name, *rest in files)
    for key, sample in itertools.groupby(files, lambda file: re.match("(?s)(.*/)?[^/.]*", file[0])[0]):
        images, label = [], None
        for file in sample:
            name, *place, tar_label = file
            ending = os.path.splitext(name)[1].lower()
            if ending in endings:
                images.append(file)
            elif name in (f"{key}.cls", f"{key}.json"):
                label = read_label(shard, ending, *place, passed_over) or label
            else:
                passed_over[ending or "without ending"] += 1
        if label and not images:
            passed_over["label(s) without an image beside"] += 1
        if label:  # KEY.seg.png is no image of the sample
            own = [file for file in images if file[0] == key + os.path.splitext(file[0])[1]] or images
            passed_over["other image(s) of a labeled sample"] += len(images) - len(own)
            images = own
        for name, *place, tar_label in images:
            folders = "/".join(name.split("/")[:-1][:2])
            yield name, *place, (True, label or tar_label) if label or tar_label else (False, folders)


def read_label(file, ending, method, offset, size, length, passed_over):
    """Class name in a .cls or .json, None if there is none."""
    position = file.tell()
    try:
        if max(size, length) > MAX_TEXT:
            raise ValueError("too long")
        file.seek(offset)
        text = io.BufferedReader.read(file, size)
        text = (inflate(text, length) if method == DEFLATED else text).decode()
        return to_label(text if ending == ".cls" else json.loads(text).get("label"))
    except (ValueError, AttributeError, RecursionError, zlib.error):  # AttributeError: JSON, but no object
        passed_over[f"corrupt {ending}"] += 1
    finally:
        file.seek(position)


def to_label(value):
    """Class name of an integer or text; None for -1, an empty or long text, and what is no single class."""
    if isinstance(value, float) and value.is_integer():  # of pandas, beside missing labels
        value = int(value)
    value = str(value).strip() if isinstance(value, (int, str)) else ""
    return None if value in ("", "-1") or len(value) > 200 or not value.isprintable() else value


def scan_list(path, passed_over):
    """Lines `path` or `path,label` of a text file; a first line that names its columns may name more.

    A line of a .txt that ends as images do is a path, with all of its commas.
    """
    path_column, label_column, count = 0, 1, 2
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = iter(lambda: file.readline(MAX_TEXT), "")
        rows = csv.reader(lines, skipinitialspace=True) if path.lower().endswith(".csv") else map(split_line, lines)
        for number, row in enumerate(rows):
            names = [name.strip().lower() for name in row]
            heads = [[name for name in known if name in names] for known in (PATH_COLUMNS, LABEL_COLUMNS)]
            if number == 0 and heads[0]:
                path_column, count = names.index(heads[0][0]), len(names)
                label_column = names.index(heads[1][0]) if heads[1] else count
                passed_over[f"column(s), none of them {', '.join(LABEL_COLUMNS)}"] += (count - 1) * (not heads[1])
            elif number == 0 and row and not is_path(row[0], os.path.dirname(path)):
                raise DataError(f"{path}: line 1, {','.join(row)[:100]!r}, is no image and names no column of "
                                f"{', '.join(PATH_COLUMNS)}: rename the column, or begin with the first image")
            elif path_column < len(row) <= count and row[path_column]:
                label = to_label(row[label_column]) if len(row) > label_column else None
                yield row[path_column], PATH, 0, 0, 0, (True, label) if label else (False, "")
            else:
                passed_over["line(s) that are not path,label"] += bool(row)


def is_path(name, folder):
    """Whether a name looks like that of an image, or is a file relative to a folder."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS or os.path.exists(os.path.join(folder, name))


def split_line(line):
    line = line.rstrip("\r\n")
    if os.path.splitext(line)[1].lower() in EXTENSIONS:
        return [line]
    return next(csv.reader([line], skipinitialspace=True), [])


# ---- Parquet ----

def scan_parquet(path, passed_over):
    file, _, column, field = open_parquet(os.getpid(), path, None)
    schema = file.schema_arrow
    names = []
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):  # without the metadata of `datasets`
        names = list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    columns = ["label"] * ("label" in schema.names)
    if field and schema.field(column).type.get_field_index("path") >= 0:
        columns.append(f"{column}.path")
    row = 0
    for group in range(file.num_row_groups):
        check_row_group(file, path, group)
        values = file.read_row_group(group, columns, use_threads=False).to_pydict() if columns else {}
        num_rows = file.metadata.row_group(group).num_rows
        for label, image in zip(values.get("label", [None] * num_rows), values.get(column, [None] * num_rows)):
            if isinstance(label, int) and 0 <= label < len(names):
                label = names[label]
            label, key = to_label(label), (image or {}).get("path") or f"row {row}"
            yield str(key), ROW, row, 0, 0, (True, label) if label else (False, "")
            row += 1


def check_row_group(file, path, number):
    """Raise DataError for one that takes gigabytes of memory: every image of it is read with all others."""
    group = file.metadata.row_group(number)
    if group.total_byte_size > MAX_BYTES or group.num_rows > MAX_ROWS:
        raise DataError(f"{path}: {group.num_rows:,} rows of {group.total_byte_size:,} bytes in one row group, write "
                        f"it with row_group_size=100")


@functools.lru_cache(maxsize=8)
def open_parquet(process, path, version):
    """ParquetFile, first row of each row group, column of the images, "bytes" if that is a struct or None."""
    import pyarrow
    import pyarrow.parquet
    check_version(path, version)
    file = pyarrow.parquet.ParquetFile(path)
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    binary = (pyarrow.binary(), pyarrow.large_binary())
    for column in sorted(file.schema_arrow, key=lambda column: column.name != "image"):
        kind = column.type
        is_struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if kind in binary or is_struct and kind.field("bytes").type in binary:
            return file, [0, *itertools.accumulate(sizes)], column.name, "bytes" if is_struct else None
    raise DataError(f"{path}: no column of images (binary, or a struct with `bytes`)")


@functools.lru_cache(maxsize=2)
def read_row_group(process, path, version, group):
    file, _, column, field = open_parquet(process, path, version)
    check_row_group(file, path, group)
    return file.read_row_group(group, [f"{column}.{field}" if field else column], use_threads=False)[column]


def read_row(path, version, row):
    _, starts, _, field = open_parquet(os.getpid(), path, version)
    group = bisect.bisect_right(starts, row) - 1
    value = read_row_group(os.getpid(), path, version, group)[row - starts[group]].as_py()
    data = value["bytes"] if field and value else value
    if data is None:
        raise ValueError("null")
    return data
