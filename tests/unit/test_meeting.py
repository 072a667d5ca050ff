"""The processes of a server agree on a name for their meeting, whatever earlier ones have left in the store; one server a run."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from server_trunk.rendezvous import _meeting
from server_trunk.run_lock import RunLock
from splitfl.errors import ConfigError, SplitflError

SOON = timedelta(seconds=20)


def meet(store: dist.Store, size: int) -> list[str]:
    found: dict[int, str] = {}

    def come(rank: int) -> None:
        found[rank] = _meeting(store, rank, size, SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def test_each_meeting_has_a_name_of_its_own_though_the_store_stays():
    store = dist.HashStore()
    store.set("splitfl/asks/1", "asked by one that died before it was answered")
    names = []
    for _ in range(3):
        met = meet(store, 3)
        assert len(set(met)) == 1
        names.append(met[0])
    assert len(set(names)) == 3


def test_who_is_not_met_is_named_and_not_waited_for_for_ever():
    store = dist.HashStore()
    with pytest.raises(SplitflError, match=r"of 3 these have not come: \[1, 2\]"):
        _meeting(store, 0, 3, timedelta(seconds=0.1))
    with pytest.raises(RuntimeError):
        _meeting(store, 1, 3, timedelta(seconds=0.1))


HOLD = """
import pathlib, sys
from server_trunk.run_lock import RunLock
held = RunLock(pathlib.Path(sys.argv[1]))
print(0, flush=True)
input()
"""


def test_a_second_server_of_a_run_is_refused_and_one_that_died_hinders_nobody(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "0\n"
        with pytest.raises(ConfigError, match="another server keeps its run in"):
            RunLock(tmp_path, patience=0.0)
        other.kill()
    lock = RunLock(tmp_path)
    with pytest.raises(ConfigError):
        RunLock(tmp_path, patience=0.0)
    lock.release()
    RunLock(tmp_path, patience=0.0).release()
