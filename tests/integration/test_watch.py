"""Processes of one server that hang or fail: the others are not left waiting. Over gloo, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.relay import free_port

pytestmark = pytest.mark.slow

LIMIT, BUSY = 3, 5

WATCHING = f"""
import os, sys, time
import torch
import torch.distributed as dist
from server_trunk.siblings import Siblings
from server_trunk.watch import Watch

def say(what):
    print(what, flush=True)

dist.init_process_group("gloo")
rank = dist.get_rank()
siblings = Siblings()
watch = Watch({LIMIT})
began, sums = time.monotonic(), 0
while rank == 2 and time.monotonic() - began < {BUSY}:  # with Python, and with torch
    sums += sum(range(10**6))
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)
dist.barrier()
say(watch.failure or "well")
sys.stdin.readline()
say(watch.failure or "well")
while watch.failure is None:
    time.sleep(0.05)
say(watch.failure)
if watch.hung is not None:
    siblings.kill(watch.hung)
sys.stdin.readline()
os._exit(0)
"""

VOTING = """
import os
from datetime import timedelta
import torch
import torch.distributed as dist
from server_trunk.sharding import group as groups
from splitfl.errors import GroupLost

groups._VOTE_OF_FAILED = timedelta(seconds=2)
group = groups.ShardGroup("fsdp", 2, torch.device("cpu"))
try:
    if group.leads:
        dist.all_reduce(torch.ones(1), group=group.mesh_group)  # which the other has left
    group.vote(group.leads)
except (GroupLost, RuntimeError) as error:
    print(type(error).__name__, flush=True)
os._exit(0)
"""


@contextlib.contextmanager
def started(program: str, size: int) -> Iterator[list[subprocess.Popen[str]]]:
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | place | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_who_hangs_is_known_by_its_silence_and_who_is_busy_or_was_stopped_like_all_others_is_not():
    with started(WATCHING, 3) as processes:
        assert [said(process) for process in processes] == ["well"] * 3
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(LIMIT + 1)  # the machine sleeps
        for process in processes:
            process.send_signal(signal.SIGCONT)
        first, hangs, other = processes
        hangs.send_signal(signal.SIGSTOP)
        for process in (first, other):
            ask(process)
            assert said(process) == "well"
        assert said(first) == f"process 1 of this server is gone (silent for {LIMIT} s), so this one ends too"
        assert hangs.wait(20) == -signal.SIGKILL
        assert other.poll() is None
        ask(first)
        assert said(other).startswith("process 0 of this server is gone")


def test_a_rank_that_fails_alone_ends_the_wait_of_the_others():
    with started(VOTING, 2) as processes:
        assert [said(process) for process in reversed(processes)] == ["GroupLost", "RuntimeError"]
