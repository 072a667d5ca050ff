"""What an eavesdropper sees: a recording searched for the bytes of a hidden state and for the words of its metadata.

A search that finds nothing proves nothing unless the same search finds something where it must. So the same hidden state is
sent once more, through the same channel and an equal relay, with a cipher that does nothing; there the search has to succeed.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.relay import Relay, free_port
from splitfl.channel.client import ClientChannel
from splitfl.channel.opening import OpenTerms
from splitfl.channel.server import ServerChannel
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import AuthorizedClients, Identity
from splitfl.protocol.messages import PROTOCOL_VERSION, Enrol, Forward, StepOpened, Welcome
from splitfl.transport.zmq_server import ZmqServerTransport

__all__ = ["Findings", "search", "send_unsealed"]

#: Field names of a forward's metadata, as msgpack writes them: no random ciphertext of a few MB holds a word this long.
METADATA_WORDS = (b"adapter_on", b"segments", b"float32")
WINDOW = 48


@dataclass(frozen=True, slots=True)
class Findings:
    """Of ``windows`` pieces of the hidden state and of the metadata's words, how many stand somewhere in the recording."""

    windows: int
    windows_found: int
    words_found: int
    bytes_searched: int


def search(relays: Sequence[Relay], hidden: bytes) -> Findings:
    """Look for pieces of ``hidden`` (48 bytes each, spread over it) and for the metadata's words in what the relays recorded."""
    step = max(WINDOW, len(hidden) // 16)
    pieces = [hidden[begin : begin + WINDOW] for begin in range(0, len(hidden) - WINDOW + 1, step)]
    return Findings(
        windows=len(pieces),
        windows_found=sum(any(relay.search(piece) for relay in relays) for piece in pieces),
        words_found=sum(any(relay.search(word) for relay in relays) for word in METADATA_WORDS),
        bytes_searched=sum(relay.bytes_seen for relay in relays),
    )


class _NoCipher:
    """Copies. Exists to show that the search works; no setting of the program reaches it."""

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Any, /) -> int:
        view = memoryview(buf)
        size = memoryview(data).nbytes
        view[:size] = data
        view[size : size + 16] = bytes(16)
        return size + 16

    def decrypt_into(self, nonce: Buffer, data: Any, associated_data: Buffer | None, buf: Any, /) -> int:
        size = memoryview(data).nbytes - 16
        memoryview(buf)[:size] = memoryview(data)[:size]
        return size


class _Sink:
    """A server that takes one tensor and opens step 0 for whoever enrols."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.channel: ServerChannel | None = None

    def welcome(self, peer: Any, hello: Any) -> Welcome:
        return Welcome(PROTOCOL_VERSION, hello.run, {}, {}, time.time())

    def admit(self, peer: Any, message: Any) -> int:
        return 0

    def elsewhere(self, peer: Any) -> None:
        return None

    def on_opened(self, session: Any) -> None:
        return None

    def allocate(self, session: str, message: Any) -> tuple[Any, memoryview]:
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)

    def on_data(self, session: str, message: Any, payload: Any) -> None:
        self.arrived.set()

    def on_control(self, session: str, message: Any) -> None:
        if isinstance(message, Enrol) and self.channel is not None:
            self.channel.tell(session, StepOpened(0))

    def on_refused(self, who: str, code: str, text: str) -> None:
        return None

    def on_closed(self, session: str, reason: str, *, lost: bool) -> None:
        return None


def send_unsealed(hidden: bytes, width: int) -> list[Relay]:
    """Send ``hidden``, fp32 rows of ``width``, through the channel with sealing off; returns the relays that listened."""
    server_key, client_key = Identity.generate(), Identity.generate()
    ports = free_port(), free_port()
    control, data = Relay(ports[0]), Relay(ports[1])
    sink = _Sink()
    factory: Any = lambda name, key: _NoCipher()  # noqa: E731
    with tempfile.TemporaryDirectory() as work:
        listed = Path(work) / "authorized_clients"
        listed.write_text(f"{client_key.public} audit\n")
        transport = ZmqServerTransport(
            server_key, host="127.0.0.1", port=ports[0], data_port=ports[1], advertise=f"127.0.0.1:{data.port}"
        )
        server = ServerChannel(transport, sink, authorized=AuthorizedClients(listed), aead_factory=factory)
        sink.channel = server
        server.start()
        opened = threading.Event()
        try:
            client = ClientChannel.open(
                JoinString(server_key.public, "127.0.0.1", control.port, "audit"),
                client_key,
                name="",
                libraries={},
                answer=lambda welcome: OpenTerms(model={}, cut=(1, 1)),
                allocate=lambda message: (None, memoryview(b"")),
                on_data=lambda message, payload: None,
                on_control=lambda message: opened.set(),
                on_lost=lambda error: None,
                aead_factory=factory,
            )
            client.tell(Enrol())
            opened.wait(5)
            rows = len(hidden) // (4 * width)
            client.send(Forward(0, 0, ((rows, 0),), width, "float32", "raw", True, True, True), hidden)
            sink.arrived.wait(5)
            client.close()
        finally:
            server.stop()
    return [control, data]
