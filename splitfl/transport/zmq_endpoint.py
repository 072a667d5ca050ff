"""One listening socket of the server: its frames, who is connected to it, and what strangers and floods may cost.

ZeroMQ holds an unfinished message of several parts without a bound, and before Python sees anything of it. So each connection's
account is kept from both ends: what the kernel says has been read from it, less what ZeroMQ has given out. Whoever lets more than
a few frames pile up in between sends a message without end, and is cut.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitfl.errors import ConfigError
from splitfl.protocol.ciphers import Buffer
from splitfl.transport.accept_filter import shut_out
from splitfl.transport.base import Endpoint, Sent, ServerFrame
from splitfl.transport.connections import Connection, Connections, listener
from splitfl.transport.door import Door, excess
from splitfl.transport.zmq_common import BYTES_A_TURN, CURVE_BYTES, FRAMES_A_TURN, bracketed, send_frame

_EVENTS_A_TURN = 512
# Parts of one message that are passed over before the other sockets are looked at again.
_PARTS_A_TURN = 4096
# Messages beyond two of each connection that are given out before one that got none is said to have had no turn: a connection's
# first frame comes up a moment after it was read.
_TURNS = 64
# Forgiven at each look: ZMTP heartbeats of a peer, and their answers, are read from a connection and given out to nobody.
_FORGIVEN = 16
_REBIND_SECONDS = 5.0
_SLACK = 2 * 2**20
#: Bytes beyond one frame each that ZeroMQ may hold over all connections of an endpoint, each of which is within its own bound.
#: The one frame is not counted: hundreds of honest clients on slow links have one under way each.
TOTAL_HELD = 256 * 2**20

_numbers = itertools.count()
_MORE_COMES = int(zmq.SNDMORE | zmq.NOBLOCK)
# Not EVENT_HANDSHAKE_FAILED_PROTOCOL: libzmq (4.3.5) tells of a CURVE frame that does not decrypt by it as well, which spoils its
# own errno: it then takes the frame for one that it has no room for, and never reads or closes that connection again.
_WATCHED = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
# A connection whose handshake was refused is gone by then, seconds; so many addresses of such are remembered.
_REFUSED_SECONDS, _MOST_REFUSED = 1.0, 4096
# Who was let in says something at once. A connection that has not by then, seconds since it was accepted, is cut.
_SILENT_SECONDS = 20.0


class ListeningEndpoint:
    """``make`` gives a fresh socket, ready to bind. ``half_open``: connections that have not said anything yet, besides those of
    ``expected`` clients; ``frame``: bytes of its largest frame; ``queued``: frames that an honest client may have waiting until
    they are taken; ``curve``: whether they come in CURVE.
    """

    def __init__(
        self,
        kind: Endpoint,
        make: Callable[[], zmq.Socket[bytes]],
        *,
        half_open: int,
        expected: Callable[[], int],
        frame: int,
        queued: int,
        curve: bool,
        refuse: Callable[[str, str, str], None],
    ) -> None:
        self.kind, self._make, self._half_open, self._expected, self._refuse = kind, make, half_open, expected, refuse
        self._frame = frame
        self.bound, self._queued, self.total = 2 * frame + _SLACK, queued * frame, TOTAL_HELD
        self._around = CURVE_BYTES if curve else 0
        self.door, self.silent_seconds = Door(), _SILENT_SECONDS
        self._broke_off = False
        self._refused: dict[str, float] = {}  # by address: when a handshake last ended with a no
        self._blocked: list[str] = []
        self._skipping = False
        self.is_to_be_judged = False  # what the last look has found
        self._messages = 0  # given out, over all connections

    def bind(self, host: str, port: int, *, patience: float = 0.0) -> None:
        """Listens. ``patience``: seconds that whoever had the port before may take to let go of it. Raises ConfigError."""
        self.socket = self._make()
        self.monitor = _monitor(self.socket)
        self.connections = Connections()
        self._listener: int | None = None
        self._kept_away: list[str] = []  # by this listener
        self._skipping = self.is_to_be_judged = False
        deadline = time.monotonic() + patience
        while True:
            try:
                self.socket.bind(f"tcp://{bracketed(host)}:{port or '*'}")
                break
            except zmq.ZMQError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                raise ConfigError(
                    f"cannot listen at {host}:{port}: {error.strerror.lower()}; choose another port or host"
                ) from None
        _give_out_ids(self.socket)
        endpoint: bytes = self.socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        self._host, self.port = host, int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def close(self, milliseconds: int) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(milliseconds)

    def reopen(self) -> None:
        """Closes, with everything that ZeroMQ holds for it, and listens at the same port again."""
        self.close(0)
        self.bind(self._host, self.port, patience=_REBIND_SECONDS)

    # --- frames ---

    def send(self, peer: bytes, frame: Buffer) -> Sent:
        try:
            # The ROUTER judges the peer on the first part: after it the second cannot fail.
            self.socket.send(peer, _MORE_COMES)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        send_frame(self.socket, frame)
        return Sent.SENT

    def receive(self, frames: list[ServerFrame]) -> bool:
        """Takes frames; True when no more are there."""
        if self._skipping and not self._skip():
            return False
        taken = 0
        for _ in range(FRAMES_A_TURN):
            if taken >= BYTES_A_TURN:
                return False
            try:
                peer = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            part: Any = self.socket.recv(copy=False)
            self._messages += 1
            self._skipping = part.more
            self._count(part, peer)
            taken += len(part)
            frame = self._taken(part, peer)
            if frame is not None:
                frames.append(frame)
            if self._skipping and not self._skip():
                return False
        return False

    def _taken(self, part: Any, peer: bytes) -> ServerFrame | None:
        """None where ZeroMQ does not say whose it is."""
        # A message of several parts is no frame of ours: an empty one stands for it, which ends the session.
        body: Buffer = b"" if part.more else part.bytes if self.kind is Endpoint.CONTROL else part.buffer
        try:
            return ServerFrame(self.kind, peer, part.get("User-Id"), part.get("Peer-Address"), body)
        except zmq.ZMQError:
            return None

    def _count(self, part: Any, peer: bytes) -> None:
        try:
            connection = self.connections.find(int(part.get("__fd")))
        except zmq.ZMQError:
            return
        if connection is not None:
            connection.half_open = connection.is_silent = False
            # Not of one that had this number before, from elsewhere, and is gone: nobody is cut for another.
            if peer and peer != connection.peer and _without_scope(part.get("Peer-Address")) == connection.address:
                connection.peer, connection.user = peer, part.get("User-Id")
            size = len(part) + self._around
            connection.handed_on += size + (2 if size < 256 else 9)

    def _skip(self) -> bool:
        """Passes over the further parts of a message, some at a time; True at its end."""
        for _ in range(_PARTS_A_TURN):
            try:
                part: Any = self.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            self._count(part, b"")
            if not part.more:
                self._skipping = False
                return True
        return False

    # --- who is connected ---

    def watch(self) -> list[str]:
        """Follows what happened to connections; the addresses of those that broke the handshake off as no client does."""
        failed = []
        for _ in range(_EVENTS_A_TURN):
            if not self.monitor.poll(0):
                break
            event = parse_monitor_message(self.monitor.recv_multipart())
            kind, value = event["event"], int(event["value"])
            if kind == zmq.EVENT_LISTENING:
                self._listener = value
            elif kind == zmq.EVENT_ACCEPTED:
                connection = self.connections.accepted(value)
                if not self.door.knock(connection.network):
                    self._cut(connection)
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._broke_off = True
            elif kind == zmq.EVENT_DISCONNECTED:
                # Only a command that does not decrypt is worth a line; every port scan breaks off.
                gone, broke_off = self.connections.gone(value), self._broke_off
                self._broke_off = False
                if gone is not None and gone.is_silent and gone.port and not broke_off and not self._was_refused(gone.address):
                    failed.append(gone.address)
        self._cut_the_silent()
        waiting = {each.number: each.network for each in self.connections if each.half_open}
        for number in excess(waiting, self._half_open + self._expected()):
            connection_ = self.connections.find(number)
            if connection_ is not None:
                self._cut(connection_)
        self._shut_out()
        return failed

    def _cut_the_silent(self) -> None:
        oldest = time.monotonic() - self.silent_seconds
        for connection in self.connections:
            if connection.since > oldest:
                break  # they stand in the order in which they were accepted
            if connection.half_open:
                self._cut(connection)

    def hang_up(self, peer: bytes) -> None:
        """Cuts the connection of this peer, if it stands."""
        for connection in self.connections:
            if connection.peer == peer:
                self._cut(connection)

    def refused(self, address: str) -> None:
        """The handshake of a connection from there ends with a no, which is reported already."""
        if len(self._refused) >= _MOST_REFUSED:
            self._refused.clear()
        self._refused[_without_scope(address)] = time.monotonic()

    def _was_refused(self, address: str) -> bool:
        return time.monotonic() - self._refused.get(address, -_REFUSED_SECONDS) < _REFUSED_SECONDS

    def _cut(self, connection: Connection) -> None:
        connection.half_open = connection.is_silent = False
        self.connections.cut(connection)

    def _shut_out(self) -> None:
        """Tells the kernel who is to be kept away for a while."""
        blocked = self.door.blocked()
        for network in set(blocked) - set(self._blocked):
            self._refuse(network, network, f"too many connections to the {self.kind.value} endpoint: shut out for a while")
        self._blocked = blocked
        if blocked == self._kept_away or self._listener is None:
            return
        self._kept_away = blocked
        with listener(self._listener) as sock:
            if sock is not None:
                shut_out(sock, blocked)

    # --- what ZeroMQ holds ---

    def look(self) -> None:
        """Learns what ZeroMQ has read of each connection, to be held against what it gives out from now on."""
        self.is_to_be_judged = self.connections.look()
        for each in self.connections:
            if each.held <= self.bound or each.handed_on != each.handed_on_before:
                each.waits_since = None
            elif each.waits_since is None:
                each.waits_since = self._messages
            each.handed_on_before = each.handed_on
        self._shut_out()

    def flooders(self, *, drained: bool) -> tuple[list[Connection], bool]:
        """Cuts and returns the connections of which ZeroMQ holds more than an honest one leaves there; and whether it holds too
        much over all others together. ``drained``: it has just given out all it could. To be called only while
        ``is_to_be_judged`` is set.
        """
        self.is_to_be_judged = not drained
        bound = self.bound if drained else self.bound + self._queued
        found = [each for each in self.connections if each.held > bound or (not drained and self._has_no_turn(each))]
        for connection in found:
            self._cut(connection)
            connection.handed_on = connection.received
        if drained:
            for connection in self.connections:
                connection.handed_on += min(_FORGIVEN, connection.held)
        return found, drained and sum(max(0, each.held - self._frame) for each in self.connections) > self.total

    def _has_no_turn(self, connection: Connection) -> bool:
        """Whether ZeroMQ holds too much of this connection, and nothing whole: it gives out of each in turn, and whole
        frames would have been served by now.
        """
        if connection.waits_since is None or connection.handed_on != connection.handed_on_before:
            return False
        return self._messages - connection.waits_since > 2 * len(self.connections) + _TURNS


def _without_scope(address: str) -> str:
    """As Python names a connection's other end: ZeroMQ adds the interface to link-local addresses of IPv6."""
    return address.partition("%")[0]


def _give_out_ids(sock: zmq.Socket[bytes]) -> None:
    """Every peer of a ROUTER that listens is known by an id that libzmq counts, also one that says an id of its own.

    By itself libzmq lets peers choose, and where it counts up to an id that one holds, it fails an assertion, which ends the
    process. It begins at a number that is the same in every process (4.3.5 draws it without a seed), so two connections would do.
    Set once the socket is bound, ROUTER_RAW only says who chooses ids: what listens has its options by then, and speaks ZMTP.
    From now on an empty frame would end the connection that it is sent to, and a second part go nowhere; we send neither.
    """
    sock.setsockopt(zmq.ROUTER_RAW, 1)


def _monitor(sock: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """What happens to the connections of a socket. Without a bound: ZeroMQ's I/O thread would wait for room in it, so that all
    connections stand still, and under a lock that closing needs, so that a server amid a flood would never end.
    """
    address = f"inproc://splitfl.monitor.{next(_numbers)}"
    sock.monitor(address, _WATCHED)
    monitor: zmq.Socket[bytes] = sock.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(address)
    return monitor
