"""Worker processes that always end: a DataLoader for training, evaluation and indexing.

    for batch in DataLoader(dataset, collate_fn=collate, num_workers=8, batch_size=64): ...

This file needs torch, and two files of common/.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from multiprocessing import resource_tracker

import torch

from common.checkpoint import iter_tensors
from common.distributed import TIMEOUT_MINUTES

JOB_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
if hasattr(signal, "sigtimedwait"):
    JOB_SIGNALS.append(signal.SIGTERM)  # by which torch stops its workers, see end_with_parent


class DataLoader(torch.utils.data.DataLoader):
    """DataLoader that always ends: if workers die or hang, by an error, and the workers with this process.

    Where workers are not forked and so take seconds to start, they are kept from one iteration to the next.

    Args:
        timeout_minutes: how long a batch may take.

    Raises:
        RuntimeError: while iterating, "DataLoader worker ..." or "DataLoader timed out ...".
    """

    def __init__(self, dataset, *, collate_fn, num_workers=0, timeout_minutes=TIMEOUT_MINUTES, **kwargs):
        super().__init__(dataset, collate_fn=functools.partial(collate_shared, collate_fn), num_workers=num_workers,
                         worker_init_fn=end_with_parent,
                         persistent_workers=num_workers > 0 and multiprocessing.get_start_method() != "fork", **kwargs)
        self.timeout_minutes = timeout_minutes

    def __iter__(self):
        try:
            with block_job_signals(), keep_garbage():  # which the workers inherit
                batches = super().__iter__()
        except OSError as error:
            raise OSError(f"data loader workers cannot be started ({error}): is /dev/shm usable? --num_workers 0 does "
                          f"without") from None
        return iter_batches(batches, self.timeout_minutes) if self.num_workers else batches


@contextlib.contextmanager
def block_job_signals():
    """Block signals that are sent to the whole job (Ctrl-C, preemption), and are for the main process alone.

    The death of a worker on them would end the run before it has saved.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def keep_garbage():
    """Leave what is garbage now to this process: workers that are forked within the context never collect it.

    The destructor of a session of onnxruntime would wait for threads that a fork does not have.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def iter_batches(batches, timeout_minutes=TIMEOUT_MINUTES):
    """Iterate a DataLoader's iterator; raises RuntimeError, whichever way a dead or hanging worker shows."""
    workers = getattr(batches, "_workers", ())
    try:
        while True:
            # kills them, because torch's own timeout ends no wait within the receipt of a batch; less than the other
            # ranks wait for this one, so that the first message is of the rank with the cause
            timer = threading.Timer(0.9 * 60 * timeout_minutes, lambda: [worker.kill() for worker in workers])
            timer.daemon = True
            timer.start()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError, pickle.UnpicklingError) as error:
                if timer.finished.is_set():
                    raise RuntimeError(f"DataLoader timed out after {timeout_minutes:g} minutes") from None
                if isinstance(error, RuntimeError):
                    raise
                # a worker that dies while it sends a batch breaks a pipe or a socket, or cuts a pickle
                raise RuntimeError(f"DataLoader worker exited while sending a batch ({type(error).__name__})") from None
            finally:
                timer.cancel()
            yield batch
    except (KeyboardInterrupt, GeneratorExit):
        for worker in workers:  # torch gives each five seconds to finish its batch
            worker.terminate()
        raise


def collate_shared(collate, samples):
    """collate(samples), in a worker with its tensors in shared memory.

    Raises there, and so in the main process, if /dev/shm is full. The thread that sends a batch would print the error
    and the main process would wait for ever.
    """
    batch = collate(samples)
    if torch.utils.data.get_worker_info():
        for _, tensor in iter_tensors(batch):
            tensor.share_memory_()
    return batch


def end_with_parent(worker_id):
    """Initialize a worker: it ends when its parent asks or is gone, though it may be waiting for a disk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, which cannot block signals
    sys.excepthook = lambda *error: None  # the thread that sends tensors would print that nobody receives them
    if hasattr(signal, "sigtimedwait"):
        parent, started_by = multiprocessing.parent_process(), os.getppid()  # the latter may be a fork server

        def wait_for_parent():
            while os.getppid() == started_by and parent.is_alive():
                received = signal.sigtimedwait({signal.SIGTERM}, 1)
                if received and received.si_pid == parent.pid:
                    break
            os._exit(0)
        threading.Thread(target=wait_for_parent, daemon=True).start()
