"""The trunk's loop: three sessions say what they like, in any order, to a trunk whose arithmetic is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from server_trunk.async_steps import AsyncSteps
from server_trunk.decoding import CHUNK_TOKENS
from server_trunk.kvcache import CacheBook
from server_trunk.scheduler import Scheduler
from server_trunk.steps import Steps
from server_trunk.training import StepReport
from server_trunk.transfers import Landing
from server_trunk.trunkloop import Event, TrunkLoop
from server_trunk.underway import Underway
from splitfl.errors import LocalProtocolError
from splitfl.protocol import messages as m
from splitfl.runlog import RunLog
from tests.fuzz.pieces import split

__all__ = ["trunk"]

_NOTHING = torch.empty(0)
CLIENTS = ("a", "b", "c")


class _Engine:
    """Computes nothing; keeps count of the graphs that it would keep."""

    is_atomic = True
    has_room = True
    training: Any

    def __init__(self) -> None:
        self.training = self
        self.graphs: set[int] = set()
        self.closed = 0

    def joined(self, client: str) -> None: ...

    def runs_beside(self, batch: Any) -> bool:
        return True

    def begin_forward(self, batch: Any, heard: Any = None) -> Underway[tuple[Landing, bool]]:
        if batch.keep:
            self.graphs.add(batch.number)
        return Underway((), lambda: (Landing([_NOTHING] * len(batch.members), lambda: 0.0), batch.keep))

    def begin_backward(self, batch: Any, heard: Any = None) -> Underway[Landing]:
        assert batch.number in self.graphs or not batch.kept
        self.graphs.discard(batch.number)
        return Underway((), lambda: Landing([_NOTHING if each.backward else None for each in batch.members], lambda: 0.0))

    def discard(self, number: int) -> None:
        self.graphs.discard(number)

    def release(self) -> None: ...

    def decode(self, runs: Any) -> Landing:
        assert sum(run.length for run in runs) <= CHUNK_TOKENS
        assert all(run.start == run.of.forward.segments[run.segment][1] + run.of.ran[run.segment] for run in runs)
        return Landing([_NOTHING] * len(runs), lambda: 0.0)

    def is_lost(self, error: Exception) -> bool:
        raise AssertionError(error)

    def close_step(self, step: int, targets: Any) -> StepReport:
        assert step == self.closed, "a step closes twice, or never"
        self.closed += 1
        return StepReport(0.1, 1.0)


class _Outlet:
    """Every answer must be one that travels."""

    def __init__(self) -> None:
        self.owed: dict[str, int] = {}  # credit by session

    def send(self, session: str, message: Any, payload: Any) -> None:
        m.encode(message)

    def tell(self, session: str, message: Any) -> None:
        m.encode(message)

    def credit(self, session: str, n: int) -> None:
        if session in self.owed:
            self.owed[session] -= n
            assert self.owed[session] >= 0, "more credit than was spent"

    def end(self, session: str, fault: m.Fault) -> None:
        m.encode(fault)
        self.owed.pop(session, None)


class _Desk:
    def __init__(self, kind: int) -> None:
        self.engine, self.outlet = _Engine(), _Outlet()
        steps = (
            AsyncSteps(clients=1, contributions=1 + kind // 2 % 2, max_staleness=kind // 4 % 3, last=6 * (kind // 12 % 2))
            if kind % 2
            else Steps(clients=1 + kind // 2 % 2, last=3 * (kind // 4 % 2), on_loss=("drop", "wait")[kind // 8 % 2])
        )
        engine: Any = self.engine
        graphs = (None, 0, 8)[kind // 16 % 3] if not kind % 2 else None
        scheduler = Scheduler(16, graph_tokens=graphs)
        log = RunLog(None, echo=None)
        self.caches = CacheBook(12, 8)
        self.loop = TrunkLoop(
            engine, steps, scheduler, self.outlet, log, client_tokens=24, payload_of=lambda tensor: b"", caches=self.caches
        )
        self.sessions = dict(zip(CLIENTS, CLIENTS, strict=True))
        self.born = 0

    def take(self, event: Event) -> None:
        # The gateway's own rule: what is not of an open session does not come here.
        message = event.message
        if isinstance(message, m.DataMessage):
            self.outlet.owed[event.session] = self.outlet.owed.get(event.session, 0) + message.payload_bytes
        self.loop.inbox.put(event)

    def act(self, piece: bytes) -> None:
        said = piece.ljust(8, b"\0")
        client = CLIENTS[said[0] % 3]
        session, step, micro = self.sessions[client], said[2], said[3] % 8
        what = said[1] % 10
        if what == 0:
            self.born += 1
            fresh = f"{client}{self.born}"
            self.take(Event(fresh, opened=True, name=client, replaces=session if said[2] % 2 else ""))
            self.sessions[client] = fresh
        elif what == 1:
            self.outlet.owed.pop(session, None)
            self.take(Event(session, lost=bool(said[2] % 2)))
        else:
            message = self._message(what, said, step, micro)
            if message is None:
                return
            self.take(Event(session, message, _NOTHING if isinstance(message, m.DataMessage) else None))
        if said[7] % 2 == 0:
            self.run()

    def _message(self, what: int, said: bytes, step: int, micro: int) -> m.Message | None:
        segments = tuple((1 + byte % 4, byte) for byte in said[4 : 5 + said[5] % 3])
        rows = 1 + said[4] % 4
        common = (1, "float32", "raw")
        makes: tuple[Callable[[], m.Message], ...] = (
            lambda: m.Enrol(tuple(range(said[4] % 3)), bool(said[5] % 2)),
            lambda: m.Forward(step, micro, segments, *common, True, True, True, said[6] % 4),
            lambda: m.Forward(
                step - 1, micro, segments, *common, False, bool(said[6] % 2), True, 0, _sequences(said, len(segments))
            ),
            lambda: m.Backward(step, micro, rows, *common, said[6] % 8, 1.0, bool(said[5] % 2)),
            lambda: m.StepDone(step, said[4] % 4, said[5] % 4, ("continue", "pause", "leave")[said[6] % 3]),
            lambda: m.Release((said[4] % 4, said[5] % 4)) if said[6] % 2 else m.Pause(),
            lambda: m.Leave(),
            lambda: m.Backward(step, micro, sum(length for length, _ in segments), *common, 0, 1.0),
        )
        try:
            return makes[what - 2]()
        except LocalProtocolError:
            return None

    def run(self) -> None:
        loop = self.loop
        assert self.caches.held_tokens <= self.caches.tokens
        assert all(self.caches.held_by(client) <= self.caches.client_tokens for client in CLIENTS)
        for _ in range(200):
            loop._turn()
            if loop.inbox.empty() and not loop._batches.may_go_on and not loop._batches.are_underway:
                return
        raise AssertionError("the loop goes round and round")


def _sequences(said: bytes, count: int) -> tuple[tuple[int, tuple[int, int]], ...]:
    """What a forward goes on from, if anything: sequences of few numbers, of which the client may have none."""
    if said[6] % 8 < 4:
        return ()
    kept = said[6] // 8 % 4
    return tuple((said[5] % 4 + index, (said[6] // 32 % 4 if kept else -1, kept)) for index in range(count))


def trunk(data: bytes) -> None:
    """The first byte says what kind of run it is."""
    desk = _Desk(data[0] if data else 0)
    for client in CLIENTS:
        desk.take(Event(client, opened=True, name=client))
    for piece in split(data[1:]):
        desk.act(piece)
    desk.loop.inbox.put(None)
    desk.run()
    for session in list(desk.loop._names):
        desk.take(Event(session))
    desk.loop.inbox.put(None)
    desk.run()
    scheduler, loop = desk.loop._scheduler, desk.loop
    left = (scheduler._waiting, scheduler._open, scheduler._underway, loop._names, loop._keeper._stale, desk.engine.graphs)
    assert not any(left), "something of a session stays when it is gone"
    assert not any(scheduler._kept.values())
    caches = desk.caches
    kept = (caches._sessions, caches._accounts, caches._idle, caches._expected, loop._batches.decoder._waiting)
    assert not any(kept), "a cache stays when its session is gone"
    assert dataclasses.is_dataclass(scheduler)
    assert scheduler.kept_graph_tokens == 0
