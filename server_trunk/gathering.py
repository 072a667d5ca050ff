"""Whether a batch of next tokens waits for one more: who decodes comes again soon, and costs little in a batch.

A batch of a few tokens reads all weights, and takes about as long for one token as for eight. Who comes just after it has begun
waits for its end, and then is a batch of its own. So a batch may wait while that shortens what all wait together: ``m`` that are
here lose ``t`` each, who comes at ``t`` gains ``S - t`` of a batch of ``S`` seconds; that pays while ``t < S / (m + 1)``. When
each comes is learnt from how long it took before, from its answer to its next token. Nobody waits for a client that is not
expected by then: one alone, or beside one behind a slow link, is run at once.

Where more are expected within a batch's time than are here, batches follow one another without a pause, and all wait for the
trunk. Then what counts is how many it serves at a time: it waits for half a batch after each that comes, until half are here.
"""

from __future__ import annotations

import math
from collections.abc import Collection

__all__ = ["Gathering"]

#: How much the newest time weighs in what is expected of the next.
_NEWEST = 0.25


class Gathering:
    """Clocks as of ``time.monotonic``. Called from the trunk's thread, save :meth:`took`."""

    def __init__(self) -> None:
        self._batch = 0.0  # seconds of a batch, as is to be expected
        self._since = -math.inf  # when last one came, or a batch ended
        self._answered: dict[str, float] = {}  # by session that is expected again
        self._gaps: dict[str, float] = {}  # by session: seconds from its answer to what it sends next

    def came(self, session: str, at: float) -> None:
        """A forward of the session has come."""
        self._since = max(self._since, at)
        answered = self._answered.pop(session, None)
        if answered is not None:
            self._gaps[session] = _smoothed(self._gaps.get(session), max(at - answered, 0.0))

    def answered(self, session: str, at: float) -> None:
        """Its answer is on its way."""
        self._since = max(self._since, at)
        self._answered[session] = at

    def took(self, seconds: float) -> None:
        """A batch of next tokens has run. From any thread."""
        self._batch = _smoothed(self._batch or None, seconds)

    def forget(self, session: str) -> None:
        self._answered.pop(session, None)
        self._gaps.pop(session, None)

    def until(self, waiting: Collection[str], now: float) -> float:
        """Until when a batch of what these sessions sent should wait, should nobody come: ``-inf`` where it should not."""
        expected = [
            answered + self._gaps[session]
            for session, answered in self._answered.items()
            # Who is late by as much again is about something else.
            if session not in waiting and session in self._gaps and now < answered + 2 * self._gaps[session]
        ]
        crowded = sum(clock <= self._since + self._batch for clock in expected) > len(waiting)
        limit = self._since + self._batch / (2 if crowded else len(waiting) + 1)
        return limit if crowded or any(clock <= limit for clock in expected) else -math.inf


def _smoothed(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
