"""Before the first step: memory and time of a run, and the batch size that fits.

    memory = *available_memory(device), peak_memory(device)     # of common/memory.py
    batch_size = fit_batch_size(student, teacher, lambda i: crops[0, i], len(images), args, device, memory, print)
"""

import functools
import math
import statistics
import time
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
        args: sizes and number of crops, batch_size_per_gpu, accum_steps, out_dim, precision, num_workers.
        available: free bytes of the device.
    """
    largest = 64 if args.batch_size_per_gpu == "auto" else args.batch_size_per_gpu
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    saved, forward_seconds = measure_forward(student, sizes, args.precision, device, largest, available)
    parameters, frozen = (sum(p.numel() for p in network.parameters()) for network in (student, teacher))
    is_on_host = device.type == "cpu"
    # of crops: in the step, one ahead, and waiting in shared memory
    batches = args.accum_steps + 1 + 2 * args.num_workers * is_on_host
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
        memory: free and total bytes, see common/memory.py.

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
