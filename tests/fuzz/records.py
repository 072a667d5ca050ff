"""Records, and messages from records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from splitfl.errors import RemoteProtocolError, SealError
from splitfl.protocol.assembly import MAX_OPEN, Inbox
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.messages import DataMessage, decode_data
from splitfl.protocol.records import FIRST, JOINED, LAST, METADATA, OVERHEAD_BYTES, PAYLOAD, Opener, Sealer
from tests.fuzz.nullcipher import null_aead, record
from tests.fuzz.pieces import split
from tests.fuzz.sentences import check_sentence

__all__ = ["Reader", "assembly", "records"]

SECRET = bytes(range(32))
RECORD, WINDOW, LARGEST = 64, 1024, 512


class Reader:
    """An inbox that counts what it is given."""

    def __init__(self, opener: Opener, *, from_client: bool = True, record_bytes: int = RECORD, largest: int = LARGEST) -> None:
        self.account = CreditAccount(WINDOW)
        self.allocated = 0
        self.admitted: list[DataMessage] = []
        self.inbox = Inbox(
            opener,
            from_client=from_client,
            record_bytes=record_bytes,
            max_message=largest,
            allocate=self._allocate,
            admit=self.admitted.append,
            charge=self.account.charge if from_client else None,
        )

    def _allocate(self, message: DataMessage) -> tuple[Any, memoryview]:
        self.allocated += message.payload_bytes
        assert message.payload_bytes <= LARGEST
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)


def records(data: bytes) -> None:
    """Frames as they come. The first byte of each says whether its number is put right."""
    try:
        opener = Opener(SECRET, AES_256_GCM)
        opener.open_into(opener.header(data), data, bytearray(max(0, len(data) - OVERHEAD_BYTES)))
    except SealError as error:
        check_sentence(error)
    else:
        raise AssertionError("a record that nobody sealed")
    reader = Reader(Opener(SECRET, AES_256_GCM, aead_factory=null_aead))
    for piece in split(data):
        frame = piece[1:] if piece[:1] != b"\1" else record(reader.inbox.records, piece[1:], RECORD)
        try:
            done = reader.inbox.receive(frame)
        except RemoteProtocolError as error:
            check_sentence(error)
            break
        if done is not None:
            message, payload = done
            assert len(payload or b"") == message.payload_bytes
        assert reader.allocated <= WINDOW


@dataclass
class _Open:
    message: DataMessage
    said: bytearray
    left: int


def assembly(data: bytes) -> None:
    """A peer that has the keys says what it likes; what is handed out is held against section 4 of PROTOCOL.md, written anew."""
    sealer, reader = Sealer(SECRET, AES_256_GCM), Reader(Opener(SECRET, AES_256_GCM))
    open_: dict[int, _Open] = {}
    begun = 0
    for piece in split(data):
        head = piece[:5].ljust(5, b"\0")
        kind, flags, number, total = head[0] % 4, head[1] % 8, head[2], int.from_bytes(head[3:5], "big")
        said = [_Said(kind, flags, number, total, piece[5:])]
        if kind == METADATA and flags & JOINED:
            # The last bytes are the payload's; the upper halves of kind and flags spoil its flags and its message.
            cut = max(5, len(piece) - min(RECORD, total))
            last = LAST if total <= RECORD else 0
            said = [
                _Said(kind, flags, number, total, piece[5:cut]),
                _Said(PAYLOAD, last ^ (head[0] >> 4) % 8, number ^ head[1] >> 4, total, piece[cut:]),
            ]
        try:
            expected = _expected_of(open_, begun, said, reader.account.left)
        except RemoteProtocolError:
            expected = None
        try:
            done = reader.inbox.receive(b"".join(sealer.seal(*record) for record in said))
        except RemoteProtocolError:
            assert expected is None, "refused, though the protocol allows it"
            return
        assert expected is not None, "taken, though the protocol forbids it"
        begun += kind == METADATA
        assert (done is not None) is expected.complete
        if done is not None:
            assert done[0] == expected.message
            assert bytes(done[1] or b"") == expected.payload
    assert reader.allocated <= WINDOW


@dataclass
class _Verdict:
    message: DataMessage
    complete: bool
    payload: bytes = b""


class _Said(NamedTuple):
    kind: int
    flags: int
    number: int
    total: int
    plaintext: bytes


def _expected_of(open_: dict[int, _Open], begun: int, said: list[_Said], credit: int) -> _Verdict | None:
    """What must become of a frame: of one record, or of metadata and the first record of its payload."""
    if len(said) == 1:
        return _expected(open_, begun, *said[0], credit)
    metadata, payload = said
    if len(payload.plaintext) != min(RECORD, metadata.total) or payload.number != metadata.number or not metadata.total:
        return None
    metadata = metadata._replace(flags=metadata.flags & ~JOINED)
    if _expected(open_, begun, *metadata, credit) is None:
        return None
    return _expected(open_, begun + 1, *payload, credit)


def _expected(
    open_: dict[int, _Open], begun: int, kind: int, flags: int, number: int, total: int, said: bytes, credit: int
) -> _Verdict | None:
    """What must become of a record; None: it ends the session. Raises RemoteProtocolError where its metadata is none."""
    if flags & ~(FIRST | LAST) or kind not in (METADATA, PAYLOAD):
        return None
    if kind == METADATA:
        message = decode_data(said, True)
        flagged = flags == (FIRST if total else FIRST | LAST)
        fits = total == message.payload_bytes and total <= LARGEST and total <= credit
        if not flagged or number != begun or len(open_) >= MAX_OPEN or not fits:
            return None
        if total:
            open_[number] = _Open(message, bytearray(), total)
        return _Verdict(message, not total)
    underway = open_.get(number)
    if underway is None or total != underway.message.payload_bytes or len(said) != min(RECORD, underway.left):
        return None
    last = len(said) == underway.left
    if flags != (LAST if last else 0):
        return None
    underway.said += said
    underway.left -= len(said)
    if last:
        del open_[number]
    return _Verdict(underway.message, last, bytes(underway.said))
