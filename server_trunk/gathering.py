"""Whether a batch of next tokens waits for one more: who decodes comes again soon, and costs little in a batch.

A batch of a few tokens reads all weights, and takes about as long for one token as for eight. Who comes just after it has begun
waits for its end, and then is a batch of its own. So a batch may wait while that shortens what all wait together: ``m`` that are
here lose ``t`` each, who comes at ``t`` gains ``S - t`` of a batch of ``S`` seconds; that pays while ``t < S / (m + 1)``. When
each comes is learnt from how long its session took before, from an answer to the next tokens behind it. Nobody waits for what is
not expected by then: one alone, or beside one behind a slow link, is run at once. A session may decode several at a time, as a
proxy does, so what is expected goes by sequence too.

Where more are expected within a batch's time than are here, batches follow one another without a pause, and all wait for the
trunk. Then what counts is how many it serves at a time: it waits for half a batch after each that comes, until half are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

__all__ = ["Gathering"]

#: How much the newest time weighs in what is expected of the next.
_NEWEST = 0.25
#: Seconds after which whoever comes has paused, which says nothing of its next token.
_PAUSE = 1.0
#: Of one session: the most answers behind which something is expected.
_MOST = 256


class Gathering:
    """Clocks as of ``time.monotonic``. Called from the trunk's thread, save :meth:`took`."""

    def __init__(self) -> None:
        self._batch = 0.0  # seconds of a batch, as is to be expected
        self._since = -math.inf  # when last one came, or a batch ended
        self._answered: dict[str, dict[int, float]] = {}  # by session and sequence: the clock, the oldest first
        self._gaps: dict[str, float] = {}  # by session: seconds from an answer to what is sent next

    def came(self, session: str, sequences: Iterable[int], at: float, *, is_prompt: bool = False) -> None:
        """A forward of the session about these sequences has come. Of a prompt nothing is learnt."""
        self._since = max(self._since, at)
        answers = self._take_answers(session, sequences)
        gap = max(at - max(answers), 0.0) if answers else math.inf
        if gap < _PAUSE and not is_prompt:
            self._gaps[session] = _smoothed(self._gaps.get(session), gap)

    def answered(self, session: str, sequence: int, at: float) -> None:
        """The answer of a forward is on its way; ``sequence``: one of those that it wrote."""
        self._since = max(self._since, at)
        own = self._answered.setdefault(session, {})
        own[sequence] = at
        if len(own) > _MOST:
            del own[next(iter(own))]

    def release(self, session: str, sequences: Iterable[int]) -> None:
        """Nothing will come behind these."""
        self._take_answers(session, sequences)

    def took(self, seconds: float) -> None:
        """A batch of next tokens has run. From any thread."""
        self._batch = _smoothed(self._batch or None, seconds)

    def forget(self, session: str) -> None:
        self._answered.pop(session, None)
        self._gaps.pop(session, None)

    def until(self, waiting: int, now: float) -> float:
        """Until when a batch of so many forwards should wait, should none come: ``-inf`` where it should not."""
        soon, first = 0, math.inf
        for clock in self._expected(now):
            soon += clock <= self._since + self._batch
            first = min(first, clock)
        crowded = soon > waiting
        limit = self._since + self._batch / (2 if crowded else waiting + 1)
        return limit if crowded or first <= limit else -math.inf

    def _expected(self, now: float) -> Iterator[float]:
        """When each comes that is expected. What says nothing of that any more is dropped on the way."""
        for session, own in self._answered.items():
            gap = self._gaps.get(session, 0.0)
            # Nothing is learnt from it any more, nor will be expected behind it, the oldest: what is learnt is less than a pause.
            while own and now >= own[oldest := next(iter(own))] + 2 * max(gap, _PAUSE):
                del own[oldest]
            # What is late by as much again is not to come.
            yield from (answered + gap for answered in own.values() if now < answered + 2 * gap)

    def _take_answers(self, session: str, sequences: Iterable[int]) -> list[float]:
        """The clocks of answers behind which nothing is expected any more."""
        own = self._answered.get(session, {})
        return [own.pop(sequence) for sequence in sequences if sequence in own]


def _smoothed(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
