"""Before the first step: memory and time of a run on this machine, the batch size that fits.

    memory = *available_memory(device), peak_memory(device)     # of the container, if there is one
    batch_size = fit_batch_size(student, teacher, lambda i: crops[0, i], len(images), args, device, memory, print)
"""

import contextlib
import functools
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from common import distributed
from common.precision import autocast, cast_weights


class MemoryEstimateError(ValueError):
    """A step that cannot fit the memory; the message names the flag to lower."""


# ---- memory and time of a step ----

class Cost(NamedTuple):
    """Memory and time of a training step on this machine, estimated."""

    fixed_bytes: float  # weights, gradients, optimizer state
    bytes_per_image: float
    seconds_per_image: float

    def memory(self, batch_size):
        """Bytes of a step."""
        return self.fixed_bytes + batch_size * self.bytes_per_image


def measure_cost(student, teacher, load, num_images, args, device, available=math.inf):
    """Cost of a step, from forward passes of one image and more and from loading some images.

    Peaks of whole runs on a CPU were within 10% of the memory.

    Args:
        student, teacher: MultiCropWrappers on the device, which are left as they are.
        load: index -> crops of an image, as a data loader worker makes them.
        args: sizes and number of crops, batch_size_per_gpu, out_dim, precision, num_workers.
        available: free bytes of the device.
    """
    largest = 64 if args.batch_size_per_gpu == "auto" else args.batch_size_per_gpu
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    saved, forward_seconds = measure_forward(student, sizes, args.precision, device, largest, available)
    parameters, frozen = (sum(p.numel() for p in network.parameters()) for network in (student, teacher))
    is_on_host = device.type == "cpu"
    batches = 2 + 2 * args.num_workers * is_on_host  # of crops: in the step, and waiting in shared memory
    crops = 4 * student.backbone.in_chans * sum(size**2 for size in sizes)
    logits = 4 * (2 + len(sizes)) * args.out_dim
    allowance = 1.15  # temporary tensors and the allocator's, measured
    seconds, loading = 3 * forward_seconds, time_loading(load, num_images) / max(1, args.num_workers)
    workers = 10**8 * args.num_workers * is_on_host
    return Cost(allowance * 4 * (4 * parameters + frozen) + workers, allowance * (saved + logits + batches * crops),
                seconds + loading if is_on_host or not args.num_workers else max(seconds, loading))


def measure_forward(student, sizes, precision, device, largest=64, available=math.inf):
    """Bytes that backward needs of each image, and seconds of the student's forward pass per image.

    Runs in eval mode on one image, two and more: up to `largest` on a fast device, in a quarter of the free bytes.
    """
    def forward(batch_size):
        channels = student.backbone.in_chans
        crops = [torch.zeros(batch_size, channels, size, size, device=device) for size in sizes]
        with cast_weights(student, precision), autocast(device, precision):
            return student(crops)

    def measure(batch_size):
        saved.append(count_saved_bytes(lambda: forward(batch_size)))

    saved, times, batch_size = [], [], 2
    student.eval()
    measure(1)  # not timed: a GPU loads its kernels in the first call, which may take seconds
    start = time.perf_counter()
    while not times or (batch_size <= largest and 8 * saved[-1] < available and time.perf_counter() - start < 1):
        times.append(time_call(functools.partial(measure, batch_size), device) / batch_size)
        batch_size *= 2
    student.train()
    return saved[1] - saved[0], min(times)  # the difference of one and two images has no weights


def count_saved_bytes(forward):
    """Bytes of the tensors that autograd keeps of forward()."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # not itself, which would be a cycle that is never freed
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())


def time_call(call, device):
    """Seconds that call() takes on a device."""
    module = torch.get_device_module(device)
    module.synchronize()
    start = time.perf_counter()
    call()
    module.synchronize()
    return time.perf_counter() - start


def time_loading(load, count, seconds=0.3):
    """Median seconds of load(i) for some of the indices below `count`, evenly spread."""
    times, start = [], time.perf_counter()
    for i in range(0, count, -(-count // 16)):
        times.append(time_call(lambda i=i: load(i), "cpu"))
        if time.perf_counter() - start > seconds:
            break
    return statistics.median(times)


# ---- memory of this machine ----

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
    """Most bytes that torch has had on the device or, on a CPU, that this process has had; 0 if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, TypeError):  # not by getrusage, which begins with the peak of the parent process
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


