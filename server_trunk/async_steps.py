"""Steps without a barrier, for clients of very unequal speed. Pure bookkeeping; no torch, no sockets, no clock of its own.

Each session has a step counter of its own: its part ends as soon as it is done and all it declared has run, which is a
**contribution**, and its next part begins at once. The optimizer steps when enough contributions have come, on everything that
is in the sum by then, a part that is still under way included. A gradient may thus stem from weights that have moved on since its
forward: its **staleness** is the number of optimizer steps made between. It is bounded: an optimizer step that would make a graph
still open older than the bound is held back until that graph's gradient has come, or its client is dropped. This is the stale
synchronous parallel model (Ho et al., NeurIPS 2013), but whoever is ahead goes on adding to the sum instead of waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server_trunk.ledger import LATE, LOST, PAUSED, Ledger, Part, check_done, earliest
from server_trunk.members import Member
from server_trunk.steps import Steps
from splitfl.config import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import StepDone

__all__ = ["AsyncSteps", "steps_of"]


@dataclass(slots=True)
class _Presence:
    """One session's place in the run. ``next``: the number of its next part, or of its present one."""

    client: str
    next: int
    enrolled: bool = False
    part: Part | None = None
    ahead: int = 0  # forwards for the next part that have arrived
    missed: int = -1  # the newest of its parts that was not waited for
    gone: bool = False  # only gradients that are here keep it
    graphs: dict[int, list[int]] = field(default_factory=dict)  # by ordinal: optimizer steps made before each forward

    def made_before(self, ordinal: int, default: int) -> int:
        """A gradient has run: the optimizer steps made before its forward. Of several forwards under one ordinal, which none but
        a liar sends, the oldest stay, so that no graph seems younger than it is.
        """
        made = self.graphs.get(ordinal)
        if made is None:
            return default
        newest = made.pop()
        if not made:
            del self.graphs[ordinal]
        return newest


