"""Requests under way: each is written in a thread, and heard of from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from client_ends.proxy.pieces import Piece
from client_ends.proxy.problems import ApiError
from client_ends.proxy.turns import Full, Turn, Turns
from client_ends.proxy.writing import Order, Writer
from splitfl.errors import CacheLost, ChannelError, UserError

__all__ = ["Desk", "Job", "log_failure"]


class Job:
    """One request. Made by :meth:`Desk.job`."""

    def __init__(self, turn: Turn) -> None:
        self._turn, self._loop = turn, asyncio.get_running_loop()
        self._told: asyncio.Queue[Piece | ApiError | None] = asyncio.Queue()

    def tell(self, what: Piece | ApiError | None) -> None:
        """From the thread that writes; None: it has ended."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, with all who listened
            self._loop.call_soon_threadsafe(self._told.put_nowait, what)

    async def pieces(self) -> AsyncIterator[Piece]:
        """As they come. Raises ApiError."""
        while (what := await self._told.get()) is not None:
            if isinstance(what, ApiError):
                raise what
            yield what
        if self._turn.is_off:
            raise ApiError(503, "the proxy is about to end", code="closing")


class Desk:
    """Gives out turns, and threads for them. ``session`` is the model's with the trunk."""

    def __init__(self, writer: Writer, turns: Turns, session: Any) -> None:
        self._writer, self._turns, self._session = writer, turns, session
        self._closing = False

    def check(self) -> None:
        """Raises ApiError where nothing can be written now."""
        if self._closing:
            raise ApiError(503, "the proxy is about to end", code="closing")
        if not self._session.is_up:
            raise ApiError(503, "the link to the trunk is down, and tried to be had again: ask again soon", code="trunk_away")

    @contextlib.contextmanager
    def job(self, order: Order) -> Iterator[Job]:
        """Have it written; whoever leaves wants no more of it. Raises ApiError."""
        self.check()
        try:
            turn = self._turns.queue(order.tokens)
        except Full:
            raise ApiError(429, "as many requests wait as may: ask again soon", code="queue_full") from None
        job = Job(turn)
        threading.Thread(target=self._work, args=(order, job, turn), name="splitfl-proxy", daemon=True).start()
        try:
            yield job
        finally:
            self._turns.call_off(turn)

    def close(self) -> None:
        """What is under way is broken off."""
        self._closing = True
        self._turns.call_off_all()

    def wait_until_idle(self, seconds: float) -> bool:
        return self._turns.wait_until_idle(seconds)

    def _work(self, order: Order, job: Job, turn: Turn) -> None:
        try:
            with self._turns.taken(turn) as wanted:
                if wanted:
                    self._writer.write(order, tell=job.tell, on_step=lambda tokens: self._turns.grow(turn, tokens))
        except Exception as error:
            job.tell(_problem(error))
        else:
            job.tell(None)


def _problem(error: Exception) -> ApiError:
    """What whoever asked is told."""
    if isinstance(error, CacheLost):
        return ApiError(503, "the trunk has no room for this beside what others write: ask again later", code="trunk_busy")
    if isinstance(error, ChannelError):
        return ApiError(503, f"the trunk is away: {error}", code="trunk_away")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    log_failure(error)
    return ApiError(500, f"this request could not be answered: {type(error).__name__}: {error}", code="internal_error")


def log_failure(error: BaseException) -> None:
    """One line for the operator of the proxy: where, and not what was asked, which the words of an error may repeat."""
    place, trace = "", error.__traceback__
    while trace is not None:
        place, trace = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}", trace.tb_next
    print(f"splitfl proxy: a request has failed: {type(error).__name__} at {place}", file=sys.stderr, flush=True)
