"""What clients' sequences keep on every rank: each rank its own heads' keys and values, or all of them where heads are whole.

The leader's book decides what is kept. Whatever becomes of a sequence there is noted, in order, and goes along with the next
command; the followers do the same to theirs before they run it.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from splitfl.parts.cached_attention import KeptSequence

__all__ = ["FollowedSequences", "LedSequence", "Notes"]


class Notes:
    """What became of the leader's sequences since the last command. Sequences may be dropped in any thread."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self._notes: deque[tuple[Any, ...]] = deque()

    def add(self, *note: Any) -> None:
        self._notes.append(note)

    def take(self) -> list[tuple[Any, ...]]:
        return [self._notes.popleft() for _ in range(len(self._notes))]


class LedSequence(KeptSequence):
    """One of the leader's, known to all ranks by its ``number``."""

    __slots__ = ("__weakref__", "_notes", "number")

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes, self.number = notes, next(notes.numbers)
        weakref.finalize(self, notes.add, "drop", self.number).atexit = False

    def commit(self, tokens: int) -> None:
        super().commit(tokens)
        self._notes.add("commit", self.number, tokens)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._notes.add("truncate", self.number, length)

    def copy(self, length: int) -> LedSequence:
        twin = LedSequence(self._notes)
        twin.begin_as(self, length)
        self._notes.add("copy", twin.number, self.number, length)
        return twin


class FollowedSequences:
    """A follower's, by number."""

    def __init__(self) -> None:
        self._held: dict[int, KeptSequence] = {}

    def __getitem__(self, number: int) -> KeptSequence:
        return self._held.setdefault(number, KeptSequence())

    def __len__(self) -> int:
        return len(self._held)

    def follow(self, notes: Iterable[Any]) -> None:
        """Do what the leader has done."""
        for what, number, *about in notes:
            match what:
                case "commit":
                    self[number].commit(*about)
                case "truncate":
                    self[number].truncate(*about)
                case "copy":
                    self._held[number] = self[about[0]].copy(about[1])
                case "drop":
                    self._held.pop(number, None)
