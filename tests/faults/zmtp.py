"""A TCP stream of ZMTP 3 (ZeroMQ RFC 37) in the pieces it is made of: a greeting of 64 bytes, then frames.

Commands of CURVE and PLAIN are frames like any other, so nothing of what is sealed needs to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Frame", "Splitter"]

_GREETING = 64
_LONG, _COMMAND = 0x02, 0x04


@dataclass(frozen=True)
class Frame:
    """``raw``: as it travels, ``head`` bytes of flags and length first."""

    raw: bytes
    head: int

    @property
    def body(self) -> bytes:
        return self.raw[self.head :]

    @property
    def is_command(self) -> bool:
        """Of the handshake, or ZMTP's own heartbeat."""
        return bool(self.raw[0] & _COMMAND)

    def flipped(self) -> bytes:
        """With one bit of its last byte changed: of a tag, where the frame is sealed."""
        return self.raw[:-1] + bytes([self.raw[-1] ^ 1])


class Splitter:
    """One direction of one connection."""

    def __init__(self) -> None:
        self._greeting = _GREETING
        self._rest = b""

    def take(self, data: bytes) -> list[bytes | Frame]:
        """What has become whole: pieces of the greeting as they come, then frames."""
        pieces: list[bytes | Frame] = []
        if self._greeting:
            greeting, data = data[: self._greeting], data[self._greeting :]
            self._greeting -= len(greeting)
            if greeting:
                pieces.append(greeting)
        self._rest += data
        while (frame := self._next()) is not None:
            pieces.append(frame)
        return pieces

    def _next(self) -> Frame | None:
        rest = self._rest
        head = 0 if not rest else 9 if rest[0] & _LONG else 2
        if not head or len(rest) < head:
            return None
        size = head + int.from_bytes(rest[1:head], "big")
        if len(rest) < size:
            return None
        self._rest = rest[size:]
        return Frame(rest[:size], head)
