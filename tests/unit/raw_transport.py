"""A client whose data connection is a plain TCP socket, for tests of what no honest client sends."""

from __future__ import annotations

import select
import socket
from typing import Any

from splitfl.errors import SessionLost
from splitfl.transport.base import ClientFrame, Endpoint
from splitfl.transport.zmq_client import ZmqClientTransport

__all__ = ["RawTransport"]


class RawTransport(ZmqClientTransport):
    """A client that speaks ZMTP by itself on the data endpoint: libzmq would keep an unfinished message to itself."""

    raw: socket.socket | None = None

    def connect_data(self, host: str, port: int, ticket: bytes, timeout: float, *, curve: Any = None) -> None:
        self.raw = socket.create_connection((host, port))
        self.raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"PLAIN".ljust(20, b"\0") + bytes(32))
        shown = ticket.hex().encode()
        self._command(b"\x05HELLO\x07splitfl" + bytes([len(shown)]) + shown)
        assert self._exactly(64)[:1] == b"\xff"
        assert b"WELCOME" in self._frame()
        self._command(b"\x08INITIATE\x0bSocket-Type\0\0\0\x06DEALER")
        assert b"READY" in self._frame()

    def _command(self, body: bytes) -> None:
        assert self.raw is not None
        self.raw.sendall(bytes([4, len(body)]) + body)

    def _exactly(self, size: int) -> bytes:
        assert self.raw is not None
        return self.raw.recv(size, socket.MSG_WAITALL)

    def _frame(self) -> bytes:
        head = self._exactly(2)
        if len(head) < 2:
            raise SessionLost("the server hung up")
        return self._exactly(head[1])

    def send_data(self, frame: Any) -> bool:
        assert self.raw is not None
        self.raw.sendall(b"\x02" + len(frame).to_bytes(8, "big") + frame)
        return True

    def poll(self, timeout: float) -> list[ClientFrame]:
        frames = super().poll(min(timeout, 0.05))
        while self.raw is not None and _readable(self.raw):
            body = self._frame()
            if b"PING" not in body:
                frames.append(ClientFrame(Endpoint.DATA, body))
        return frames

    def close(self, linger: float) -> None:
        super().close(linger)
        if self.raw is not None:
            self.raw.close()


def _readable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))
