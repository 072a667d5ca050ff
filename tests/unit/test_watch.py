"""Signs of life between processes; here between two objects over queues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest
import torch

from server_trunk.watch import Watch
from splitfl.errors import SplitflError
from tests.unit.channel_world import wait_until


class Wires:
    """What :class:`Watch` asks of torch.distributed, for two ranks that are threads; a wire that is ``cut`` fails."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], queue.Queue[int | None]] = {(0, 1): queue.Queue(), (1, 0): queue.Queue()}
        self.here = threading.local()
        self.rank = 0

    def new_group(self, **options: object) -> int:
        return self.rank  # of the one that makes it

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return 2

    def send(self, word: torch.Tensor, group_dst: int, group: int) -> None:
        self.queues[group, group_dst].put(int(word))

    def recv(self, word: torch.Tensor, group_src: int, group: int) -> None:
        said = self.queues[group_src, group].get()
        if said is None:
            raise RuntimeError("Connection closed by peer")
        word.fill_(said)

    def cut(self) -> None:
        for wire in self.queues.values():
            wire.put(None)


@pytest.fixture
def wires(monkeypatch) -> Iterator[Wires]:
    made = Wires()
    monkeypatch.setattr("server_trunk.watch.dist", made)
    yield made
    made.cut()


def watch(wires: Wires, rank: int, limit: float) -> tuple[Watch, list[SplitflError | None]]:
    wires.rank = rank
    heard: list[SplitflError | None] = []
    return Watch(limit, lambda watch: heard.append(watch.failure)), heard


def test_who_says_goodbye_is_not_missed(wires):
    (first, _), (second, _) = watch(wires, 0, 0.5), watch(wires, 1, 0.5)
    wait_until(lambda: wires.queues[1, 0].qsize() == 0 and not first.failure)
    second.close(10)
    first.close(10)
    assert not any(thread.is_alive() for each in (first, second) for thread in each._threads)
    assert first.failure is second.failure is None


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_silent_is_taken_for_dead(wires, rank):
    alone, heard = watch(wires, rank, 0.2)
    wait_until(lambda: alone.failure is not None)
    wait_until(lambda: heard == [alone.failure])
    assert str(alone.failure) == f"process {1 - rank} of this server is gone (silent for 0.2 s), so this one ends too"
    assert alone.hung == 1 - rank


def test_without_a_limit_only_a_broken_connection_tells(wires):
    alone, heard = watch(wires, 0, 0.0)
    wires.cut()
    wait_until(lambda: bool(heard))
    assert "(Connection closed by peer)" in str(alone.failure)
    assert alone.hung is None


def test_who_ends_on_account_of_its_own_blames_nobody(wires):
    alone, heard = watch(wires, 0, 0.0)
    alone.mute()
    wires.cut()
    alone._threads[0].join(10)
    assert not alone._threads[0].is_alive()
    assert alone.failure is None
    assert heard == []
