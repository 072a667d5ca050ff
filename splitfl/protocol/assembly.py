"""Messages from records and records from messages. A message = one METADATA record (FIRST), then its payload in PAYLOAD
records, the last one marked LAST. Up to ``MAX_OPEN`` messages of one direction interleave, told apart by the message
id. A frame is one record, or a METADATA record and the first of its payload (JOINED): a frame costs both sides about as much
time as a hundred KiB of payload, however small it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from splitfl.errors import LocalProtocolError
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.message import MAX_METADATA_BYTES
from splitfl.protocol.messages import DataMessage, decode_data, encode
from splitfl.protocol.records import (
    FIRST,
    JOINED,
    LAST,
    MAX_RECORD_BYTES,
    METADATA,
    OVERHEAD_BYTES,
    PAYLOAD,
    Header,
    Opener,
    Sealer,
)

MAX_OPEN = 8

# What a joined frame has besides its payload, at most.
_AROUND_BYTES = MAX_METADATA_BYTES + 2 * OVERHEAD_BYTES
MAX_FRAME_BYTES = MAX_RECORD_BYTES + _AROUND_BYTES

Allocate = Callable[[DataMessage], tuple[Any, memoryview]]


def largest_frame(record_bytes: int) -> int:
    """Bytes of the largest frame, where a full record has so many of plaintext."""
    return record_bytes + _AROUND_BYTES


def byte_view(buffer: Any) -> memoryview:
    """A flat view of the buffer's bytes. Raises LocalProtocolError when it is not contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise LocalProtocolError("a payload must be contiguous")
    # cast() refuses views with a zero in their shape.
    return view.cast("B") if view.nbytes else memoryview(b"")


def payload_view(message: DataMessage, payload: Any) -> memoryview:
    """The payload's bytes, when they are as many as the message declares; else LocalProtocolError."""
    view = byte_view(payload)
    if len(view) != message.payload_bytes:
        raise LocalProtocolError(
            f"{type(message).__name__} declares {message.payload_bytes} payload bytes, the buffer has {len(view)}"
        )
    return view


class _Outgoing:
    __slots__ = ("id", "metadata", "offset", "payload")

    def __init__(self, metadata: bytes, payload: memoryview) -> None:
        self.id, self.metadata, self.payload, self.offset = -1, metadata, payload, 0

    @property
    def left(self) -> int:
        return len(self.payload) - self.offset


def _order(outgoing: _Outgoing) -> tuple[int, int]:
    return outgoing.left, outgoing.id


class Outbox:
    """Messages waiting to be sealed, in order; not thread-safe.

    Messages *begin* in the order they were added, as far as credit reaches; of those begun, the one with the least left
    is served first, so that a small message overtakes a large one, and equal ones complete one after the other. None begins
    before something can be gained by it, as the other side makes room for a whole message when it begins.
    """

    def __init__(self, sealer: Sealer, record_bytes: int, credit: CreditAccount | None = None) -> None:
        self._sealer, self._record, self._credit = sealer, record_bytes, credit
        self._waiting: deque[_Outgoing] = deque()
        self._smallest: deque[int] = deque()  # of each waiting message that no smaller one is behind, its payload bytes
        self._begun: list[_Outgoing] = []
        self._next_id = 0
        self.pending = 0  # payload bytes added and not yet sealed

    def __bool__(self) -> bool:
        return bool(self._waiting or self._begun)

    @property
    def records(self) -> int:
        """How many records have been sealed."""
        return self._sealer.records

    def add(self, message: DataMessage, payload: Buffer) -> None:
        """Queues a message; its payload is referenced, not copied, until sealed."""
        view = payload_view(message, payload)
        self._waiting.append(_Outgoing(encode(message), view))
        while self._smallest and self._smallest[-1] > len(view):
            self._smallest.pop()
        self._smallest.append(len(view))
        self.pending += len(view)

    def next_frame(self) -> bytearray | memoryview | None:
        """The next frame, sealed, or None when nothing can be sent now (nothing waits, or credit is out)."""
        served = min(self._begun, key=_order) if self._begun else None
        if self._waiting and len(self._begun) < MAX_OPEN and (served is None or self._smallest[0] < served.left):
            begun = self._begin()
            if begun is not None:
                return self._beginning(begun)
        return self._payload(served) if served is not None else None

    def _begin(self) -> _Outgoing | None:
        """The next message in order begins, if credit covers it."""
        size = len(self._waiting[0].payload)
        if self._credit is not None:
            if not self._credit.covers(size):
                return None
            self._credit.spend(size)
        begun = self._waiting.popleft()
        if self._smallest[0] == size:
            self._smallest.popleft()
        self._begun.append(begun)
        begun.id, self._next_id = self._next_id, self._next_id + 1
        return begun

    def _beginning(self, outgoing: _Outgoing) -> bytearray | memoryview:
        total, metadata = len(outgoing.payload), outgoing.metadata
        if not total:
            self._begun.remove(outgoing)
            return self._sealer.seal(METADATA, FIRST | LAST, outgoing.id, 0, metadata)
        if self._smallest and self._smallest[0] < total and len(self._begun) < MAX_OPEN:
            # What is behind it overtakes it at once.
            return self._sealer.seal(METADATA, FIRST, outgoing.id, total, metadata)
        chunk, flags = self._chunk(outgoing)
        ahead = len(metadata) + OVERHEAD_BYTES
        frame = self._sealer.make_frame(ahead + len(chunk) + OVERHEAD_BYTES)
        view = memoryview(frame)
        self._sealer.seal_into(view[:ahead], METADATA, FIRST | JOINED, outgoing.id, total, metadata)
        self._sealer.seal_into(view[ahead:], PAYLOAD, flags, outgoing.id, total, chunk)
        return frame

    def _payload(self, outgoing: _Outgoing) -> bytearray | memoryview:
        chunk, flags = self._chunk(outgoing)
        return self._sealer.seal(PAYLOAD, flags, outgoing.id, len(outgoing.payload), chunk)

    def _chunk(self, outgoing: _Outgoing) -> tuple[memoryview, int]:
        """The plaintext of its next payload record, and that record's flags."""
        chunk = outgoing.payload[outgoing.offset : outgoing.offset + self._record]
        outgoing.offset += len(chunk)
        self.pending -= len(chunk)
        if outgoing.left:
            return chunk, 0
        self._begun.remove(outgoing)
        return chunk, LAST


