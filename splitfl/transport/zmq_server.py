"""The server's sockets: a ROUTER with CURVE for control, a ROUTER with tickets for data, both behind a ZAP handler.

Without a ZAP handler CURVE lets every stranger in, so ``bind`` ends with a test: a random key and a random ticket must
be refused.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitfl.errors import ConfigError
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.keys import Identity
from splitfl.protocol.message import MAX_CONTROL_BYTES
from splitfl.protocol.messages import RefusalCode
from splitfl.transport.base import Cut, Endpoint, Gate, Sent, ServerFrame
from splitfl.transport.door import network_of
from splitfl.transport.readiness import Readiness
from splitfl.transport.refusals import RefusalLog
from splitfl.transport.zap import CONTROL_DOMAIN, DATA_DOMAIN, Zap
from splitfl.transport.zmq_common import (
    CONTROL_FRAMES_QUEUED,
    Wake,
    bracketed,
    common_options,
    curve_client,
    curve_server,
    data_frame_limit,
    data_options,
    keep_large_buffers,
    make_frame,
    never_full,
    plain_client,
)
from splitfl.transport.zmq_endpoint import ListeningEndpoint

_SELF_TEST_SECONDS = 5.0
_LOOK_SECONDS = 0.25
# Connections that have not said anything yet, besides one of each client that may be expected; each may hold one frame of its
# endpoint in memory.
_HALF_OPEN_CONTROL, _HALF_OPEN_DATA = 256, 48

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
        self._readiness = Readiness(self._wake)
        self._refusals = RefusalLog(lambda who, code, text: None)
        self._cut: Cut = lambda endpoint, peer: None
        self._endpoints: list[ListeningEndpoint] = []
        self._zap: Zap | None = None
        self._testing = False
        self._next_look = 0.0
        self.control_port = self.data_port = 0
        keep_large_buffers()

    @property
    def data_address(self) -> str:
        return f"tcp://{self._advertise}" if self._advertise else f"tcp://*:{self.data_port}"

    def on_refused(self, report: Callable[[str, str, str], None]) -> None:
        self._refusals = RefusalLog(report)

    def on_cut(self, report: Cut) -> None:
        self._cut = report

    def bind(self, gate: Gate, frame_bytes: int, *, window: int, curve: bool = False) -> None:
        self._curve = curve
        self._zap = Zap(self._context, gate, self._refuse)
        self._readiness.register(self._zap.socket)
        data_frame = data_frame_limit(frame_bytes, curve=curve)
        self._control = ListeningEndpoint(
            Endpoint.CONTROL,
            functools.partial(self._router, CONTROL_DOMAIN, affinity=1, max_frame=MAX_CONTROL_BYTES, curve=True),
            half_open=_HALF_OPEN_CONTROL,
            expected=functools.partial(gate.expected, Endpoint.CONTROL),
            frame=MAX_CONTROL_BYTES,
            queued=CONTROL_FRAMES_QUEUED,
            curve=True,
            refuse=self._flood,
        )
        self._data = ListeningEndpoint(
            Endpoint.DATA,
            functools.partial(self._router, DATA_DOMAIN, affinity=2, max_frame=data_frame, curve=curve),
            half_open=_HALF_OPEN_DATA,
            expected=functools.partial(gate.expected, Endpoint.DATA),
            frame=data_frame,
            queued=-(-window // frame_bytes),
            curve=curve,
            refuse=self._flood,
        )
        for endpoint, port in ((self._control, self._ports[0]), (self._data, self._ports[1])):
            self._endpoints.append(endpoint)
            endpoint.bind(self._host, port)
            self._register(endpoint)
        self.control_port, self.data_port = self._control.port, self._data.port
        self._self_test()

    def poll(self, timeout: float) -> list[ServerFrame]:
        now = time.monotonic()
        looking = now >= self._next_look
        if looking:
            self._next_look = now + _LOOK_SECONDS
            for endpoint in self._endpoints:
                endpoint.look()
        ready = self._readiness.poll(timeout)
        for endpoint in self._endpoints:
            if looking or endpoint.monitor in ready:
                self._watch(endpoint)
        assert self._zap is not None
        if self._zap.socket in ready:
            self._zap.answer()
        frames: list[ServerFrame] = []
        for endpoint in self._endpoints:
            drained = endpoint.receive(frames) if endpoint.socket in ready else True
            if not endpoint.is_to_be_judged:
                continue
            flooders, flooded = endpoint.flooders(drained=drained)
            for connection in flooders:
                who = f"{connection.address}, a {endpoint.kind.value} connection"
                self._flood(connection.network, who, "a message without an end: the connection is cut")
                self._cut(endpoint.kind, connection.peer)
            if flooded:
                self._reopen(endpoint)
        return frames

    def send_control(self, peer: bytes, frame: bytes) -> Sent:
        self._readiness.touch(self._control.socket)
        return self._control.send(peer, frame)

    def make_frame(self, size: int) -> bytearray | memoryview:
        return make_frame(size)

    def send_data(self, peer: bytes, frame: Buffer) -> Sent:
        self._readiness.touch(self._data.socket)
        return self._data.send(peer, frame)

    def hang_up(self, endpoint: Endpoint, peer: bytes) -> None:
        for each in self._endpoints:
            if each.kind is endpoint:
                each.hang_up(peer)

    def connected(self, user: str) -> int:
        return sum(each.user == user for each in self._control.connections)

    def wake(self) -> None:
        self._wake.set()

    def close(self, linger: float) -> None:
        milliseconds = int(linger * 1000)
        for endpoint in self._endpoints:
            endpoint.close(milliseconds)
        if self._zap is not None:
            self._zap.socket.close(0)
        self._context.destroy(milliseconds)
        self._wake.close()

    def _router(self, domain: bytes, *, affinity: int, max_frame: int, curve: bool) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.ROUTER)
        common_options(sock, max_frame=max_frame, ipv6=":" in self._host)
        # MANDATORY: a ROUTER otherwise drops in silence what it cannot deliver.
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ZAP_DOMAIN, domain)
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        sock.setsockopt(zmq.AFFINITY, affinity)
        never_full(sock)
        if domain == DATA_DOMAIN:
            data_options(sock)
        if curve:
            curve_server(sock, self._identity)
        else:
            sock.setsockopt(zmq.PLAIN_SERVER, 1)
        return sock

    def _register(self, endpoint: ListeningEndpoint) -> None:
        for sock in (endpoint.socket, endpoint.monitor):
            self._readiness.register(sock)

    def _reopen(self, endpoint: ListeningEndpoint) -> None:
        """The last resort against what ZeroMQ holds: all of it goes, and every connection; whoever is honest comes again."""
        self._flood("several clients", "several clients", f"the {endpoint.kind.value} endpoint is flooded: opened anew")
        for sock in (endpoint.socket, endpoint.monitor):
            self._readiness.unregister(sock)
        endpoint.reopen()
        self._register(endpoint)
        self._cut(endpoint.kind, None)

    def _refuse(self, address: str, who: str, text: str, at_data: bool) -> None:
        endpoint = self._data if at_data else self._control
        endpoint.refused(address)
        if not self._testing:
            # Counted once more: it has cost a whole handshake, and may be gone before its connection was looked at.
            endpoint.door.knock(network_of(address))
            self._refusals.refused(address, who, RefusalCode.NOT_AUTHORIZED, text, once=at_data)

    def _flood(self, whose: str, who: str, text: str) -> None:
        # Apart from its refused keys: five of those would hide it.
        self._refusals.refused(whose, who, "flood", text, kind=text)

    def _watch(self, endpoint: ListeningEndpoint) -> None:
        """Handshakes that fail before ZAP is asked: the server's key in the client's join string is not ours."""
        self._readiness.touch(endpoint.monitor)
        for who in endpoint.watch():
            if not self._testing and endpoint.kind is Endpoint.CONTROL:
                self._refusals.refused(who, who, "handshake", _OTHER_KEY)

    def _self_test(self) -> None:
        """Raises ConfigError unless a random key and a random ticket are refused."""
        self._testing = True
        host = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        for what, port in (("key", self.control_port), ("ticket", self.data_port)):
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stranger = context.socket(zmq.DEALER)
            common_options(stranger, max_frame=1024, ipv6=":" in host)
            stranger.setsockopt(zmq.RECONNECT_IVL, -1)
            if what == "key" or self._curve:
                curve_client(stranger, self._identity.public, Identity.generate())
            else:
                plain_client(stranger, os.urandom(32))
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
        assert self._zap is not None
        while time.monotonic() < deadline:
            if self._zap.socket.poll(10):
                self._zap.answer()
            if monitor.poll(0):
                event: int = parse_monitor_message(monitor.recv_multipart())["event"]
                return event
        return None
