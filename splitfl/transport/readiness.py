"""Which sockets of a thread have something for it. The kernel is asked once for all of them, where ``zmq_poll`` asks for each.

The file descriptor of a ZeroMQ socket tells of news, once: whatever is done with the socket may take the news and leave what they
were about. So a socket with which something was done is asked itself, until it has nothing more; the others are watched by their
file descriptors.
"""

from __future__ import annotations

import zmq

from splitfl.transport.zmq_common import Wake

__all__ = ["READABLE", "WRITABLE", "Readiness"]

#: As ``zmq.POLLIN`` and ``zmq.POLLOUT``, with which arithmetic takes far longer: they are of Python's enum.
READABLE, WRITABLE = int(zmq.POLLIN), int(zmq.POLLOUT)


class Readiness:
    """Sockets of one thread, and its wake-up."""

    def __init__(self, wake: Wake) -> None:
        self._wake, self._wake_number = wake, wake.receiver.fileno()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_number, READABLE)
        self._sockets: dict[int, zmq.Socket[bytes]] = {}  # by file descriptor
        self._wanted: dict[zmq.Socket[bytes], int] = {}
        self._touched: set[zmq.Socket[bytes]] = set()

    def register(self, sock: zmq.Socket[bytes]) -> None:
        """It is asked for what has come."""
        number = int(sock.getsockopt(zmq.FD))
        self._sockets[number], self._wanted[sock] = sock, READABLE
        self._poller.register(number, READABLE)
        self._touched.add(sock)

    def unregister(self, sock: zmq.Socket[bytes]) -> None:
        """Before it is closed."""
        number = int(sock.getsockopt(zmq.FD))
        self._poller.unregister(number)
        del self._sockets[number], self._wanted[sock]
        self._touched.discard(sock)

    def want_room(self, sock: zmq.Socket[bytes], *, room: bool) -> None:
        """Whether it is also asked for room to send."""
        self._wanted[sock] = READABLE | WRITABLE if room else READABLE
        self._touched.add(sock)

    def touch(self, sock: zmq.Socket[bytes]) -> None:
        """Something was sent, received or asked other than by :meth:`poll`'s leave."""
        self._touched.add(sock)

    def poll(self, timeout: float) -> dict[zmq.Socket[bytes], int]:
        """Sockets that have what is wanted of them, and what; waits up to ``timeout`` seconds for one, or for the wake-up."""
        ready: dict[zmq.Socket[bytes], int] = {}
        for sock in tuple(self._touched):
            self._ask(sock, ready)
        for number, _ in self._poller.poll(0 if ready else max(0, int(timeout * 1000))):
            if number == self._wake_number:
                self._wake.clear()
            elif self._sockets[number] not in ready:
                self._ask(self._sockets[number], ready)
        return ready

    def _ask(self, sock: zmq.Socket[bytes], ready: dict[zmq.Socket[bytes], int]) -> None:
        found = int(sock.getsockopt(zmq.EVENTS)) & self._wanted[sock]
        if found:
            ready[sock] = found
            self._touched.add(sock)
        else:
            self._touched.discard(sock)
