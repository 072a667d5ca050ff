"""How a client ends its session: what is queued leaves first, then it says goodbye and awaits the answer."""

from __future__ import annotations

import time

from splitfl.protocol.messages import Bye, Leave

__all__ = ["Parting"]


class Parting:
    """Each of the two waits is over after ``flush`` seconds. Times are monotonic, seconds."""

    def __init__(self, flush: float) -> None:
        self._flush = flush
        self._leave = False
        self._until: float | None = None  # when the present wait is given up; None: nobody wants to part
        self.has_begun = False  # goodbye is said
        self.is_abandoned = False  # there is nothing to wait for

    def want(self, *, leave: bool) -> None:
        """``leave``: the client does not mean to come again. A second wish changes nothing."""
        if self._until is None:
            self._leave, self._until = leave, time.monotonic() + self._flush

    @property
    def is_wanted(self) -> bool:
        return self._until is not None

    @property
    def is_late(self) -> bool:
        """Whether the present wait is over."""
        return self.is_abandoned or (self._until is not None and time.monotonic() >= self._until)

    def look_again(self, until: float, *, more: bool) -> float:
        """When to look again, at the latest; ``until`` where nobody wants to part. ``more``: something is still to be sent."""
        if self._until is None:
            return until
        # All has left: goodbye comes next, of which nobody wakes the thread.
        return min(until, self._until) if more or self.has_begun else 0.0

    def begin(self, records: int) -> tuple[Leave | Bye, ...]:
        """What is said after ``records`` were sent; now its answer is awaited."""
        self.has_begun, self._until = True, time.monotonic() + self._flush
        return (Leave(), Bye(records)) if self._leave else (Bye(records),)
