"""Floods over real sockets: of connections, of handshakes, of old tickets, of messages without an end."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from splitfl.channel.timing import Timing
from splitfl.errors import ConfigError, SessionLost, SplitflError
from splitfl.protocol.keys import AuthorizedClient, Identity
from splitfl.transport.base import ClientFrame, Endpoint
from splitfl.transport.door import Door
from splitfl.transport.zmq_client import ZmqClientTransport
from splitfl.transport.zmq_common import curve_client, plain_client
from splitfl.transport.zmq_endpoint import ListeningEndpoint
from tests.unit.channel_world import MIB, Client, Make, World, forward, inverted, make_worlds, wait_until
from tests.world import World as TrunkWorld
from tests.world import running, tiny_llama

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's account of a connection is Linux's")


@pytest.fixture
def make() -> Iterator[Make]:
    yield from make_worlds("zmq")


def ports(world: World) -> tuple[int, int]:
    return world.transport.control_port, world.transport.data_port


def readable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


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
        while self.raw is not None and readable(self.raw):
            body = self._frame()
            if b"PING" not in body:
                frames.append(ClientFrame(Endpoint.DATA, body))
        return frames

    def close(self, linger: float) -> None:
        super().close(linger)
        if self.raw is not None:
            self.raw.close()


def flood(client: Client, parts: int, size: int = 0) -> bool:
    """Parts of a message that has no last one, from a client that was let in; False once it has been cut."""
    part = b"\x03" + size.to_bytes(8, "big") + bytes(size) if size else b"\x01\0"
    try:
        client.channel._transport.raw.sendall(part * parts)  # type: ignore[attr-defined]
    except OSError:
        return False
    return not client.lost


def peak_bytes(*, anew: bool = False) -> int:
    """The most that this process has had in memory, since it was last asked ``anew``."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def two(world: World) -> tuple[Client, Client]:
    """An honest client, and one that is about to flood."""
    honest, transport = world.join(), RawTransport()
    flooder = world.join(transport=transport)
    assert transport.raw is not None
    transport.raw.settimeout(1.0)
    return honest, flooder


@linux
@pytest.mark.parametrize("size", [0, 30_000])
def test_a_message_without_an_end_costs_its_sender_the_connection(make: Make, size: int) -> None:
    world = make()
    honest, flooder = two(world)
    session = flooder.channel.opened.session
    assert honest.echo(bytes(MIB)) == inverted(bytes(MIB))
    before = peak_bytes(anew=True)
    sent = 0
    while flood(flooder, 1000 if size else 100_000, size):
        sent += 1
        assert sent < 2000
    wait_until(lambda: world.handler.closed)
    assert world.handler.closed[0][0] == session
    assert "a message without an end" in world.handler.closed[0][1]
    assert any(code == "flood" for _, code, _ in world.handler.refused)
    assert honest.echo(bytes(MIB), 1) == inverted(bytes(MIB)), "nobody else was touched"
    assert not honest.lost
    assert peak_bytes() - before < 512 * MIB, "measured: at most 320 for empty parts, 170 for large ones"


