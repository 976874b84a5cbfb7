import os
import signal
import time

import pytest

from common import distributed
from common.distributed import StopSignals


@pytest.fixture(autouse=True)
def restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_interrupt_stops_at_once():
    stop = StopSignals()
    assert stop.poll() == (None, False) and stop.poll(save_due=True) == (None, True)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun and the terminal may each send one
    assert stop.poll() == ("SIGINT", False)
    stop.received_at -= 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_restored_signals_are_those_from_before():
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    assert signal.getsignal(signal.SIGTERM) != before
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before


POLL = """
import os, signal, torch.distributed as dist
from common.distributed import StopSignals, all_gather_objects, get_rank, get_world_size, init_distributed
rank, world_size, device = init_distributed("cpu")
assert (get_rank(), get_world_size()) == (rank, world_size) == (int(os.environ["RANK"]), 2)
assert all_gather_objects(rank) == [0, 1]
signals = StopSignals()
assert signals.poll(save_due=rank == 1) == (None, True)
if rank == 1:
    os.kill(os.getpid(), signal.SIGUSR1)
assert signals.poll() == ("SIGUSR1", False)
dist.destroy_process_group()
"""


def test_all_ranks_agree_on_stopping_and_saving(run_torchrun):
    run_torchrun(2, POLL)


def test_ranks_that_see_different_runs_refuse(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, 0])
    with pytest.raises(distributed.DistributedError, match="rank 1 has a run at step 0, rank 0 has 40"):
        distributed.check_same_on_all_ranks("a run at step", 40)
