"""Messages without an end, over real sockets: whoever sends one is cut, and nobody else; an endpoint that is full of them is
opened anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes, reset_peak
from splitfl.channel.timing import Timing
from splitfl.errors import ConfigError, SplitflError
from tests.unit.channel_world import MIB, Client, Make, World, forward, inverted, linux, make_worlds, wait_until
from tests.unit.raw_transport import RawTransport
from tests.world import World as TrunkWorld
from tests.world import running, tiny_llama


@pytest.fixture
def make() -> Iterator[Make]:
    yield from make_worlds("zmq")


def flood(client: Client, parts: int, size: int = 0) -> bool:
    """Parts of a message that has no last one, from a client that was let in; False once it has been cut."""
    part = b"\x03" + size.to_bytes(8, "big") + bytes(size) if size else b"\x01\0"
    try:
        client.channel._transport.raw.sendall(part * parts)  # type: ignore[attr-defined]
    except OSError:
        return False
    return not client.lost


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
    reset_peak()
    before = peak_bytes()
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
    before = world.ports
    sent = 0
    while flood(flooder, 1000, 30_000):
        sent += 1
        assert sent < 2000
    wait_until(lambda: honest.lost and len(world.handler.closed) == 2)
    assert getattr(honest.lost[0], "code", "") in ("restarting", "lost"), "what a client connects again after"
    assert world.ports == before
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
    patient = Timing(heartbeat=0.1, silence=20.0, flush=5.0, linger=0.5)  # on a busy machine nobody is to be lost for its silence
    world = make(window=64 * MIB, max_message=8 * MIB, timing=patient)
    for endpoint in (world.transport._control, world.transport._data):
        endpoint.bound -= 2 * MIB  # without the slack: two frames
    clients = [world.join(timing=patient) for _ in range(3)]
    sizes = [2, 4096, 100_000, MIB, 8 * MIB, 3 * MIB + 2]
    for micro in range(18):
        for client in clients:
            size = sizes[micro % len(sizes)] // 2 * 2
            client.channel.send(forward(size, micro), bytes(size))
    wait_until(lambda: all(len(client.data) == 18 or client.lost for client in clients), 60)
    assert not [client.lost for client in clients if client.lost]
    held = [each.held for each in world.transport._data.connections]
    assert max(held) < MIB, "the account comes out even"


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
                data = run.server.endpoints._transport._data
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
        transport = run.server.endpoints._transport

        def taken(*_: Any, **__: Any) -> None:
            raise ConfigError("cannot listen at 127.0.0.1: another process has the port")

        transport._data.reopen = taken
        transport._data.is_to_be_judged, transport._data.total = True, -1
        transport.wake()
        with pytest.raises(SplitflError, match="the channel failed: cannot listen"):
            run.server.wait(10)
