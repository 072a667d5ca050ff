"""Limits of one client: its bytes, tokens, messages, sessions and window; and one that does not read."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitfl.channel.admission import Admission
from splitfl.channel.allowance import Allowance, Bucket
from splitfl.channel.client import OpenTerms
from splitfl.channel.handler import Peer
from splitfl.channel.offer import check_room
from splitfl.channel.timing import Timing
from splitfl.errors import Refused, SessionLost
from splitfl.protocol.keys import AuthorizedClients, Identity
from splitfl.protocol.limits import SESSIONS
from splitfl.protocol.messages import PROTOCOL_VERSION, Heartbeat, Hello, encode
from splitfl.transport.base import Sent
from tests.unit.channel_world import MIB, MODEL, QUICK, Client, Make, World, forward, inverted, make_worlds, wait_until

# The channel's clock is wound by hand: nobody may be taken for silent meanwhile.
PATIENT = Timing(heartbeat=900.0, silence=1000.0, flush=1.0, linger=0.1, stall=1e9)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes worlds over one transport."""
    yield from make_worlds(request.param)


def test_a_bucket_may_be_overdrawn_and_is_then_waited_for() -> None:
    clock = Clock()
    bucket = Bucket(10, 20, clock)
    bucket.take(20)
    assert bucket.wait() == 0
    bucket.take(30)
    assert bucket.wait() == 3
    clock.now = 2.0
    assert bucket.wait() == 1
    clock.now = 100.0
    bucket.take(25)  # no more than the burst was saved up
    assert bucket.wait() == 0.5
    bucket.set(5, 20)
    assert bucket.wait() == 1.0


def test_the_narrowest_limit_says_how_long() -> None:
    clock = Clock()
    allowance = Allowance({"bytes_per_second": 1000, "tokens_per_second": 10}, clock)
    allowance.begun(1000, 10)
    assert allowance.wait() == 0
    allowance.begun(1000, 40)
    assert allowance.wait() == 4
    allowance.limit({"bytes_per_second": 1000})
    assert allowance.wait() == 1
    allowance.limit({})
    assert allowance.wait() == 0
    for _ in range(8192 + 2000 - 2):
        allowance.begun(0, 0)
    assert allowance.wait() == pytest.approx(1.0), "small messages are counted too"
    allowance.begun(2**20, 0, 8192)
    assert allowance.wait() == pytest.approx(1.064), "and so is what names much"


def test_who_was_far_ahead_and_has_waited_since_floods_no_more() -> None:
    clock = Clock()
    allowance = Allowance({}, clock)
    allowance.begun(2**20, 0, 64 * (8192 + 20_001))
    assert allowance.flooded
    clock.now = 60.0
    allowance.begun(2**20, 0)
    assert not allowance.flooded, "a large message takes nothing of what small ones may"
    assert allowance.wait() == 0