class _Incoming:
    __slots__ = ("destination", "message", "object", "offset")

    def __init__(self, message: DataMessage, target: Any, destination: memoryview) -> None:
        self.message, self.object, self.destination, self.offset = message, target, destination, 0


class Inbox:
    """Opens records straight into the buffers that ``allocate`` gives; hands a message out only when its last tag
    verified.

    ``charge(payload bytes)`` is asked before anything is allocated and may raise RemoteProtocolError;
    ``admit(message)`` likewise.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        from_client: bool,
        record_bytes: int,
        max_message: int,
        allocate: Allocate,
        admit: Callable[[DataMessage], None],
        charge: Callable[[int], None] | None = None,
    ) -> None:
        self._opener, self._from_client, self._record, self._max = opener, from_client, record_bytes, max_message
        self._allocate, self._admit, self._charge = allocate, admit, charge
        self._open: dict[int, _Incoming] = {}
        self._next_id = 0

    @property
    def records(self) -> int:
        """How many records have arrived."""
        return self._opener.records

    def receive(self, frame: Buffer) -> tuple[DataMessage, Any] | None:
        """One frame. Returns (message, its object) when that completes a message. Raises RemoteProtocolError: the
        session ends.
        """
        header = self._opener.header(frame)
        if header.kind == PAYLOAD:
            return self._continue(frame, header)
        if not header.flags & JOINED:
            return self._begin(frame, header)
        # How long the payload's record is follows from the message's length; the rest is the metadata's.
        ahead = len(frame) - min(self._record, header.total) - OVERHEAD_BYTES
        if ahead < OVERHEAD_BYTES or not header.total:
            raise self._opener.fail(f"a frame of {len(frame)} bytes, too few for two records")
        view = memoryview(frame)
        self._begin(view[:ahead], header)
        joined = self._opener.header(view[ahead:])
        if joined.kind != PAYLOAD or joined.message != header.message:
            raise self._opener.fail("a record in a frame with another message's")
        return self._continue(view[ahead:], joined)

    def _begin(self, frame: Buffer, header: Header) -> tuple[DataMessage, Any] | None:
        size = len(frame) - OVERHEAD_BYTES
        if size > MAX_METADATA_BYTES:
            raise self._opener.fail(f"metadata of {size} bytes, more than {MAX_METADATA_BYTES}")
        metadata = bytearray(size)
        self._opener.open_into(header, frame, metadata)
        expected = FIRST if header.total else FIRST | LAST
        if header.flags & ~JOINED != expected or header.message != self._next_id or len(self._open) >= MAX_OPEN:
            raise self._opener.fail("a message that begins out of order, or too many at once")
        self._next_id += 1
        message = decode_data(bytes(metadata), self._from_client)
        if message.payload_bytes != header.total:
            raise self._opener.fail(f"a payload of {header.total} bytes where the metadata says {message.payload_bytes}")
        if header.total > self._max:
            raise self._opener.fail(f"a payload of {header.total} bytes, more than {self._max}")
        self._admit(message)
        if self._charge is not None:
            self._charge(header.total)
        if not header.total:
            return message, None
        target, destination = self._allocate(message)
        destination = byte_view(destination)
        if len(destination) != header.total or destination.readonly:
            raise LocalProtocolError(f"allocate() must give {header.total} writable bytes, it gave {len(destination)}")
        self._open[header.message] = _Incoming(message, target, destination)
        return None

    def _continue(self, frame: Buffer, header: Header) -> tuple[DataMessage, Any] | None:
        size = len(frame) - OVERHEAD_BYTES
        incoming = self._open.get(header.message)
        if incoming is None or header.total != len(incoming.destination):
            raise self._opener.fail("a record of a message that is not open")
        # Full records only, save the last: else a peer could make us open a message byte by byte.
        if size != min(self._record, header.total - incoming.offset):
            raise self._opener.fail(f"a record of {size} bytes at offset {incoming.offset} of {header.total}")
        last = incoming.offset + size == header.total
        if header.flags != (LAST if last else 0):
            raise self._opener.fail("a record whose LAST mark contradicts its message's length")
        self._opener.open_into(header, frame, incoming.destination[incoming.offset : incoming.offset + size])
        incoming.offset += size
        if not last:
            return None
        del self._open[header.message]
        return incoming.message, incoming.object
