"""Process groups, collectives on plain objects, and stop signals.

    rank, world_size, device = init_distributed("cuda")     # (0, 1, cuda) unless torchrun started this process
    sizes = all_gather_objects(len(dataset))                # one value per rank
    signals = StopSignals()                                 # SIGTERM, SIGINT and SIGUSR1 ask for a clean stop

Every function also works in a single process without a process group. This file needs torch and nothing else.
"""

import datetime
import os
import signal
import time

import torch
import torch.distributed as dist


class DistributedError(ValueError):
    """Processes were started in a way that cannot work, or they disagree about what to train."""


def init_distributed(device, timeout_minutes=30.0):
    """Join the process group if torchrun started this process.

    Args:
        device: "cuda", "mps" or "cpu".
        timeout_minutes: how long a collective waits for the other processes.

    Returns:
        rank, world size, torch.device of this process.

    Raises:
        DistributedError: more processes than GPUs, or several processes on MPS.
    """
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device(device)
    local_device = torch.device(device)
    if device == "mps":
        raise DistributedError("torchrun: several processes need CUDA, or --device cpu")
    if device == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise DistributedError(f"torchrun: local rank {local_rank} has no GPU, --nproc_per_node can be at most "
                                   f"{torch.cuda.device_count()}")
        local_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(local_device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts; without a prefix of its own a restart finds stale addresses.
        # Over several machines there is no common prefix: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # gloo carries what the hosts agree on without waiting for the GPUs
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world_size, timeout=timeout)
    return rank, world_size, local_device


def get_rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero():
    """Whether this process is the one that prints, logs and saves."""
    return get_rank() == 0


def run_on_rank_zero_first(function):
    """Call `function` on rank 0, then on the other ranks, so that a download happens once; returns its result."""
    if not is_rank_zero():
        all_gather_objects(None)
    result = function()
    if is_rank_zero():
        all_gather_objects(None)
    return result


def all_gather_objects(value):
    """Picklable value of every rank, as a list in the order of ranks."""
    values = [value]
    if get_world_size() > 1:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def all_gather_rows(tensor):
    """Tensors [M, ...] of all ranks, concatenated in the order of ranks, on the CPU of every rank.

    M may differ between ranks; where it is 0, the other dimensions may be missing.
    """
    if get_world_size() == 1:
        return tensor.cpu()
    shapes = all_gather_objects(tensor.shape)
    rows = torch.empty(sum(shape[0] for shape in shapes), *max(shapes, key=len)[1:], dtype=tensor.dtype)
    for rank, part in enumerate(rows.split([shape[0] for shape in shapes])):  # in place: no copy for each rank
        if rank == get_rank():
            part.copy_(tensor.view(part.shape))
        if len(part):
            dist.broadcast(part, rank)
    return rows


def check_same_on_all_ranks(name, value):
    """Check that all ranks have the same value, since ranks that disagree deadlock or train different models.

    Raises:
        DistributedError: on all ranks; the message names the first rank that differs from rank 0.
    """
    values = all_gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise DistributedError(f"rank {rank} has {name} {other}, rank 0 has {values[0]}: all ranks need the same "
                                   f"images and a shared --output_dir")


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request to stop, which the training loop polls.

    A second SIGINT, two seconds later or more (torchrun and a terminal may each send one), raises KeyboardInterrupt.
    """

    def __init__(self):
        self.number, self.received_at = 0, 0.0
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}

    def restore(self):
        """Put the previous signal handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.received_at > 2:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.received_at = number, time.monotonic()
            # print is not reentrant
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving\n".encode())

    def poll(self, save_due=False):
        """Agree with all ranks, which must all call this, on stopping and saving.

        Args:
            save_due: whether this rank wants to save.

        Returns:
            name of a signal that some rank received, or None; and whether some rank wants to save.
        """
        flags = torch.tensor([self.number, save_due])
        if get_world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        number, save_due = flags.tolist()
        return signal.Signals(number).name if number else None, bool(save_due)
