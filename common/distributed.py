"""Process groups, collectives on plain objects, and stop signals.

    rank, world_size, device = init_distributed("cuda")     # (0, 1, cuda) unless torchrun started this process
    sizes = all_gather_objects(len(dataset))                # one value per rank
    signals = StopSignals()                                 # SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a clean stop
    batch, _ = signals.wait(lambda: next(batches))          # raises StopRequested on all ranks

Every function also works in a single process without a process group. This file needs torch and nothing else.
"""

import datetime
import os
import select
import signal
import threading
import time

import torch
import torch.distributed as dist

TIMEOUT_MINUTES = 30.0


class DistributedError(ValueError):
    """Processes were started in a way that cannot work, or they disagree about what to train."""


class StopRequested(KeyboardInterrupt):
    """A signal, of this number, asks to stop. No Exception, so that nothing takes it for a corrupt file."""

    def __str__(self):
        return signal.Signals(self.args[0]).name


def is_launched():
    """Whether torchrun, or another launcher that sets its variables, started this process.

    LOCAL_RANK alone does not count: notebooks and job scripts leave it behind.

    Raises:
        DistributedError: some of its variables are missing or wrong.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    if not (values["RANK"] or values["WORLD_SIZE"]):
        return False
    rank, world_size, local_rank, _, port = (int(text) if text.isdecimal() else -1 for text in values.values())
    if rank < 0 or world_size <= rank or local_rank < 0 or not values["MASTER_ADDR"] or not 0 < port < 2**16:
        raise DistributedError(f"cannot be what a launcher sets: {' '.join(f'{k}={v}' for k, v in values.items())}; "
                               f"start with torchrun, or unset RANK WORLD_SIZE for a single process")
    return True


def init_distributed(device, timeout_minutes=TIMEOUT_MINUTES):
    """Join the process group if torchrun started this process.

    Args:
        device: "cuda", "mps" or "cpu".
        timeout_minutes: how long a collective waits for the other processes.

    Returns:
        rank, world size, torch.device of this process.

    Raises:
        DistributedError: more processes than GPUs, several processes on MPS, or see `is_launched`.
    """
    if not is_launched():
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


def count_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def get_rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero():
    """Whether this process is the one that prints, logs and saves."""
    return get_rank() == 0


def run_on_rank_zero_first(function):
    """Call `function` on rank 0, then on one rank of each other machine, then on all others; returns its result.

    So a download happens once, and what is cached in a folder of each machine is made once there.
    """
    own_turn = 0 if is_rank_zero() else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for turn in range(3):
        if turn == own_turn:
            result = function()
        wait_for_all_ranks()
    return result


def wait_for_all_ranks():
    """Return when every rank has called this. On the hosts, by gloo, so that no GPU waits."""
    all_gather_objects(None)


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


# ---- signals ----

def handle_signals(handler, *names):
    """Install a handler of the signals that exist here; returns {number: previous handler}.

    Threads cannot, such as those that run a notebook. SIGHUP stays ignored under nohup.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN}


def request_stop(number, frame):
    """Signal handler that raises StopRequested."""
    raise StopRequested(number)


def silence_lost_output():
    """Discard what is printed to a terminal that was closed, or to a pipe that nobody reads, instead of failing."""
    if hasattr(select, "poll"):
        poll = select.poll()
        for stream in (1, 2):
            poll.register(stream, 0)  # for errors and hangups alone
        null = os.open(os.devnull, os.O_WRONLY)
        for stream, _ in poll.poll(0):
            os.dup2(null, stream)
        os.close(null)


def wait_for(function):
    """`function()`, ended early if a signal is received while StopSignals are installed, see `StopSignals.wait`."""
    return StopSignals.installed.wait(function)[0] if StopSignals.installed else function()


class StopSignals:
    """Turns SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 into a request to stop, which `wait` passes on.

    A second SIGINT raises KeyboardInterrupt; under torchrun one within two seconds does not count, since torchrun and
    the terminal may each send one.
    """

    installed = None

    def __init__(self):
        self.number, self.received_at, self.is_waiting = 0, 0.0, False
        self.previous = handle_signals(self.receive, "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
        StopSignals.installed = self

    def restore(self):
        """Put the previous signal handlers back."""
        StopSignals.installed = None
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.received_at > 2 * (get_world_size() > 1):
            raise KeyboardInterrupt
        silence_lost_output()
        if not self.number:
            self.number, self.received_at = number, time.monotonic()
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            # print is not reentrant
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving{again}\n".encode())
        if self.is_waiting:
            self.is_waiting = False
            raise StopRequested(number)

    def wait(self, function, save_due=False):
        """Call a function that may wait long, such as for data, and agree with all ranks on stopping and saving.

        Args:
            function: without collectives; a signal ends it early. All ranks must call this.
            save_due: whether this rank wants to save.

        Returns:
            what the function returns, and whether some rank wants to save.

        Raises:
            StopRequested: some rank received a signal, now or before.
        """
        result = None
        try:
            self.is_waiting = True
            if not self.number:
                result = function()
        except StopRequested:
            pass
        finally:
            self.is_waiting = False
        flags = torch.tensor([self.number, save_due])
        if get_world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        number, save_due = flags.tolist()
        if number:
            raise StopRequested(number)
        return result, bool(save_due)
