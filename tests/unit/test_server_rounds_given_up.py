"""A run over replicas that is ended amid a round does not wait for the round's end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from server_trunk.averaging import Averager
from server_trunk.ends_book import EndsBook
from server_trunk.ledger import Ledger, Part
from server_trunk.replicas.coordinator import Coordinator
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.words import Drain, State, Stop
from server_trunk.roundkeeper import RoundKeeper
from server_trunk.rounds import Rounds
from splitfl.adapters.layout import Layout, part_bytes_for
from splitfl.protocol.messages import EndsPart, StepDone
from splitfl.runlog import RunLog
from splitfl.tensors import byte_view
from tests.integration.test_lost import wait_for

LAYOUT = Layout.of({"a": torch.zeros(4)})


class Both:
    """The sums of two replicas, each of which calls from a thread of its own."""

    size = 2

    def __init__(self) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=20), {}

    def of(self, rank: int) -> Any:
        one = Both.__new__(Both)
        one.rank, one.barrier, one.given = rank, self.barrier, self.given
        return one

    def all_reduce_tensors(self, tensors: list[torch.Tensor]) -> None:
        self.given[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait()
        sums = [mine + theirs for mine, theirs in zip(self.given[0], self.given[1], strict=True)]
        self.barrier.wait()
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)


class Outlet:
    def tell(self, session: str, message: object) -> None: ...

    def credit(self, session: str, n: int) -> None: ...


def keeper(directory: Path, replicas: Any, rank: int) -> RoundKeeper:
    """Of a replica with one client, which was asked for its ends."""
    directory.mkdir()
    averager = Averager(directory, credit=lambda session, size: None, tell=lambda: None, replicas=replicas.of(rank))
    book = EndsBook(averaged=True, part_bytes=part_bytes_for(1 << 20))
    made = RoundKeeper(Rounds(steps=1, alone=False), averager, book, Outlet(), RunLog(directory / "log", echo=None))  # type: ignore[arg-type]
    session = f"s{rank}"
    made.names = {session: session}
    for message in LAYOUT.messages():
        book.declare(session, message)
    part = Part(session, session, targets=3, done=StepDone(0, 1, 1, "continue"))
    made.step_closed(Ledger(0, {session: part}))
    return made


def send(to: RoundKeeper, rank: int) -> None:
    message = EndsPart(0, 0, 0, LAYOUT.bytes)
    to.take_part(f"s{rank}", message, torch.frombuffer(bytearray(byte_view(torch.ones(4))), dtype=torch.uint8))


@pytest.mark.parametrize("whole", [True, False])
def test_a_round_that_one_replica_gives_up_ends_on_all_without_an_average(tmp_path, whole):
    both = Both()
    keepers = [keeper(tmp_path / str(rank), both, rank) for rank in range(2)]
    if whole:
        send(keepers[0], 0)  # which waits for the other replica from then on
        wait_for(lambda: keepers[0].turn() or keepers[0]._closing)
    for each in keepers:
        each.give_up()

    def over() -> bool:
        for each in keepers:
            each.turn()
        return all(each.is_void for each in keepers)

    wait_for(over)
    assert all(each.is_open and each.average is None for each in keepers)
    for each in keepers:
        each.close()


def test_a_round_that_all_replicas_average_already_comes_to_its_end(tmp_path):
    both = Both()
    keepers = [keeper(tmp_path / str(rank), both, rank) for rank in range(2)]
    for rank, each in enumerate(keepers):
        send(each, rank)
        wait_for(lambda each=each: each.turn() or each._closing or not each.is_open)
        each.give_up()

    def over() -> bool:
        for each in keepers:
            each.turn()
        return not any(each.is_open for each in keepers)

    wait_for(over)
    assert not any(each.is_void for each in keepers)
    assert all(torch.equal(each.average.tensors()["a"], torch.ones(4)) for each in keepers if each.average)
    for each in keepers:
        each.close()


def test_who_asks_again_waits_no_longer_for_a_round():
    rank_0 = Coordinator(2, clients=1, meetings=Meetings())
    assert rank_0.drain() == [(0, Drain()), (1, Drain()), (0, Stop(True)), (1, Stop(True))]
    assert rank_0.stop() == []
    assert rank_0.stop(now=True) == [(0, Stop(True, True)), (1, Stop(True, True))]
    assert rank_0.stop(now=True) == rank_0.stop() == rank_0.hear(0, State(0, 0, 0, 1)) == []
