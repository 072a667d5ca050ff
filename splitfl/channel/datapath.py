"""The client's half of the data connection: from queued messages to sealed records and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.assembly import Allocate, Inbox, Outbox, payload_view
from splitfl.protocol.ciphers import AeadFactory, Buffer, MakeFrame
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.messages import Attach, DataMessage, Opened
from splitfl.protocol.records import Opener, Sealer
from splitfl.protocol.schedule import TrafficSecrets
from splitfl.transport.base import ClientTransport

# Frames, and their bytes, sealed and handed over before the connections are read again.
_FRAMES_A_TURN, _BYTES_A_TURN = 16, 2**20


class DataPath:
    """Keys, credit and messages under way of one session; belongs to the I/O thread."""

    def __init__(
        self,
        opened: Opened,
        secrets: TrafficSecrets,
        *,
        aead_factory: AeadFactory,
        allocate: Allocate,
        admit: Callable[[DataMessage], None],
        make_frame: MakeFrame = bytearray,
    ) -> None:
        if opened.max_message > opened.window:
            raise RemoteProtocolError("the server grants less credit than one message may need")
        self.credit = CreditAccount(opened.window)
        sealer = Sealer(secrets.client, opened.cipher, aead_factory=aead_factory, make_frame=make_frame)
        self._outbox = Outbox(sealer, opened.record, self.credit)
        self._inbox = Inbox(
            Opener(secrets.server, opened.cipher, aead_factory=aead_factory),
            from_client=False,
            record_bytes=opened.record,
            max_message=opened.max_message,
            allocate=allocate,
            admit=admit,
        )
        self.stuck: Buffer | None = None  # a sealed frame the link had no room for
        self.records_sent = 0
        self.bytes_sent = 0  # of frames

    @property
    def records_received(self) -> int:
        return self._inbox.records

    def __bool__(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outbox) or self.stuck is not None

    def add(self, message: DataMessage, payload: Buffer) -> None:
        """Queues a message."""
        self._outbox.add(message, payload)

    def receive(self, frame: Buffer) -> tuple[DataMessage, Any] | None:
        """One frame; a message with its object when that completes one. Raises RemoteProtocolError."""
        return self._inbox.receive(frame)

    def pump(self, transport: ClientTransport) -> bool:
        """Seals and sends a few frames; True when there is more to do at once."""
        enough = self.bytes_sent + _BYTES_A_TURN
        for _ in range(_FRAMES_A_TURN):
            if self.bytes_sent >= enough:
                return True
            frame = self.stuck if self.stuck is not None else self._outbox.next_frame()
            self.stuck = None
            if frame is None:
                return False
            if not transport.send_data(frame):
                self.stuck = frame
                return False
            self.records_sent = self._outbox.records
            self.bytes_sent += len(frame)
        return True


def outgoing(message: DataMessage, payload: Buffer, limit: int) -> memoryview:
    """The payload's bytes. Raises LocalProtocolError: wrong size, more than ``limit``, or a message of the channel's own."""
    if type(message) is Attach:
        raise LocalProtocolError("Attach is the channel's own")
    view = payload_view(message, payload)
    if len(view) > limit:
        raise LocalProtocolError(
            f"a payload of {len(view)} bytes exceeds the server's limit of {limit}: use smaller micro-batches"
        )
    return view


def data_address(text: str, dialled: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port``; an empty host or ``*`` stands for the one the client dialled.

    Raises RemoteProtocolError.
    """
    try:
        address = urlsplit(text)
        host, port = address.hostname or "", address.port
    except ValueError:
        host, port = "", None
    if not text.startswith("tcp://") or not port:
        raise RemoteProtocolError("the server gave a malformed data address")
    return dialled if host in ("", "*") else host, port