class AsyncSteps:
    """The state of an asynchronous run's steps, with the methods of :class:`~server_trunk.steps.Steps`."""

    def __init__(
        self,
        *,
        clients: int,
        contributions: int,
        max_staleness: int,
        last: int = 0,
        first: int = 0,
        deadline: float = 0.0,
    ) -> None:
        """``clients``: enrolled sessions the first parts wait for. ``contributions``: finished parts an optimizer step waits
        for. ``max_staleness``: optimizer steps that may lie between a forward and its gradient's inclusion. ``last``: optimizer
        steps of the run (0: no end). ``deadline``: seconds for which a part may hold back an optimizer step (0: no limit).
        """
        self.number = first  # optimizer steps made
        self._needed = 0 if first else clients  # a run that is taken up again began long ago
        self._contributions, self._max_staleness = contributions, max_staleness
        self._last, self._deadline = last, deadline
        self._sessions: dict[str, _Presence] = {}
        self._finished = 0  # contributions since the last optimizer step
        self._ledger = Ledger(first, ends_parts=False)

    @property
    def is_open(self) -> bool:
        return any(presence.part is not None for presence in self._sessions.values())

    @property
    def complete(self) -> bool:
        return bool(self._last) and self.number >= self._last

    # --- who takes part ---------------------------------------------------------------------------------------------------------

    def enrol(self, session: str, client: str = "", held: tuple[int, ...] = (), *, moves: bool = False) -> None:
        """``held`` is of no concern, as each session numbers its own steps, and there is nowhere to move to."""
        presence = self._sessions.setdefault(session, _Presence(client or session, self.number))
        if presence.enrolled:
            raise RemoteProtocolError("enrolled twice")
        presence.enrolled = True

    def pause(self, session: str, client: str = "") -> int | None:
        """Withdraw; returns the number of the part it withdrew from, of which what has arrived counts."""
        presence = self._sessions.get(session)
        if presence is None:
            return None
        presence.enrolled = False
        part = presence.part
        if part is None or part.done is not None or part.dropped:
            return None
        self._cut_short(presence, part, PAUSED)
        return part.step

    def lose(self, session: str, now: float = 0.0) -> None:
        """The session is gone; what of it has arrived runs and counts."""
        presence = self._sessions.get(session)
        if presence is None:
            return
        presence.enrolled, presence.gone = False, True
        if presence.part is None:
            del self._sessions[session]
        elif not (presence.part.all_arrived or presence.part.dropped):
            self._cut_short(presence, presence.part, LOST)

    def _cut_short(self, presence: _Presence, part: Part, why: str) -> None:
        """No more is awaited of this part; gradients that are here are on their way into the sum."""
        part.dropped, part.why = True, why
        presence.graphs = {ordinal: made for ordinal, made in presence.graphs.items() if ordinal in part.counted}

    def away(self, now: float) -> set[str]:
        """Nobody's return is waited for."""
        return set()

    def overdue(self, now: float, *, idle: bool = True) -> list[str]:
        """The sessions that have held back an optimizer step for longer than the deadline allows."""
        due = self._finished >= self._contributions
        for presence in self._sessions.values():
            if presence.part is not None:
                presence.part.wait(now, due and not presence.part.pending and self._holds_back(presence))
        return [part.session for part in self._under_way() if self._deadline and part.is_overdue(now, self._deadline)]

    def wake(self, now: float) -> float | None:
        return earliest(self._under_way(), now, self._deadline) if self._deadline else None

    def _under_way(self) -> list[Part]:
        parts = (presence.part for presence in self._sessions.values())
        return [part for part in parts if part is not None and not part.dropped]

    def _holds_back(self, presence: _Presence) -> bool:
        return any(self.number + 1 - made[0] > self._max_staleness for made in presence.graphs.values())

    def drop(self, session: str) -> int:
        """Wait no longer for this session's part; it has to enrol again. Returns the part's number."""
        presence = self._sessions[session]
        part = presence.part
        assert part is not None
        self._cut_short(presence, part, LATE)
        presence.missed = part.step
        part.withdrawn = part.done is None or self.complete
        if part.withdrawn:
            presence.enrolled, presence.ahead = False, 0
        return part.step

    def departures(self) -> list[str]:
        """None: there is nowhere to go."""
        return []

    def dismiss(self) -> list[str]:
        """Once the run is complete: the sessions that train, each of whose parts ends here."""
        if not self.complete:
            return []
        left = []
        for session, presence in self._sessions.items():
            if presence.part is not None and not presence.part.dropped:
                self.drop(session)
                left.append(session)
            elif presence.enrolled:
                left.append(session)
            presence.enrolled = False
        return left

    def common(self, kept: Sequence[int]) -> int | None:
        """Nobody has to stand where others stand."""
        return None

    def go_back(self, number: int) -> None:
        raise AssertionError("an asynchronous run goes on from where it was resumed")

    @property
    def expects_forwards(self) -> bool:
        """Nobody waits for anybody."""
        return False

    def openings(self, now: float = 0.0) -> list[tuple[str, int]]:
        """Begin the next part of every enrolled session that has none; returns them with the numbers of their parts."""
        ready = [(session, one) for session, one in self._sessions.items() if one.enrolled and one.part is None]
        if self.complete or not ready or len(ready) < self._needed:
            return []
        self._needed = 0  # only the first parts wait for company
        for session, presence in ready:
            presence.part = Part(session, presence.client, presence.next, taken=presence.ahead)
            presence.ahead = 0
        return [(session, presence.next) for session, presence in ready]

    # --- what comes in ----------------------------------------------------------------------------------------------------------

    def _part(self, session: str, step: int) -> Part | None:
        presence = self._sessions.get(session)
        part = presence.part if presence is not None else None
        return part if part is not None and part.step == step else None

    def is_stale(self, session: str, step: int) -> bool:
        """Whether a training message comes from an honest client whose part was not waited for."""
        presence = self._sessions.get(session)
        if self.complete:
            return True
        if presence is None or presence.missed < 0:
            return False
        ahead = step == presence.missed + 1 and not presence.enrolled and self._part(session, step) is None
        return step <= presence.missed or ahead

    def take_forward(self, session: str, step: int) -> None:
        """A training forward has arrived; it runs once :meth:`is_running`. Raises RemoteProtocolError."""
        part, presence = self._part(session, step), self._sessions.get(session)
        if part is not None and part.done is None:
            part.taken += 1
            return
        if presence is None or not presence.enrolled or step != presence.next + (presence.part is not None):
            raise RemoteProtocolError(f"a training forward for step {step}, which is not this session's present one")
        presence.ahead += 1

    def is_replay(self, session: str, step: int, ordinal: int) -> bool:
        return False

    def may_evaluate(self, step: int) -> bool:
        """Evaluation takes the weights as they are: no other client is waited for."""
        return True

    def is_running(self, session: str, step: int) -> bool:
        part = self._part(session, step)
        return part is not None and not part.dropped

    def forward_ran(self, session: str, step: int, ordinal: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.forward_ran(session)
            self._sessions[session].graphs.setdefault(ordinal, []).append(self.number)

    def backward_arrived(self, session: str, step: int, ordinal: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.backward_arrived(ordinal)

    def backward_ran(self, session: str, step: int, ordinal: int, targets: int) -> None:
        """Its gradient is in the sum of the next optimizer step."""
        part, presence = self._part(session, step), self._sessions.get(session)
        if part is None or presence is None:
            return
        part.backward_ran(session, ordinal, targets)
        staleness = self.number - presence.made_before(ordinal, self.number)
        part.staleness = max(part.staleness, staleness)
        counted = self._ledger.parts.setdefault(session, Part(session, presence.client))
        counted.targets += targets
        counted.micro_batches += 1
        counted.staleness = max(counted.staleness, staleness)

    def backward_failed(self, session: str, step: int, ordinal: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.backward_failed(session, ordinal)
            self._sessions[session].made_before(ordinal, self.number)

    def done(self, session: str, message: StepDone) -> None:
        if self.is_stale(session, message.step):
            return  # it crossed the word that nobody waits for it
        part, presence = self._part(session, message.step), self._sessions.get(session)
        if part is None or presence is None:
            raise RemoteProtocolError(f"the end of step {message.step}, which is not this session's present one")
        check_done(part, message)
        part.done = message
        if message.then != "continue":
            presence.enrolled = False

    def all_arrived(self, session: str) -> int | None:
        presence = self._sessions.get(session)
        part = presence.part if presence is not None else None
        return part.step if part is not None and part.all_arrived else None

    def ends_with(self, members: Sequence[Member]) -> bool:
        return False  # no step waits for anything

    # --- ends -------------------------------------------------------------------------------------------------------------------

    def is_ending(self, session: str) -> bool:
        presence = self._sessions.get(session)
        return presence is not None and presence.part is not None and presence.part.dropped

    def ended(self) -> list[Part]:
        """The parts that have ended since this was asked last; each that is whole counts towards the next optimizer step."""
        ended = []
        for session, presence in list(self._sessions.items()):
            part = presence.part
            if part is None or part.unrun or not part.finished:
                continue
            ended.append(part)
            self._finished += part.micro_batches > 0 and not part.dropped
            presence.part, presence.next = None, part.step + 1
            presence.graphs.clear()
            if presence.gone:
                del self._sessions[session]
        return ended

    def close(self) -> Ledger | None:
        """What the next optimizer step is made of, where it is due: enough contributions have come, and it leaves no open graph
        behind that is too old; or everybody who could contribute has gone.
        """
        idle = not any(presence.enrolled or presence.part is not None for presence in self._sessions.values())
        # A contribution may have been used before its end was known: it counts all the same, once there is something to use.
        due = bool(self._ledger.parts) and (idle or self._finished >= self._contributions)
        if not due or self.complete or any(self._holds_back(presence) for presence in self._sessions.values()):
            return None
        ledger, self._ledger = self._ledger, Ledger(self.number + 1, ends_parts=False)
        self._finished = 0
        self.number += 1
        return ledger


def steps_of(config: RunConfig, *, first: int = 0) -> Steps | AsyncSteps:
    """The steps of a run from ``first``, as its mode wants them."""
    last, deadline = config.optimizer.steps, config.step_deadline
    if config.mode != "async":
        return Steps(clients=config.clients, last=last, first=first, on_loss=config.on_loss, deadline=deadline)
    return AsyncSteps(
        clients=config.clients,
        contributions=config.async_contributions,
        max_staleness=config.max_staleness,
        last=last,
        first=first,
        deadline=deadline,
    )
