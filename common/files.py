"""Files: atomic writes, text with any byte-order mark and any path in it, and one-line errors.

    atomic_write("model.onnx", lambda temporary: Path(temporary).write_bytes(content))
    write_text("flags.txt", text)
    text = read_text("flags.txt")
    torch.load(check_file("checkpoint.pth"))        # raises OSError for a named pipe, which open() would wait for
"""

import codecs
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from pathlib import Path

UMASK = os.umask(0)  # which can be read by setting it only, and so for all threads
os.umask(UMASK)
OS_ERRORS = {  # errno -> what to print in place of the system's text
    errno.ENOENT: "no such file or folder", errno.EEXIST: "is a file: name a folder, or one that is not there yet",
    errno.ENOTDIR: "a part of this path is a file: name another", errno.EROFS: "read-only disk: name another path",
    errno.EACCES: "permission denied: name another path, or change its owner or mode"}


# ---- writing ----

def atomic_write(path, write, keep=1):
    """Call `write(temporary)` on a file of the same name in a new folder beside it, flush it to disk and move it here.

    The previous files are kept as PATH.1 to PATH.(keep - 1). At any moment there is a complete file, also if several
    processes write it at a time. What a killed one left behind is removed by the first that comes a day later.

    Raises:
        OSError: the disk is full or the folder not writable; the previous file is untouched.
    """
    folder, name = os.path.split(path)
    try:
        with tempfile.TemporaryDirectory(".tmp", f"{name}.", folder or ".", ignore_cleanup_errors=True) as own:
            day_ago = os.stat(own).st_mtime - 24 * 3600  # by the clock of the file server
            remove_temporaries(folder, glob.escape(name), day_ago)
            write(temporary := os.path.join(own, name))
            with open(temporary, "rb+") as file:  # Windows flushes no file that is open for reading only
                with contextlib.suppress(OSError):  # on file systems without modes
                    os.chmod(temporary, 0o666 & ~UMASK)  # safetensors writes files that only their owner can read
                os.fsync(file.fileno())
            names = [f"{path}", *(f"{path}.{age}" for age in range(1, keep))]
            for newer, older in reversed(list(zip(names, names[1:]))):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(newer, older)
            os.replace(temporary, path)
    except Exception as error:  # torch and safetensors raise errors of their own on a full disk
        if "DataLoader worker" in str(error):  # raised wherever the main process happens to be
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"{path}: cannot be written, the previous file is untouched ({reason})") from None
    with contextlib.suppress(OSError):  # on Windows and on disks that cannot flush a folder
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)  # makes the rename itself durable
        finally:
            os.close(descriptor)


def remove_temporaries(folder, pattern, before=math.inf):
    """Remove folders of `atomic_write` for names of a pattern that killed processes left, last changed before a time.
    """
    for path in Path(folder).glob(f"{pattern}.????????.tmp"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < before:
                shutil.rmtree(path)


def write_text(path, text):
    """Write text as UTF-8, atomically; paths in it may hold bytes that are none."""
    atomic_write(path, lambda temporary: Path(temporary).write_text(text, "utf-8", "surrogateescape"))


def write_json(path, content):
    """Write plain values as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1))


def number_name(name, taken):
    """Name for an output about a file, within what file systems allow; numbered if it is in a list, and added to it."""
    name = name[-55:]  # which may be four times as many bytes
    taken.append(f"{name}.{len(taken) + 1}" if name in taken else name)
    return taken[-1]


def create_folder(folder):
    """Create a folder unless it exists; raises OSError if no file can be created in it."""
    os.makedirs(folder, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder}: not writable ({error.strerror})") from None


# ---- reading ----

def check_file(path):
    """Return the path of a regular file; raises OSError for any other, as a named pipe, whose opening would block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.ENXIO, "is not a regular file", os.fspath(path))
    return path


def read_text(path):
    """Text of a file in UTF-8, or as its byte-order mark says; see `write_text`."""
    content = Path(check_file(path)).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # of PowerShell
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", "surrogateescape")


def read_json(path):
    """Object in a JSON file; {} if there is no such file, or it holds anything else."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def hash_file(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(check_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- errors ----

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_os_error(error):
    """Path, problem and fix of an OSError of the system, whose own text begins with [Errno N]; None for another."""
    path = getattr(error, "filename", None)
    return path and f"{os.fsdecode(path)}: {OS_ERRORS.get(error.errno, error.strerror)}"
