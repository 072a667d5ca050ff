"""What a server's sessions survive of their own side: connections that are cut, a handler that fails, peers that do not read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from splitfl.protocol.messages import Enrol, StepOpened
from splitfl.transport.base import Endpoint, Sent
from tests.unit.channel_world import Client, Make, World, inverted, make_worlds, wait_until


@pytest.fixture
def make() -> Iterator[Make]:
    yield from make_worlds("memory")


def of_io_thread(world: World, action: object) -> None:
    """Runs it where all of a server's sessions are looked after; returns once it has run."""
    link = next(iter(world.server._sessions._links.values()))
    ran: list[bool] = []
    world.server._do(link, action)  # type: ignore[arg-type]
    world.server._do(link, lambda: ran.append(True))
    wait_until(lambda: ran)


def session_of(client: Client) -> str:
    return client.channel.opened.session


def test_a_connection_that_is_cut_ends_the_session_behind_it(make: Make) -> None:
    world = make()
    first, second, honest = world.join(), world.join(), world.join()
    links = [world.server._sessions.find(session_of(client)) for client in (first, second)]
    cut = world.server._sessions.cut
    of_io_thread(world, lambda: cut(Endpoint.CONTROL, links[0].control_peer))  # type: ignore[union-attr]
    of_io_thread(world, lambda: cut(Endpoint.DATA, links[1].data_peer))  # type: ignore[union-attr]
    of_io_thread(world, lambda: cut(Endpoint.DATA, b"nobody"))
    wait_until(lambda: len(world.handler.closed) == 2)
    assert [session for session, _ in world.handler.closed] == [session_of(first), session_of(second)]
    assert [why.partition(": ")[2] for _, why in world.handler.closed] == [
        "a message without an end on the control endpoint",
        "a message without an end on the data endpoint",
    ]
    assert honest.echo(b"ab") == inverted(b"ab")


def test_an_endpoint_that_is_opened_anew_takes_its_sessions_along_and_they_may_come_again(make: Make) -> None:
    world = make()
    clients = [world.join(), world.join()]
    of_io_thread(world, lambda: world.server._sessions.cut(Endpoint.DATA, None))
    wait_until(lambda: all(client.lost for client in clients))
    assert {client.lost[0].code for client in clients} == {"restarting"}  # type: ignore[attr-defined]
    assert {why for _, why in world.handler.closed} == {"a flood on the data endpoint, which was opened anew"}
    assert world.join().echo(b"ab") == inverted(b"ab")


def test_a_handler_that_fails_ends_nobody_elses_session(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    world = make()
    leaving, staying = world.join(), world.join()

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    world.handler.on_closed = world.handler.on_refused = fails  # type: ignore[method-assign]
    leaving.channel.close()
    of_io_thread(world, lambda: world.server._sessions.refusal("somebody", "full", "no"))
    assert staying.echo(b"ab") == inverted(b"ab")
    assert world.server._sessions.find(session_of(leaving)) is None
    assert "on_closed failed" in caplog.text
    assert "on_refused failed" in caplog.text


def test_who_does_not_read_its_control_messages_is_dropped(make: Make) -> None:
    world = make()
    client, honest = world.join(), world.join()
    link = world.server._sessions.find(session_of(client))
    assert link is not None
    send = world.transport.send_control
    world.transport.send_control = lambda peer, frame: Sent.FULL if peer == link.control_peer else send(peer, frame)
    client.channel.tell(Enrol())
    wait_until(lambda: world.handler.control)
    world.server.tell(session_of(client), StepOpened(0))
    wait_until(lambda: world.handler.closed)
    assert world.handler.closed[0] == (session_of(client), "it does not read its control messages")
    of_io_thread(world, lambda: world.server._sessions.deliver(link, b"late"))
    assert honest.echo(b"ab") == inverted(b"ab")


def test_traffic_is_counted_by_name_over_all_sessions(make: Make) -> None:
    world = make()
    first = world.join()
    first.echo(bytes(100_000))
    first.channel.close()
    received, sent = world.server.traffic()["alice"]
    assert received > 100_000
    assert sent > 100_000
    world.join().echo(bytes(100_000))
    assert world.server.traffic()["alice"][0] > received + 100_000
