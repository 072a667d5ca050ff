"""Records: one frame = 32-byte header || ciphertext || 16-byte tag. The header is the associated data; nonce = IV xor
sequence.

Header, big-endian: version u8, kind u8, flags u8, zero u8, epoch u32, sequence u64, message id u64, payload length u64.
Only the expected sequence number is accepted, so a record can be neither dropped, replayed nor reordered; the first
failure ends the session. Keys change with the epoch: after 64 GiB, 2^24 records or one hour.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidTag

from splitfl.errors import LocalProtocolError, SealError
from splitfl.protocol.ciphers import TAG_BYTES, AeadFactory, Buffer, MakeFrame, make_aead
from splitfl.protocol.schedule import key_and_iv, next_secret

_HEADER = struct.Struct(">BBBBIQQQ")
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = HEADER_BYTES + TAG_BYTES

# The form of a record, which newer versions of the protocol have left as it was.
RECORD_VERSION = 1

METADATA = 1  # the first record of a message: msgpack
PAYLOAD = 2

FIRST = 1
LAST = 2
JOINED = 4  # of metadata: the first payload record of its message follows in the same frame
_KINDS, _FLAGS = frozenset({METADATA, PAYLOAD}), FIRST | LAST | JOINED

DEFAULT_RECORD_BYTES = 2**20
MIN_RECORD_BYTES = 256 * 1024
MAX_RECORD_BYTES = 4 * 2**20


@dataclass(frozen=True)
class RekeyLimits:
    """When the sender moves to the next epoch, whichever comes first."""

    bytes: int = 64 * 2**30
    records: int = 2**24
    seconds: float = 3600.0


class Header(NamedTuple):
    """A record's header; ``total`` is the payload length of the message it belongs to, bytes."""

    kind: int
    flags: int
    epoch: int
    sequence: int
    message: int
    total: int


class _Epoch:
    """One direction's current key."""

    def __init__(self, secret: bytes, cipher: str, aead_factory: AeadFactory) -> None:
        self.secret, self.cipher, self.aead_factory = secret, cipher, aead_factory
        self.number = 0
        self._derive()

    def advance(self) -> None:
        self.secret = next_secret(self.secret)
        self.number += 1
        self._derive()

    def _derive(self) -> None:
        key, iv = key_and_iv(self.secret)
        self.aead = self.aead_factory(self.cipher, key)
        self._iv = int.from_bytes(iv, "big")

    def nonce(self, sequence: int) -> bytes:
        return (self._iv ^ sequence).to_bytes(12, "big")


class Sealer:
    """Seals one direction's records. Not thread-safe: the sequence is the order on the wire."""

    def __init__(
        self,
        secret: bytes,
        cipher: str,
        *,
        limits: RekeyLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        aead_factory: AeadFactory = make_aead,
        make_frame: MakeFrame = bytearray,
    ) -> None:
        self._epoch = _Epoch(secret, cipher, aead_factory)
        self.make_frame = make_frame
        self._limits = limits or RekeyLimits()
        self._clock = clock
        self._sequence = 0
        self._begin_epoch()

    @property
    def records(self) -> int:
        """How many records have been sealed."""
        return self._sequence

    def _begin_epoch(self) -> None:
        self._bytes, self._records, self._since = 0, 0, self._clock()

    def seal(self, kind: int, flags: int, message: int, total: int, plaintext: Buffer) -> bytearray | memoryview:
        """One frame, sealed straight from ``plaintext``."""
        frame = self.make_frame(len(plaintext) + OVERHEAD_BYTES)
        self.seal_into(memoryview(frame), kind, flags, message, total, plaintext)
        return frame

    def seal_into(self, view: memoryview, kind: int, flags: int, message: int, total: int, plaintext: Buffer) -> None:
        """One record into ``view``, which is as long as the record."""
        size = len(plaintext)
        limits = self._limits
        if (
            self._records >= limits.records or self._bytes + size > limits.bytes or self._clock() - self._since >= limits.seconds
        ) and self._records:
            self._epoch.advance()
            self._begin_epoch()
        if self._sequence >= 2**63 or self._epoch.number >= 2**32 - 1:
            raise LocalProtocolError("the session is worn out: open another")
        header = _HEADER.pack(RECORD_VERSION, kind, flags, 0, self._epoch.number, self._sequence, message, total)
        nonce = self._epoch.nonce(self._sequence)
        view[:HEADER_BYTES] = header
        self._epoch.aead.encrypt_into(nonce, plaintext, header, view[HEADER_BYTES:])
        self._sequence += 1
        self._records += 1
        self._bytes += size


class Opener:
    """Opens the other direction's records. After the first SealError every further call raises it again."""

    def __init__(self, secret: bytes, cipher: str, *, aead_factory: AeadFactory = make_aead) -> None:
        self._epoch = _Epoch(secret, cipher, aead_factory)
        self._sequence = 0
        self._failed = False

    @property
    def records(self) -> int:
        """How many records have been opened."""
        return self._sequence

    def header(self, frame: Buffer) -> Header:
        """Checks everything about the header that needs no key. The result may be acted on only after
        :meth:`open_into`, save for choosing where to decrypt to.
        """
        if self._failed:
            raise SealError("the session ended with a record that did not verify")
        if len(frame) < OVERHEAD_BYTES:
            raise self._fail(f"a record of {len(frame)} bytes")
        version, kind, flags, zero, epoch, sequence, message, total = _HEADER.unpack_from(frame)
        if version != RECORD_VERSION or zero or kind not in _KINDS or flags & ~_FLAGS:
            raise self._fail("a record with a malformed header")
        if sequence != self._sequence:
            raise self._fail(f"record {sequence} where {self._sequence} was expected")
        if not 0 <= epoch - self._epoch.number <= 1:
            raise self._fail(f"a record of epoch {epoch} in epoch {self._epoch.number}")
        return Header(kind, flags, epoch, sequence, message, total)

    def open_into(self, header: Header, frame: Buffer, destination: Buffer) -> None:
        """Decrypts ``frame``, whose header was just checked, into ``destination`` (exactly the plaintext's size).

        On failure ``destination`` holds unverified bytes: the caller must not release them. Raises SealError.
        """
        if header.epoch != self._epoch.number:
            self._epoch.advance()
        view = memoryview(frame)
        nonce = self._epoch.nonce(header.sequence)
        try:
            self._epoch.aead.decrypt_into(nonce, view[HEADER_BYTES:], view[:HEADER_BYTES], destination)
        except InvalidTag:
            raise self._fail(f"record {header.sequence} does not verify") from None
        self._sequence += 1

    def fail(self, text: str) -> SealError:
        """Marks the direction as ended (a record that verified, yet breaks the rules of messages); returns the
        error.
        """
        return self._fail(text)

    def _fail(self, text: str) -> SealError:
        self._failed = True
        return SealError(text)