def wind(world: World, clock: Clock, condition: Any) -> float:
    """Lets the channel's clock run, a quarter of a second for each look, until the condition holds; its time then."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        clock.now += 0.25
        world.transport.wake()
        threading.Event().wait(0.005)
    return clock.now


def test_bytes_beyond_the_rate_wait_for_their_credit_and_nobody_else_does(make: Make) -> None:
    clock = Clock()
    world = make(window=2 * MIB, max_message=2 * MIB, clock=clock, timing=PATIENT)
    slow = world.join(identity=world.listed("slow", bytes_per_second=MIB), timing=PATIENT)
    free = world.join(timing=PATIENT)
    for micro in range(8):
        slow.channel.send(forward(MIB, micro), bytes(MIB))
    wait_until(lambda: len(slow.data) >= 2)
    for micro in range(8):
        assert free.echo(bytes(2 * MIB), micro) == inverted(bytes(2 * MIB))
    assert len(slow.data) <= 3, "a second's worth, one that overdraws, and what of the window was left"
    # Seven messages had begun before the last got its credit: a second's worth of them at once, a window's overdrawn.
    assert wind(world, clock, lambda: len(slow.data) == 8) >= 4.0
    assert not slow.lost


def test_tokens_beyond_the_rate_wait_too(make: Make) -> None:
    clock = Clock()
    size = 64 * 1024  # 32768 tokens
    world = make(window=size, max_message=size, clock=clock, timing=PATIENT)
    client = world.join(identity=world.listed("tokens", tokens_per_second=size // 2), timing=PATIENT)
    for micro in range(4):
        client.channel.send(forward(size, micro), bytes(size))
    wait_until(lambda: len(client.data) == 2)
    assert wind(world, clock, lambda: len(client.data) == 4) >= 2.0
    assert not client.lost


def test_a_window_of_ones_own(make: Make) -> None:
    world = make(window=8 * MIB, max_message=8 * MIB)
    client = world.join(identity=world.listed("narrow", window=4 * MIB))
    assert (client.channel.window, client.channel.max_message) == (4 * MIB, 4 * MIB)
    assert client.echo(bytes(4 * MIB)) == inverted(bytes(4 * MIB))
    assert world.join().channel.window == 8 * MIB


def test_no_more_sessions_than_the_limit(make: Make) -> None:
    world = make()
    identity = world.listed("one", sessions=1)
    first = world.join(identity=identity)
    with pytest.raises(Refused, match="may have 1 sessions at a time") as caught:
        world.join(identity=identity)
    assert caught.value.code == "full"
    again = world.join(identity=identity, answer=lambda _: OpenTerms(MODEL, (1, 1), replaces=first.channel.opened.session))
    assert again.echo(b"ab") == inverted(b"ab"), "one that stands for a lost one is let in"
    assert world.join().echo(b"ab") == inverted(b"ab")
    first.channel.close()
    again.channel.close()
    wait_until(lambda: len(world.handler.closed) == 2)
    assert world.join(identity=identity).echo(b"ab") == inverted(b"ab")


def test_a_client_whose_line_does_not_say_has_so_many_sessions_and_no_more() -> None:
    peer = Peer(Identity.generate().public, "a", "here")
    others = [f"session {number}" for number in range(SESSIONS)]
    check_room(peer, others[1:], "", 20.0)
    check_room(peer, others, others[3], 20.0)
    with pytest.raises(Refused, match=f"may have {SESSIONS} sessions at a time, and has them.*sessions=N") as caught:
        check_room(peer, others, "another's", 20.0)
    assert caught.value.code == "full"
    check_room(replace(peer, limits={"sessions": SESSIONS + 1}), others, "", 20.0)


def test_a_flood_of_control_messages_ends_the_session(make: Make) -> None:
    world = make(clock=Clock(), timing=PATIENT)
    client, honest = world.join(timing=PATIENT), world.join(identity=world.listed("honest"), timing=PATIENT)
    link = world.server._sessions.find(client.channel.opened.session)
    assert link is not None
    for _ in range(50):
        before = link.traffic.received
        for _ in range(100):
            if client.lost:
                break
            with contextlib.suppress(SessionLost):
                client.channel.tell(Heartbeat(0.0))
        wait_until(lambda before=before: client.lost or link.traffic.received - before >= 100 * 20)
    # Who floods on may be cut before it has read why.
    wait_until(lambda: client.lost and world.handler.closed)
    assert "more control messages than" in world.handler.closed[0][1]
    assert honest.echo(b"ab") == inverted(b"ab")


def test_a_flood_of_small_messages_that_cost_no_credit_ends_the_session(make: Make) -> None:
    world = make(clock=Clock(), timing=PATIENT)
    client, honest = world.join(timing=PATIENT), world.join(identity=world.listed("honest"), timing=PATIENT)
    link = world.server._sessions.find(client.channel.opened.session)
    assert link is not None
    link.allowance._small.take(8192 + 20_000 - 3)  # Attach and two more are within
    for micro in range(2):
        assert client.echo(b"ab", micro) == inverted(b"ab")
    client.channel.send(forward(2, 2), b"ab")
    wait_until(lambda: client.lost)
    assert "more small messages than" in str(client.lost[0])
    assert honest.echo(b"ab") == inverted(b"ab")


def test_limits_follow_the_file(make: Make, tmp_path: Path) -> None:
    clock = Clock()
    world = make(window=4 * MIB, max_message=4 * MIB, clock=clock, timing=PATIENT)
    path = tmp_path / "authorized_clients"
    path.write_text(f"{world.identity.public} alice bytes_per_second={MIB}\n")
    world.server._admission._authorized = AuthorizedClients(path)
    client = world.join(timing=PATIENT)
    for micro in range(3):
        client.channel.send(forward(4 * MIB, micro), bytes(4 * MIB))
    wait_until(lambda: client.data)
    path.write_text(f"{world.identity.public} alice\n")
    assert wind(world, clock, lambda: len(client.data) == 3) < 7.0, "the limit would have taken that long"
    assert not client.lost


def test_a_key_that_was_removed_cannot_fill_the_log(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(timing=replace(QUICK, linger=600.0))
    transports, join = [world.client_transport() for _ in range(30)], world.join_string
    for transport in transports:
        transport.connect_control(join.host, join.port, join.key, world.identity, 3.0)
    world.authorized._clients.clear()
    answers, send, leaving = [], world.transport.send_control, world.server._sessions._leaving
    monkeypatch.setattr(world.transport, "send_control", lambda *answer: answers.append(answer) or send(*answer))
    for transport in transports:
        for _ in range(2):
            transport.send_control(encode(Hello(PROTOCOL_VERSION, "run", {}, "a platform")))
    wait_until(lambda: sum(due.frames for due in list(leaving._due.values())) == 60)
    heard = [transport.poll(1.0) for transport in transports]
    for transport in transports:
        transport.close(0)
    assert len(answers) == 30, "one on each connection"
    assert all(heard)
    assert [code for _, code, _ in world.handler.refused] == ["not-authorized"] * 5


def test_a_list_that_is_away_while_it_is_saved_ends_no_session(tmp_path: Path) -> None:
    path = tmp_path / "authorized_clients"
    path.write_text(f"{Identity.generate().public} bob\n")
    authorized = AuthorizedClients(path)
    admission = Admission(authorized, 15, Clock())
    text = path.read_text()
    for _ in range(3):
        path.rename(tmp_path / "backup")
        assert not admission.changed()
        path.write_text("")
        assert not admission.changed()
        path.write_text(text)
        assert not admission.changed()
        assert admission.changed()
        assert not admission.changed()
        assert len(authorized) == 1
    path.unlink()
    assert [admission.changed() for _ in range(3)] == [False, True, False], "one that stays away is taken at its word"


def test_a_list_that_is_emptied_right_after_it_was_found_changed_ends_no_session(tmp_path: Path) -> None:
    path = tmp_path / "authorized_clients"
    key = Identity.generate().public
    path.write_text(f"{key} bob\n")
    admission = Admission(AuthorizedClients(path), 15, Clock())
    path.write_text(f"{key} bob window=8388608\n")
    assert [admission.changed(), admission.changed()] == [False, True]
    path.write_text("")
    assert admission.limits(Peer(key, "bob", "here")) == {"window": 8388608}


def test_who_does_not_read_is_dropped_and_held_little(make: Make) -> None:
    world = make(window=4 * MIB, max_message=MIB, timing=Timing(heartbeat=0.1, silence=5.0, flush=0.5, linger=0.1, stall=0.6))
    client = world.join()
    reader: Client = world.join()
    send, stalled = world.transport.send_data, world.server._sessions.find(client.channel.opened.session).data_peer
    world.transport.send_data = lambda peer, frame: Sent.FULL if peer == stalled else send(peer, frame)
    for micro in range(40):
        client.channel.send(forward(MIB, micro), bytes(MIB))
    most = [0]

    def dropped() -> bool:
        link = world.server._sessions.find(client.channel.opened.session)
        if link is not None:
            most[0] = max(most[0], link.outbox.pending)
        return link is None

    wait_until(dropped)
    assert world.handler.closed[0] == (client.channel.opened.session, "it has read nothing for 0.6 s of what was sent to it")
    assert MIB <= most[0] <= 9 * MIB
    assert reader.echo(b"ab") == inverted(b"ab")
    assert QUICK.stall == 120.0
