"""One input as several pieces: frames of a session, in order. Each has its length before it, two bytes."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["joined", "split"]

#: More would only repeat what fewer do.
MOST = 24


def split(data: bytes) -> list[bytes]:
    """Any bytes are pieces: a length that reaches beyond the end ends there."""
    pieces: list[bytes] = []
    at = 0
    while at + 2 <= len(data) and len(pieces) < MOST:
        size = int.from_bytes(data[at : at + 2], "big")
        pieces.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return pieces


def joined(pieces: Iterable[bytes]) -> bytes:
    """The inverse, of pieces under 64 KiB."""
    return b"".join(len(piece).to_bytes(2, "big") + piece for piece in pieces)
