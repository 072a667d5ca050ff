"""What a peer says it has sent against what has come: a frame that was lost on its way is noticed, not waited for.

A record that is missing shows in the next one's number, and a control frame that comes twice in CURVE's own; but after the last
record, and on the control connection, nothing follows that would show it. So each heartbeat carries both counts.

What does follow on a control frame that was lost is a message that the session's state has no place for. Whether one was lost, or
the peer broke the protocol, the next heartbeat tells.
"""

from __future__ import annotations

from splitfl.errors import OutOfTurn, SealError
from splitfl.protocol.messages import Heartbeat

__all__ = ["Tally"]


class Tally:
    """Counts of one direction. ``heard``: control messages that have come; one connection carries them in order, so at a
    heartbeat the number is exact. Records travel on another, and may still be under way.
    """

    def __init__(self, overdue: float) -> None:
        """``overdue``: seconds without any record after which those that are owed count as lost."""
        self.heard = 0
        self._overdue = overdue
        self._records, self._since = -1, 0.0  # how many had come, and since when no more have
        self._says = False  # whether the peer's heartbeats say what it has sent
        self._doubted: tuple[OutOfTurn, float] | None = None  # the first message out of turn, and when it came

    def doubt(self, error: OutOfTurn, now: float) -> None:
        """A message came out of turn. Raises ``error`` where no heartbeat will tell whether one before it was lost."""
        if not self._says:
            raise error
        self._doubted = self._doubted or (error, now)

    @property
    def is_in_doubt(self) -> bool:
        """Whether what comes is passed over until the next heartbeat."""
        return self._doubted is not None

    def check_doubt(self, now: float, seconds: float) -> None:
        """Raises OutOfTurn where the heartbeat that would tell has not come for so long."""
        if self._doubted is not None and now - self._doubted[1] >= seconds:
            raise self._doubted[0]

    def check(self, heartbeat: Heartbeat, records: int, now: float) -> None:
        """``records``: how many have come; ``now``: the caller's clock, seconds. ``heard`` counts this heartbeat already.

        Raises SealError where something was lost on its way; OutOfTurn where nothing was and a message came out of turn.
        """
        self._says = heartbeat.control > 0
        if heartbeat.control and heartbeat.control != self.heard - 1:
            raise SealError(f"{heartbeat.control} control messages were sent, {self.heard - 1} have come")
        if heartbeat.records <= records or records != self._records:
            self._records, self._since = records, now
        elif now - self._since >= self._overdue:
            raise SealError(f"{heartbeat.records} records were sent, {records} have come, and no more for {self._overdue:g} s")
        if self._doubted is not None:
            raise self._doubted[0]
