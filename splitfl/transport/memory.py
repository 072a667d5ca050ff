"""The in-memory twin of the network: the same gates, limits and failures, without sockets.

A :class:`MemoryNetwork` stands for the network between one server and its clients; a test may tap it to alter frames.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable

from splitfl.errors import LocalProtocolError, SessionLost
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.keys import Identity, PublicKey
from splitfl.protocol.message import MAX_CONTROL_BYTES
from splitfl.transport import wording
from splitfl.transport.base import ClientFrame, Cut, Endpoint, Gate, Sent, ServerFrame

QUEUE_FRAMES = 16  # data frames under way to one peer before it is full, as the sockets' high-water mark

# (endpoint, from_client, frame) -> the frames to deliver in its place
Tap = Callable[[Endpoint, bool, bytes], list[bytes]]


class _Link:
    """One client's connections, seen from both ends."""

    def __init__(self, peer: bytes, user: str) -> None:
        self.peer, self.control_user, self.data_user = peer, user, ""
        self.client = _Mailbox()
        self.to_server = 0  # data frames the server has not taken yet
        self.to_client = 0
        self.up = True
        self.is_silent = True  # nothing of it has been taken on the control endpoint


class _Mailbox:
    def __init__(self) -> None:
        self.frames: deque[tuple[_Link | None, Endpoint, Buffer]] = deque()
        self.condition = threading.Condition()
        self.woken = False

    def put(self, link: _Link | None, endpoint: Endpoint, frame: Buffer) -> None:
        with self.condition:
            self.frames.append((link, endpoint, frame))
            self.condition.notify_all()

    def wake(self) -> None:
        with self.condition:
            self.woken = True
            self.condition.notify_all()

    def take(self, timeout: float) -> list[tuple[_Link | None, Endpoint, Buffer]]:
        with self.condition:
            if not self.frames and not self.woken:
                self.condition.wait(timeout)
            self.woken = False
            taken = list(self.frames)
            self.frames.clear()
            return taken


class MemoryNetwork:
    """What one server and its clients share. ``tap`` sees, and may replace, every frame."""

    def __init__(self) -> None:
        self.tap: Tap | None = None
        self.server: MemoryServerTransport | None = None
        self.lock = threading.RLock()

    def carried(self, endpoint: Endpoint, from_client: bool, frame: Buffer) -> list[Buffer]:
        """The frames that arrive when ``frame`` is sent."""
        if self.tap is None:
            return [frame]
        return list(self.tap(endpoint, from_client, bytes(frame)))


class MemoryServerTransport:
    """The server's side. Bound to ``port`` of its network."""

    def __init__(self, network: MemoryNetwork, identity: Identity, *, port: int = 1, data_port: int = 2) -> None:
        self.network, self.identity = network, identity
        self.control_port, self.data_port = port, data_port
        self.data_address = f"tcp://*:{data_port}"
        self.gate: Gate | None = None
        self._mailbox = _Mailbox()
        self._links: dict[bytes, _Link] = {}
        self._numbers = itertools.count(1)
        self._report: Callable[[str, str, str], None] = lambda who, code, text: None
        self._frame_limit = 0
        # The gate belongs to the I/O thread: who knocks waits here to be let in.
        self._knocks: deque[_Knock] = deque()

    def on_refused(self, report: Callable[[str, str, str], None]) -> None:
        self._report = report

    def on_cut(self, report: Cut) -> None:
        """There is nothing here that floods could fill."""

    def bind(self, gate: Gate, frame_bytes: int, *, window: int, curve: bool = False) -> None:
        self.gate, self._frame_limit = gate, frame_bytes
        with self.network.lock:
            self.network.server = self

    def knock(self, ask: Callable[[Gate], str | None], who: str, timeout: float) -> str | None:
        """A client asks to be let in; answered by the I/O thread in ``poll``. Raises TimeoutError."""
        knock = _Knock(ask, who)
        self._knocks.append(knock)
        self._mailbox.wake()
        if not knock.answered.wait(timeout):
            raise TimeoutError
        return knock.user

    def attach(self, user: str) -> _Link:
        with self.network.lock:
            link = _Link(next(self._numbers).to_bytes(5, "big"), user)
            self._links[link.peer] = link
            return link

    def detach(self, link: _Link) -> None:
        """The connection is gone, which the client notices at once, as by a socket."""
        with self.network.lock:
            link.up = False
            self._links.pop(link.peer, None)
        link.client.wake()

    def deliver(self, link: _Link, endpoint: Endpoint, frame: Buffer) -> None:
        """From a client. A frame over the limit cuts the connection, as MAXMSGSIZE does."""
        if len(frame) > (MAX_CONTROL_BYTES if endpoint is Endpoint.CONTROL else self._frame_limit):
            self.detach(link)
            return
        for carried in self.network.carried(endpoint, True, frame):
            if endpoint is Endpoint.DATA:
                with self.network.lock:
                    link.to_server += 1
            self._mailbox.put(link, endpoint, carried)

    def poll(self, timeout: float) -> list[ServerFrame]:
        if self.gate is None:
            raise LocalProtocolError("bind() comes before poll()")
        frames = []
        taken = self._mailbox.take(0 if self._knocks else timeout)
        while self._knocks:
            self._knocks.popleft().answer(self.gate, self._report)
        for link, endpoint, frame in taken:
            assert link is not None
            if endpoint is Endpoint.DATA:
                with self.network.lock:
                    link.to_server -= 1
                link.client.wake()
            else:
                link.is_silent = False
            user = link.control_user if endpoint is Endpoint.CONTROL else link.data_user
            frames.append(ServerFrame(endpoint, link.peer, user, "memory", frame))
        return frames

    def send_control(self, peer: bytes, frame: bytes) -> Sent:
        return self._send(peer, Endpoint.CONTROL, frame)

    def make_frame(self, size: int) -> bytearray:
        return bytearray(size)

    def send_data(self, peer: bytes, frame: Buffer) -> Sent:
        link = self._links.get(peer)
        if link is not None and link.to_client >= QUEUE_FRAMES:
            return Sent.FULL
        return self._send(peer, Endpoint.DATA, frame)

    def _send(self, peer: bytes, endpoint: Endpoint, frame: Buffer) -> Sent:
        link = self._links.get(peer)
        if link is None:
            return Sent.GONE
        for carried in self.network.carried(endpoint, False, frame):
            if endpoint is Endpoint.DATA:
                with self.network.lock:
                    link.to_client += 1
            link.client.put(None, endpoint, carried)
        return Sent.SENT

    def hang_up(self, endpoint: Endpoint, peer: bytes) -> None:
        link = self._links.get(peer)
        if link is not None:
            self.detach(link)

    def connected(self, user: str) -> int:
        with self.network.lock:
            return sum(link.control_user == user and not link.is_silent for link in self._links.values())

    def wake(self) -> None:
        self._mailbox.wake()

    def close(self, linger: float) -> None:
        with self.network.lock:
            if self.network.server is self:
                self.network.server = None
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.up = False
            link.client.wake()


