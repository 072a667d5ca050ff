"""A batch that has begun: its pieces run in the engine's lanes, its end is the business of the thread that began it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

__all__ = ["Underway", "done", "failed"]

T = TypeVar("T")


class Underway(Generic[T]):
    """``pieces``: what runs of it; ``finish``: what makes its results of theirs."""

    def __init__(self, pieces: Sequence[Future[Any]], finish: Callable[[], T]) -> None:
        self._pieces, self._finish = pieces, finish

    @property
    def is_done(self) -> bool:
        """Whether :meth:`result` would wait for nothing."""
        return all(piece.done() for piece in self._pieces)

    def result(self) -> T:
        """Its results, once all of it has run. To be asked for once. Raises what it failed with."""
        finish = self._finish
        del self._finish, self._pieces  # they hold what it has computed, and this may be held for longer
        return finish()


def done(result: T) -> Future[T]:
    """A piece that has run already."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


def failed(error: Exception) -> Future[Any]:
    """A piece that has failed already."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
