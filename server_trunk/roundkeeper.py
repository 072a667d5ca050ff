"""Rounds as clients see them: asked for their ends when a round's last step has closed, and given the average.

:mod:`server_trunk.rounds` knows what may happen, :mod:`server_trunk.averaging` does the sums; this tells those it concerns.
Called from the trunk's thread. While a round is open no step opens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server_trunk.averaging import Average, Averager, Done
from server_trunk.ends_book import EndsBook
from server_trunk.ledger import Ledger
from server_trunk.outlet import Outlet
from server_trunk.rounds import Rounds
from splitfl.protocol.messages import AveragePart, EndsPart, Fault, RefusalCode, RoundClosed, RoundOpened
from splitfl.runlog import RunLog

__all__ = ["RoundKeeper"]


@dataclass(frozen=True, slots=True)
class _Over:
    """``weights``: of this replica's members, by client's name. ``seconds``: since the round's last step."""

    closed: RoundClosed
    average: Average | None
    weights: dict[str, int]
    seconds: float


class RoundKeeper:
    """``names``: clients by open session, kept by the loop."""

    def __init__(
        self,
        rounds: Rounds,
        averager: Averager,
        book: EndsBook,
        outlet: Outlet,
        log: RunLog,
    ) -> None:
        self._rounds, self._averager, self._book = rounds, averager, book
        self._outlet, self._log = outlet, log
        self.names: Mapping[str, str] = {}
        self.average: Average | None = None  # the newest
        self._given: dict[str, int] = {}  # by session: the round whose average it was given
        self._replaces: dict[str, str] = {}  # by session: the lost one of its client whose place it has taken
        self._closed = RoundClosed(0, 0, 0)  # of the newest average
        self._present: dict[str, str] = {}  # clients by session that await the end of the open round
        self._asked: dict[str, int] = {}  # the weights of those asked for their ends
        self._whole: set[str] = set()
        self._over: _Over | None = None  # a round that nobody was told of yet
        self._brought = 0  # bytes of averages given since the round before, to those who were not there at its end
        self._closing = False  # whether the average is being made
        self.is_void = False  # whether the open round was given up, on all replicas
        self._left_out: dict[str, str] = {}  # why, by client's name
        self._step = -1
        self._began = 0.0

    @property
    def is_open(self) -> bool:
        return self._rounds.is_open

    def opened(self, session: str, replaces: str) -> None:
        """A session is there; its client says which lost one it stands for."""
        if replaces:
            self._replaces[session] = replaces

    def joins(self, session: str, held: Sequence[int]) -> None:
        """A session takes part for the first time; ``held`` are the steps after which its client can go on."""
        client = self.names[session]
        if self._rounds.waits_for(client):
            replaces = self._replaces.get(session, "")
            weight = self._rounds.returns(session, client, time.monotonic(), holds=self._step in held, replaces=replaces)
            if weight:
                self._present = {one: name for one, name in self._present.items() if name != client or one in self.names}
                self._present[session], self._asked[session] = client, weight
                self._ask(session)
            else:
                self._left_out[client] = "lost"
        self._rounds.joins(session, goes_on=bool(held))

    def withdraw(self, session: str) -> None:
        """The session takes no part in the next step."""
        self._rounds.withdraw(session)

    def departs(self, session: str) -> None:
        """The session ends, as its client goes to another replica: there it is given the average."""
        self._present.pop(session, None)
        self._asked.pop(session, None)

    def step_closed(self, ledger: Ledger) -> None:
        """A step has closed; where it was the last of a round, that is open now."""
        self._rounds.count(ledger, self.names)
        if not self._rounds.ends_with(ledger.step):
            return
        parts = ledger.parts.values()
        ended = [part for part in parts if part.done is not None and not part.withdrawn]
        self._present = {part.session: part.client for part in ended if part.session in self.names}
        self._step, self._began, self._closing = ledger.step, time.monotonic(), False
        stay = [part.session for part in ended if part.done is not None and part.done.then == "continue"]
        self._asked = self._rounds.open(ledger.step, self._present, self._began, stay=stay)
        self._whole, self._left_out = set(), {}
        self._book.hold()
        for session in self._asked:
            self._ask(session)

    def _ask(self, session: str) -> None:
        self._book.ask(session, self._rounds.number)
        self._outlet.tell(session, RoundOpened(self._rounds.number))

    def take_part(self, session: str, message: EndsPart, payload: Any) -> None:
        """A piece of a session's ends; of no use where the round has gone on without it."""
        layout = self._book.layout
        if layout is not None and self._rounds.awaits(session, message.round):
            self._averager.write(session, layout, message, payload)
        else:
            self._outlet.credit(session, message.payload_bytes)

    def forget(self, session: str) -> None:
        """The session is gone."""
        self._given.pop(session, None)
        self._replaces.pop(session, None)
        self._rounds.lose(session, time.monotonic())
        if session in self._asked and session not in self._whole:
            if self._rounds.waits_for(self._present[session]):
                self._averager.discard(session)
            else:
                self._leave_out(session, "lost")

    def wake(self, now: float) -> float | None:
        return self._rounds.wake(now)

    def turn(self) -> None:
        """Go on with the open round as far as it goes."""
        for news in self._averager.take():
            if isinstance(news, Done):
                self._close(news)
            elif self._rounds.awaits(news.session, self._rounds.number):
                self._whole.add(news.session)
                self._rounds.whole(news.session, time.monotonic())
                if news.why:
                    self._rounds.exclude(news.session)
                    self._leave_out(news.session, news.why)
        if not self.is_open or self._closing:
            return
        for session in self._rounds.overdue(time.monotonic()):
            self._rounds.lose(session)
            self._leave_out(session, "late")
        for client in self._rounds.give_up(time.monotonic()):
            self._left_out[client] = "lost"
        if self._rounds.is_gathered:
            self._gather()

    def give_up(self) -> None:
        """The run ends amid the round: there is no average, unless every replica has begun to make it."""
        if self.is_open and not self._closing:
            self._closing = True
            self._averager.average(self._rounds.number, self._book.layout, {}, void=True)

    def _leave_out(self, session: str, why: str) -> None:
        self._left_out[self._named(session)] = why
        self._averager.discard(session)

    def _gather(self) -> None:
        """Everybody's ends are here who will be in the average."""
        self._closing = True
        # In the order of names, so that who was faster changes no digit.
        weights = dict(sorted(self._rounds.weights.items(), key=lambda item: (self._present[item[0]], item[0])))
        self._averager.average(self._rounds.number, self._book.layout, weights)

    def _close(self, done: Done) -> None:
        if done.void:
            self.is_void = True
            return
        weights, average = self._rounds.weights if done.fits else {}, done.average
        self._rounds.close()
        closed = RoundClosed(self._rounds.number, done.members, done.targets)
        if average is not None:
            self.average, self._closed = average, closed
            self._expel(self._book.keep(average.layout), average)
        else:
            self._book.let_go()
        named = dict(sorted((self._named(session), weight) for session, weight in weights.items()))
        self._over = _Over(closed, average, named, time.monotonic() - self._began)

    def _expel(self, sessions: Sequence[str], average: Average) -> None:
        """These clients of this replica train other ends than those of the others, which were first."""
        theirs = average.layout.describe()
        text = f"this run averages ends trained as {theirs}, which yours are not; use the same --ends as the other clients"
        for session in sessions:
            self._outlet.end(session, Fault(RefusalCode.ENDS, text))

    def tell(self) -> None:
        """Tell those that await the end of a round of it, and give them the average."""
        if self._over is None:
            return
        over, self._over = self._over, None
        told = [session for session in self._present if session in self.names]
        size = over.average.layout.bytes if over.average is not None else 0
        self._log.write(
            "round",
            round=over.closed.round,
            step=self._step,
            targets=over.closed.targets,
            members=over.weights,
            left_out=self._left_out or None,
            bytes_received=size * len(self._whole),
            bytes_sent=self._brought + size * len(told),
            seconds=round(over.seconds, 4),
        )
        self._brought = 0
        for session in told:
            self._outlet.tell(session, over.closed)
            if over.average is not None:
                self._give(session, over.average)

    # --- who has which average --------------------------------------------------------------------------------------------------

    def bring_up(self, session: str) -> None:
        """A session is about to take part in a step: it must have the newest average. A new session is always given it: whether
        its client's ends hold it already, or what they learned since, only the client knows.
        """
        if self.average is not None and self._given.get(session, -1) < self.average.number:
            self._outlet.tell(session, self._closed)
            self._give(session, self.average)
            self._brought += self.average.layout.bytes

    def _give(self, session: str, average: Average) -> None:
        self._given[session] = average.number
        for tensor, offset, size in average.layout.parts(self._book.part_bytes):
            self._outlet.send(session, AveragePart(average.number, tensor, offset, size), average.part(tensor, offset, size))

    def _named(self, session: str) -> str:
        """The client's name; with the session, where a client has several."""
        client = self._present[session]
        return client if list(self._present.values()).count(client) == 1 else f"{client}/{session[:4]}"

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the newest average, where there is one, and what has counted since."""
        state: dict[str, Any] = {"rounds": {"targets": self._rounds.targets}}
        if self.average is not None:
            state["rounds"] |= {"round": self._closed.round, "members": self._closed.members, "total": self._closed.targets}
            state["ends"] = self.average.tensors()
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        kept, self.average = state.get("rounds", {}), None
        self._given.clear()
        self._rounds.targets = kept.get("targets", {})
        if "ends" in state:
            self._closed = RoundClosed(kept["round"], kept["members"], kept["total"])
            self.average = self._averager.restore(kept["round"], state["ends"])
            self._book.keep(self.average.layout)

    def close(self) -> None:
        self._averager.close()
