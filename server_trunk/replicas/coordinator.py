"""Rank 0's decisions over all replicas: when a step opens, and when it closes. A state machine without I/O.

Replicas report where they stand; each report says how many grants and closings its replica had heard by then. One made before the
newest word reached its replica is passed over, as the replica reports again once it hears that word: so no decision rests on what
has changed meanwhile. A replica without participants is *out* of the round and takes part in its closing alone; it comes in by a
grant, so its first participant and a closing cannot cross.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.words import Close, Drain, GoBack, Grant, Move, Phase, State, Stop, WaitedFor, Word

__all__ = ["Coordinator"]

#: A rank, and what it is to be told.
Told = tuple[int, Word]


@dataclass(slots=True)
class _Replica:
    state: State
    told: int = 0  # grants and closings
    is_waited_for: bool = False  # and knows it


class Coordinator:
    """``clients``: enrolled sessions, over all replicas, that the first step waits for. ``kept``: the steps of checkpoints.
    ``choose(step, movable)``: who of the ``movable`` clients, by replica, is to go elsewhere now that ``step`` closes.
    """

    def __init__(
        self,
        size: int,
        *,
        clients: int,
        meetings: Meetings,
        first: int = 0,
        kept: Callable[[], Sequence[int]] = tuple,
        choose: Callable[[int, Sequence[Sequence[str]]], Move | None] = lambda step, movable: None,
    ) -> None:
        self.step = first  # the furthest that any replica is known to be
        self._round = first  # the first step of the open round
        self._needed, self._begun, self._kept = clients, False, kept
        self._meetings, self._choose = meetings, choose
        self._replicas = [_Replica(State(0, Phase.OUT, first)) for _ in range(size)]
        self._draining = self._stopped = self._stopped_now = False

    def hear(self, rank: int, state: State) -> list[Told]:
        """What a replica's report leads to, in the order of telling."""
        replica = self._replicas[rank]
        if self._stopped or state.heard != replica.told:
            return []
        replica.state = state
        self.step = max(self.step, state.step)
        phases = {other.state.phase for other in self._replicas}
        if Phase.WHOLE not in phases:
            return self._grant() + self._stop_if_drained()
        return self._remind() if Phase.IN in phases else self._close() + self._stop_if_drained()

    def begin(self) -> list[Told]:
        """Wait for no further clients before the first step."""
        if self._stopped or self._needed <= 1:
            return []
        self._needed = 1
        return self._grant()

    def drain(self) -> list[Told]:
        """No step opens any more; once the open ones are over, none closes either."""
        if self._draining or self._stopped:
            return []
        self._draining = True
        return [(rank, Drain()) for rank in range(len(self._replicas))] + self._stop_if_drained()

    def _stop_if_drained(self) -> list[Told]:
        out = all(replica.state.phase is Phase.OUT for replica in self._replicas)
        return self.stop() if self._draining and out else []

    def stop(self, *, now: bool = False) -> list[Told]:
        """No step closes any more: what was told before holds for all. ``now``: nobody waits for the end of a round either."""
        if self._stopped_now or (self._stopped and not now):
            return []
        self._stopped, self._stopped_now = True, now
        # Only a server that means to be back lets the open step come to its end.
        return [(rank, Stop(self._draining, now)) for rank in range(len(self._replicas))]

    def _grant(self) -> list[Told]:
        """Let those in who have participants. Nobody comes in once a part is whole: the others would wait for all of theirs."""
        told: list[Told] = []
        ready = self._ready()
        if ready and not self._begun:
            self._begun = True
            common = self._common()
            if common is not None:
                return self._go_back(common)
        for rank in ready:
            replica = self._replicas[rank]
            replica.state = replace(replica.state, phase=Phase.IN)
            replica.told += 1
            told.append((rank, Grant(self.step)))
        return told

    def _common(self) -> int | None:
        """As :meth:`server_trunk.steps.Steps.common`, over the clients of all replicas."""
        wanted = [other.state.holds for other in self._replicas if other.state.holds is not None]
        if not self.step or all(self.step - 1 in steps for steps in wanted):
            return None
        return max((step for step in self._kept() if step < self.step and all(step in steps for steps in wanted)), default=None)

    def _go_back(self, step: int) -> list[Told]:
        self.step = self._round = step + 1
        for replica in self._replicas:
            replica.state = replace(replica.state, step=self.step)
            replica.told += 1
        return [(rank, GoBack(step)) for rank in range(len(self._replicas))]

    @property
    def _is_complete(self) -> bool:
        return bool(self._meetings.last) and self.step >= self._meetings.last

    def _ready(self) -> list[int]:
        """The replicas that come in now, if any may."""
        out = [(rank, other.state) for rank, other in enumerate(self._replicas) if other.state.phase is Phase.OUT]
        is_open = len(out) < len(self._replicas)
        enrolled = sum(state.enrolled for _, state in out)
        if self._draining or self._is_complete or not (is_open or enrolled >= max(1, self._needed)):
            return []
        self._needed = 1  # only the first step waits for company
        return [rank for rank, state in out if state.enrolled or state.held]

    def _remind(self) -> list[Told]:
        told: list[Told] = []
        for rank, replica in enumerate(self._replicas):
            if replica.state.phase is Phase.IN and not replica.is_waited_for:
                replica.is_waited_for = True
                told.append((rank, WaitedFor()))
        return told

    def _close(self) -> list[Told]:
        """Everybody who was in is whole: the round closes, on all replicas."""
        counted: Counter[str] = Counter()
        for replica in self._replicas:
            counted.update(replica.state.counted)
        participants = sum(replica.state.participants for replica in self._replicas)
        closed = self._meetings.last_of(self._round)
        self.step = self._round = closed + 1
        move = None if self._draining or self._is_complete else self._choose(closed, [r.state.movable for r in self._replicas])
        for replica in self._replicas:
            replica.state = replace(replica.state, phase=Phase.OUT, step=self.step, counted={}, participants=0, movable=())
            replica.told += 1
            replica.is_waited_for = False
        if move is not None:
            # The next step waits for it there, so it takes part in each.
            origin, target = self._replicas[move.origin], self._replicas[move.target]
            origin.state = replace(origin.state, enrolled=origin.state.enrolled - 1)
            target.state = replace(target.state, held=target.state.held + 1)
        ready = set(self._ready())
        for rank in ready:
            self._replicas[rank].state = replace(self._replicas[rank].state, phase=Phase.IN)
        return [(rank, Close(closed, rank in ready, dict(counted), participants, move)) for rank in range(len(self._replicas))]
