"""The TCP connections of one listening endpoint, as ZeroMQ's monitor tells of them.

ZeroMQ owns the file descriptors and may close one at any moment, so each is looked at through a duplicate, and only if it still
is the connection that was accepted under its number.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from splitfl.transport.door import network_of

_UNKNOWN = ("unknown address", 0)
_BYTES_RECEIVED = slice(128, 136)  # tcpi_bytes_received in struct tcp_info, since Linux 4.1


@dataclass(eq=False)
class Connection:
    """``since``: when it was accepted, monotonic seconds; ``handed_on``: bytes of its frames that ZeroMQ has given out; ``peer``,
    ``user``: their routing id and who the gate said it is, once one has come; ``is_silent``: none has come, and nobody here has
    cut it; ``waits_since``: how many messages of all connections had been given out when this one was first seen to hold too much
    and to get no turn, None where it is not so.
    """

    number: int
    address: str
    port: int
    since: float = field(default_factory=time.monotonic)
    half_open: bool = True
    is_silent: bool = True
    handed_on: int = 0
    peer: bytes = b""
    user: str = ""
    received: int = 0  # by ZeroMQ, when last looked
    handed_on_before: int = 0  # when last looked
    waits_since: int | None = None

    @property
    def network(self) -> str:
        return network_of(self.address)

    @property
    def held(self) -> int:
        """Bytes that ZeroMQ had, when last looked, and has not given out since."""
        return max(0, self.received - self.handed_on)


class Connections:
    """By file descriptor, in the order in which they were accepted."""

    def __init__(self) -> None:
        self._all: dict[int, Connection] = {}

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def find(self, number: int) -> Connection | None:
        return self._all.get(number)

    def accepted(self, number: int) -> Connection:
        """A new connection; of one that is gone already no address is known."""
        self._all.pop(number, None)
        with _duplicate(number) as sock:
            address, port = _name(sock)
        self._all[number] = Connection(number, address, port)
        return self._all[number]

    def gone(self, number: int) -> Connection | None:
        return self._all.pop(number, None)

    def cut(self, connection: Connection) -> bool:
        """Ends a connection; ZeroMQ notices and forgets it."""
        with _duplicate(connection.number) as sock:
            if not _is(connection, sock):
                return False
            assert sock is not None
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            return True

    def look(self) -> bool:
        """Learns how much ZeroMQ has read of each connection; False where the system does not say."""
        if not sys.platform.startswith("linux"):
            return False
        for connection in self:
            with _duplicate(connection.number) as sock:
                if _is(connection, sock):
                    assert sock is not None
                    connection.received = _read_so_far(sock)
                    if connection.handed_on > max(0, connection.received):
                        # Frames of the one that had this number before, closed while they were queued, count for nobody.
                        connection.handed_on = min(connection.handed_on, _read_so_far(sock, most=True))
        return True


def _read_so_far(sock: socket.socket, *, most: bool = False) -> int:
    """Bytes that have come in on a connection, less those that nobody has read yet: at least so many, or at ``most``. The kernel
    is asked for the two one after the other, and more may arrive in between.
    """
    try:
        # What arrives in between is taken for unread, or, where the most is asked for, for read. The other way round an honest
        # peer would be cut where this thread has to wait for the interpreter's lock between the two.
        return -_unread(sock) + _come_in(sock) if most else _come_in(sock) - _unread(sock)
    except OSError:
        return sys.maxsize if most else 0


def _come_in(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int.from_bytes(info[_BYTES_RECEIVED], sys.byteorder)


def _unread(sock: socket.socket) -> int:
    import fcntl
    import termios

    size: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0]
    return size


@contextlib.contextmanager
def _duplicate(number: int) -> Iterator[socket.socket | None]:
    if os.name != "posix":  # elsewhere a socket is no file descriptor
        yield None
        return
    try:
        duplicate = os.dup(number)
    except OSError:
        yield None
        return
    try:
        sock = socket.socket(fileno=duplicate)
    except OSError:  # by now a file, say
        os.close(duplicate)
        yield None
        return
    with sock:
        yield sock


def _name(sock: socket.socket | None) -> tuple[str, int]:
    try:
        name = sock.getpeername() if sock is not None else None
    except OSError:
        name = None
    # Closed and opened again as something else by now, the descriptor may have a name of another form.
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else _UNKNOWN


def _is(connection: Connection, sock: socket.socket | None) -> bool:
    """Whether this socket still is that connection. Of one without a known address nobody can tell: its descriptor may be
    another's, who has nothing to do with us.
    """
    return (connection.address, connection.port) == _name(sock) != _UNKNOWN


@contextlib.contextmanager
def listener(number: int) -> Iterator[socket.socket | None]:
    """A listening socket of ZeroMQ's, to set options of."""
    with _duplicate(number) as sock:
        yield sock
