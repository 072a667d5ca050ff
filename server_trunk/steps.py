"""Optimizer steps: which one is open, who takes part, what has counted. Pure bookkeeping; no torch, sockets or clock of its own.

A session *enrols*; it is a **participant** of the next step to open. Step 0 opens when the configured number has enrolled. A step
closes when every participant has said that its part is done and all it declared has run. A participant that is lost or late is
dropped: what already ran counts, what did not does not, and nothing is ever subtracted. Under ``on_loss = "wait"`` the part of a
lost one is held instead, until a new session of the same client takes it over and replays it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server_trunk.ledger import LATE, LOST, PAUSED, Ledger, Part, check_asked, check_done, earliest
from server_trunk.members import Member
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import AskNorm, StepDone

__all__ = ["Enrolment", "Steps"]


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What a session said when it last enrolled. ``held``: steps after which its client can go on. ``moves``: whether it would go
    on at another replica.
    """

    client: str
    held: tuple[int, ...] = ()
    moves: bool = False


class Steps:
    """The state of a synchronous run's steps. Every method is called from the trunk's thread; ``now`` is its clock, seconds."""

    def __init__(self, *, clients: int, last: int = 0, first: int = 0, on_loss: str = "drop", deadline: float = 0.0) -> None:
        """``clients``: enrolled sessions the first step waits for. ``last``: steps of the run (0: no end). ``first``: to
        resume. ``on_loss``: ``drop`` or ``wait``. ``deadline``: seconds for which others wait for a participant in a step, or
        for the return of a lost one (0: no limit).
        """
        self.number = first  # the open step, or the next to open
        self.is_open = False
        self.is_awaited = False  # whether somebody who is not here waits for the open step
        self.stops_now = False  # whether the run ends, over several replicas, without waiting for the end of a round
        self._needed = clients
        self._last = last
        self._waits, self._deadline = on_loss == "wait", deadline
        self._enrolled: dict[str, str] = {}  # clients by session, in the order of enrolling
        self._ahead: dict[str, int] = {}  # forwards for the next step that have arrived
        self._awaited: dict[str, str] = {}  # clients by lost session, for whose return the next step will be held
        self._awaited_since: dict[str, float] = {}
        self._missed: dict[str, int] = {}  # by session: the newest step that did not wait for it
        self._ledger = Ledger(first)
        self._holders: dict[str, Part] = {}  # the open step's parts, by every session that holds or held one
        self._enrolments: dict[str, Enrolment] = {}  # by session that has taken part or wants to
        self._first = first
        self._company: float | None = None  # since when somebody waits for the others of a run that was taken up again

    @property
    def complete(self) -> bool:
        return bool(self._last) and self.number >= self._last

    # --- who takes part ---------------------------------------------------------------------------------------------------------

    def enrol(self, session: str, client: str = "", held: tuple[int, ...] = (), *, moves: bool = False) -> None:
        """``held``, ``moves``: as in :class:`Enrolment`."""
        if session in self._enrolled:
            raise RemoteProtocolError("enrolled twice")
        self._enrolled[session] = client or session
        self._enrolments[session] = Enrolment(client or session, held, moves)
        returned = next((lost for lost, name in self._awaited.items() if name == client), None)
        if returned is not None:
            del self._awaited[returned], self._awaited_since[returned]

    def pause(self, session: str, client: str = "") -> int | None:
        """Withdraw from the next step, and from the open one where this part of it is not done. ``client``: whose session it is.

        Returns the open step if it withdrew from it: what of it has run counts, nothing more is waited for.
        """
        self._enrolled.pop(session, None)
        part = self._holders.get(session)
        if part is None or part.session != session or part.done is not None or part.dropped:
            return None
        if part.forwards or part.counted:
            part.dropped, part.why = True, PAUSED
        else:
            self._forget_part(part)
        return self.number

    def lose(self, session: str, now: float = 0.0) -> None:
        """The session is gone. Where every gradient it announced has arrived, its part will be whole; else the step goes on
        without it, or waits for its client.
        """
        client = self._enrolled.pop(session, None)
        self._enrolments.pop(session, None)
        self._ahead.pop(session, None)
        self._missed.pop(session, None)
        part = self._holders.get(session)
        underway = (
            part is not None and part.session == session and not part.dropped and part.lost_at is None and not part.will_be_whole
        )
        if part is not None and underway and self._waits:
            part.hold(now)
        elif part is not None and underway:
            part.dropped, part.why = True, LOST
        elif client is not None and self._waits:
            self._awaited[session], self._awaited_since[session] = client, now

    def away(self, now: float) -> set[str]:
        """Lost clients whose return is waited for: in the open step, or for the next, and then for as long."""
        parts = self._ledger.parts.values() if self.is_open else ()
        held = {part.client for part in parts if part.lost_at is not None and not part.dropped}
        awaited = {} if self.complete else self._awaited_since
        return held | {
            self._awaited[session] for session, since in awaited.items() if not self._deadline or now - since < self._deadline
        }

    def overdue(self, now: float, *, idle: bool = True) -> list[str]:
        """The sessions that others have waited for longer than the deadline allows.

        A participant is waited for while nothing of it is here to be run and somebody else's part is done, or is held up: is
        here although the trunk is ``idle``, which means that nothing can run.
        """
        self._await_company(now)
        if not self.is_open or not self._deadline:
            return []
        parts = [part for part in self._ledger.parts.values() if not part.dropped]
        present = [part for part in parts if part.lost_at is None]
        if self.is_awaited or any(part.finished or (idle and part.pending) for part in present):
            for part in present:
                part.wait(now, not part.finished and not part.pending)
        return [part.session for part in parts if part.is_overdue(now, self._deadline)]

    def wake(self, now: float) -> float | None:
        """Seconds until :meth:`overdue` or :meth:`away` is worth asking again though nothing has happened; None: no need."""
        if not self._deadline:
            return None
        if self.is_open:
            return earliest((part for part in self._ledger.parts.values() if not part.dropped), now, self._deadline)
        begun = [*self._awaited_since.values(), *([] if self._company is None else [self._company])]
        rests = [since + self._deadline - now for since in begun]
        return min((rest for rest in rests if rest > 0), default=None)

    def _await_company(self, now: float) -> None:
        """A run that was taken up again waits for all of its clients no longer than for one in a step: some may have finished."""
        if self.is_open or not self._first or self._needed <= 1 or not self._enrolled:
            self._company = None
        elif self._company is None:
            self._company = now
        elif self._deadline and now - self._company >= self._deadline:
            self._needed, self._company = 1, None

    def drop(self, session: str) -> int:
        """Wait no longer for this session's part of the open step; returns that step. A silent one has to enrol again."""
        part = self._holders[session]
        part.dropped, part.why = True, LATE if part.lost_at is None else LOST
        if part.lost_at is None:
            self._missed[session] = self.number
            part.withdrawn = part.done is None
            if part.withdrawn:
                self._enrolled.pop(session, None)
                self._ahead.pop(session, None)
        return self.number

    def departures(self) -> list[str]:
        """The sessions whose clients go to another replica now, between two steps: each is to end."""
        return []

    def dismiss(self) -> list[str]:
        """The sessions still enrolled once the run is complete: no step will ever open for them."""
        left = list(self._enrolled) if self.complete else []
        if left:
            self._enrolled.clear()
        return left

    def common(self, kept: Sequence[int]) -> int | None:
        """Of the steps that the server has ``kept``, the newest after which everybody enrolled can go on, where the first step
        since the run was resumed is about to open and not all can go on from where it stands; else None.
        """
        wanted = self._wanted()
        begun = self.is_open or self.number != self._first or not self._first or len(self._enrolled) < max(1, self._needed)
        if begun or all(self.number - 1 in steps for steps in wanted):
            return None
        return max((step for step in kept if step < self.number and all(step in steps for steps in wanted)), default=None)

    def _wanted(self) -> list[set[int]]:
        """The steps after which each of those enrolled can go on, save who has yet to begin: that goes on from anywhere."""
        held = (self._enrolments[session].held for session in self._enrolled)
        return [set(steps) for steps in held if steps]

    def go_back(self, number: int) -> None:
        """The run stands before step ``number`` again."""
        self.number = self._first = number
        self._ledger = Ledger(number)

    @property
    def expects_forwards(self) -> bool:
        """Whether a participant of the open step has yet to send its first forward."""
        parts = self._ledger.parts.values() if self.is_open else ()
        return any(not part.taken and part.done is None and not part.dropped and part.lost_at is None for part in parts)

    def openings(self, now: float = 0.0) -> list[tuple[str, int]]:
        """Open the next step if it may, or give a held part to its client's new session; returns the sessions to be told, and
        of which step.
        """
        if self.is_open:
            return self._returns()
        if self.complete or not self._may_open():
            return []
        self._needed = 1  # only the first step waits for company
        self.is_open = True
        self._holders = {
            session: Part(session, client, self.number, taken=self._ahead.pop(session, 0))
            for session, client in self._enrolled.items()
        }
        for session, client in self._awaited.items():
            self._holders[session] = Part(session, client, self.number, lost_at=now)
        self._awaited.clear()
        self._awaited_since.clear()
        self._ledger = Ledger(self.number, dict(self._holders))
        return [(session, self.number) for session in self._enrolled]

    def _may_open(self) -> bool:
        return len(self._enrolled) >= max(1, self._needed)

    def _returns(self) -> list[tuple[str, int]]:
        told = []
        for part in self._ledger.parts.values():
            if part.lost_at is None or part.dropped:
                continue
            for session, client in self._enrolled.items():
                if client == part.client and session not in self._holders:
                    part.take_over(session)
                    self._holders[session] = part
                    told.append((session, self.number))
                    break
        return told

    def _forget_part(self, part: Part) -> None:
        self._holders = {session: other for session, other in self._holders.items() if other is not part}
        self._ledger.parts = {session: other for session, other in self._ledger.parts.items() if other is not part}

    # --- what comes in ----------------------------------------------------------------------------------------------------------

    def _part(self, session: str, step: int) -> Part | None:
        part = self._holders.get(session)
        return part if part is not None and step == self.number else None

    def is_stale(self, session: str, step: int) -> bool:
        """Whether a training message for ``step`` comes from an honest client that this step has not waited for."""
        missed = self._missed.get(session, -1)
        return step <= missed or (missed >= 0 and step == missed + 1 and self._withdrawn(session, step))

    def _withdrawn(self, session: str, step: int) -> bool:
        return session not in self._enrolled and self._part(session, step) is None

    def take_forward(self, session: str, step: int) -> None:
        """A training forward has arrived; it runs once :meth:`is_running`.

        Raises:
            RemoteProtocolError: the session is in no position to send it, now or later.
        """
        part = self._holders.get(session)
        if part is not None and part.session == session and step == self.number and part.done is None:
            part.taken += 1
            return
        # The next step's forward may overtake the end of this one: they travel on two connections.
        ahead = part is not None and step == self.number + 1
        if session not in self._enrolled or not (ahead or (part is None and step >= self.number)):
            raise RemoteProtocolError(f"a training forward for step {step}, while step {self.number} is the present one")
        self._ahead[session] = self._ahead.get(session, 0) + 1

    def is_replay(self, session: str, step: int, ordinal: int) -> bool:
        """Whether the gradient of this micro-batch is in the sum already, from before its client was lost."""
        part = self._part(session, step)
        return part is not None and part.session == session and ordinal in part.replays.get(session, ())

    def may_evaluate(self, step: int) -> bool:
        """An evaluation forward that names a step wants the weights after all steps before it; while a step is held for a lost
        client, it takes them as they are.
        """
        return step <= self.number or any(part.lost_at is not None for part in self._ledger.parts.values() if not part.dropped)

    def is_running(self, session: str, step: int) -> bool:
        """Whether ``step`` is open for this session right now."""
        part = self._part(session, step)
        return part is not None and part.session == session and not part.dropped

    def forward_ran(self, session: str, step: int, ordinal: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.forward_ran(session)

    def backward_arrived(self, session: str, step: int, ordinal: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.backward_arrived(ordinal)

    def backward_ran(self, session: str, step: int, ordinal: int, targets: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.backward_ran(session, ordinal, targets)

    def backward_failed(self, session: str, step: int, ordinal: int) -> None:
        part = self._part(session, step)
        if part is not None:
            part.backward_failed(session, ordinal)

    def done(self, session: str, message: StepDone) -> None:
        if self.is_stale(session, message.step):
            return  # it crossed the word that nobody waits for it
        part = self._part(session, message.step)
        if part is None or part.session != session:
            raise RemoteProtocolError(f"the end of step {message.step}, while step {self.number} is the present one")
        check_done(part, message)
        part.done = message
        if message.then != "continue":
            self._enrolled.pop(session, None)

    def ask_norm(self, session: str, message: AskNorm) -> None:
        """The session wants to know the norm of the step's gradient, once what it names has run."""
        part = self._part(session, message.step)
        if part is not None and part.session == session and not part.dropped:
            check_asked(part, message)
            part.asked = message

    def norm_due(self) -> list[Part]:
        """The parts whose sessions are to be told the norm of the step's gradient now."""
        due = [part for part in self._ledger.parts.values() if part.has_asked_in_time]
        for part in due:
            part.asked = None
        return due

    @property
    def targets(self) -> int:
        """What has counted of the open step so far."""
        return self._ledger.targets_here

    def all_arrived(self, session: str) -> int | None:
        """The step of which every announced gradient of this session is here; None while more will come."""
        part = self._holders.get(session)
        return self.number if part is not None and part.session == session and part.all_arrived else None

    def ends_with(self, members: Sequence[Member]) -> bool:
        """Whether the gradients of these, which are about to run together, are likely to be the last of the open step here. Only
        asked for where that saves time.
        """
        return False

    # --- the end of a step ------------------------------------------------------------------------------------------------------

    def is_ending(self, session: str) -> bool:
        """Whether this session's part is cut short and it has yet to be told."""
        part = self._holders.get(session)
        return part is not None and part.dropped

    def ended(self) -> list[Part]:
        """Parts that end before the optimizer steps: none in a synchronous run, where :meth:`close` ends them all."""
        return []

    def close(self) -> Ledger | None:
        """Close the open step if all its parts are finished; returns what it was made of.

        A step that everybody left before anything counted is not closed but opened anew, under the same number.
        """
        if not self._is_settled:
            return None
        ledger, void = self._ledger, self._is_void
        self.is_open, self._holders = False, {}
        if void:
            self._ledger = Ledger(self.number)
            return None
        self.number += 1
        return ledger

    @property
    def _is_settled(self) -> bool:
        """Whether a step is open of which nothing is awaited any more."""
        return self.is_open and not any(part.unrun or not part.finished for part in self._ledger.parts.values())

    @property
    def _is_void(self) -> bool:
        """Whether everybody left the step before anything counted."""
        parts = self._ledger.parts.values()
        return self._ledger.targets_here == 0 and all(part.why != LATE and (part.dropped or part.done is None) for part in parts)
