"""Connections whose session is over, or that were refused one: each is cut, once its client has had time to hear why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from splitfl.transport.base import Endpoint

__all__ = ["Leaving"]

# Frames that may still come on such a connection until it is cut at once.
_FRAMES = 1024


@dataclass(slots=True)
class _Due:
    at: float
    frames: int = 0


class Leaving:
    """``cut(endpoint, peer)`` ends a connection; ``linger``: seconds until then; ``remembered``: for how long something
    of one that was cut may still be queued, seconds. Used on the I/O thread only.
    """

    def __init__(
        self, cut: Callable[[Endpoint, bytes], None], *, linger: float, remembered: float, clock: Callable[[], float]
    ) -> None:
        self._cut, self._linger, self._remembered, self._clock = cut, linger, remembered, clock
        self._due: dict[tuple[Endpoint, bytes], _Due] = {}
        self._gone: dict[tuple[Endpoint, bytes], float] = {}

    def __contains__(self, connection: tuple[Endpoint, bytes]) -> bool:
        """Whether it is to go and still stands."""
        return connection in self._due

    def is_gone(self, endpoint: Endpoint, peer: bytes) -> bool:
        """Whether it was cut."""
        return (endpoint, peer) in self._gone

    def add(self, endpoint: Endpoint, peer: bytes) -> None:
        """This connection is to go."""
        # One that was cut has had its last word: what still comes of it was queued.
        linger = 0.0 if (endpoint, peer) in self._gone else self._linger
        self._due.setdefault((endpoint, peer), _Due(self._clock() + linger))

    def came(self, endpoint: Endpoint, peer: bytes) -> None:
        """A frame for which there is no session has come on it."""
        self.add(endpoint, peer)
        due = self._due[endpoint, peer]
        due.frames += 1
        if due.frames > _FRAMES:
            self.cut(endpoint, peer)

    def cut(self, endpoint: Endpoint, peer: bytes) -> None:
        """Ends it now."""
        self._due.pop((endpoint, peer), None)
        self._gone[endpoint, peer] = self._clock() + self._remembered
        self._cut(endpoint, peer)

    def tick(self) -> None:
        """Ends those whose time has come."""
        now = self._clock()
        for (endpoint, peer), due in list(self._due.items()):
            if now >= due.at:
                self.cut(endpoint, peer)
        self._gone = {connection: until for connection, until in self._gone.items() if now < until}
