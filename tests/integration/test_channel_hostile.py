"""The channel against a hostile network: what an eavesdropper sees, and what altered, replayed or cut traffic leads
to.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from splitfl.errors import SealError
from splitfl.protocol.join import JoinString
from splitfl.protocol.messages import Heartbeat
from splitfl.transport.base import Endpoint
from tests.unit.channel_world import MIB, Client, World, closed_at_the_end, forward, inverted, wait_until


class Relay:
    """A machine in the middle of one TCP endpoint: keeps every byte, may alter or cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.seen = bytearray()
        self.alter: Callable[[bytes], bytes] = lambda chunk: chunk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pairs: dict[socket.socket, socket.socket] = {}
        while self._open:
            ready, _, _ = select.select([self._listener, *pairs], [], [], 0.05)
            for sock in ready:
                if sock is self._listener:
                    near, far = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                    pairs.update({near: far, far: near})
                    self._sockets += [near, far]
                    continue
                other = pairs.get(sock)
                if other is None:
                    continue
                try:
                    chunk = sock.recv(65536)
                    self.seen += chunk
                    other.sendall(self.alter(chunk))
                except OSError:
                    chunk = b""
                if not chunk:
                    for end in (sock, other):
                        pairs.pop(end, None)
                        end.close()

    def cut(self) -> None:
        """Closes every connection."""
        self._open = False
        self._thread.join()
        for sock in self._sockets:
            sock.close()

    def close(self) -> None:
        self.cut()
        self._listener.close()


class RelayedWorld(World):
    """A world over ZeroMQ with a relay before each endpoint."""

    def __init__(self, **server: Any) -> None:
        super().__init__("zmq", **server)
        self.control_relay, self.data_relay = Relay(self.transport.control_port), Relay(self.transport.data_port)
        self.transport._advertise = f"127.0.0.1:{self.data_relay.port}"

    @property
    def join_string(self) -> JoinString:
        return JoinString(self.server_identity.public, "127.0.0.1", self.control_relay.port, "run")

    def close(self) -> None:
        super().close()
        self.control_relay.close()
        self.data_relay.close()


@pytest.fixture
def keep() -> Iterator[Callable[[Any], Any]]:
    yield from closed_at_the_end()


class NullAead:
    """Seals nothing: what the wire would show without the seal. Reachable from here only."""

    def encrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int:
        buf[: len(data)] = data
        buf[len(data) :] = bytes(16)
        return len(buf)

    def decrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int:
        buf[:] = data[:-16]
        return len(buf)


@pytest.mark.parametrize("sealed", [True, False])
def test_the_wire_shows_ciphertext_only(keep: Any, sealed: bool) -> None:
    aead: dict[str, Any] = {} if sealed else {"aead_factory": lambda name, key: NullAead()}
    world = keep(RelayedWorld(**aead))
    client = world.join(**aead)
    payload = os.urandom(3 * MIB + 2)
    assert client.echo(payload) == inverted(payload)
    client.channel.close()
    seen = bytes(world.data_relay.seen)
    assert len(seen) > 2 * len(payload)
    marks = {
        "payload": [payload[offset : offset + 64] for offset in range(0, len(payload) - 64, 4096)],
        "answer": [inverted(payload)[:64]],
        "metadata": [b"bfloat16", b"adapter_on", b"segments", b"micro"],
    }
    for what, needles in marks.items():
        found = [needle in seen for needle in needles]
        assert not any(found) if sealed else sum(found) >= 0.9 * len(found), what
    # Control is CURVE's either way: neither the run's configuration nor a secret of the session is to be seen.
    control = bytes(world.control_relay.seen)
    opened, session = client.channel.opened, world.handler.opened[0]
    for needle in (
        b"libraries",
        b"torch",
        b"client_secret",
        session.open.client_secret,
        opened.server_secret,
        opened.ticket,
    ):
        assert needle not in control
    assert opened.server_secret not in seen


def test_a_byte_flipped_on_the_way_ends_the_session(keep: Any) -> None:
    world = keep(RelayedWorld())
    client = world.join()
    assert client.echo(b"before") == inverted(b"before")
    count = [0]

    def alter(chunk: bytes) -> bytes:
        count[0] += len(chunk)
        if count[0] < MIB or count[0] - len(chunk) >= MIB:
            return chunk
        return chunk[:-1] + bytes([chunk[-1] ^ 0x40])

    world.data_relay.alter = alter
    client.channel.send(forward(4 * MIB, 7), bytes(4 * MIB))
    wait_until(lambda: client.lost and world.handler.closed)
    assert getattr(client.lost[0], "code", "") == "seal"
    assert "does not verify" in world.handler.closed[0][1]
    assert [message.micro for _, message, _ in world.handler.data] == [0], "nothing unverified was handed out"
    world.data_relay.alter = lambda chunk: chunk
    again = world.join()
    assert again.echo(b"after!") == inverted(b"after!")


