"""What a peer says it has sent against what has come: a frame that was lost on its way is noticed, not waited for.

A record that is missing shows in the next one's number, and a control frame that comes twice in CURVE's own; but after the last
record, and on the control connection, nothing follows that would show it. So each heartbeat carries both counts.
"""

from __future__ import annotations

from splitfl.errors import SealError
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

    def check(self, heartbeat: Heartbeat, records: int, now: float) -> None:
        """``records``: how many have come; ``now``: the caller's clock, seconds. ``heard`` counts this heartbeat already.

        Raises SealError where something was lost on its way.
        """
        if heartbeat.control and heartbeat.control != self.heard - 1:
            raise SealError(f"{heartbeat.control} control messages were sent, {self.heard - 1} have come")
        if heartbeat.records <= records or records != self._records:
            self._records, self._since = records, now
        elif now - self._since >= self._overdue:
            raise SealError(f"{heartbeat.records} records were sent, {records} have come, and no more for {self._overdue:g} s")
