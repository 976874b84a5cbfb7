import os
import signal
import time

import pytest

from common import distributed
from common.distributed import StopRequested, StopSignals

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def restore_signals():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_interrupt_stops_at_once(monkeypatch):
    stop = StopSignals()
    assert stop.wait(lambda: 7) == (7, False) and stop.wait(lambda: 7, save_due=True) == (7, True)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun and the terminal may each send one
    stop.received_at -= 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    monkeypatch.undo()
    with pytest.raises(StopRequested, match="SIGINT"):
        stop.wait(lambda: pytest.fail("not to be called after a signal"))


def test_a_signal_ends_what_waits(capfd):
    """And only that: elsewhere it is kept until the next wait."""
    stop = StopSignals()
    with pytest.raises(StopRequested, match="SIGHUP"):
        stop.wait(lambda: (os.kill(os.getpid(), signal.SIGHUP), time.sleep(60)))
    assert "SIGHUP: finishing the step, then saving" in capfd.readouterr().err
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested):
        distributed.wait_for(lambda: pytest.fail("not to be called after a signal"))
    stop.restore()
    assert distributed.wait_for(lambda: 7) == 7


def test_hangup_stays_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.wait(lambda: 7) == (7, False)


def test_restored_signals_are_those_from_before():
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    assert signal.getsignal(signal.SIGTERM) != before
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before


WAIT = """
import os, signal, torch.distributed as dist
from common.distributed import (StopRequested, StopSignals, all_gather_objects, get_rank, get_world_size,
                                init_distributed)
rank, world_size, device = init_distributed("cpu")
assert (get_rank(), get_world_size()) == (rank, world_size) == (int(os.environ["RANK"]), 2)
assert all_gather_objects(rank) == [0, 1]
signals = StopSignals()
assert signals.wait(lambda: rank, save_due=rank == 1) == (rank, True)
try:
    signals.wait(lambda: rank == 1 and os.kill(os.getpid(), signal.SIGUSR1))
except StopRequested as stop:
    assert str(stop) == "SIGUSR1"
else:
    raise AssertionError
"""


def test_all_ranks_agree_on_stopping_and_saving(run_torchrun):
    run_torchrun(2, WAIT)


def test_ranks_that_see_different_runs_refuse(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, 0])
    with pytest.raises(distributed.DistributedError, match="rank 1 has a run at step 0, rank 0 has 40"):
        distributed.check_same_on_all_ranks("a run at step", 40)


LAUNCHED = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize("variables, expected", [
    ({}, False), (dict(LOCAL_RANK="0"), False), (LAUNCHED, True), (LAUNCHED | dict(RANK="2"), None),
    (LAUNCHED | dict(RANK="abc"), None), (dict(RANK="abc"), None), (dict(WORLD_SIZE="0"), None),
    (LAUNCHED | dict(LOCAL_RANK=""), None), (LAUNCHED | dict(LOCAL_RANK="-1"), None),
    (LAUNCHED | dict(MASTER_ADDR=""), None), (LAUNCHED | dict(MASTER_PORT=""), None),
    (LAUNCHED | dict(MASTER_PORT="65536"), None), (LAUNCHED | dict(MASTER_PORT="tcp"), None)])
def test_launcher_variables(monkeypatch, variables, expected):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(distributed.DistributedError, match="cannot be what a launcher sets: RANK=.* MASTER_PORT="):
            distributed.init_distributed("cpu")
    else:
        assert distributed.is_launched() == expected
    if expected is False:
        assert distributed.init_distributed("cpu")[:2] == (0, 1)
