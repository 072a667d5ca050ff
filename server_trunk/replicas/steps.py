"""One replica's steps: its own participants', opened and closed with those of all others. Pure bookkeeping, like its base.

Rank 0's :class:`~server_trunk.replicas.coordinator.Coordinator` grants this replica the round, and says when it closes; in
between, this replica's steps are as they would be alone. Words come in from any thread, in order; everything else is the trunk's
thread's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from server_trunk.ledger import Ledger, Part
from server_trunk.members import Member
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.moving import MovingSteps
from server_trunk.replicas.words import Close, Drain, GoBack, Grant, Move, Phase, State, Stays, Stop, WaitedFor

__all__ = ["Heard", "ReplicaSteps"]

#: What rank 0 says to a replica.
Heard = Grant | WaitedFor | Close | GoBack | Drain | Stop | Stays | Move


class ReplicaSteps(MovingSteps):
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
        super().__init__(say, rank=rank, last=meetings.last, first=first, on_loss=on_loss, deadline=deadline)
        self._meetings, self._on_whole, self._on_stop = meetings, on_whole, on_stop
        self._foresees = foresees
        self._usual: dict[str, tuple[int, int]] = {}  # by client: the gradients of its last two parts
        self._words: deque[Heard] = deque()
        self._heard = 0
        self._phase = Phase.OUT
        self._counted: Counter[str] = Counter()  # targets by client since the replicas met, of steps that have closed
        self._draining = self._stopped = False
        self._back: int | None = None  # the step that rank 0 wants to go back to
        self._said = State(0, Phase.OUT, first)
        self._left: dict[str, Part] = {}  # parts of the round whose replica was left before anything counted here, for the ledger

    def hear(self, word: Heard) -> None:
        """A word from rank 0; from any thread. The trunk's thread has to be woken for it."""
        self._words.append(word)
        if isinstance(word, Stop) and word.now:
            self.stops_now = True

    def wake(self, now: float) -> float | None:
        return 0.0 if self._words else super().wake(now)

    def common(self, kept: Sequence[int]) -> int | None:
        return self._back

    def go_back(self, number: int) -> None:
        super().go_back(number)
        self._back = None

    def openings(self, now: float = 0.0) -> list[tuple[str, int]]:
        self._await_arrivals(now)
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
            if isinstance(word, GoBack):
                self._heard, self._back = self._heard + 1, word.step
                return None
            self._act_on(word)
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

    def _act_on(self, word: Grant | WaitedFor | Drain | Stop | Stays | Move) -> None:
        if isinstance(word, Grant):
            self._heard += 1
            self._phase, self.number = Phase.IN, max(self.number, word.step)
            self._said = self._state()  # as rank 0 knows
        elif isinstance(word, WaitedFor):
            self.is_awaited = True
        elif isinstance(word, Stays):
            self._refuse(word.client)
        elif isinstance(word, Move):
            self._hear_of(word)
        elif isinstance(word, Drain):
            self._draining = True
        elif not self._stopped:
            self._stopped = True
            self._on_stop(word.back)

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
        self._moves_next(word.move)
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