def test_a_cut_connection_is_noticed_on_both_sides(keep: Any) -> None:
    for which in ("control_relay", "data_relay"):
        world = keep(RelayedWorld())
        client = world.join()
        getattr(world, which).cut()
        wait_until(lambda client=client: client.lost, 3)
        assert "broke" in str(client.lost[0])
        wait_until(lambda world=world: world.handler.closed, 5)


# --- Record by record, in the in-memory twin ---


def tampered(world: World, act: Callable[[list[bytes], bytes], list[bytes]], *, from_client: bool = True) -> None:
    """From now on ``act(history, frame)`` says which data frames arrive in place of each."""
    history: list[bytes] = []

    def tap(endpoint: Endpoint, client_sends: bool, frame: bytes) -> list[bytes]:
        if endpoint is not Endpoint.DATA or client_sends is not from_client:
            return [frame]
        delivered = act(history, frame)
        history.append(frame)
        return delivered

    world.network.tap = tap


def flip(history: list[bytes], frame: bytes) -> list[bytes]:
    return [frame if len(history) != 2 else frame[:100] + bytes([frame[100] ^ 1]) + frame[101:]]


def replay(history: list[bytes], frame: bytes) -> list[bytes]:
    return [frame, frame] if len(history) == 2 else [frame]


def replay_old(history: list[bytes], frame: bytes) -> list[bytes]:
    return [history[0]] if len(history) == 3 else [frame]


def drop(history: list[bytes], frame: bytes) -> list[bytes]:
    return [] if len(history) == 1 else [frame]


def reorder(history: list[bytes], frame: bytes) -> list[bytes]:
    return [] if len(history) == 1 else [frame, history[1]] if len(history) == 2 else [frame]


def truncate(history: list[bytes], frame: bytes) -> list[bytes]:
    return [frame[:-1]] if len(history) == 2 else [frame]


def lengthen(history: list[bytes], frame: bytes) -> list[bytes]:
    return [frame[24:32].join((frame[:24], frame[32:])) if len(history) != 1 else frame[:31] + b"\xff" + frame[32:]]


@pytest.mark.parametrize("act", [flip, replay, replay_old, drop, reorder, truncate, lengthen])
@pytest.mark.parametrize("from_client", [True, False])
def test_altered_records_end_the_session_and_are_not_handed_out(keep: Any, act: Any, from_client: bool) -> None:
    world = keep(World("memory"))
    client: Client = world.join()
    tampered(world, act, from_client=from_client)
    payload = os.urandom(4 * MIB)
    client.channel.send(forward(len(payload), 1), payload)
    wait_until(lambda: client.lost and world.handler.closed)
    if from_client:
        assert getattr(client.lost[0], "code", "") == "seal"
        assert "seal" in world.handler.closed[0][1]
        if act is not replay:
            assert world.handler.data == []
    else:
        assert isinstance(client.lost[0], SealError)
        assert client.data == []
    world.network.tap = None
    assert world.join().echo(b"ab") == inverted(b"ab")


def test_a_record_of_an_earlier_session_does_not_open(keep: Any) -> None:
    world = keep(World("memory"))
    recorded: list[bytes] = []
    tampered(world, lambda history, frame: recorded.append(frame) or [frame])  # type: ignore[func-returns-value]
    first = world.join()
    first.echo(b"secret")
    first.channel.close()
    world.network.tap = None
    second = world.join()
    second.channel._path.stuck = bytearray(recorded[1])
    second.channel._transport.wake()
    wait_until(lambda: second.lost)
    assert getattr(second.lost[0], "code", "") == "seal"


def test_a_message_of_several_parts_ends_the_session(keep: Any) -> None:
    world = keep(World("zmq"))
    client = world.join()
    transport: Any = client.channel._transport
    send = transport.send_control
    transport.send_control = lambda frame: transport._control.send_multipart([frame, b"more"])
    client.channel.tell(Heartbeat(0.0))
    wait_until(lambda: client.lost)
    assert getattr(client.lost[0], "code", "") == "protocol"
    transport.send_control = send
