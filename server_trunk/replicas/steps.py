"""One replica's steps: its own participants', opened and closed with those of all others. Pure bookkeeping, like its base.

Rank 0's :class:`~server_trunk.replicas.coordinator.Coordinator` grants this replica the round, and says when it closes; in
between, this replica's steps are as they would be alone. Words come in from any thread, in order; everything else is the trunk's
thread's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from server_trunk.ledger import Ledger, Part
from server_trunk.members import Member
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.words import Close, Drain, GoBack, Grant, Move, Phase, State, Stays, Stop, WaitedFor
from server_trunk.steps import Enrolment, Steps
from splitfl.errors import RemoteProtocolError

__all__ = ["ARRIVAL", "Heard", "ReplicaSteps"]

#: What rank 0 says to a replica.
Heard = Grant | WaitedFor | Close | GoBack | Drain | Stop | Stays | Move

#: Seconds that a step waits for a client that was sent here from another replica.
ARRIVAL = 30.0


class ReplicaSteps(Steps):
    """The steps of one replica. ``number`` follows the furthest replica while this one has no participants."""

    def __init__(
        self,
        say: Callable[[State | Stays | Move], None],
        *,
        meetings: Meetings,
        rank: int = 0,
        first: int = 0,
        on_loss: str = "drop",
        deadline: float = 0.0,
        on_whole: Callable[[int], None] = lambda targets: None,
        on_stop: Callable[[bool], None] = lambda back: None,
        foresees: bool = False,
    ) -> None:
        """``say``: sends a word to rank 0. ``on_whole(targets)``: nothing more of this replica counts towards the step that
        closes the round. ``on_stop(back)``: no step closes any more, and whether the server means to start again.
        ``foresees``: whether it is worth knowing with which gradients a step is likely to end here.
        """
        super().__init__(clients=1, last=meetings.last, first=first, on_loss=on_loss, deadline=deadline)
        self._say, self._meetings = say, meetings
        self._on_whole, self._on_stop = on_whole, on_stop
        self._rank, self._foresees = rank, foresees
        self._usual: dict[str, tuple[int, int]] = {}  # by client: the gradients of its last two parts
        self._words: deque[Heard] = deque()
        self._heard = 0
        self._phase = Phase.OUT
        self._counted: Counter[str] = Counter()  # targets by client since the replicas met, of steps that have closed
        self._draining = self._stopped = False
        self._back: int | None = None  # the step that rank 0 wants to go back to
        self._said = State(0, Phase.OUT, first)
        self._move: Move | None = None  # to be made before the next step opens
        self._elsewhere: dict[str, int] = {}  # by client that was moved: the replica where it belongs
        self._newest: dict[str, int] = {}  # by client that was moved: the number of the newest decision about it
        self._sent_on: set[str] = set()  # those of them that have come here since, and went again
        self._leaving: dict[str, str] = {}  # by session that has enrolled here: clients of them that are to go on there
        self._asking: dict[str, str] = {}  # likewise: those that stay here, if the replica where they belong lets go of them
        self._arrivals: list[str] = []  # clients that come from elsewhere, for whom the next step will be held
        self._left: dict[str, Part] = {}  # parts of the round whose replica was left before anything counted here, for the ledger

    def hear(self, word: Heard) -> None:
        """A word from rank 0; from any thread. The trunk's thread has to be woken for it."""
        self._words.append(word)
        if isinstance(word, Stop) and word.now:
            self.stops_now = True

    def wake(self, now: float) -> float | None:
        if self._words:
            return 0.0
        waits = [max(0.0, since + ARRIVAL - now) for _, since in self._under_way()]
        rest = super().wake(now)
        return min([*waits, rest] if rest is not None else waits, default=None)

    def _under_way(self) -> list[tuple[str, float]]:
        """The parts that are held for clients on their way here, and since when; under ``on_loss = "wait"`` as for a lost one."""
        parts = self._ledger.parts.values() if self.is_open and not self._waits else ()
        return [
            (p.session, p.lost_at) for p in parts if p.session == _coming(p.client) and p.lost_at is not None and not p.dropped
        ]

    def overdue(self, now: float, *, idle: bool = True) -> list[str]:
        late = super().overdue(now, idle=idle)
        return late + [session for session, since in self._under_way() if now - since >= ARRIVAL and session not in late]

    # --- clients that go to another replica, and come from one ------------------------------------------------------------------

    def enrol(self, session: str, client: str = "", held: tuple[int, ...] = (), *, moves: bool = False) -> None:
        """As in the base. Who belongs elsewhere is sent on (:meth:`departures`) if it can be, and once: who comes again would do
        so for ever, so it is asked for.
        """
        if session in self._leaving or session in self._asking:
            raise RemoteProtocolError("enrolled twice")
        if client not in self._elsewhere:
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
        self._say(Move(client, self._elsewhere[client], self._rank, self._newest[client]))

    def _hear_of(self, move: Move) -> None:
        """A client has gone from one replica to another by itself, or is asked for."""
        client, newest = move.client, self._newest.get(move.client, 0)
        if move.number > newest:
            self._decided(move)
        elif move.number == newest and client not in self._elsewhere:
            if self._takes_part(client):
                self._say(Stays(client, move.target))
                return
            was_held = self._forget_coming(client) | self._forget_lost(client)
            self._elsewhere[client] = move.target
            self._say(move)
            if not was_held:  # nor is it there, should it have gone again
                self._say(Stays(client, move.target))

    def _decided(self, move: Move) -> None:
        """From now on the client belongs to the target."""
        client = move.client
        self._newest[client] = move.number
        self._sent_on.discard(client)
        if move.target == self._rank:
            self._take_in(client)
            return
        self._elsewhere[client] = move.target
        if client in self._asking.values():
            self._say(replace(move, origin=move.target, target=self._rank))  # the one that was asked no longer has it
        else:
            self._forget_coming(client)  # who has asked is gone

    def _take_in(self, client: str) -> None:
        """The client belongs here."""
        self._elsewhere.pop(client, None)
        for session in [session for session, name in (self._asking | self._leaving).items() if name == client]:
            self._asking.pop(session, None)
            self._leaving.pop(session, None)
            enrolment = self._enrolments[session]
            super().enrol(session, client, enrolment.held, moves=enrolment.moves)

    def _takes_part(self, client: str) -> bool:
        """Whether it is enrolled here, or a part of it is not whole, save one that is held for its arrival."""
        parts = self._ledger.parts.values() if self.is_open else ()
        held = (part for part in parts if part.client == client and not part.finished)
        return client in self._enrolled.values() or any(part.lost_at is None or part.session != _coming(client) for part in held)

    def pause(self, session: str, client: str = "") -> int | None:
        self._leaving.pop(session, None)
        self._asking.pop(session, None)
        self._forget_coming(client)  # it has come, and takes no part
        if client in self._elsewhere:  # it was on its way here before it was moved
            self._say(Stays(client, self._elsewhere[client]))
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
        clients = Counter([*(each.client for each in self._enrolments.values()), *self._awaited.values()])
        enrolled = [self._enrolments[session] for session in self._enrolled]
        return tuple(sorted(each.client for each in enrolled if each.moves and clients[each.client] == 1))

    def _let_go(self, move: Move) -> None:
        """The client goes now; a round of the ends that it was a member of is over here."""
        client, is_origin = move.client, move.origin == self._rank
        if move.target == self._rank:
            return
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

    def _forget_lost(self, client: str) -> bool:
        """Hold no further step for a client that was lost here; returns whether any would have been."""
        lost = [session for session, name in self._awaited.items() if name == client]
        for session in lost:
            del self._awaited[session], self._awaited_since[session]
        return bool(lost)

    def _refuse(self, client: str) -> None:
        """The client does not come here; who asks for it is sent on."""
        self._forget_coming(client)
        refused = {session: name for session, name in self._asking.items() if name == client}
        self._asking = {session: name for session, name in self._asking.items() if name != client}
        self._leaving |= refused

    def _forget_coming(self, client: str) -> bool:
        """Hold no part for a client's arrival; returns whether one was held."""
        name, arrives = _coming(client), client in self._arrivals
        self._arrivals = [other for other in self._arrivals if other != client]
        awaited = self._awaited.pop(name, None)
        self._awaited_since.pop(name, None)
        part = self._holders.get(name)
        held = part is not None and part.session == name and part.lost_at is not None  # nobody has taken it over
        if part is not None and held:
            self._forget_part(part)
        return arrives or awaited is not None or held

    # --- opened and closed ------------------------------------------------------------------------------------------------------

    def common(self, kept: Sequence[int]) -> int | None:
        return self._back

    def go_back(self, number: int) -> None:
        super().go_back(number)
        self._back = None

    def openings(self, now: float = 0.0) -> list[tuple[str, int]]:
        # Who has overtaken the word is here, or was, and is held a part already.
        for client in set(self._arrivals).difference(self._enrolled.values(), self._awaited.values()):
            self._awaited[_coming(client)], self._awaited_since[_coming(client)] = client, now
        self._arrivals = []
        was_open, opened = self.is_open, [] if self._stopped else super().openings(now)
        if self.is_open and not was_open:
            self._take_up_left()
        if self._phase is Phase.IN and not self.is_open:
            self._phase = Phase.OUT  # everybody has left
        self._report()
        return opened

    def _may_open(self) -> bool:
        return self._phase is Phase.IN and not self._draining and bool(self._enrolled or self._awaited)

    def close(self) -> Ledger | None:
        """The ledger of a step that has closed here: on rank 0's word, empty where this replica has no part in it; or, amid a
        round, this replica's own.
        """
        while self._words:
            word = self._words.popleft()
            if isinstance(word, Close):
                return self._close_with_all(word)
            if isinstance(word, Grant):
                self._heard += 1
                self._phase, self.number = Phase.IN, max(self.number, word.step)
                self._said = self._state()  # as rank 0 knows
            elif isinstance(word, WaitedFor):
                self.is_awaited = True
            elif isinstance(word, GoBack):
                self._heard += 1
                self._back = word.step
                return None
            elif isinstance(word, Stays):
                self._refuse(word.client)
            elif isinstance(word, Move):
                self._hear_of(word)
            elif isinstance(word, Drain):
                self._draining = True
            elif not self._stopped:
                self._stopped = True
                self._on_stop(word.back)
        if self._stopped or self._phase is Phase.WHOLE or not self._is_settled:
            return None
        if self._is_void or not self._meetings.meets_at(self.number):
            if self._is_void:
                self._left = dict(self._ledger.parts)
            ledger = super().close()
            self._counted.update(ledger.targets_by_client if ledger is not None else {})
            return ledger
        self._phase = Phase.WHOLE
        self._on_whole(self._ledger.targets_here)
        return None

    def ends_with(self, members: Sequence[Member]) -> bool:
        """A client is taken to have as many gradients in each step as in its last two, where those were alike. So it need not
        say; where that turns out wrong, what comes late is summed late.
        """
        if not self._foresees or self._phase is not Phase.IN:
            return False
        running = Counter(id(self._part(m.session, m.forward.step)) for m in members if m.backward is not None)
        for part in self._ledger.parts.values():
            if part.unrun != running[id(part)]:
                return False  # more of it is here
            if not part.dropped and not part.all_arrived and (part.lost_at is not None or not self._is_as_usual(part)):
                return False
        return True

    def _is_as_usual(self, part: Part) -> bool:
        """Whether all that has come of it has its gradient, and as many as ever have come."""
        return part.done is None and part.taken == part.arrived and self._usual.get(part.client) == (part.arrived,) * 2

    def _take_up_left(self) -> None:
        """The step has opened here once more: who is in it again has lost nothing."""
        again = {part.client for part in self._ledger.parts.values()}
        self._ledger.parts |= {session: part for session, part in self._left.items() if part.client not in again}
        self._left = {}

    @property
    def counted(self) -> Counter[str]:
        """Target tokens by client since the replicas met, of steps that have closed here."""
        return self._counted.copy()

    def _close_with_all(self, word: Close) -> Ledger:
        is_whole = self._phase is Phase.WHOLE
        assert is_whole or not self.is_open, "rank 0 closes what is not whole"
        ledger = self._ledger if is_whole else Ledger(word.step, self._left)
        for part in ledger.parts.values():
            if part.done is not None:
                self._usual[part.client] = self._usual.get(part.client, (0, 0))[1], part.done.backwards
        ledger.met = word.counted
        self._counted.clear()
        self._left = {}
        if self._meetings.every == 1:
            ledger.targets_elsewhere = sum(word.counted.values()) - ledger.targets_here
            ledger.participants_elsewhere = word.participants - len(ledger.parts)
        self._heard += 1
        self.is_open = self.is_awaited = False
        self._holders = {}
        self.number = word.step + 1
        self._phase = Phase.IN if word.opens else Phase.OUT
        self._move = word.move
        if word.move is not None and word.move.target == self._rank:  # it may be here before the move is made here
            self._decided(word.move)
            self._arrivals.append(word.move.client)
        if word.opens:
            self._said = self._state()  # as rank 0 knows
        return ledger

    def _state(self) -> State:
        if self._phase is Phase.IN:
            return State(self._heard, Phase.IN, self.number)
        here = self._ledger if self._phase is Phase.WHOLE else Ledger(self.number, self._left)
        counted = self.counted
        counted.update(here.targets_by_client)  # as a sum would lose who has counted nothing
        waiting = len(self._enrolled), len(self._awaited)
        movable = self._movable() if self._phase is Phase.WHOLE else ()
        return State(self._heard, self._phase, self.number, *waiting, dict(counted), len(here.parts), self._holds(), movable)

    def _holds(self) -> tuple[int, ...] | None:
        if not self._first or self.number != self._first:
            return None
        held = self._wanted()
        return tuple(sorted(set.intersection(*held))) if held else None

    def _report(self) -> None:
        state = self._state()
        if state != self._said:
            self._said = state
            self._say(state)


def _coming(client: str) -> str:
    """Stands for the session of a client that comes from another replica."""
    return f"moved {client}"
