"""Whose rows a trunk is running on: told to the modules inside it that treat clients apart.

The hidden state a block sees says nothing of where its rows come from. Dropout whose masks are keyed, an adapter a client, and
attention over packed rows need to know; they look it up here. A context variable, not an attribute of the model: several threads
may run one trunk, each on rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Rows", "current_rows", "running_on"]


@dataclass(frozen=True)
class Rows:
    """The segments of one run of the trunk, in the order of its rows.

    ``wire``: (length, start) of each segment. ``packed``: the trunk sees ``(1, tokens, H)``, all segments behind one another;
    else ``(S, Tmax, H)``, a segment a row, padded on the right. ``owners``: for each segment, the client it belongs to, whose
    adapter it takes where each client has its own ("": none; no owners at all: none anywhere). ``keys``: for each segment, what
    its dropout masks are keyed by; None where nothing is dropped. ``past``: in decoding, for each segment, what it follows
    (:class:`splitfl.parts.cached_attention.KeptSequence`).
    """

    wire: tuple[tuple[int, int], ...]
    packed: bool
    owners: tuple[str, ...] = ()
    keys: tuple[bytes, ...] | None = None
    past: tuple[Any, ...] | None = None

    @property
    def tokens(self) -> int:
        return sum(length for length, _ in self.wire)

    @cached_property
    def longest(self) -> int:
        return max((length for length, _ in self.wire), default=0)

    @cached_property
    def runs(self) -> tuple[tuple[str, int, int], ...]:
        """``(owner, begin, end)`` of neighbouring rows with one owner, in the tensor as rows one after another, pads included."""
        runs: list[tuple[str, int, int]] = []
        end = 0
        for owner, (length, _) in zip(self.owners, self.wire, strict=True) if self.owners else ():
            begin, end = end, end + (length if self.packed else self.longest)
            if runs and runs[-1][0] == owner:
                begin = runs.pop()[1]
            runs.append((owner, begin, end))
        return tuple(runs)


_current: ContextVar[Rows | None] = ContextVar("splitfl_rows", default=None)


def current_rows() -> Rows | None:
    """The rows the calling thread's trunk is running on; None outside a run."""
    return _current.get()


@contextmanager
def running_on(rows: Rows) -> Iterator[None]:
    """Inside, :func:`current_rows` is ``rows``. Wraps a run of the trunk, and wraps it again when it is recomputed."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)
