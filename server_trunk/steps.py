"""Optimizer steps: which one is open, who takes part, what has counted. Pure bookkeeping; no torch, no sockets.

A session *enrols*; it is a **participant** of the next step to open. Step 0 opens when the configured number has enrolled. A step
closes when every participant has said that its part is done and all it declared has run. A session that vanishes is dropped: what
already ran counts, what did not does not, and nothing is ever subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import StepDone

__all__ = ["Ledger", "Part", "Steps"]


@dataclass(slots=True)
class Part:
    """What one session has contributed to one step. ``targets`` are the tokens whose gradient counted."""

    forwards: int = 0
    backwards: int = 0
    targets: int = 0
    done: StepDone | None = None
    dropped: bool = False

    @property
    def finished(self) -> bool:
        if self.dropped:
            return True
        return self.done is not None and self.forwards >= self.done.forwards and self.backwards >= self.done.backwards


@dataclass(slots=True)
class Ledger:
    """What one closed step was made of."""

    step: int
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def targets(self) -> int:
        return sum(part.targets for part in self.parts.values())


class Steps:
    """The state of the run's steps. Every method is called from the trunk's thread only."""

    def __init__(self, *, clients: int, last: int = 0, first: int = 0) -> None:
        """``clients``: enrolled sessions the first step waits for. ``last``: steps of the run (0: no end). ``first``: to
        resume.
        """
        self.number = first  # the open step, or the next to open
        self.is_open = False
        self._needed = clients
        self._last = last
        self._enrolled: dict[str, None] = {}  # in the order of enrolling
        self._ledger = Ledger(first)

    @property
    def complete(self) -> bool:
        return bool(self._last) and self.number >= self._last

    def enrol(self, session: str) -> None:
        if session in self._enrolled:
            raise RemoteProtocolError("enrolled twice")
        self._enrolled[session] = None

    def pause(self, session: str) -> bool:
        """Withdraw from the next step, and from the open one where this part of it is not done.

        Returns whether it withdrew from the open step: what of it has run counts, nothing more is waited for.
        """
        self._enrolled.pop(session, None)
        part = self._ledger.parts.get(session) if self.is_open else None
        if part is None or part.done is not None:
            return False
        if part.forwards:
            part.dropped = True
        else:
            del self._ledger.parts[session]
        return True

    def lose(self, session: str, *, all_arrived: bool = False) -> None:
        """The session is gone: the step goes on without it. ``all_arrived``: every backward it declared is here and will run,
        so that its part will be whole.
        """
        self._enrolled.pop(session, None)
        part = self._ledger.parts.get(session)
        if part is None or part.finished:
            return
        whole = all_arrived and part.done is not None and part.forwards >= part.done.forwards
        part.dropped = not whole

    def holds(self, session: str) -> bool:
        """Whether the open step has a part of this session, dropped or not."""
        return self.is_open and session in self._ledger.parts

    def dismiss(self) -> list[str]:
        """The sessions still enrolled once the run is complete: no step will ever open for them."""
        left = list(self._enrolled) if self.complete else []
        if left:
            self._enrolled.clear()
        return left

    def open_next(self) -> list[str]:
        """Open the next step if it may; returns its participants, or an empty list."""
        if self.is_open or self.complete or len(self._enrolled) < max(1, self._needed):
            return []
        self._needed = 1  # only the first step waits for company
        self.is_open = True
        self._ledger = Ledger(self.number, {session: Part() for session in self._enrolled})
        return list(self._enrolled)

    def may_train(self, session: str, step: int) -> bool:
        """Whether a training forward of ``step`` can run now; False: it waits for its step to open.

        Raises:
            RemoteProtocolError: the session is in no position to send it, now or later.
        """
        part = self._ledger.parts.get(session) if self.is_open else None
        if part is not None and step == self.number and part.done is None:
            return True
        # The next step's forward may overtake the end of this one: they travel on two connections.
        ahead = part is not None and step == self.number + 1
        if session in self._enrolled and (ahead or (part is None and step >= self.number)):
            return False
        raise RemoteProtocolError(f"a training forward for step {step}, while step {self.number} is the present one")

    def may_evaluate(self, step: int) -> bool:
        """An evaluation forward that names a step wants the weights after all steps before it."""
        return step <= self.number

    def is_running(self, session: str, step: int) -> bool:
        """Whether ``step`` is open for this session right now."""
        part = self._ledger.parts.get(session) if self.is_open else None
        return part is not None and step == self.number and not part.dropped

    def forward_ran(self, session: str) -> None:
        part = self._ledger.parts.get(session)
        if part is not None:
            part.forwards += 1

    def backward_ran(self, session: str, step: int, targets: int) -> None:
        """Its gradient is in the sum, also when the session vanished meanwhile."""
        part = self._ledger.parts.get(session)
        if step == self._ledger.step and part is not None:
            part.backwards += 1
            part.targets += targets

    def done(self, session: str, message: StepDone) -> None:
        part = self._ledger.parts.get(session) if self.is_open else None
        if part is None or message.step != self.number:
            raise RemoteProtocolError(f"the end of step {message.step}, while step {self.number} is the present one")
        if part.done is not None:
            raise RemoteProtocolError(f"the end of step {message.step} twice")
        if part.forwards > message.forwards or part.backwards > message.backwards:
            raise RemoteProtocolError(f"the end of step {message.step} declares less than was sent")
        if message.backwards > message.forwards:
            raise RemoteProtocolError(f"the end of step {message.step} declares more backwards than forwards")
        part.done = message
        if message.then != "continue":
            self._enrolled.pop(session, None)

    def backwards_left(self, session: str) -> int | None:
        """How many more backwards the session announced for the open step; None while it has not said."""
        part = self._ledger.parts.get(session)
        if part is None or part.done is None:
            return None
        return part.done.backwards - part.backwards

    def close(self) -> Ledger | None:
        """Close the open step if all its parts are finished; returns what it was made of.

        A step that everybody left before anything counted is not closed but opened anew, under the same number.
        """
        if not self.is_open or not all(part.finished for part in self._ledger.parts.values()):
            return None
        ledger = self._ledger
        self.is_open = False
        if ledger.targets == 0 and all(part.dropped or part.done is None for part in ledger.parts.values()):
            self._ledger = Ledger(self.number)
            return None
        self.number += 1
        return ledger
