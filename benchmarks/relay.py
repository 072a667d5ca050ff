"""A TCP relay on loopback that records what passes: the eavesdropper of the demo and of tests."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field

__all__ = ["Relay", "free_port"]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Relay:
    """Forwards 127.0.0.1:``port`` to 127.0.0.1:``target``. ``recorded`` holds one buffer a direction of each connection."""

    target: int
    record: bool = True
    recorded: list[bytearray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name=f"relay-{self.port}", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        tape = bytearray()
        with self._lock:
            self.recorded.append(tape)
        buffer = bytearray(1 << 18)
        view = memoryview(buffer)
        try:
            while count := source.recv_into(buffer):
                if self.record:
                    tape += view[:count]
                sink.sendall(view[:count])
        except OSError:
            pass
        finally:
            for one in (source, sink):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def search(self, needle: bytes) -> int:
        """How many recorded streams contain ``needle``."""
        return sum(needle in tape for tape in self.recorded)

    @property
    def bytes_seen(self) -> int:
        return sum(len(tape) for tape in self.recorded)

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                one.close()
