"""Which code an input reaches, and the fewest short inputs that together reach all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

__all__ = ["chosen", "reached"]

_PACKAGES = ("splitfl", "server_trunk")

Arc = tuple[str, int, int]


def reached(run: Callable[[bytes], None], data: bytes) -> set[Arc]:
    """The pairs of lines of this program that ``run(data)`` goes from and to."""
    arcs: set[Arc] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(_PACKAGES):
            return None
        name, last = frame.f_code.co_filename, [0]

        def local(frame: FrameType, event: str, _: Any) -> Any:
            if event in ("line", "return"):
                now = frame.f_lineno if event == "line" else -1
                arcs.add((name, last[0], now))
                last[0] = now
            return local

        return local

    sys.settrace(trace)
    try:
        run(data)
    finally:
        sys.settrace(None)
    return arcs


def chosen(run: Callable[[bytes], None], inputs: Sequence[bytes]) -> list[bytes]:
    """Of ``inputs``, shortest first, those that reach what none before them reached."""
    kept: list[bytes] = []
    seen: set[Arc] = set()
    for data in sorted(set(inputs), key=lambda each: (len(each), each)):
        arcs = reached(run, data)
        if not arcs <= seen:
            seen |= arcs
            kept.append(data)
    return kept
