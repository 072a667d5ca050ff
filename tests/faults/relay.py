"""The network between a client and its server: a relay that knows where one frame ends, and does to it what it is told.

It listens on an address of its own at the server's ports. Faults have a place, not a time: the first frame that ``when`` is true
of is held while ``do`` is at work, and leaves as what that returns.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from splitfl.protocol.messages import Heartbeat, encode
from splitfl.protocol.records import JOINED, PAYLOAD
from tests.faults.zmtp import Frame, Splitter

__all__ = ["HOST", "Passing", "Relay"]

HOST = "127.0.0.2"

#: A control frame is CURVE's: its name, a short nonce, a tag and flags around the message.
_CURVE_BYTES = 8 + 8 + 16 + 1
_HEARTBEATS = range(len(encode(Heartbeat(1.5))), len(encode(Heartbeat(1.5, 65535, 65535))) + 1)


@dataclass(frozen=True)
class Passing:
    """A frame on its way. ``way``: up to the server, or down. ``session``: which of the client's data connections, from 0."""

    frame: Frame
    is_data: bool
    way: str
    session: int

    @property
    def message(self) -> int:
        """Of a record: the number of the message that it belongs to, in its direction."""
        return int.from_bytes(self.frame.body[16:24], "big")

    @property
    def is_payload(self) -> bool:
        """Whether it brings payload, with or without the metadata before it."""
        return self.is_data and (self.frame.body[1] == PAYLOAD or bool(self.frame.body[2] & JOINED))

    @property
    def is_heartbeat(self) -> bool:
        return not self.is_data and len(self.frame.body) - _CURVE_BYTES in _HEARTBEATS


class Relay:
    """Leads ``host`` at ``control`` and ``data`` to 127.0.0.1 at the same ports."""

    def __init__(self, control: int, data: int, *, host: str = HOST) -> None:
        self._host, self._data_port = host, data
        self._ports = (control, data)
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._rate: float | None = None  # bytes a second down
        self._late: dict[int, float] = {}  # by port: seconds that everything takes longer
        self._sessions = 0
        self._when: Callable[[Passing], bool] | None = None
        self._do: Callable[[Passing], bytes] = lambda passing: passing.frame.raw
        self.fired = threading.Event()
        self.heal()

    def at(self, when: Callable[[Passing], bool], do: Callable[[Passing], bytes]) -> None:
        """The next frame that ``when`` is true of, and no other; ``fired`` is set once ``do`` has been called."""
        with self._lock:
            self.fired.clear()
            self._when, self._do = when, do

    @property
    def is_cut(self) -> bool:
        return not self._listeners

    # --- the link as a whole ----------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Break every connection, and take no other."""
        with self._lock:
            listeners, self._listeners = self._listeners, []
            broken, self._open = self._open, set()
        for one in (*listeners, *broken):
            _end(one)

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flows.clear()

    def throttle(self, rate: float) -> None:
        """``rate``: bytes a second down to the client."""
        self._rate = rate

    def delay(self, *, control: float = 0.0, data: float = 0.0) -> None:
        """What comes on either connection, up or down, leaves at least so many seconds later. Each by itself: what leaves on one
        overtakes what was sent before it on the other.
        """
        self._late = dict(zip(self._ports, (control, data), strict=True))

    def heal(self) -> None:
        self._rate, self._late = None, {}
        self._flows.set()
        if not self._listeners:
            self._listeners = [socket.create_server((self._host, port)) for port in self._ports]
            for listener in self._listeners:
                threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        self.cut()
        self._flows.set()

    # --- one connection ---------------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._flows.wait()
                try:
                    far = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._open |= {near, far}
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for source, sink, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pump, args=(source, sink, port, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, port: int, way: str) -> None:
        splitter, is_data, number = Splitter(), port == self._data_port, -1
        try:
            while data := source.recv(1 << 16):
                came = time.monotonic()
                for piece in splitter.take(data):
                    self._flows.wait()
                    if isinstance(piece, bytes) or piece.is_command:
                        raw = piece if isinstance(piece, bytes) else piece.raw
                    else:
                        if is_data and way == "up" and number < 0:
                            number = self._sessions
                            self._sessions += 1
                        raw = self._through(Passing(piece, is_data, way, self._sessions - 1 if number < 0 else number))
                    time.sleep(max(0.0, came + self._late.get(port, 0.0) - time.monotonic()))
                    self._send(sink, raw, way)
        except OSError:
            pass
        finally:
            self._flows.wait()
            with self._lock:
                self._open -= {source, sink}
            _end(source)
            _end(sink)

    def _through(self, passing: Passing) -> bytes:
        with self._lock:
            meant = self._when is not None and self._when(passing)
            if meant:
                self._when = None
        if not meant:
            return passing.frame.raw
        try:
            return self._do(passing)
        finally:
            self.fired.set()

    def _send(self, sink: socket.socket, raw: bytes, way: str) -> None:
        while raw:
            self._flows.wait()
            rate = self._rate if way == "down" else None
            piece, raw = (raw, b"") if rate is None else (raw[:512], raw[512:])
            sink.sendall(piece)
            if rate is not None:
                time.sleep(len(piece) / rate)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
