"""The server's sockets: a ROUTER with CURVE for control, a ROUTER with PLAIN (tickets) for data, both behind a ZAP
handler (RFC 27).

Without a ZAP handler CURVE lets every stranger in, so ``bind`` ends with a test: a random key and a random ticket must
be refused.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitfl.errors import ConfigError, KeyFileError
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.keys import Identity, PublicKey
from splitfl.protocol.message import MAX_CONTROL_BYTES
from splitfl.protocol.messages import RefusalCode
from splitfl.transport.base import Endpoint, Gate, Sent, ServerFrame
from splitfl.transport.refusals import RefusalLog
from splitfl.transport.zmq_common import (
    FRAMES_A_TURN,
    PLAIN_USER,
    Wake,
    bracketed,
    common_options,
    data_options,
    keep_large_buffers,
)

_log = logging.getLogger(__name__)

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_CONTROL_DOMAIN, _DATA_DOMAIN = b"splitfl.control", b"splitfl.data"
_SELF_TEST_SECONDS = 5.0

_OTHER_KEY = "its join string holds another server key, or it is no splitfl client"


class ZmqServerTransport:
    """A :class:`~splitfl.transport.base.ServerTransport` over TCP.

    ``host`` is the address to bind (``*`` for all IPv4 interfaces, ``::`` for IPv6 too); port 0 lets the system choose.
    ``advertise`` is the data endpoint's ``host:port`` as clients reach it, where that differs from what they dialled.
    """

    def __init__(
        self, identity: Identity, *, host: str = "*", port: int = 0, data_port: int = 0, advertise: str | None = None
    ) -> None:
        self._identity, self._host, self._ports, self._advertise = identity, host, (port, data_port), advertise
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._wake = Wake()
        self._poller = zmq.Poller()
        self._poller.register(self._wake.receiver, zmq.POLLIN)
        self._refusals = RefusalLog(lambda who, code, text: None)
        self._sockets: list[zmq.Socket[bytes]] = []
        self._accepted: dict[int, str] = {}  # file descriptor -> address, of connections that have not shaken hands
        self._testing = False
        self.control_port = self.data_port = 0
        keep_large_buffers()

    @property
    def data_address(self) -> str:
        return f"tcp://{self._advertise}" if self._advertise else f"tcp://*:{self.data_port}"

    def on_refused(self, report: Callable[[str, str, str], None]) -> None:
        self._refusals = RefusalLog(report)

    def bind(self, gate: Gate, record_frame_bytes: int) -> None:
        self._gate = gate
        # The handler must stand before the first peer connects, else the first one would wait for it in vain.
        self._zap = self._context.socket(zmq.ROUTER)
        self._zap.bind(_ZAP_ADDRESS)
        self._control = self._router(_CONTROL_DOMAIN, affinity=1, max_frame=MAX_CONTROL_BYTES)
        self._control.setsockopt(zmq.CURVE_SERVER, 1)
        self._control.setsockopt(zmq.CURVE_PUBLICKEY, self._identity.public.raw)
        self._control.setsockopt(zmq.CURVE_SECRETKEY, self._identity.secret)
        self._data = self._router(_DATA_DOMAIN, affinity=2, max_frame=record_frame_bytes)
        data_options(self._data)
        self._data.setsockopt(zmq.PLAIN_SERVER, 1)
        self._sockets = [self._zap, self._control, self._data]
        self._monitor = self._control.get_monitor_socket(
            zmq.EVENT_ACCEPTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        self._failed_protocol = False
        for sock in (*self._sockets, self._monitor):
            self._poller.register(sock, zmq.POLLIN)
        self.control_port = self._bind_port(self._control, self._ports[0])
        self.data_port = self._bind_port(self._data, self._ports[1])
        self._self_test()

    def poll(self, timeout: float) -> list[ServerFrame]:
        ready = dict(self._poller.poll(max(0, int(timeout * 1000))))
        if self._wake.receiver.fileno() in ready or self._wake.receiver in ready:
            self._wake.clear()
        if self._monitor in ready:
            self._watch()
        if self._zap in ready:
            self._answer_zap()
        frames: list[ServerFrame] = []
        if self._control in ready:
            self._receive(self._control, Endpoint.CONTROL, frames)
        if self._data in ready:
            self._receive(self._data, Endpoint.DATA, frames)
        return frames

    def send_control(self, peer: bytes, frame: bytes) -> Sent:
        return self._send(self._control, peer, frame, copy=True)

    def send_data(self, peer: bytes, frame: Buffer) -> Sent:
        return self._send(self._data, peer, frame, copy=False)

    def wake(self) -> None:
        self._wake.set()

    def close(self, linger: float) -> None:
        milliseconds = int(linger * 1000)
        if self._sockets:
            self._control.disable_monitor()
            self._monitor.close(0)
            for sock in self._sockets:
                sock.close(milliseconds)
        self._context.destroy(milliseconds)
        self._wake.close()

    def _router(self, domain: bytes, *, affinity: int, max_frame: int) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.ROUTER)
        common_options(sock, max_frame=max_frame, ipv6=":" in self._host)
        # MANDATORY: a ROUTER otherwise drops in silence what it cannot deliver. HANDOVER off: nobody takes over
        # another's id.
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 0)
        sock.setsockopt(zmq.ZAP_DOMAIN, domain)
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        sock.setsockopt(zmq.AFFINITY, affinity)
        return sock

    def _bind_port(self, sock: zmq.Socket[bytes], port: int) -> int:
        try:
            sock.bind(f"tcp://{bracketed(self._host)}:{port or '*'}")
        except zmq.ZMQError as error:
            raise ConfigError(
                f"cannot listen at {self._host}:{port}: {error.strerror.lower()}; choose another port or host"
            ) from None
        endpoint: bytes = sock.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def _send(self, sock: zmq.Socket[bytes], peer: bytes, frame: Buffer, *, copy: bool) -> Sent:
        try:
            # The ROUTER judges the peer on the first part: after it the second cannot fail.
            sock.send(peer, zmq.SNDMORE | zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        sock.send(frame, zmq.NOBLOCK, copy=copy)
        return Sent.SENT

    def _receive(self, sock: Any, endpoint: Endpoint, frames: list[ServerFrame]) -> None:
        for _ in range(FRAMES_A_TURN):
            try:
                parts = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            last = parts[-1]
            try:
                user, address = last.get("User-Id"), last.get("Peer-Address")
            except zmq.ZMQError:
                continue
            # A message of several parts is no frame of ours: an empty one stands for it, which ends the session.
            body: Buffer = b"" if len(parts) != 2 else last.bytes if endpoint is Endpoint.CONTROL else last.buffer
            frames.append(ServerFrame(endpoint, parts[0].bytes, str(user), str(address), body))

    def _answer_zap(self) -> None:
        for _ in range(FRAMES_A_TURN):
            try:
                message = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # envelope (routing id, empty), then version, request id, domain, address, routing id, mechanism,
            # credentials (RFC 27)
            if len(message) < 9 or message[2] != b"1.0":
                continue
            request, domain, address, mechanism, credentials = (
                message[3],
                message[4],
                message[5].decode(),
                message[7],
                message[8:],
            )
            user = self._judge(domain, mechanism, credentials, address)
            status, text = (b"400", b"refused") if user is None else (b"200", b"")
            self._zap.send_multipart([*message[:2], b"1.0", request, status, text, (user or "").encode(), b""])

    def _judge(self, domain: bytes, mechanism: bytes, credentials: list[bytes], address: str) -> str | None:
        if (domain, mechanism, len(credentials)) == (_CONTROL_DOMAIN, b"CURVE", 1):
            try:
                key = PublicKey(credentials[0])
            except KeyFileError:
                return None
            user = self._gate.admit_key(key, address)
            who, text = f"{address}, key {key}", "this key is not on the list of authorized clients"
        elif (domain, mechanism, len(credentials)) == (_DATA_DOMAIN, b"PLAIN", 2) and credentials[0] == PLAIN_USER:
            user = self._gate.admit_ticket(_from_hex(credentials[1]), address)
            who, text = f"{address}, a data connection", "the ticket is unknown, used or too old"
        else:
            user, who, text = None, address, "neither a key nor a ticket"
        if user is None and not self._testing:
            self._refusals.refused(address, who, RefusalCode.NOT_AUTHORIZED, text)
        return user

    def _watch(self) -> None:
        """Handshakes that fail before ZAP is asked: the server's key in the client's join string is not ours."""
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_ACCEPTED:
                self._accepted[value] = _peer_name(value)
            elif kind in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                # Only a command that does not decrypt is worth a line; every port scan breaks off.
                self._failed_protocol = kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            elif kind == zmq.EVENT_DISCONNECTED:
                who = self._accepted.pop(value, "unknown address")
                if self._failed_protocol and not self._testing:
                    self._refusals.refused(who, who, "handshake", _OTHER_KEY)
                self._failed_protocol = False

    def _self_test(self) -> None:
        """Raises ConfigError unless a random key and a random ticket are refused."""
        self._testing = True
        host = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        for what, port in (("key", self.control_port), ("ticket", self.data_port)):
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stranger = context.socket(zmq.DEALER)
            common_options(stranger, max_frame=1024, ipv6=":" in host)
            stranger.setsockopt(zmq.RECONNECT_IVL, -1)
            if what == "key":
                identity = Identity.generate()
                stranger.setsockopt(zmq.CURVE_SERVERKEY, self._identity.public.raw)
                stranger.setsockopt(zmq.CURVE_PUBLICKEY, identity.public.raw)
                stranger.setsockopt(zmq.CURVE_SECRETKEY, identity.secret)
            else:
                stranger.setsockopt(zmq.PLAIN_USERNAME, PLAIN_USER)
                stranger.setsockopt(zmq.PLAIN_PASSWORD, os.urandom(32).hex().encode())
            monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
            try:
                stranger.connect(f"tcp://{bracketed(host)}:{port}")
                outcome = self._outcome(monitor)
            finally:
                stranger.disable_monitor()
                monitor.close(0)
                context.destroy(0)
            if outcome != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise ConfigError(
                    f"the start-up self-test failed: a random {what} was not refused at {host}:{port}; the server does not start"
                )
        self._testing = False

    def _outcome(self, monitor: zmq.Socket[bytes]) -> int | None:
        deadline = time.monotonic() + _SELF_TEST_SECONDS
        while time.monotonic() < deadline:
            if self._zap.poll(10):
                self._answer_zap()
            if monitor.poll(0):
                event: int = parse_monitor_message(monitor.recv_multipart())["event"]
                return event
        return None


def _from_hex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return b""


def _peer_name(descriptor: int) -> str:
    """The address behind a socket that ZeroMQ owns; it may be closed by now, and is left as it is."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return "unknown address"
    try:
        name = sock.getpeername()
        # Closed and opened again as something else by now, the descriptor may have a name of another form.
        return str(name[0]) if isinstance(name, tuple) else "unknown address"
    except OSError:
        return "unknown address"
    finally:
        sock.detach()