class _Knock:
    def __init__(self, ask: Callable[[Gate], str | None], who: str) -> None:
        self._ask, self._who = ask, who
        self.user: str | None = None
        self.answered = threading.Event()

    def answer(self, gate: Gate, report: Callable[[str, str, str], None]) -> None:
        self.user = self._ask(gate)
        if self.user is None:
            report(self._who, "not-authorized", "refused at the gate")
        self.answered.set()


class MemoryClientTransport:
    """The client's side."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._server: MemoryServerTransport | None = None
        self._link: _Link | None = None
        self._early = _Mailbox()  # wakes that come before there is a link
        self._frame_limit = 0

    def set_frame_limit(self, frame_bytes: int) -> None:
        self._frame_limit = frame_bytes

    def connect_control(self, host: str, port: int, server_key: PublicKey, identity: Identity, timeout: float) -> None:
        server = self._network.server
        if server is None or server.control_port != port:
            raise wording.nothing_listens(host, port)
        if server_key != server.identity.public:
            raise wording.other_key(host, port)
        key = identity.public
        try:
            user = server.knock(lambda gate: gate.admit_key(key, "memory"), f"memory, key {key}", timeout)
        except TimeoutError:
            raise wording.silent(host, port, timeout) from None
        if user is None:
            raise wording.not_listed(key)
        self._server, self._link = server, server.attach(user)

    def connect_data(self, host: str, port: int, ticket: bytes, timeout: float, *, curve: PublicKey | None = None) -> None:
        server, link = self._server, self._link
        assert server is not None
        assert link is not None
        if port != server.data_port:
            raise wording.data_unreachable(host, port, "nothing listens there")
        shown = ticket if curve is None else Identity.from_secret(ticket).public.raw
        try:
            user = server.knock(lambda gate: gate.admit_ticket(shown, "memory"), "memory, a data connection", timeout)
        except TimeoutError:
            raise wording.data_unreachable(host, port, "it stayed silent") from None
        if user is None:
            raise wording.ticket_refused()
        link.data_user = user

    def send_control(self, frame: bytes) -> None:
        server, link = self._up()
        server.deliver(link, Endpoint.CONTROL, frame)

    def make_frame(self, size: int) -> bytearray:
        return bytearray(size)

    def send_data(self, frame: Buffer) -> bool:
        server, link = self._up()
        if link.to_server >= QUEUE_FRAMES:
            return False
        server.deliver(link, Endpoint.DATA, frame)
        return True

    def poll(self, timeout: float) -> list[ClientFrame]:
        if self._link is None:
            self._early.take(timeout)
            return []
        taken = self._link.client.take(timeout if self._link.up else 0)
        if not taken and not self._link.up:
            raise SessionLost("the connection to the server broke")
        for _, endpoint, frame in taken:
            if endpoint is Endpoint.DATA:
                with self._network.lock:
                    self._link.to_client -= 1
                if self._server is not None:
                    self._server.wake()
                if len(frame) > self._frame_limit:
                    raise SessionLost("the server sent a frame over the limit")
        return [ClientFrame(endpoint, frame) for _, endpoint, frame in taken]

    def wake(self) -> None:
        self._early.wake()
        if self._link is not None:
            self._link.client.wake()

    def close(self, linger: float) -> None:
        if self._server is not None and self._link is not None:
            self._server.detach(self._link)

    def _up(self) -> tuple[MemoryServerTransport, _Link]:
        if self._server is None or self._link is None or not self._link.up:
            raise SessionLost("the connection to the server broke")
        return self._server, self._link
