"""The seam between the channel and what carries its frames. Everything here is called on one I/O thread, save ``wake``.

Two endpoints: *control* carries small frames between peers whose keys the transport has checked; *data* carries sealed
records of peers that showed a ticket. A transport delivers whole frames, in order for each peer and endpoint, or
reports the link as lost.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.keys import Identity, PublicKey


class Endpoint(Enum):
    """Which of the two a frame came in on."""

    CONTROL = "control"
    DATA = "data"


class ClientFrame(NamedTuple):
    """A frame from the server."""

    endpoint: Endpoint
    frame: Buffer


class ServerFrame(NamedTuple):
    """A frame from a client. ``peer`` is where to send an answer; ``user`` is what the gate said of it when it
    connected: only that is proof of who it is.
    """

    endpoint: Endpoint
    peer: bytes
    user: str
    address: str
    frame: Buffer


class Sent(Enum):
    """What became of a frame. FULL: later, the peer reads slowly; GONE: the peer is no longer connected."""

    SENT = "sent"
    FULL = "full"
    GONE = "gone"


#: Of a server: (endpoint, peer) of a connection that was cut because it flooded the server; peer empty: it had not said anything
#: yet, None: all connections of the endpoint.
Cut = Callable[[Endpoint, bytes | None], None]


class Gate(Protocol):
    """Who may connect; asked by the transport on the I/O thread. The answer is the ``user`` of every frame, None
    refuses.
    """

    def admit_key(self, key: PublicKey, address: str) -> str | None: ...

    def admit_ticket(self, shown: bytes, address: str) -> str | None: ...

    def expected(self, endpoint: Endpoint) -> int:
        """Connections that clients may be about to make at once: as many as are listed, or have been given a ticket lately."""


class ClientTransport(Protocol):
    """One client's two connections."""

    def connect_control(self, host: str, port: int, server_key: PublicKey, identity: Identity, timeout: float) -> None:
        """Blocks until the handshake is through. Raises ConnectError with one clear sentence."""

    def connect_data(self, host: str, port: int, ticket: bytes, timeout: float, *, curve: PublicKey | None = None) -> None:
        """Likewise for the data endpoint. ``curve``: the server's key, where the ticket is a CURVE secret."""

    def set_frame_limit(self, frame_bytes: int) -> None:
        """The largest frame the data endpoint accepts; told before ``connect_data``."""

    def send_control(self, frame: bytes) -> None:
        """Raises SessionLost when the link is down."""

    def make_frame(self, size: int) -> bytearray | memoryview:
        """Writable memory of ``size`` bytes for a frame that ``send_data`` is about to be given."""

    def send_data(self, frame: Buffer) -> bool:
        """False when the link is full: ``poll`` returns as soon as it is not. The frame must not change afterwards."""

    def poll(self, timeout: float) -> list[ClientFrame]:
        """Frames that have arrived; waits up to ``timeout`` seconds for one, for room, or for ``wake``. Raises
        SessionLost.
        """

    def wake(self) -> None:
        """Makes ``poll`` return; the one method for other threads."""

    def close(self, linger: float) -> None:
        """Ends both connections; what was sent has ``linger`` seconds to leave."""


class ServerTransport(Protocol):
    """The server's two endpoints."""

    def bind(self, gate: Gate, frame_bytes: int, *, window: int, curve: bool = False) -> None:
        """Opens both endpoints and proves that a stranger is refused, else ConfigError. ``window``: bytes that a client may have
        in flight; ``curve``: tickets are CURVE keys.
        """

    @property
    def control_port(self) -> int:
        """Where the control endpoint is bound."""

    @property
    def data_address(self) -> str:
        """What clients are told in Opened: ``tcp://host:port``."""

    def poll(self, timeout: float) -> list[ServerFrame]:
        """As the client's ``poll``; never raises for what a peer did."""

    def send_control(self, peer: bytes, frame: bytes) -> Sent: ...

    def make_frame(self, size: int) -> bytearray | memoryview:
        """As the client's."""

    def send_data(self, peer: bytes, frame: Buffer) -> Sent: ...

    def hang_up(self, endpoint: Endpoint, peer: bytes) -> None:
        """Ends the connection of this peer, and what it has yet to be sent; one that is gone is passed over."""

    def connected(self, user: str) -> int:
        """How many connections of this user stand on the control endpoint. One that has not said anything yet is nobody's."""

    def on_refused(self, report: Callable[[str, str, str], None]) -> None:
        """Who is told of refusals below the protocol: report(who, code, text)."""

    def on_cut(self, report: Cut) -> None:
        """Who is told of connections that the transport has cut."""

    def wake(self) -> None: ...

    def close(self, linger: float) -> None: ...
