import errno
import fcntl
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import files
from common.checkpoint import prepare_output_dir
from common.files import atomic_write, check_file, read_json, read_text, write_json, write_text

# ---- writing ----

def test_writers_of_one_file_do_not_mix(tmp_path):
    """Two commands that write the same file at a time: it is always one's, whole, and both end."""
    path, found, errors = tmp_path / "result.json", set(), []

    def write(letter):
        try:
            for _ in range(50):
                atomic_write(path, lambda temporary: write_slowly(temporary, letter))
        except OSError as error:
            errors.append(error)

    def write_slowly(temporary, letter):
        with open(temporary, "w") as file:
            for _ in range(4):
                file.write(letter * 1000)
                file.flush()
                time.sleep(0.0001)

    write("a")
    threads = [threading.Thread(target=write, args=letter) for letter in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.add(path.read_text())
    assert found <= {"a" * 4000, "b" * 4000} and errors == [] and os.listdir(tmp_path) == ["result.json"]


def write_and_die(path):
    """safetensors writes to a hidden file first; a kill leaves that one and the temporary file."""
    def write(temporary):
        save_file({"x": torch.ones(9)}, temporary)
        with open(os.path.join(os.path.dirname(temporary), ".tmpAbCdEf"), "w") as file:
            file.write("half")
        os.kill(os.getpid(), signal.SIGKILL)
    if not (child := os.fork()):
        atomic_write(path, write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_kill_leaves_is_removed(tmp_path):
    """By the next writer once it is a day old, since another may be writing, and by the next run in the folder."""
    path = tmp_path / "teacher.safetensors"
    atomic_write(path, lambda temporary: save_file({"x": torch.zeros(9)}, temporary))
    write_and_die(path)
    [left] = tmp_path.glob("*.tmp")
    assert {name.name for name in left.iterdir()} == {"teacher.safetensors", ".tmpAbCdEf"}
    assert load_file(path)["x"].sum() == 0
    (tmp_path / "student.safetensors.notes.tmp").mkdir()  # a user's
    atomic_write(path, lambda temporary: save_file({"x": torch.zeros(9)}, temporary))
    assert left.exists()
    os.utime(left, (0, time.time() - 25 * 3600))
    atomic_write(path, lambda temporary: save_file({"x": torch.ones(9)}, temporary))
    assert sorted(os.listdir(tmp_path)) == ["student.safetensors.notes.tmp", path.name]
    assert load_file(path)["x"].sum() == 9
    write_and_die(path)
    write_and_die(tmp_path / "checkpoint0019.pth")
    prepare_output_dir(tmp_path, "pretraining", found=None, overwrite=True).close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "student.safetensors.notes.tmp"]


def test_files_have_the_mode_of_others(tmp_path):
    atomic_write(tmp_path / "a.safetensors", lambda temporary: save_file({"x": torch.ones(1)}, temporary))
    write_json(tmp_path / "b.json", {})
    for name in ("a.safetensors", "b.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~files.UMASK


def test_disks_that_cannot_flush_a_folder(tmp_path, monkeypatch):
    """VirtualBox's shared folders and old CIFS. Windows flushes a file only if it is open for writing."""
    flushed, fsync = [], os.fsync

    def fsync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files_only)
    before = len(os.listdir("/proc/self/fd"))
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and flushed == [os.O_RDWR]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_cannot_be_written_is_untouched(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match=r"a.txt: cannot be written, the previous file is untouched \(No space left"):
        atomic_write(tmp_path / "a.txt", lambda temporary: Path("/dev/full").write_text("new"))
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(OSError, match=r"none/a.txt: cannot be written, .* \(No such file or directory\)$"):
        write_text(tmp_path / "none" / "a.txt", "new")


# ---- reading ----

def test_text_with_any_mark_and_any_path(tmp_path):
    path = tmp_path / "a.txt"
    text = "/data/caf\udce9/größe\n"  # the first with a byte that is no UTF-8, as Linux allows
    write_text(path, text)
    assert path.read_bytes() == b"/data/caf\xe9/gr\xc3\xb6\xc3\x9fe\n" and read_text(path) == text
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        mark = "\ufeff" * encoding.endswith("e")
        path.write_bytes((mark + "größe\n").encode(encoding))
        assert read_text(path) == "größe\n"


def test_objects_of_json_files(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    for content, value in ((b'\xef\xbb\xbf{"a": [1]}', {"a": [1]}), (b'{"a": ', {}), (b"[1]", {}), (b"\xff\xfe", {})):
        path.write_bytes(content)
        assert read_json(path) == value


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("text")
    assert read_text(tmp_path / "link") == "text"
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="is not a regular file"):
            check_file(path)
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")