@linux
def test_a_message_without_an_end_is_found_where_the_server_never_comes_to_the_end_of_what_waits(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(window=64 * MIB)
    data, flooders = world.transport._data, world.transport._data.flooders
    monkeypatch.setattr(data, "flooders", lambda *, drained: flooders(drained=False))
    honest, flooder = two(world)
    for _ in range(40):
        assert flood(flooder, 10, 30_000)
    wait_until(lambda: any(each.held > data.bound for each in data.connections))
    micro = 0
    while not world.handler.closed:
        assert honest.echo(b"ab", micro) == inverted(b"ab")
        micro += 1
        assert micro < 5000
    assert "a message without an end" in world.handler.closed[0][1]
    assert not honest.lost


@linux
def test_floods_of_many_open_the_endpoint_anew_and_the_honest_come_back(make: Make) -> None:
    world = make()
    world.transport._data.bound, world.transport._data.total = 1024 * MIB, 4 * MIB
    honest, flooder = two(world)
    before = ports(world)
    sent = 0
    while flood(flooder, 1000, 30_000):
        sent += 1
        assert sent < 2000
    wait_until(lambda: honest.lost and len(world.handler.closed) == 2)
    assert getattr(honest.lost[0], "code", "") in ("restarting", "lost"), "what a client connects again after"
    assert ports(world) == before
    again = world.join()
    assert again.echo(bytes(3 * MIB)) == inverted(bytes(3 * MIB))
    assert any("opened anew" in text for _, _, text in world.handler.refused)


@linux
def test_who_floods_on_after_its_session_was_ended_is_cut_at_once(make: Make) -> None:
    world = make(timing=Timing(heartbeat=0.1, silence=20.0, flush=1.0, linger=600.0))
    honest, flooder = two(world)
    raw = flooder.channel._transport.raw  # type: ignore[attr-defined]
    flooder.channel._session.receive = lambda frame: None  # type: ignore[method-assign, assignment, return-value]
    raw.sendall(b"\0\0" * 100)
    wait_until(lambda: world.handler.closed)
    assert len(world.transport._data.connections) == 2, "it may hear why"
    with contextlib.suppress(OSError):
        raw.sendall(b"\0\0" * 4000)
    wait_until(lambda: len(world.transport._data.connections) == 1)
    assert honest.echo(bytes(MIB)) == inverted(bytes(MIB))
    assert not honest.lost


def test_a_complete_message_of_many_parts_is_passed_over(make: Make) -> None:
    world = make()
    honest, flooder = two(world)
    raw = flooder.channel._transport.raw  # type: ignore[attr-defined]
    raw.sendall(b"\x01\0" * 200_000 + b"\0\x07the end")
    wait_until(lambda: world.handler.closed)
    assert honest.echo(bytes(MIB)) == inverted(bytes(MIB))
    assert not honest.lost


def test_honest_traffic_is_never_taken_for_a_flood(make: Make) -> None:
    world = make(window=64 * MIB, max_message=8 * MIB)
    for endpoint in (world.transport._control, world.transport._data):
        endpoint.bound -= 2 * MIB  # without the slack: two frames
    clients = [world.join() for _ in range(3)]
    sizes = [2, 4096, 100_000, MIB, 8 * MIB, 3 * MIB + 2]
    for micro in range(18):
        for client in clients:
            size = sizes[micro % len(sizes)] // 2 * 2
            client.channel.send(forward(size, micro), bytes(size))
    wait_until(lambda: all(len(client.data) == 18 or client.lost for client in clients), 60)
    assert not [client.lost for client in clients if client.lost]
    held = [each.held for each in world.transport._data.connections]
    assert max(held) < MIB, "the account comes out even"


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


@linux
def test_records_under_way_are_no_flood_however_many_clients_send_one(make: Make) -> None:
    world = make()
    data = world.transport._data
    data.total = MIB
    honest, flooder = two(world)
    slow = [flooder, *(world.join(transport=RawTransport()) for _ in range(3))]
    for client in slow:
        client.channel._transport.raw.sendall(b"\x02" + MIB.to_bytes(8, "big") + bytes(700_000))  # type: ignore[attr-defined]
    wait_until(lambda: sum(each.held for each in data.connections) > 4 * 700_000)
    for micro in range(3):
        assert honest.echo(bytes(MIB), micro) == inverted(bytes(MIB))
    assert not [client.lost for client in (honest, *slow) if client.lost]
    assert not world.handler.refused


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
    for port, endpoint in zip(ports(world), (world.transport._control, world.transport._data), strict=True):
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
    for mechanism, port in zip(("key", "ticket"), ports(world), strict=True):
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


def losses_of_a_run(work: Path, *, flooded: bool) -> list[float]:
    """Five steps of one client over sockets; where ``flooded``, the data endpoint is opened anew amid the third."""
    ids = torch.arange(48).reshape(4, 12)
    work.mkdir()
    run = TrunkWorld(
        work, tiny_llama(work / "model"), 1, memory=False, on_loss="wait", **{"optimizer.learning_rate": 0.05, "run": "flooded"}
    )
    losses = []
    with running(run):
        model = run.join_as(0).train()
        for step in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            if flooded and step == 2:
                data = run.server._transport._data
                data.total = -1
                wait_until(lambda: run.events("left"))
                data.total = 256 * MIB
            loss.backward()
            model.step()
            losses.append(loss.item())
        model.close()
        assert len(run.events("joined")) == 1 + flooded
    return losses


@linux
def test_training_goes_on_by_itself_when_the_endpoint_is_opened_anew(tmp_path: Path) -> None:
    calm, flooded = (losses_of_a_run(tmp_path / name, flooded=name == "flooded") for name in ("calm", "flooded"))
    assert calm[-1] < calm[0]
    assert flooded == pytest.approx(calm, rel=1e-5)


@linux
def test_a_server_whose_endpoint_cannot_be_opened_anew_ends_and_says_why(tmp_path: Path) -> None:
    run = TrunkWorld(tmp_path, tiny_llama(tmp_path / "model"), 1, memory=False, run="taken")
    with running(run):
        transport = run.server._transport

        def taken(*_: Any, **__: Any) -> None:
            raise ConfigError("cannot listen at 127.0.0.1: another process has the port")

        transport._data.reopen = taken
        transport._data._looked, transport._data.total = True, -1
        transport.wake()
        with pytest.raises(SplitflError, match="the channel failed: cannot listen"):
            run.server.wait(10)
