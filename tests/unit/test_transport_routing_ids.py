"""By which ids a server knows its connections: its own, whatever they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import zmq

from splitfl.protocol.keys import Identity, PublicKey
from splitfl.transport.base import Endpoint, Sent, ServerFrame
from splitfl.transport.zmq_common import curve_client, plain_client
from splitfl.transport.zmq_server import ZmqServerTransport
from tests.unit.channel_world import wait_until

FRAME = 2**16


class Desk:
    """A gate that knows one key, of which any number may come, and one ticket."""

    def __init__(self) -> None:
        self.identity, self.ticket = Identity.generate(), Identity.generate()

    def admit_key(self, key: PublicKey, address: str) -> str | None:
        return "a client" if key == self.identity.public else None

    def admit_ticket(self, shown: bytes, address: str) -> str | None:
        return "a session" if shown in (self.ticket.secret, self.ticket.public.raw) else None

    def expected(self, endpoint: Endpoint) -> int:
        return 16


@pytest.mark.parametrize("where", ["control", "data", "data in CURVE"])
def test_a_peer_that_chooses_the_id_that_comes_next_ends_no_process(where: str) -> None:
    """In a process of its own, which a failed assertion in libzmq would end."""
    command = [sys.executable, "-c", f"from {__name__} import attacked; attacked({where!r})"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def attacked(where: str) -> None:
    """Peers say ids: those that come next, one that stands, and names; each is heard and answered as itself, also where the
    endpoint has been opened anew.
    """
    desk, key, context = Desk(), Identity.generate(), zmq.Context()
    server = ZmqServerTransport(key, host="127.0.0.1")
    server.bind(desk, FRAME, window=4 * FRAME, curve="CURVE" in where)
    kind = Endpoint.CONTROL if where == "control" else Endpoint.DATA
    peers, ids = [], []

    def come(chosen: bytes) -> bytes:
        """The id that the newcomer gets."""
        sock = context.socket(zmq.DEALER)
        if chosen:
            sock.setsockopt(zmq.ROUTING_ID, chosen)
        if where == "data":
            plain_client(sock, desk.ticket.secret)
        else:
            curve_client(sock, key.public, desk.identity if kind is Endpoint.CONTROL else desk.ticket)
        sock.connect(f"tcp://127.0.0.1:{server.control_port if kind is Endpoint.CONTROL else server.data_port}")
        word = f"from {len(peers)}".encode()
        sock.send(word)
        peers.append(sock)
        (frame,) = heard(server)
        assert (frame.endpoint, bytes(frame.frame)) == (kind, word)
        return frame.peer

    def after(peer: bytes, count: int) -> bytes:
        return peer[:1] + ((int.from_bytes(peer[1:], "big") + count) % 2**32).to_bytes(4, "big")

    ids.append(come(b""))
    for choose in (lambda: after(ids[-1], 1), lambda: after(ids[-1], 2), lambda: ids[0], lambda: b"a name", lambda: b"a name"):
        ids.append(come(choose()))
        ids.append(come(b""))
    assert len(set(ids)) == len(peers) == 11
    send: Callable[[bytes, bytes], Sent] = server.send_control if kind is Endpoint.CONTROL else server.send_data
    for number, peer in enumerate(ids):
        assert send(peer, f"to {number}".encode() + os.urandom(FRAME // 2)) is Sent.SENT
    for number, sock in enumerate(peers):
        assert sock.poll(5000)
        assert sock.recv().startswith(f"to {number}".encode())
        sock.send(f"again from {number}".encode())
        (frame,) = heard(server)
        assert (frame.peer, bytes(frame.frame)) == (ids[number], f"again from {number}".encode())
    # An empty frame is one like another. What has gone is gone, and is said to be.
    peers[0].send(b"")
    (frame,) = heard(server)
    assert (frame.peer, bytes(frame.frame)) == (ids[0], b"")
    peers[0].close(0)
    wait_until(lambda: send(ids[0], b"into the void") is Sent.GONE)
    assert send(ids[1], b"to a neighbour") is Sent.SENT
    for sock in peers:
        sock.close(0)
    server._reopen(server._control if kind is Endpoint.CONTROL else server._data)
    first = come(b"")
    assert len({first, come(after(first, 1)), come(b"")}) == 3
    context.destroy(0)
    server.close(0)


def heard(server: ZmqServerTransport) -> list[ServerFrame]:
    for _ in range(500):
        if frames := server.poll(0.01):
            return frames
    return []
