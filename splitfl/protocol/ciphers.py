"""The two AEADs of the record layer, and which one this machine should prefer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from splitfl.errors import LocalProtocolError

Buffer = bytes | bytearray | memoryview

KEY_BYTES = 32
IV_BYTES = 12
TAG_BYTES = 16

AES_256_GCM = "aes-256-gcm"
CHACHA20_POLY1305 = "chacha20-poly1305"


class Aead(Protocol):
    """What the record layer needs of a cipher. Buffers are written in place and have exactly the right size."""

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer, /) -> int: ...

    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer, /) -> int: ...


# (bytes) -> memory for one frame, writable; what it holds does not matter.
MakeFrame = Callable[[int], bytearray | memoryview]

# (cipher name, key) -> the cipher. The seam by which a benchmark or the demo runs with sealing off; no setting reaches
# it.
AeadFactory = Callable[[str, bytes], Aead]

CIPHERS: dict[str, Callable[[bytes], Aead]] = {AES_256_GCM: AESGCM, CHACHA20_POLY1305: ChaCha20Poly1305}


def make_aead(name: str, key: bytes) -> Aead:
    """The named cipher with this key. Raises LocalProtocolError for a name that is no cipher of the protocol."""
    if name not in CIPHERS:
        raise LocalProtocolError(f"no cipher {name!r}")
    return CIPHERS[name](key)


def pick_ciphers(clock: Callable[[], float] = time.perf_counter) -> tuple[str, ...]:
    """The ciphers this machine offers, the fastest first: without AES in hardware ChaCha20-Poly1305 is several times
    faster.

    AES stays first unless it is clearly slower, so that noise in the timing does not flip the choice.
    """
    data, frame = bytes(256 * 1024), bytearray(256 * 1024 + TAG_BYTES)
    seconds: dict[str, float] = {}
    for name in CIPHERS:
        aead = make_aead(name, os.urandom(KEY_BYTES))
        best = float("inf")
        for number in range(3):
            start = clock()
            aead.encrypt_into(number.to_bytes(IV_BYTES, "big"), data, None, frame)
            best = min(best, clock() - start)
        seconds[name] = best
    if seconds[AES_256_GCM] <= 1.25 * seconds[CHACHA20_POLY1305]:
        return (AES_256_GCM, CHACHA20_POLY1305)
    return (CHACHA20_POLY1305, AES_256_GCM)


def choose_cipher(offered: Sequence[str], own: Sequence[str]) -> str | None:
    """The server's choice among the ciphers of both, each side's fastest first: what both prefer, else ChaCha20-Poly1305. Who
    prefers that has no AES in hardware, and would be slowed down by far more than the other side is by ChaCha20.
    """
    common = [name for name in offered if name in own and name in CIPHERS]
    theirs, ours = common[:1], [name for name in own if name in common][:1]
    if theirs != ours:
        return CHACHA20_POLY1305
    return theirs[0] if theirs else None
