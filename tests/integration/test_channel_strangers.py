"""Whoever may knock at a server's ports, and whatever else may listen where a client knocks."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from splitfl.channel.server import ServerChannel
from splitfl.errors import ConfigError, ConnectError
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import AuthorizedClients, Identity
from splitfl.transport.zmq_server import ZmqServerTransport
from tests.unit.channel_world import QUICK, Handler, World, closed_at_the_end, inverted, wait_until


@pytest.fixture
def keep() -> Iterator[Callable[[Any], Any]]:
    yield from closed_at_the_end()


def test_noise_from_strangers_leaves_the_sessions_alone(keep: Any) -> None:
    world = keep(World("zmq"))
    client = world.join()
    strangers = []
    for port in (world.transport.control_port, world.transport.data_port):
        for junk in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(4096),
            b"\xff" + bytes(8) + b"\x7f\x03" + os.urandom(200),
        ):
            sock = socket.create_connection(("127.0.0.1", port))
            strangers.append(sock)
            sock.sendall(junk)
    context = zmq.Context()
    for port in (world.transport.control_port, world.transport.data_port):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(100):
            dealer.send(b"let me in", zmq.SNDMORE)
    assert client.echo(b"still here") == inverted(b"still here")
    for sock in strangers:
        sock.close()
    context.destroy(0)
    assert len(world.handler.opened) == 1
    assert client.echo(b"still here", 1) == inverted(b"still here")


def test_a_server_that_would_let_strangers_in_does_not_start() -> None:
    class OpenDoor(AuthorizedClients):
        def lookup(self, public_key: Any) -> Any:
            return object()

    doors = OpenDoor.of({})
    server = ServerChannel(ZmqServerTransport(Identity.generate(), host="127.0.0.1"), Handler(), authorized=doors)
    with pytest.raises(ConfigError, match="a random key was not refused"):
        server.start()


def test_a_port_that_is_taken(keep: Any) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    keep(taken)
    transport = ZmqServerTransport(Identity.generate(), host="127.0.0.1", port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="choose another port"):
        ServerChannel(transport, Handler(), authorized=AuthorizedClients.of({})).start()


def test_the_list_on_disk_is_followed_while_running(keep: Any, tmp_path: Path) -> None:
    world = keep(World("zmq"))
    path = tmp_path / "authorized_clients"
    path.write_text(f"{world.identity.public} alice\n")
    world.server._admission._authorized = AuthorizedClients(path)
    client, newcomer = world.join(), Identity.generate()
    with pytest.raises(ConnectError, match="not on the server's list"):
        world.join(identity=newcomer)
    path.write_text(f"{newcomer.public} bob\n")
    wait_until(lambda: client.lost)
    assert "removed from the server's list" in str(client.lost[0])
    assert world.join(identity=newcomer).echo(b"ab") == inverted(b"ab")


def test_a_client_takes_another_key_while_the_server_runs(keep: Any, tmp_path: Path) -> None:
    world = keep(World("zmq"))
    path = tmp_path / "authorized_clients"
    path.write_text(f"{world.identity.public} alice\n")
    world.server._admission._authorized = AuthorizedClients(path)
    client, fresh = world.join(), Identity.generate()
    path.write_text(f"{fresh.public} alice\n")
    wait_until(lambda: client.lost)
    assert world.join(identity=fresh).echo(b"ab") == inverted(b"ab")
    assert [session.peer.name for session in world.handler.opened] == ["alice", "alice"]
    with pytest.raises(ConnectError, match="not on the server's list"):
        world.join()


# --- What else may listen at the address ---


def reach(port: int, host: str = "127.0.0.1", timeout: float = 0.5) -> str:
    """The sentence that a client gets there."""
    world = World.__new__(World)
    world.kind, world.clients, world.identity = "zmq", [], Identity.generate()
    join = JoinString(Identity.generate().public, host, port)
    with pytest.raises(ConnectError) as caught:
        world.join(join=join, timeout=timeout)
    return str(caught.value)


def test_another_kind_of_server(keep: Any) -> None:
    listener = keep(socket.create_server(("127.0.0.1", 0)))

    def answer() -> None:
        try:
            while True:
                connection, _ = listener.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)
                connection.close()
        except OSError:
            return

    threading.Thread(target=answer, daemon=True).start()
    assert "is not a splitfl server" in reach(listener.getsockname()[1])


def test_a_port_that_stays_silent(keep: Any) -> None:
    listener = keep(socket.create_server(("127.0.0.1", 0)))
    assert "stayed silent for 0.5 s" in reach(listener.getsockname()[1])


def test_a_host_without_an_address() -> None:
    assert "the host name is not known" in reach(1, "no-such-host.invalid", 5.0)


def test_a_data_endpoint_that_cannot_be_reached(keep: Any) -> None:
    world = keep(World("zmq"))
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    world.transport._advertise = f"127.0.0.1:{port}"
    with pytest.raises(ConnectError, match="--advertise"):
        world.join()


def test_the_server_over_ipv6(keep: Any) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    world = World("zmq")
    world.server.stop()
    transport = ZmqServerTransport(world.server_identity, host="::1")
    server = ServerChannel(transport, world.handler, authorized=world.authorized, timing=QUICK)
    world.handler.channel = world.server = server
    keep(world)
    server.start()
    client = world.join(join=JoinString(world.server_identity.public, "::1", transport.control_port))
    assert client.echo(b"six!") == inverted(b"six!")
