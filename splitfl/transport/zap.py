"""The authenticator that ZeroMQ asks about each handshake (ZAP, RFC 27): a key at the control endpoint, a ticket at the other."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from splitfl.errors import KeyFileError
from splitfl.protocol.keys import PublicKey
from splitfl.transport.base import Gate
from splitfl.transport.zmq_common import FRAMES_A_TURN, PLAIN_USER

CONTROL_DOMAIN, DATA_DOMAIN = b"splitfl.control", b"splitfl.data"

_ADDRESS = "inproc://zeromq.zap.01"

# (address, who, text, whether at the data endpoint)
Refuse = Callable[[str, str, str, bool], None]


class Zap:
    """Belongs to the I/O thread. It must stand before the first peer connects, else that one would wait for it in vain."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], gate: Gate, refuse: Refuse) -> None:
        self._gate, self._refuse = gate, refuse
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind(_ADDRESS)

    def answer(self) -> None:
        """Answers what has been asked."""
        for _ in range(FRAMES_A_TURN):
            try:
                message = self.socket.recv_multipart(zmq.NOBLOCK)
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
            self.socket.send_multipart([*message[:2], b"1.0", request, status, text, (user or "").encode(), b""])

    def _judge(self, domain: bytes, mechanism: bytes, credentials: list[bytes], address: str) -> str | None:
        ticket = _ticket(mechanism, credentials)
        if (domain, mechanism, len(credentials)) == (CONTROL_DOMAIN, b"CURVE", 1):
            try:
                key = PublicKey(credentials[0])
            except KeyFileError:
                return None
            user = self._gate.admit_key(key, address)
            who, text = f"{address}, key {key}", "this key is not on the list of authorized clients"
        elif domain == DATA_DOMAIN and ticket is not None:
            user = self._gate.admit_ticket(ticket, address)
            who, text = f"{address}, a data connection", "the ticket is unknown, used or too old"
        else:
            user, who, text = None, address, "neither a key nor a ticket"
        if user is None:
            self._refuse(address, who, text, domain == DATA_DOMAIN)
        return user


def _ticket(mechanism: bytes, credentials: list[bytes]) -> bytes | None:
    """What is shown at the data endpoint: a ticket as a password, or the public key of one that is a CURVE secret."""
    if mechanism == b"CURVE" and len(credentials) == 1:
        return credentials[0]
    if mechanism == b"PLAIN" and len(credentials) == 2 and credentials[0] == PLAIN_USER:
        try:
            return bytes.fromhex(credentials[1].decode("ascii"))
        except ValueError:
            return b""
    return None
