"""The client's sockets: a DEALER with CURVE for control, a DEALER with PLAIN (the ticket) for data.

Neither reconnects by itself: a session that lost its link is over, and another one takes new tickets, secrets and keys.
The socket monitors say why a handshake failed; without them a refused client would hang.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitfl.errors import ConnectError, SessionLost
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.keys import Identity, PublicKey
from splitfl.protocol.message import MAX_CONTROL_BYTES
from splitfl.transport import wording
from splitfl.transport.base import ClientFrame, Endpoint
from splitfl.transport.readiness import WRITABLE, Readiness
from splitfl.transport.zmq_common import (
    BYTES_A_TURN,
    FRAMES_A_TURN,
    Wake,
    bracketed,
    client_data_options,
    common_options,
    curve_client,
    data_frame_limit,
    keep_large_buffers,
    make_frame,
    plain_client,
    send_frame,
)

_LAST_WORDS_SECONDS = 0.25
# Not -1, which also means never: with it a broken link takes frames along that have arrived and are not read yet.
_NEVER_MILLISECONDS = 24 * 3600 * 1000

_HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


class ZmqClientTransport:
    """A :class:`~splitfl.transport.base.ClientTransport` over TCP."""

    def __init__(self) -> None:
        self._wake = Wake()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._readiness = Readiness(self._wake)
        self._control: zmq.Socket[bytes] | None = None
        self._data: zmq.Socket[bytes] | None = None
        self._monitors: list[zmq.Socket[bytes]] = []
        self._frame_limit = 0
        self._broken: float | None = None  # when a connection broke, monotonic seconds
        keep_large_buffers()

    def set_frame_limit(self, frame_bytes: int) -> None:
        self._frame_limit = frame_bytes

    def connect_control(self, host: str, port: int, server_key: PublicKey, identity: Identity, timeout: float) -> None:
        address = _reach(host, port, timeout)
        sock = self._socket(address, affinity=1, max_frame=MAX_CONTROL_BYTES)
        curve_client(sock, server_key, identity)
        outcome, value = self._shake_hands(sock, address, port, timeout)
        if outcome == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise wording.not_listed(identity.public)
        if outcome is None or (outcome == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value in (errno.EAGAIN, errno.ETIMEDOUT)):
            raise wording.silent(host, port, timeout)
        if outcome == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # The greetings were exchanged, then the server hung up on our first CURVE command: it could not decrypt it.
            raise wording.other_key(host, port)
        if outcome == zmq.EVENT_CLOSED:
            raise wording.nothing_listens(host, port)
        if outcome != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            raise wording.not_splitfl(host, port)
        self._control = sock
        self._readiness.register(sock)

    def connect_data(self, host: str, port: int, ticket: bytes, timeout: float, *, curve: PublicKey | None = None) -> None:
        try:
            address = _reach(host, port, timeout)
        except ConnectError as error:
            raise wording.data_unreachable(host, port, str(error.__cause__ or "no connection")) from None
        sock = self._socket(address, affinity=2, max_frame=data_frame_limit(self._frame_limit, curve=curve is not None))
        client_data_options(sock)
        if curve is not None:
            curve_client(sock, curve, Identity.from_secret(ticket))
        else:
            plain_client(sock, ticket)
        outcome, _ = self._shake_hands(sock, address, port, timeout)
        if outcome == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise wording.ticket_refused()
        if outcome != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            raise wording.data_unreachable(host, port, "it does not answer as one")
        self._data = sock
        self._readiness.register(sock)

    def send_control(self, frame: bytes) -> None:
        if self._control is None:
            raise SessionLost("the control connection is not open")
        self._readiness.touch(self._control)
        try:
            self._control.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise SessionLost("the server does not read its control messages") from None

    def make_frame(self, size: int) -> bytearray | memoryview:
        return make_frame(size)

    def send_data(self, frame: Buffer) -> bool:
        if self._data is None:
            raise SessionLost("the data connection is not open")
        self._readiness.touch(self._data)
        try:
            send_frame(self._data, frame)
        except zmq.Again:
            self._readiness.want_room(self._data, room=True)
            return False
        return True

    def poll(self, timeout: float) -> list[ClientFrame]:
        ready = self._readiness.poll(timeout)
        frames: list[ClientFrame] = []
        if self._control in ready:
            self._receive(self._control, Endpoint.CONTROL, frames)
        if self._data in ready:
            assert self._data is not None
            if ready[self._data] & WRITABLE:
                self._readiness.want_room(self._data, room=False)
            self._receive(self._data, Endpoint.DATA, frames)
        # Frames first: a server that says why it closes is heard before the closing is.
        if self._broken is not None or any(monitor in ready for monitor in self._monitors):
            self._check_links(frames)
        return frames

    def wake(self) -> None:
        self._wake.set()

    def close(self, linger: float) -> None:
        for sock in (self._control, self._data):
            if sock is not None:
                sock.disable_monitor()
        for monitor in self._monitors:
            monitor.close(0)
        milliseconds = int(linger * 1000)
        for sock in (self._control, self._data):
            if sock is not None:
                sock.close(milliseconds)
        self._context.destroy(milliseconds)
        self._wake.close()

    def _socket(self, address: str, *, affinity: int, max_frame: int) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.DEALER)
        common_options(sock, max_frame=max_frame, ipv6=":" in address)
        sock.setsockopt(zmq.RECONNECT_IVL, _NEVER_MILLISECONDS)
        # Control and data on an I/O thread of their own: a bulk write never delays a credit or a heartbeat.
        sock.setsockopt(zmq.AFFINITY, affinity)
        return sock

    def _shake_hands(self, sock: zmq.Socket[bytes], address: str, port: int, timeout: float) -> tuple[int | None, int]:
        """Connects; the event that ends the handshake and its value, or (None, 0) after ``timeout`` seconds."""
        monitor = sock.get_monitor_socket(_HANDSHAKE_EVENTS)
        deadline = time.monotonic() + timeout
        sock.connect(f"tcp://{bracketed(address)}:{port}")
        outcome: tuple[int | None, int] = (None, 0)
        while (left := deadline - time.monotonic()) > 0:
            if monitor.poll(int(left * 1000) + 1):
                event = parse_monitor_message(monitor.recv_multipart())
                outcome = event["event"], event["value"]
                break
        if outcome[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._monitors.append(monitor)
            self._readiness.register(monitor)
        else:
            sock.disable_monitor()
            monitor.close(0)
            sock.close(0)
        return outcome

    def _receive(self, sock: Any, endpoint: Endpoint, frames: list[ClientFrame]) -> None:
        self._readiness.touch(sock)
        taken = 0
        for _ in range(FRAMES_A_TURN):
            if taken >= BYTES_A_TURN:
                return
            try:
                frame = sock.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if frame.more:
                raise SessionLost("the server sent a frame of more than one part")
            taken += len(frame)
            frames.append(ClientFrame(endpoint, frame.bytes if endpoint is Endpoint.CONTROL else frame.buffer))

    def _check_links(self, frames: list[ClientFrame]) -> None:
        for monitor in self._monitors:
            self._readiness.touch(monitor)
            while monitor.poll(0):
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if self._broken is None and event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                    self._broken = time.monotonic()
        if self._broken is None or frames:
            return
        # The data connection may break a moment before the control connection has brought the reason.
        left = self._broken + _LAST_WORDS_SECONDS - time.monotonic()
        if left > 0 and self._control is not None and self._control.poll(int(left * 1000) + 1):
            self._receive(self._control, Endpoint.CONTROL, frames)
        if not frames:
            raise SessionLost("the connection to the server broke")


def _reach(host: str, port: int, timeout: float) -> str:
    """The first of the host's addresses that takes a TCP connection, as text; ZeroMQ itself would retry in silence."""
    try:
        with socket.create_connection((host, port), timeout=timeout) as probe:
            address: str = probe.getpeername()[0]
            return address
    except socket.gaierror as error:
        raise wording.nothing_listens(host, port, "the host name is not known") from error
    except UnicodeError as error:
        raise wording.nothing_listens(host, port, "no host can have this name") from error
    except TimeoutError as error:
        raise wording.nothing_listens(host, port, "no answer") from error
    except OSError as error:
        raise wording.nothing_listens(host, port, (error.strerror or str(error)).lower()) from error
