"""Whose turn it is: so many requests are written at a time, within the room that the trunk has for this client's caches.

In the order in which they came. A request that grows beyond the room while others grow too waits, save the oldest: else each
would push the others' keys and values out of the trunk, token by token, and all would be sent again and again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Full", "Turn", "Turns"]


class Full(Exception):
    """As many wait as may."""


class Turn:
    """One request's place. ``tokens``: what it has in the trunk now, or will have first."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.waits = False  # amid its answer, for room
        self.is_off = False  # nobody wants it any more


class Turns:
    """``most``: requests at a time; ``room``: tokens of all of them (None: any number); ``line``: how many may wait."""

    def __init__(self, most: int, room: int | None, line: int) -> None:
        self._most, self._room, self._longest_line = most, room, line
        self._changed = threading.Condition()
        self._line: list[Turn] = []
        self._active: list[Turn] = []

    def queue(self, tokens: int) -> Turn:
        """A place at the end of the line. Raises Full."""
        turn = Turn(tokens)
        with self._changed:
            # Who will not have to wait is in nobody's line.
            if len(self._line) + len(self._active) >= self._most + self._longest_line:
                raise Full
            self._line.append(turn)
        return turn

    @contextmanager
    def taken(self, turn: Turn) -> Iterator[bool]:
        """Wait for the turn, and have it within; False: it was called off before."""
        with self._changed:
            self._changed.wait_for(lambda: turn.is_off or self._is_next(turn))
            self._line.remove(turn)
            if not turn.is_off:
                self._active.append(turn)
            self._changed.notify_all()
        try:
            yield not turn.is_off
        finally:
            with self._changed:
                if turn in self._active:
                    self._active.remove(turn)
                self._changed.notify_all()

    def grow(self, turn: Turn, tokens: int) -> bool:
        """It has so many tokens now; returns whether it is still wanted. Waits where there is no room for it."""
        with self._changed:
            turn.tokens = tokens
            if not self._may_go_on(turn):
                turn.waits = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: turn.is_off or self._may_go_on(turn))
                turn.waits = False
                self._changed.notify_all()
            return not turn.is_off

    def call_off(self, turn: Turn) -> None:
        with self._changed:
            turn.is_off = True
            self._changed.notify_all()

    def call_off_all(self) -> None:
        with self._changed:
            for turn in (*self._line, *self._active):
                turn.is_off = True
            self._changed.notify_all()

    def wait_until_idle(self, seconds: float) -> bool:
        """Whether nothing is under way any more."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._line and not self._active, seconds)

    # --- the lock is held -------------------------------------------------------------------------------------------------------

    def _is_next(self, turn: Turn) -> bool:
        if self._line[0] is not turn or len(self._active) >= self._most:
            return False
        return not any(each.waits for each in self._active) and self._has_room(turn)

    def _may_go_on(self, turn: Turn) -> bool:
        older = self._active[: self._active.index(turn)]
        return not older or (not any(each.waits for each in older) and self._has_room(turn))

    def _has_room(self, turn: Turn) -> bool:
        others = [each for each in self._active if each is not turn and not each.waits]
        return self._room is None or not others or sum(each.tokens for each in others) + turn.tokens <= self._room