# ---- batch size ----

def choose_batch_size(num_images, cost, available, largest=64):
    """The largest power of two up to `largest` with a step for the images of a process that fits the memory; 0 if none.

    Args:
        num_images: of this process and micro-batch, at least one.
        available: bytes, of which a fifth is left free.
    """
    sizes = (2**i for i in range(min(largest, num_images).bit_length() - 1, -1, -1))
    return next((size for size in sizes if cost.memory(size) <= 0.8 * available), 0)


def resolve_batch_size(batch_size, num_images, cost, memory):
    """--batch_size_per_gpu as a number, and a sentence if it does not fit well.

    Args:
        batch_size: "auto", see `choose_batch_size`, or a number, which is kept.
        memory: free and total bytes, see `available_memory`.

    Raises:
        MemoryEstimateError: no batch size fits, or the number needs over 1.2 times all memory.
    """
    (free, total), best = memory, choose_batch_size(num_images, cost, memory[0])
    is_auto, wanted = batch_size == "auto", batch_size
    if is_auto:
        wanted = choose_batch_size(num_images, cost, math.inf) if best else 1
    problem = f"a step with {wanted} image{'s' * (wanted > 1)} takes about {cost.memory(wanted) / 1e9:.1f} GB, " \
        f"{free / 1e9:.1f} GB are free"
    fix = f"set --batch_size_per_gpu {best}" if best else "lower --out_dim, --global_crops_size or the --arch"
    if not best if is_auto else cost.memory(wanted) > 1.2 * total:  # the estimate may be too high
        raise MemoryEstimateError(f"{problem}, of {total / 1e9:.1f} GB in all: {fix}")
    if is_auto:
        return best, f"--batch_size_per_gpu {best}: {problem}" * (best < wanted)
    return batch_size, f"{problem}: {fix}" * (cost.memory(wanted) > free)


def fit_batch_size(student, teacher, load, num_images, args, device, memory, log):
    """--batch_size_per_gpu as a number that fits, the same on all ranks; logs the estimate, and a note if it is small.

    Arguments and errors of `measure_cost` and `resolve_batch_size`; args.batch_size_per_gpu may be "auto".

    Args:
        memory: free and total bytes before the networks were built, and the peak of the process so far.
    """
    cost = None
    if distributed.is_rank_zero():
        cost = measure_cost(student, teacher, load, num_images, args, device, memory[0])
    cost, (*memory, base) = distributed.all_gather_objects((cost, memory))[0]
    world_size = distributed.get_world_size()
    images = max(1, num_images // (args.accum_steps * world_size))
    batch_size, note = resolve_batch_size(args.batch_size_per_gpu, images, cost, memory)
    log(f"estimated: {(base + cost.memory(batch_size)) / 1e9:.1f} GB of memory{' per process' * (world_size > 1)} and "
        f"{format_duration(cost.seconds_per_image * num_images / world_size)} per epoch on this machine")
    if note:
        log(f"NOTE: {note}")
    return batch_size


def format_duration(seconds):
    """"40 minutes", in the largest unit of which there are two."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{math.ceil(seconds)} second{'s' * (seconds > 1)}"


# ---- a look at the images ----

def sample_images(images, samples=8):
    """A few images, evenly spaced, without those that cannot be read."""
    sample = []
    for i in range(0, len(images), -(-len(images) // samples) or 1):
        with contextlib.suppress(OSError):
            sample.append(images[i][0])
    return sample


def typical_side(images):
    """Median shorter side of images in pixels; None for no images."""
    sizes = [image.shape[1:] if isinstance(image, torch.Tensor) else image.size for image in images]
    return statistics.median(map(min, sizes)) if sizes else None


def is_nearly_black(image):
    """Whether 99% of the pixels of an RGB image are below 16 of 255."""
    return sum(image.convert("L").histogram()[:16]) > 0.99 * image.width * image.height
