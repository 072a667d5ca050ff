"""A control frame that was lost on its way is no breach of the protocol, though what follows looks like one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from client_ends.retrying import may_pass
from splitfl.errors import ConnectError, OutOfTurn, SealError
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import Enrol, Message, StepClosed, StepDone, StepOpened, encode
from splitfl.transport.base import Sent
from tests.faults import relay as relays
from tests.faults.relay import Relay
from tests.unit.channel_world import QUICK, Client, Make, World, make_worlds, wait_until

CLOSED = StepClosed(0, 0, 1, 0.0, None)


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    yield from make_worlds(request.param)


def in_step(world: World) -> tuple[Client, str]:
    """A client in step 0 whose heartbeats have been heard, and its session."""
    client = world.join()
    session = client.channel.opened.session
    client.channel.tell(Enrol())
    wait_until(lambda: world.handler.control)
    world.server.tell(session, StepOpened(0))
    link = world.server._sessions.find(session)
    assert link is not None
    wait_until(lambda: client.control and link.tally._says and client.channel._tally._says)
    return client, session


def test_a_word_of_the_server_that_was_lost(make: Make) -> None:
    world = make()
    client, session = in_step(world)
    send = world.transport.send_control
    lost: list[bytes] = []

    def losing(peer: bytes, frame: bytes) -> Sent:
        if frame == encode(CLOSED) and not lost:
            lost.append(frame)
            return Sent.SENT
        return send(peer, frame)

    world.transport.send_control = losing
    client.channel.tell(StepDone(0, 0, 0, "continue"))
    wait_until(lambda: len(world.handler.control) == 2)
    world.server.tell(session, CLOSED)
    world.server.tell(session, StepOpened(1))
    wait_until(lambda: client.lost)
    assert lost
    assert isinstance(client.lost[0], SealError)
    assert may_pass(client.lost[0])
    assert client.control == [StepOpened(0, 1)], "what came out of turn is not acted on"


def test_a_word_of_the_client_that_was_lost(make: Make) -> None:
    world = make()
    client, session = in_step(world)
    transport = client.channel._transport
    send, done = transport.send_control, encode(StepDone(0, 0, 0, "pause"))
    transport.send_control = lambda frame: None if frame == done else send(frame)  # type: ignore[method-assign]
    client.channel.tell(StepDone(0, 0, 0, "pause"))
    client.channel.tell(Enrol())
    wait_until(lambda: client.lost and world.handler.closed)
    ((closed, why),) = world.handler.closed
    assert closed == session
    assert why.startswith("seal: ")
    assert may_pass(client.lost[0])
    assert [message for _, message in world.handler.control] == [Enrol()]


def test_the_first_record_of_the_server_that_was_lost(make: Make) -> None:
    """The session does not come about; who joins hears the same as of any link that broke."""
    world = make()
    world.transport.send_data = lambda peer, frame: Sent.SENT
    with pytest.raises(ConnectError, match="no session was opened: 1 records were sent, 0 have come"):
        world.join(timing=dataclasses.replace(QUICK, overdue=0.3))


def say(world: World, session: str, message: Message) -> None:
    """The server says it, whatever its own state."""
    link = world.server._sessions.find(session)
    assert link is not None
    world.server._do(link, lambda: world.server._sessions.deliver(link, encode(message)))


def test_a_server_that_breaks_the_protocol_is_not_forgiven(make: Make) -> None:
    world = make()
    client, session = in_step(world)
    say(world, session, StepOpened(7, 1))
    wait_until(lambda: client.lost)
    assert isinstance(client.lost[0], OutOfTurn)
    assert not may_pass(client.lost[0])


def test_a_client_that_breaks_the_protocol_is_not_forgiven(make: Make) -> None:
    world = make()
    client, _ = in_step(world)
    client.channel._control_queue.append(encode(Enrol()))
    client.channel._transport.wake()
    wait_until(lambda: client.lost and world.handler.closed)
    assert world.handler.closed[0][1].startswith("protocol: ")
    assert not may_pass(client.lost[0])


def test_who_says_nothing_more_is_not_waited_for(make: Make) -> None:
    world = make()
    client, session = in_step(world)
    link = world.server._sessions.find(session)
    assert link is not None
    client.channel._timing = client.channel._timing.__class__(heartbeat=900.0, silence=900.0)
    link.heard = 1e12  # what it says meanwhile keeps its session
    client.channel._control_queue.append(encode(Enrol()))
    client.channel._transport.wake()
    wait_until(lambda: world.handler.closed)
    assert world.handler.closed[0][1].startswith("protocol: ")


def test_a_control_frame_that_does_not_decrypt_ends_its_connection_for_good() -> None:
    """libzmq once kept the broken connection, unread, for as long as the server lived."""
    world = World("zmq")
    relay = Relay(world.transport.control_port, world.transport.data_port)
    try:
        through = JoinString(world.server_identity.public, relays.HOST, world.transport.control_port, "run")
        for number in range(3):
            client = world.join(join=through)
            relay.at(lambda passing: not passing.is_data and passing.way == "up", lambda passing: passing.frame.flipped())
            wait_until(lambda client=client: client.lost)
            client.channel.close()
            wait_until(lambda: not len(world.transport._control.connections) and not len(world.transport._data.connections))
            assert len(world.handler.closed) == number + 1
        assert not [text for _, code, text in world.handler.refused if code == "handshake"]
        other = JoinString(Identity.generate().public, "127.0.0.1", world.transport.control_port, "run")

        def told() -> bool:
            with pytest.raises(ConnectError, match="another key"):
                world.join(join=other)
            return bool(world.handler.refused)

        wait_until(told)  # not within a moment of the server's own test at its start, which is refused
        assert {code for _, code, _ in world.handler.refused} == {"handshake"}
    finally:
        world.close()
        relay.close()
