"""A cipher that seals nothing, so that whoever searches is not stopped by a tag that nobody can guess."""

from __future__ import annotations

from typing import Any

from splitfl.protocol.records import JOINED, LAST, METADATA, PAYLOAD, RECORD_VERSION

__all__ = ["NullAead", "null_aead", "record"]

_TAG = bytes(16)


class NullAead:
    def encrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any, /) -> int:
        buf[: len(data)] = data
        buf[len(data) :] = _TAG
        return len(buf)

    def decrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any, /) -> int:
        buf[:] = data[:-16]
        return len(buf)


def null_aead(name: str, key: bytes) -> NullAead:
    return NullAead()


def record(sequence: int, said: bytes, record_bytes: int) -> bytes:
    """A frame of the number that is expected. ``said``: kind, flags, message, total (four bytes), then the plaintext. Where the
    flags say that a payload record is joined, its plaintext are the last bytes, as many as it is to have; the upper halves of
    kind and flags change its flags and its message.
    """
    said = said.ljust(7, b"\0")
    kind, flags, number, total = said[0], said[1], said[2], int.from_bytes(said[3:7], "big")
    if kind & 15 != METADATA or not flags & JOINED:
        return _record(sequence, kind, flags, number, total, said[7:])
    cut = max(7, len(said) - min(record_bytes, total))
    last = LAST if total <= record_bytes else 0
    metadata = _record(sequence, METADATA, flags & 15, number, total, said[7:cut])
    return metadata + _record(sequence + 1, PAYLOAD, last ^ kind >> 4, number ^ flags >> 4, total, said[cut:])


def _record(sequence: int, kind: int, flags: int, number: int, total: int, plaintext: bytes) -> bytes:
    header = bytes([RECORD_VERSION, kind, flags, 0]) + bytes(4) + sequence.to_bytes(8, "big")
    return header + number.to_bytes(8, "big") + total.to_bytes(8, "big") + plaintext + _TAG
