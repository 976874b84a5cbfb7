"""Memory of this machine: what is free, of the container if there is one, and what this process has had.

    free, total = available_memory("cpu")
    base = peak_memory("cpu")
"""

import contextlib
import math
import os
import re
import sys
from pathlib import Path

import torch


def available_memory(device):
    """Free and total bytes of a device; of the memory of a CPU, the share of one process. Infinite if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        return (torch.mps.recommended_max_memory(),) * 2
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free = {name: 1024 * int(value) for name, value, *_ in lines}
        found = [(free["MemAvailable:"], free["MemTotal:"] + free["SwapTotal:"]), *read_cgroups()]
        return [min(values) / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) for values in zip(*found)]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no sysconf on Windows
        return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),) * 2
    return math.inf, math.inf


def read_cgroups(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Yield the free and total bytes of each control group that limits this process, as in a container."""
    for line in Path(own).read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        base, limit_name, usage_name = Path(root), "memory.max", "memory.current"  # version 2
        if controllers:
            base, limit_name, usage_name = base / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        group = base / path.lstrip("/")
        for folder in {base, group, *(parent for parent in group.parents if base in parent.parents)}:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit = int((folder / limit_name).read_text())
                used = int((folder / usage_name).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat["inactive_file"]), limit


def peak_memory(device):
    """Most bytes that torch has had on a CUDA device or, elsewhere, that this process has had; 0 if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, TypeError):  # not by getrusage, which begins with the peak of the parent process
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
