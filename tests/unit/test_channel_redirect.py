"""A server with several endpoints sends a client to another of them, once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from splitfl.errors import ConnectError
from splitfl.protocol.messages import Redirect
from tests.unit.channel_world import QUICK, World


@pytest.fixture
def pair() -> Iterator[tuple[World, World]]:
    """Two endpoints of one server, of which the first sends its clients to the second."""
    first = World("zmq")
    second = World("zmq", like=first)
    first.handler.redirect = Redirect("", second.transport.control_port)
    yield first, second
    for world in (first, second):
        world.close()


def join(world: World) -> None:
    # As a client does, which brings no transport of its own.
    world.client_transport = lambda: None  # type: ignore[method-assign]
    world.join()


def test_the_session_opens_where_the_client_was_sent(pair: tuple[World, World]) -> None:
    first, _ = pair
    join(first)
    assert [len(world.handler.opened) for world in pair] == [0, 1]
    assert first.clients[0].echo(b"abcd") == bytes(255 - byte for byte in b"abcd")
    assert first.handler.refused == first.handler.closed == []


def test_there_is_no_second_time(pair: tuple[World, World]) -> None:
    first, second = pair
    second.handler.redirect = Redirect("127.0.0.1", first.transport.control_port)
    with pytest.raises(ConnectError, match="once more"):
        join(first)


def test_another_key_there_is_noticed(pair: tuple[World, World]) -> None:
    first, _ = pair
    stranger = World("zmq", timing=QUICK)
    first.handler.redirect = Redirect("127.0.0.1", stranger.transport.control_port)
    with pytest.raises(ConnectError, match="another key"):
        join(first)
    stranger.close()


def test_endpoints_that_disagree_are_noticed(pair: tuple[World, World], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    welcome = second.handler.welcome

    def other(*arguments):
        answer = welcome(*arguments)
        answer.config["cut"] = [2, 2]
        return answer

    monkeypatch.setattr(second.handler, "welcome", other)
    with pytest.raises(ConnectError, match="different configurations"):
        join(first)


def test_a_connection_of_the_callers_own_cannot_be_sent_on() -> None:
    world = World("memory")
    world.handler.redirect = Redirect("", 5)
    with pytest.raises(ConnectError, match="another address"):
        world.join()
    world.close()
