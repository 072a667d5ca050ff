"""Decoding: forwards that go on from what the trunk keeps of a client's sequences, many clients' in one batch.

They wait apart from training and evaluation, and each turn of the trunk's thread runs at most one batch of them before anything
else: a token takes milliseconds, and never waits for a step. What is long, a prompt, runs in chunks, each in a batch with the
single tokens of others. A batch is whatever waits: who comes while one runs is in the next (continuous batching: Yu et al.,
"Orca", OSDI 2022), as every row brings its own keys and values, of whatever length.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from server_trunk.gathering import Gathering
from server_trunk.kvcache import CacheBook, CacheFull, Evicted
from server_trunk.meter import Meter
from server_trunk.outlet import Outlet
from server_trunk.pieces import is_out_of_memory, let_go
from server_trunk.transfers import Landing, Mailer
from splitfl.errors import kind_and_line
from splitfl.parts.cached_attention import KeptSequence
from splitfl.protocol.messages import Fault, Forward, Hidden, RefusalCode

__all__ = ["CHUNK_TOKENS", "Decoder", "Decoding", "Run"]

#: Most tokens of one batch: how long a single token may wait for a prompt's next chunk.
CHUNK_TOKENS = 512

#: Most tokens of one segment that count as next tokens, not as a prompt: one, or some that were proposed.
_FEW = 16


@dataclass(slots=True, eq=False)
class Decoding:
    """One forward on its way. ``hidden: (tokens, H)``; of segment ``i`` the first ``ran[i]`` tokens have run."""

    session: str
    client: str
    forward: Forward
    hidden: Any
    arrived: float
    follows: list[KeptSequence] | None = None  # by segment, once its room is reserved
    ran: list[int] = field(init=False)
    out: list[list[Any]] = field(init=False)  # by segment, what has come out
    # What the meter reads, too.
    tokens: int = field(init=False)
    longest: int = field(init=False)
    returned: float | None = None

    def __post_init__(self) -> None:
        self.ran = [0] * len(self.forward.segments)
        self.out = [[] for _ in self.forward.segments]
        self.tokens = self.forward.rows
        self.longest = max(length for length, _ in self.forward.segments)

    @property
    def left(self) -> int:
        """Tokens that have yet to run."""
        return self.tokens - sum(self.ran)

    @property
    def segments(self) -> int:
        return len(self.forward.segments)

    @property
    def is_prompt(self) -> bool:
        return self.longest > _FEW


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` tokens of one segment of a forward, from ``begin`` on in its ``hidden``, the first at position ``start``."""

    of: Decoding
    segment: int
    begin: int
    length: int
    start: int
    follows: KeptSequence


class Computes(Protocol):
    """What a decoder asks of the engine."""

    def decode(self, runs: list[Run]) -> Landing: ...
    def is_lost(self, error: Exception) -> bool: ...


