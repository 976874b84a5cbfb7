import subprocess
import sys
from pathlib import Path

import pytest

from common.memory import read_cgroups

ROOT = Path(__file__).parents[2]
GB = 10**9


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(tmp_path, version):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    base = tmp_path / "memory" if version == 1 else tmp_path
    unlimited = 2**63 - 4096 if version == 1 else "max"
    for folder, limit in ((base, unlimited), (base / "pod", 8 * GB), (base / "pod/c", 9 * GB)):
        folder.mkdir(exist_ok=True, parents=True)
        for name, text in zip((*names, "memory.stat"), (limit, 3 * GB, f"active_file 7\ninactive_file {GB}\n")):
            (folder / name).write_text(str(text))
    (tmp_path / "own").write_text("7:cpu,cpuacct:/pod/c\n" + ("6:memory:" if version == 1 else "0::") + "/pod/c\n")
    groups = list(read_cgroups(tmp_path, tmp_path / "own"))
    assert min(groups) == (6 * GB, 8 * GB) and len(groups) == 4 - version


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no /proc")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    large = bytearray(b"x") * 2 * GB
    code = "from common.memory import peak_memory; x = bytearray(b'x') * 10**9; print(peak_memory('cpu'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert GB < int(found) < len(large)
