"""A cipher that seals nothing, so that whoever searches is not stopped by a tag that nobody can guess."""

from __future__ import annotations

from typing import Any

from splitfl.protocol.records import RECORD_VERSION

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


def record(sequence: int, said: bytes) -> bytes:
    """A frame of the number that is expected. ``said``: kind, flags, message, total (four bytes), then the plaintext."""
    said = said.ljust(7, b"\0")
    header = bytes([RECORD_VERSION, said[0], said[1], 0]) + bytes(4) + sequence.to_bytes(8, "big")
    header += said[2].to_bytes(8, "big") + int.from_bytes(said[3:7], "big").to_bytes(8, "big")
    return header + said[7:] + _TAG
