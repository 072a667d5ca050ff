"""Data connections inside CURVE: the ticket is a one-time key, and junk does not get as far as the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from splitfl.errors import ConnectError
from splitfl.protocol.control import CURVE, SEALED
from splitfl.protocol.keys import Identity
from splitfl.transport.zmq_common import curve_client, plain_client
from tests.unit.channel_world import MIB, Make, inverted, make_worlds


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    yield from make_worlds(request.param)


@pytest.fixture
def make_sockets() -> Iterator[Make]:
    yield from make_worlds("zmq")


def test_a_session_whose_data_is_in_curve(make: Make) -> None:
    world = make(bulk=CURVE)
    client = world.join()
    assert client.channel.opened.bulk == CURVE
    for micro, size in enumerate((2, MIB, 5 * MIB + 6)):
        payload = os.urandom(size)
        assert client.echo(payload, micro) == inverted(payload)
    assert make().join().channel.opened.bulk == SEALED


def handshake(port: int, option: Any) -> int:
    """The event that ends a handshake with the options that ``option`` sets."""
    from zmq.utils.monitor import parse_monitor_message

    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.RECONNECT_IVL, -1)
    option(sock)
    monitor = sock.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )
    sock.connect(f"tcp://127.0.0.1:{port}")
    assert monitor.poll(5000)
    event: int = parse_monitor_message(monitor.recv_multipart())["event"]
    sock.disable_monitor()
    context.destroy(0)
    return event


def test_only_the_ticket_itself_opens_the_door_and_only_once(make_sockets: Make) -> None:
    world = make_sockets(bulk=CURVE)
    client = world.join()
    port, server = world.transport.data_port, world.server_identity.public
    used = Identity.from_secret(client.channel.opened.ticket)
    assert handshake(port, lambda sock: curve_client(sock, server, used)) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    listed = handshake(port, lambda sock: curve_client(sock, server, world.identity))
    assert listed == zmq.EVENT_HANDSHAKE_FAILED_AUTH, "a key of the list is no ticket"
    fresh = world.server._admission.ticket("some session")
    assert handshake(port, lambda sock: plain_client(sock, fresh)) != zmq.EVENT_HANDSHAKE_SUCCEEDED
    good = handshake(port, lambda sock: curve_client(sock, server, Identity.from_secret(fresh)))
    assert good == zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert client.echo(b"ab") == inverted(b"ab")


def test_a_client_that_does_not_follow_is_not_let_in(make_sockets: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_sockets(bulk=CURVE)
    monkeypatch.setattr("splitfl.channel.client.CURVE", "something else")
    with pytest.raises(ConnectError):
        world.join(timeout=1.0)
