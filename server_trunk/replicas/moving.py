"""Steps whose clients come from other replicas and go to them. Pure bookkeeping, like their base.

A client belongs to one replica, where rank 0 sends it, and takes part there alone. Each decision of rank 0's about it has a
number, and all replicas hear of it in one order: a word that rests on an older one is passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from server_trunk.replicas.words import Move, State, Stays
from server_trunk.steps import Enrolment, Steps
from splitfl.errors import RemoteProtocolError

__all__ = ["ARRIVAL", "MovingSteps"]

#: Seconds that a step waits for a client that was sent here from another replica.
ARRIVAL = 30.0


class MovingSteps(Steps):
    """The steps of a replica as far as its clients move. When they open and close is another's to say."""

    def __init__(
        self,
        say: Callable[[State | Stays | Move], None],
        *,
        rank: int,
        last: int,
        first: int,
        on_loss: str,
        deadline: float,
    ) -> None:
        """``say``: sends a word to rank 0."""
        super().__init__(clients=1, last=last, first=first, on_loss=on_loss, deadline=deadline)
        self._say, self._rank = say, rank
        self._move: Move | None = None  # to be made before the next step opens
        self._newest: dict[str, Move] = {}  # by client that was moved: the newest that was decided, or agreed to here
        self._sent_on: set[str] = set()  # those of them that have come here since, and went again
        self._leaving: dict[str, str] = {}  # by session that has enrolled here: clients of them that are to go on there
        self._asking: dict[str, str] = {}  # likewise: those that stay here, if the replica where they belong lets go of them
        self._arrivals: list[str] = []  # clients that come from elsewhere, for whom the next step will be held

    # --- who comes, and who goes ------------------------------------------------------------------------------------------------

    def enrol(self, session: str, client: str = "", held: tuple[int, ...] = (), *, moves: bool = False) -> None:
        """As in the base. Who belongs elsewhere is sent on (:meth:`departures`) if it can be, and once: who comes again would do
        so for ever, so it is asked for.
        """
        if session in self._leaving or session in self._asking:
            raise RemoteProtocolError("enrolled twice")
        if self._elsewhere(client) is None:
            super().enrol(session, client, held, moves=moves)
            return
        self._enrolments[session] = Enrolment(client, held, moves)
        if moves and client not in self._sent_on:
            self._sent_on.add(client)
            self._leaving[session] = client
        else:
            self._ask_for(session, client)

    def _ask_for(self, session: str, client: str) -> None:
        """It takes part here once the replica where it belongs has let go of it, and rank 0 knows: so wherever a part of it is
        held, it is sent there should its link be lost.
        """
        self._asking[session] = client
        self._arrivals.append(client)
        self._ask(client)

    def _ask(self, client: str) -> None:
        newest = self._newest[client]
        self._say(replace(newest, origin=newest.target, target=self._rank))

    def pause(self, session: str, client: str = "") -> int | None:
        self._leaving.pop(session, None)
        self._asking.pop(session, None)
        self._forget_coming(client)  # it has come, and takes no part
        elsewhere = self._elsewhere(client)
        if elsewhere is not None:  # it was on its way here before it was moved
            self._say(Stays(client, elsewhere))
        return super().pause(session, client)

    def lose(self, session: str, now: float = 0.0) -> None:
        super().lose(session, now)
        self._leaving.pop(session, None)
        client = self._asking.pop(session, None)
        if client is not None and not self._waits and client not in self._asking.values():
            self._forget_coming(client)

    def departures(self) -> list[str]:
        """Also of who was on its way here before it was moved, or paused then: nobody but its new replica waits for it."""
        move, self._move = self._move, None
        if move is not None:
            self._let_go(move)
        leaving, self._leaving = list(self._leaving), {}
        return leaving

    def dismiss(self) -> list[str]:
        if self.complete:
            self._enrolled |= self._asking
            self._asking = {}
        return super().dismiss()

    def _movable(self) -> tuple[str, ...]:
        """The clients that could go on at another replica: each has its one session here, enrolled for the next step."""
        clients = Counter([*(each.client for each in self._enrolments.values()), *self._awaited.values()])
        enrolled = [self._enrolments[session] for session in self._enrolled]
        return tuple(sorted(each.client for each in enrolled if each.moves and clients[each.client] == 1))

    # --- where a client belongs -------------------------------------------------------------------------------------------------

    def _moves_next(self, move: Move | None) -> None:
        """Who goes elsewhere before the next step opens, as the closing of the one before has said."""
        self._move = None
        if move is None or move.target != self._rank:
            self._move = move
            return
        self._decided(move)  # it may be here before the move is made here
        self._arrivals.append(move.client)

    def _let_go(self, move: Move) -> None:
        """The client goes now; a round of the ends that it was a member of is over here."""
        client, is_origin = move.client, move.origin == self._rank
        self._decided(move)
        if is_origin:
            self._say(move)  # before its session ends, so that it finds its place changed
        here = [session for session, name in self._enrolled.items() if name == client]
        for session in here:
            if self._enrolments[session].moves:
                del self._enrolled[session]
                self._ahead.pop(session, None)
                self._leaving[session] = client
            elif is_origin:
                del self._enrolled[session]
                self._ask_for(session, client)
        if is_origin and not self._forget_lost(client) and not here:
            self._say(Stays(client, move.target))  # it is in no position to go, so it will not come there now

    def _elsewhere(self, client: str) -> int | None:
        """The other replica where a client belongs."""
        newest = self._newest.get(client)
        return None if newest is None or newest.target == self._rank else newest.target

    def _hear_of(self, move: Move) -> None:
        """A client has gone from one replica to another by itself, or is asked for."""
        client, newest = move.client, self._newest.get(move.client)
        number = 0 if newest is None else newest.number
        if move.number > number:
            self._decided(move)
        elif move.number == number and self._elsewhere(client) is None:
            if self._takes_part(client):
                self._say(Stays(client, move.target))
                return
            was_held = self._forget_coming(client) | self._forget_lost(client)
            self._newest[client] = move
            self._say(move)
            if not was_held:  # nor is it there, should it have gone again
                self._say(Stays(client, move.target))

    def _decided(self, move: Move) -> None:
        """From now on the client belongs to the target."""
        client = move.client
        self._newest[client] = move
        self._sent_on.discard(client)
        if move.target == self._rank:
            self._take_in(client)
            return
        if client in self._asking.values():
            self._ask(client)  # the one that was asked no longer has it
        else:
            self._forget_coming(client)  # who has asked is gone

    def _take_in(self, client: str) -> None:
        """The client belongs here."""
        for session, name in (self._asking | self._leaving).items():
            if name == client:
                self._asking.pop(session, None)
                self._leaving.pop(session, None)
                enrolment = self._enrolments[session]
                super().enrol(session, client, enrolment.held, moves=enrolment.moves)

    def _refuse(self, client: str) -> None:
        """The client does not come here; who asks for it is sent on."""
        self._forget_coming(client)
        for session in [session for session, name in self._asking.items() if name == client]:
            self._leaving[session] = self._asking.pop(session)

    def _takes_part(self, client: str) -> bool:
        """Whether it is enrolled here, or a part of it is not whole, save one that is held for its arrival."""
        parts = self._ledger.parts.values() if self.is_open else ()
        held = (part.session for part in parts if part.client == client and not part.finished)
        return client in self._enrolled.values() or any(session != _coming(client) for session in held)

    # --- for whom a step is held ------------------------------------------------------------------------------------------------

    def _await_arrivals(self, now: float) -> None:
        """The next step is held for them. Who has overtaken the word is here, or was, and is held a part already."""
        for client in set(self._arrivals).difference(self._enrolled.values(), self._awaited.values()):
            self._awaited[_coming(client)], self._awaited_since[_coming(client)] = client, now
        self._arrivals = []

    def _under_way(self) -> dict[str, float]:
        """By session, since when a part is held for a client on its way here; under ``on_loss = "wait"`` as for a lost one."""
        parts = self._ledger.parts.values() if self.is_open and not self._waits else ()
        coming = (part for part in parts if part.session == _coming(part.client) and not part.dropped)
        return {part.session: part.lost_at for part in coming if part.lost_at is not None}

    def overdue(self, now: float, *, idle: bool = True) -> list[str]:
        late = super().overdue(now, idle=idle)
        return late + [session for session, since in self._under_way().items() if now - since >= ARRIVAL and session not in late]

    def wake(self, now: float) -> float | None:
        waits = [max(0.0, since + ARRIVAL - now) for since in self._under_way().values()]
        rest = super().wake(now)
        return min([*waits, rest] if rest is not None else waits, default=None)

    def _forget_lost(self, client: str) -> bool:
        """Hold no further step for a client that was lost here; returns whether any would have been."""
        lost = [session for session, name in self._awaited.items() if name == client]
        for session in lost:
            del self._awaited[session], self._awaited_since[session]
        return bool(lost)

    def _forget_coming(self, client: str) -> bool:
        """Hold no part for a client's arrival; returns whether one was held."""
        name, arrives = _coming(client), client in self._arrivals
        self._arrivals = [other for other in self._arrivals if other != client]
        awaited = self._awaited.pop(name, None)
        self._awaited_since.pop(name, None)
        part = self._holders.get(name)
        if part is None or part.session != name:  # none was held, or its client has come and taken it over
            return arrives or awaited is not None
        self._forget_part(part)
        return True


def _coming(client: str) -> str:
    """Stands for the session of a client that comes from another replica."""
    return f"moved {client}"
