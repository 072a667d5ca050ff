"""Floods over real sockets: of connections, of handshakes, of old tickets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zmq

from splitfl.channel.timing import Timing
from splitfl.protocol.keys import AuthorizedClient, Identity
from splitfl.transport.base import Endpoint
from splitfl.transport.door import Door
from splitfl.transport.zmq_common import curve_client, plain_client
from splitfl.transport.zmq_endpoint import ListeningEndpoint
from tests.unit.channel_world import MIB, Make, inverted, linux, make_worlds, wait_until
from tests.unit.raw_transport import RawTransport


@pytest.fixture
def make() -> Iterator[Make]:
    yield from make_worlds("zmq")


def test_clients_that_were_given_a_ticket_are_not_cut_for_being_many(make: Make) -> None:
    world = make(timing=Timing(heartbeat=1.0, silence=20.0, flush=1.0, linger=0.1))
    data = world.transport._data
    data._half_open, many = 2, 12
    world.authorized._clients[world.identity.public.raw] = AuthorizedClient("alice", {"sessions": many})
    together = threading.Barrier(many)

    class Slow(RawTransport):
        def _command(self, body: bytes) -> None:
            if b"HELLO" in body:  # nobody says anything before all are there, and have been looked at
                together.wait(10)
                wait_until(lambda: len(data.connections) >= many)
            super()._command(body)

    with ThreadPoolExecutor(many) as pool:
        clients = [pool.submit(world.join, transport=Slow(), timeout=10.0) for _ in range(many)]
        assert [client.result().lost for client in clients] == [[]] * many


@pytest.fixture
def endpoint() -> Iterator[ListeningEndpoint]:
    """A listening socket without anything behind it."""
    context = zmq.Context()
    made = ListeningEndpoint(
        Endpoint.CONTROL,
        lambda: context.socket(zmq.ROUTER),
        half_open=10,
        expected=lambda: 0,
        frame=1024,
        queued=1,
        curve=False,
        refuse=lambda *_: None,
    )
    made.bind("127.0.0.1", 0)
    yield made
    context.destroy(0)


def test_an_address_that_is_shut_out_stays_so_when_the_endpoint_is_opened_anew(
    endpoint: ListeningEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr("splitfl.transport.zmq_endpoint.shut_out", lambda sock, networks: told.append(list(networks)))
    endpoint.door = Door(burst=1, rate=0.001, seconds=60.0)
    assert [endpoint.door.knock("192.0.2.1") for _ in range(2)] == [True, False]
    for times in (1, 2):
        wait_until(lambda times=times: endpoint.watch() == [] and len(told) == times)
        endpoint.reopen()
    endpoint.close(0)
    assert told == [["192.0.2.1"]] * 2


def test_a_server_ends_amid_a_flood_that_it_has_not_looked_at(endpoint: ListeningEndpoint) -> None:
    address = ("127.0.0.1", endpoint.port)
    for _ in range(1000):
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=0.5).close()
    closing = threading.Thread(target=endpoint.close, args=(0,), daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_unfinished_handshakes_are_few(make: Make) -> None:
    world = make()
    client = world.join()
    for port, endpoint in zip(world.ports, (world.transport._control, world.transport._data), strict=True):
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        most = endpoint._half_open

        def few(endpoint: Any = endpoint, most: int = most) -> bool:
            world.transport.wake()
            return len(endpoint.connections) <= most + 2

        wait_until(few)
        assert client.echo(b"ab", port) == inverted(b"ab")
        for sock in idle:
            sock.close()
    newcomer = world.join()
    assert newcomer.echo(b"ab") == inverted(b"ab")


@linux
def test_an_address_that_floods_is_shut_out_and_sessions_that_stand_go_on(make: Make) -> None:
    world = make()
    client = world.join()
    control = world.transport._control
    control.door = Door(burst=20, rate=1.0, seconds=1.5)
    kept = []

    def kept_out() -> bool:
        try:
            kept.append(socket.create_connection(("127.0.0.1", control.port), timeout=0.2))
        except TimeoutError:
            return True
        return False

    wait_until(kept_out)
    assert len(kept) >= 20
    assert client.echo(bytes(MIB)) == inverted(bytes(MIB))
    assert any(code == "flood" and "shut out" in text for _, code, text in world.handler.refused)
    assert sum(code == "flood" for _, code, _ in world.handler.refused) <= 5

    def comes_in() -> bool:
        try:
            return world.join().echo(b"ab") == inverted(b"ab")
        except Exception:
            return False

    wait_until(comes_in, 20)
    assert not client.lost
    for sock in kept:
        sock.close()


@linux
def test_refused_handshakes_shut_their_address_out(make: Make) -> None:
    world = make()
    client = world.join()
    door = world.transport._control.door = Door(burst=6, rate=0.001, seconds=60.0)
    context, kept = zmq.Context(), []
    for _ in range(4):
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        curve_client(sock, world.server_identity.public, Identity.generate())
        sock.connect(f"tcp://127.0.0.1:{world.transport.control_port}")
        kept.append(sock)
    wait_until(door.blocked)
    wait_until(lambda: any("shut out" in text for _, _, text in world.handler.refused))
    with pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", world.transport.control_port), timeout=0.3)
    assert client.echo(bytes(MIB)) == inverted(bytes(MIB))
    context.destroy(0)


def test_refused_keys_and_tickets_are_said_and_not_too_often(make: Make) -> None:
    world = make()
    client = world.join()
    context, kept = zmq.Context(), []
    for mechanism, port in zip(("key", "ticket"), world.ports, strict=True):
        for _ in range(12):
            sock = context.socket(zmq.DEALER)
            sock.setsockopt(zmq.RECONNECT_IVL, -1)
            if mechanism == "key":
                curve_client(sock, world.server_identity.public, Identity.generate())
            else:
                plain_client(sock, client.channel.opened.ticket)  # it has been used
            sock.connect(f"tcp://127.0.0.1:{port}")
            kept.append(sock)
    wait_until(lambda: any("ticket" in text for _, _, text in world.handler.refused) and len(world.handler.refused) >= 6)
    assert client.echo(os.urandom(MIB)) is not None
    assert sum("ticket" in text for _, _, text in world.handler.refused) == 1
    assert sum("not on the list" in text for _, _, text in world.handler.refused) == 5
    context.destroy(0)
