"""A client whose server says what the protocol forbids, and where the fault is the client's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from splitfl.errors import ConnectError, OutOfTurn, RemoteProtocolError, SessionLost, SplitflError
from splitfl.protocol.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    Credit,
    Hello,
    Hidden,
    Welcome,
    decode_control,
    encode,
)
from splitfl.protocol.session import ClientSession
from splitfl.transport.base import ClientFrame, Endpoint
from splitfl.transport.memory import MemoryClientTransport
from tests.unit.channel_world import Make, World, forward, make_worlds, wait_until


@pytest.fixture
def world() -> Iterator[World]:
    made: Iterator[Make] = make_worlds("memory")
    yield next(made)()
    next(made, None)


class Early(MemoryClientTransport):
    """A connection on which a data frame comes before there is a data connection."""

    def poll(self, timeout: float) -> list[ClientFrame]:
        return [ClientFrame(Endpoint.DATA, b"junk"), *super().poll(timeout)]


def test_data_before_the_session_is_open(world: World) -> None:
    with pytest.raises(RemoteProtocolError, match="data before the session was open"):
        world.join(transport=Early(world.network))


def test_data_before_attached(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed as it should be, so it is the server's own mistake."""
    monkeypatch.setattr("splitfl.channel.sessions.Attached", lambda: Hidden(-1, 0, 1, 1, "float16", "raw"))
    monkeypatch.setattr("splitfl.protocol.assembly.payload_view", lambda message, _: memoryview(bytes(message.payload_bytes)))
    with pytest.raises(RemoteProtocolError, match="data before Attached"):
        world.join()


def test_attached_twice(world: World) -> None:
    client = world.join()
    world.server.send(client.channel.opened.session, Attached(), b"")
    wait_until(lambda: client.lost)
    assert isinstance(client.lost[0], RemoteProtocolError)
    assert "Attached twice" in str(client.lost[0])


def test_attach_twice_ends_the_clients_session(world: World) -> None:
    client = world.join()
    client.channel._data_queue.append((Attach(), memoryview(b"")))
    client.channel._transport.wake()
    wait_until(lambda: world.handler.closed)
    assert "Attach comes first on a data connection, and once" in world.handler.closed[0][1]


def test_a_server_of_another_version_in_its_welcome(world: World) -> None:
    def other(endpoint: Endpoint, from_client: bool, frame: bytes) -> list[bytes]:
        if endpoint is Endpoint.CONTROL and not from_client:
            message = decode_control(frame, from_client=False)
            if isinstance(message, Welcome):
                return [encode(Welcome(9, message.run, {}, {}, 0.0))]
        return [frame]

    world.network.tap = other
    with pytest.raises(ConnectError, match="version 9"):
        world.join()


def test_a_client_that_has_no_room_says_so_and_where(world: World) -> None:
    def full(message: Any) -> Any:
        raise MemoryError

    client = world.join(allocate=full)
    client.channel.send(forward(4), b"abcd")
    wait_until(lambda: client.lost)
    assert isinstance(client.lost[0], SessionLost)
    assert client.lost[0].code == "internal"


def test_whoever_hears_of_the_loss_may_fail(world: World) -> None:
    heard = threading.Event()

    def fail(error: SplitflError) -> None:
        heard.set()
        raise RuntimeError("a mistake of the caller's")

    client = world.join(on_lost=fail)
    world.server.stop("maintenance")
    assert heard.wait(10)
    client.channel.close()
    with pytest.raises(SessionLost, match="maintenance"):
        client.channel.send(forward(4), b"abcd")


def test_credit_before_the_session_is_open_is_out_of_turn() -> None:
    """So the channel need not look whether it has an account yet."""
    session = ClientSession()
    session.send(Hello(PROTOCOL_VERSION, "run", {}, ""))
    session.receive(encode(Welcome(PROTOCOL_VERSION, "run", {}, {}, 0.0)))
    session.send(session.make_open(ciphers=("aes-256-gcm",), model={}, cut=(1, 1), name="a"))
    with pytest.raises(OutOfTurn):
        session.receive(encode(Credit(9)))