class Decoder:
    """What waits, and what runs next. All in the trunk's thread, save what :class:`Mailer` does."""

    def __init__(
        self,
        engine: Computes,
        book: CacheBook,
        outlet: Outlet,
        mailer: Mailer,
        *,
        payload_of: Callable[[Any], Any],
        may_evaluate: Callable[[int], bool],
        end: Callable[[str, str, str], None],
        log: Callable[..., None],
        meter: Meter,
    ) -> None:
        """``may_evaluate(step)``: whether a forward of that step may see the weights as they are. ``end(session, code, text)``
        ends a session.
        """
        self._engine, self._book, self._outlet, self._mailer = engine, book, outlet, mailer
        self._payload_of, self._may_evaluate, self._end = payload_of, may_evaluate, end
        self._log, self._meter = log, meter
        self._waiting: list[Decoding] = []
        self._gathering = Gathering()

    def take(self, session: str, client: str, forward: Forward, hidden: Any, now: float) -> None:
        """Raises RemoteProtocolError where it is about a sequence that another forward is about."""
        about = self._book.expect(session, forward)
        each = Decoding(session, client, forward, hidden, now)
        self._waiting.append(each)
        self._gathering.came(session, about, now, is_prompt=each.is_prompt)

    def release(self, session: str, numbers: tuple[int, ...]) -> None:
        self._book.release(session, numbers)
        self._gathering.release(session, numbers)

    def forget(self, session: str) -> None:
        """The session is gone, and what waits of it with it."""
        self._waiting = [each for each in self._waiting if each.session != session]
        self._book.forget(session)
        self._gathering.forget(session)

    @property
    def due(self) -> float | None:
        """From when on a batch runs, should nothing come: a clock, perhaps long past; None where none can."""
        ready = [each for each in self._waiting if self._may_run(each)]
        if not ready:
            return None
        if any(each.is_prompt for each in ready):
            return -math.inf
        return self._gathering.until(len(ready), time.monotonic())

    def turn(self) -> None:
        """Run one batch, if one can, due or not."""
        runs = self._choose()
        if runs:
            self._run(runs)

    # --- what runs --------------------------------------------------------------------------------------------------------------

    def _may_run(self, each: Decoding) -> bool:
        # Who has begun has room that others may wait for.
        return each.follows is not None or self._may_evaluate(each.forward.step)

    def _choose(self) -> list[Run]:
        """The next tokens of those that wait: the shortest first, so that nobody's token waits for another's prompt, but always
        something of whoever came first.
        """
        ready = self._begin()
        if not ready:
            return []
        first, *others = ready
        kind = first.forward.adapter_on
        others = sorted((each for each in others if each.forward.adapter_on == kind), key=lambda each: each.left)
        runs = _next_of(first, CHUNK_TOKENS // 2 if others else CHUNK_TOKENS)
        left = CHUNK_TOKENS - sum(run.length for run in runs)
        for each in others:
            more = _next_of(each, left)
            left -= sum(run.length for run in more)
            runs += more
        return runs

    def _begin(self) -> list[Decoding]:
        """Those that have room for what they write, in the order in which they came."""
        for each in list(self._waiting):
            if each.follows is None and self._may_run(each) and not self._reserve(each):
                break  # who comes later does not take the room that it waits for
        return [each for each in self._waiting if each.follows is not None]

    def _reserve(self, each: Decoding) -> bool:
        """Whether it need not wait for room: it has it, or is told why it cannot, and waits no more."""
        try:
            each.follows = self._book.begin(each.session, each.client, each.forward)
        except (Evicted, CacheFull) as error:
            self._drop(each)
            code = RefusalCode.EVICTED if isinstance(error, Evicted) else RefusalCode.CACHE_FULL
            self._outlet.tell(each.session, Fault(code, str(error), False, each.forward.micro))
            self._outlet.credit(each.session, each.forward.payload_bytes)
            return True
        return each.follows is not None

    def _drop(self, each: Decoding) -> None:
        self._waiting.remove(each)
        self._book.give_up(each.session, each.forward)

    # --- compute and reply ------------------------------------------------------------------------------------------------------

    def _run(self, runs: list[Run]) -> None:
        began = time.monotonic()
        try:
            landing = self._engine.decode(runs)
        except Exception as error:
            if self._engine.is_lost(error):
                raise
            self._fail(runs, error)
            return
        done: list[Decoding] = []
        for run in runs:
            run.follows.commit(run.length)
            run.of.ran[run.segment] += run.length
            if not run.of.left and run.of not in done:
                done.append(run.of)
        self._waiting = [each for each in self._waiting if each not in done]
        # Before everything else: its clients wait for it.
        self._mailer.send(landing, functools.partial(self._leave, runs, done, began, landing))
        for each in done:
            self._book.done(each.session, each.forward)
            self._outlet.credit(each.session, each.forward.payload_bytes)
            self._gathering.answered(each.session, min(number for number, _ in each.forward.sequences), time.monotonic())

    def _leave(self, runs: list[Run], done: list[Decoding], began: float, landing: Landing) -> None:
        """Put away what has landed, and send the answers that it makes whole; batches land in order."""
        for run, rows in zip(runs, landing.tensors, strict=True):
            run.of.out[run.segment].append(rows)
        for each in done:
            forward = each.forward
            parts = [part for own in each.out for part in own]
            answer = parts[0] if len(parts) == 1 else torch.cat(parts)
            reply = Hidden(forward.step, forward.micro, forward.rows, forward.hidden, forward.dtype, forward.codec)
            self._outlet.send(each.session, reply, self._payload_of(answer))
        if all(run.length <= _FEW for run in runs):
            self._gathering.took(landing.took())
        if done:
            self._meter.ran("forward", done, began=began, seconds=landing.took())

    def _fail(self, runs: list[Run], error: Exception) -> None:
        """A batch the trunk cannot run: its forwards are tried alone, and whoever fails alone loses its session."""
        let_go(error)  # else it would be held while others run in its place
        if is_out_of_memory(error) and self._book.evict_idle():
            self._run(runs)
            return
        members = list(dict.fromkeys(run.of for run in runs))
        if len(members) > 1:
            for each in members:
                if each in self._waiting:  # else its session has just ended by another of its forwards
                    self._run([run for run in runs if run.of is each])
            return
        (each,) = members
        said = kind_and_line(error)
        self._drop(each)
        self._log("forward-failed", client=each.client, error=said)
        text = f"the trunk cannot decode this ({said}); use fewer or shorter rows, or ask the operator to look at the log"
        self._end(each.session, "batch", text)


def _next_of(each: Decoding, room: int) -> list[Run]:
    """Its next tokens, ``room`` at most."""
    assert each.follows is not None
    runs: list[Run] = []
    begin = 0
    for segment, (length, start) in enumerate(each.forward.segments):
        ran = each.ran[segment]
        taken = min(length - ran, room)
        if taken:
            runs.append(Run(each, segment, begin + ran, taken, start + ran, each.follows[segment]))
            room -= taken
        begin += length
    return runs
