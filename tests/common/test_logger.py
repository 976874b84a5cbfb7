import json
import math
import os
import platform
import re
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.logger import Logger, describe_environment


@pytest.fixture
def logger(tmp_path):
    logger = Logger(tmp_path / "log.jsonl")
    logger.start_progress(0, 10)
    return logger


def records(logger):
    return [json.loads(line) for line in logger.path.read_text().splitlines()]


def test_throughput_separates_waiting_for_data(logger):
    def slow():
        while True:
            time.sleep(0.05)
            yield "batch"

    batches = slow()
    for _ in range(3):
        assert logger.next_batch(batches) == "batch"
        logger.count_step()
    throughput = logger.throughput(images_per_step=8, steps_left=5)
    assert 0.05 <= throughput["data_time"] <= throughput["step_time"]
    assert throughput["images_per_sec"] == pytest.approx(8 / throughput["step_time"])
    assert throughput["eta"] == pytest.approx(5 * throughput["step_time"])
    assert logger.steps == 0 and logger.waits == []


def test_a_step_is_a_line_and_a_record(logger, capsys):
    record = dict(epoch=3, step=4, loss=2.5, images_per_sec=99.6, data_time=0.01, step_time=0.5, eta=3725.2)
    logger.log_step(record, 6, ["loss {loss:.3f}", "step {step}"])
    line = r"[\d-]{10} [\d:]{8} epoch 3/6 \[5/10\] loss 2.500 step 4 100 img/s data 2% elapsed 0:00:0\d eta 1:02:05\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert records(logger) == [record]


def test_the_progress_bar_fits_80_columns(tmp_path, monkeypatch):
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        logger = Logger(tmp_path / "log.jsonl")
        logger.start_progress(0, 187_200)
        logger.progress.start_t -= 36_000  # it runs for ten hours
        logger.progress.n = 183_599
        logger.count_step()
        record = dict(epoch=98, step=183_599, loss=11.0904, kl=0.768, lr=2.5e-4, images_per_sec=1234.5, data_time=0.01,
                      step_time=0.5, eta=3725.2)
        logger.log_step(record, 100, ["loss {loss:.3f}", "kl {kl:.3f}", "lr {lr:.1e}"])
        output = b""
        while select.select([reader], [], [], 0.5)[0]:  # the terminal passes it on in parts
            output += os.read(reader, 4096)
        line = output.decode().split("\r")[-1]
        logger.close()
    assert len(line) <= 80 and " 183600/187200 10:00:00<11:45, loss 11.090 1234 img/s data 2%" in line


def test_the_environment_of_a_run():
    found = describe_environment("cpu")
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert f"{torch.get_num_threads()} threads" in found["device"]
    root = Path(__file__).parents[2]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    modified = subprocess.run(["git", "-C", str(root), "diff-index", "--quiet", "HEAD"]).returncode
    expected = None if head.returncode else head.stdout.strip() + ", modified" * bool(modified)
    assert found["commit"] == expected


def test_values_that_are_not_finite_become_null(logger):
    logger.log(dict(loss=math.nan, kl=math.inf, lr=0.1, eval="epoch 0"))
    assert records(logger) == [dict(loss=None, kl=None, lr=0.1, eval="epoch 0")]


def test_a_resumed_log_is_cut_to_the_checkpoint(logger):
    for step in range(3):
        logger.log(dict(step=step))
    size = len(json.dumps(dict(step=0))) + 1
    resumed = Logger(logger.path)
    resumed.resume(log_bytes=2 * size, corrupt_images=["a.jpg: truncated"])
    resumed.log(dict(step="again"))
    assert [record["step"] for record in records(resumed)] == [0, 1, "again"]
    assert resumed.corrupt_images == {"a.jpg: truncated"}


def test_a_corrupt_image_is_printed_once(logger, capsys):
    logger.log_corrupt(["a.jpg: truncated", "a.jpg: truncated"])
    logger.log_corrupt(["a.jpg: truncated", "b.jpg: empty"])
    assert capsys.readouterr().out.splitlines() == ["skipped corrupt image a.jpg: truncated",
                                                    "skipped corrupt image b.jpg: empty"]


def test_a_silent_logger_writes_nothing(tmp_path, capsys):
    logger = Logger(tmp_path / "log.jsonl", is_silent=True)
    logger.start_progress(0, 10)
    logger.print("text")
    logger.log(dict(loss=1.0))
    assert capsys.readouterr().out == "" and not logger.path.exists()


def test_an_unwritable_log_is_one_line(tmp_path):
    with pytest.raises(OSError, match="log.jsonl: cannot be written"):
        Logger(tmp_path / "missing" / "log.jsonl").log(dict(loss=1.0))
