"""Which sockets of a thread have something for it, asked once for all of them, where ``zmq.Poller`` asks each.

The file descriptor of a ZeroMQ socket tells of news, once: whatever is done with the socket may take the news and leave what they
were about. So a socket with which something was done is asked itself, until it has nothing more; the others are watched by their
file descriptors.
"""

from __future__ import annotations

from typing import Any

import zmq

from splitfl.transport.zmq_common import Wake

__all__ = ["READABLE", "WRITABLE", "Readiness"]

#: As ``zmq.POLLIN`` and ``zmq.POLLOUT``, with which arithmetic takes far longer: they are of Python's enum.
READABLE, WRITABLE = int(zmq.POLLIN), int(zmq.POLLOUT)


class Readiness:
    """Sockets of one thread, and its wake-up."""

    def __init__(self, wake: Wake) -> None:
        self._wake, self._wake_number = wake, wake.receiver.fileno()
        self._watched: list[tuple[int, int]] = [(self._wake_number, READABLE)]  # file descriptors, and what for
        self._sockets: dict[int, zmq.Socket[bytes]] = {}  # by file descriptor
        self._wanted: dict[zmq.Socket[bytes], int] = {}
        self._touched: set[zmq.Socket[bytes]] = set()

    def register(self, sock: zmq.Socket[bytes]) -> None:
        """It is asked for what has come."""
        number = int(sock.getsockopt(zmq.FD))
        self._sockets[number], self._wanted[sock] = sock, READABLE
        self._watched.append((number, READABLE))
        self._touched.add(sock)

    def unregister(self, sock: zmq.Socket[bytes]) -> None:
        """Before it is closed."""
        number = int(sock.getsockopt(zmq.FD))
        self._watched.remove((number, READABLE))
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
        asked = self._touched
        ready: dict[zmq.Socket[bytes], int] = {}
        news: list[int] = []
        # ZeroMQ looks at the descriptors first and asks the sockets then: no news gets lost in between.
        items: list[tuple[Any, int]] = [*self._watched, *[(sock, self._wanted[sock]) for sock in asked]]
        for what, found in zmq.zmq_poll(items, max(0, int(timeout * 1000))):
            if isinstance(what, zmq.Socket):
                ready[what] = found
            elif what == self._wake_number:
                self._wake.clear()
            else:
                news.append(what)
        self._touched = set(ready)
        for number in news:
            if self._sockets[number] not in asked:
                self._ask(self._sockets[number], ready)
        return ready

    def _ask(self, sock: zmq.Socket[bytes], ready: dict[zmq.Socket[bytes], int]) -> None:
        found = int(sock.getsockopt(zmq.EVENTS)) & self._wanted[sock]
        if found:
            ready[sock] = found
            self._touched.add(sock)
