"""Listed clients that send all they can: others keep their share, and what is served of a flood is bounded.

The flood comes from a process of its own. What is asserted are counts of what was served, not times.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq

from splitfl.channel.client import ClientChannel
from splitfl.channel.opening import OpenTerms
from splitfl.errors import SplitflError
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import Ends, Forward, Heartbeat, Open, Release, decode_hello, encode
from splitfl.transport.base import Endpoint
from splitfl.transport.zmq_common import curve_client
from tests.unit.channel_world import MODEL, Client, Make, World, forward, inverted, make_worlds, wait_until
from tests.unit.test_channel_limits import PATIENT, Clock

LONG_LIST = Ends(tuple((f"{name:0200}", ("float32", (1,) * 8)) for name in range(128)))
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def make() -> Iterator[Make]:
    yield from make_worlds("zmq")


# --- the flood: workers in a process of their own ---


def knock(join: JoinString, secret: bytes, connections: int) -> None:
    """Without a session: a message that is long to decode, on and on, on connections that come back when they are cut."""
    asked = Open(bytes(32), bytes(1184), (AES_256_GCM,), MODEL, (1, 1), "a").to_map()
    frame = msgpack.packb(asked | {"model": {"x": list(range(100)) * 81}})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []
    for _ in range(connections):
        sock = context.socket(zmq.DEALER)
        curve_client(sock, join.key, Identity.from_secret(secret))
        sock.connect(f"tcp://{join.host}:{join.port}")
        sockets.append(sock)
    while True:
        for sock in sockets:
            with contextlib.suppress(zmq.Again):
                for _ in range(10):
                    sock.send(frame, zmq.NOBLOCK)
        time.sleep(0.001)


def pour(join: JoinString, secret: bytes, say: Callable[[ClientChannel, int], None], times: int, begin: Any) -> None:
    """In a session, once it is to ``begin``: ``say`` as fast as it goes."""
    client = Client()
    channel = ClientChannel.open(
        join,
        Identity.from_secret(secret),
        name="greedy",
        libraries={},
        answer=lambda _: OpenTerms(MODEL, (1, 1)),
        allocate=client.allocate,
        on_data=lambda message, payload: None,
        on_control=lambda message: None,
        on_lost=client.lost.append,
        timing=PATIENT,
    )
    begin.wait()
    with contextlib.suppress(SplitflError):
        for number in range(times):
            say(channel, number)
    threading.Event().wait()


def small(channel: ClientChannel, number: int) -> None:
    channel.send(forward(2, number), b"ab")


def many_segments(channel: ClientChannel, number: int) -> None:
    channel.send(Forward(-1, number, ((1, 0),) * 4096, 1, "bfloat16", "raw", False, False, True), bytes(8192))


def releases(channel: ClientChannel, number: int) -> None:
    channel.send(Release(tuple(range(8192))), b"")


def heartbeats(channel: ClientChannel, number: int) -> None:
    channel.tell(Heartbeat(0.0))
    if number % 20 == 19:
        time.sleep(0.001)  # its own queue has room for a thousand


def long_lists(channel: ClientChannel, number: int) -> None:
    channel.tell(LONG_LIST)


@contextlib.contextmanager
def flood(world: World, work: Callable[..., None], *arguments: Any) -> Iterator[str]:
    """The flood runs; gives the user that it is to the server."""
    identity = world.listed("greedy")
    process = SPAWN.Process(target=work, args=(world.join_string, identity.secret, *arguments), daemon=True)
    process.start()
    try:
        yield str(identity.public)
    finally:
        process.kill()
        process.join()


# --- what is served of it ---


def logged(world: World, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Endpoint, str]]:
    """Endpoint and user of each frame, in the order in which they are taken."""
    taken, take = [], world.server._sessions.take

    def noting(frame: Any) -> None:
        taken.append((frame.endpoint, frame.user))
        take(frame)

    monkeypatch.setattr(world.server._sessions, "take", noting)
    return taken


def test_who_has_no_session_gets_a_first_message_looked_at_and_no_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    honest = world.join()
    taken, looked_at, begun = logged(world, monkeypatch), [], []
    connections = world.transport._control.connections

    def looking(frame: bytes) -> Any:
        looked_at.append(len(frame))
        return decode_hello(frame)

    def accepting(number: int) -> Any:
        begun.append(number)
        return accepted(number)

    accepted = connections.accepted
    monkeypatch.setattr("splitfl.channel.entrance.decode_hello", looking)
    monkeypatch.setattr(connections, "accepted", accepting)
    with flood(world, knock, 20) as greedy:
        wait_until(lambda: (Endpoint.CONTROL, greedy) in taken, 30)
        for micro in range(100):
            assert honest.echo(bytes(65536), micro) == inverted(bytes(65536))
        wait_until(lambda: taken.count((Endpoint.CONTROL, greedy)) >= 100, 30)
    assert len(looked_at) <= len(begun)
    assert any("no Hello" in text for _, _, text in world.handler.refused)
    assert not honest.lost


def size(message: Any) -> int:
    return len(encode(message))


@pytest.mark.parametrize(
    ("say", "endpoint", "most"),
    [
        pytest.param(small, Endpoint.DATA, 8192, marks=pytest.mark.slow),
        pytest.param(many_segments, Endpoint.DATA, 8192 // 65, marks=pytest.mark.slow),
        (releases, Endpoint.DATA, 8192 // 129),
        (heartbeats, Endpoint.CONTROL, int(1096 / (1 + size(Heartbeat(0.0)) / 256))),
        (long_lists, Endpoint.CONTROL, int(1096 / (1 + size(LONG_LIST) / 256))),
    ],
)
def test_a_flood_in_a_session_is_served_in_turn_and_then_ended(
    make: Make, monkeypatch: pytest.MonkeyPatch, say: Callable[..., None], endpoint: Endpoint, most: int
) -> None:
    world = make(clock=Clock(), timing=PATIENT)  # no time passes: nothing is given back of what a client may send in a second
    honest, messages, payload = world.join(timing=PATIENT), 60, bytes(65536)
    taken, poll, open_gate, is_shut = logged(world, monkeypatch), world.transport.poll, threading.Event(), threading.Event()

    def gated(timeout: float) -> Any:
        if open_gate.is_set():
            return poll(timeout)
        is_shut.set()
        open_gate.wait(0.05)
        return []

    answer = world.handler.answer
    monkeypatch.setattr(
        world.handler, "answer", lambda session, message, payload: payload is None or answer(session, message, payload)
    )
    monkeypatch.setattr(world.transport, "poll", gated)
    open_gate.set()
    begin = SPAWN.Event()
    with flood(world, pour, say, most + most // 4, begin) as greedy:
        wait_until(lambda: len(world.handler.opened) == 2, 30)
        ours, theirs = (info.session for info in world.handler.opened)
        link = world.server._sessions.find(theirs)
        link.allowance._small.take(20_000)  # by so much it may be ahead before it is ended
        link.allowance._control.take(3000)
        # The server takes nothing for a moment, until both have much waiting there.
        open_gate.clear()
        world.transport.wake()
        wait_until(is_shut.is_set)
        begin.set()
        for micro in range(messages):
            honest.channel.send(forward(len(payload), micro), payload)
        user = theirs if endpoint is Endpoint.DATA else greedy
        wait_until(lambda: waiting(world, Endpoint.DATA, ours) > messages * len(payload), 30)
        wait_until(lambda: waiting(world, endpoint, user) > 20_000, 30)
        taken.clear()
        open_gate.set()
        wait_until(lambda: len(honest.data) == messages, 30)
        wait_until(lambda: world.handler.closed, 60)
    assert "than a client has use for" in world.handler.closed[0][1]
    served = sum(session == theirs for session, _, _ in world.handler.data)
    assert most // 2 < served + link.tally.heard <= most + 5
    frames = [index for index, (_, user) in enumerate(taken) if user == ours]
    between = sum(user != ours for _, user in taken[frames[0] : frames[-1]])
    assert between <= 2 * len(frames)
    assert not honest.lost


def waiting(world: World, endpoint: Endpoint, user: str) -> int:
    """Bytes of this user's that ZeroMQ holds; asked while the server takes nothing."""
    listening = world.transport._data if endpoint is Endpoint.DATA else world.transport._control
    listening.connections.look()
    return sum(each.held for each in listening.connections if each.user == user)
