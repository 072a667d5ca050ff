"""How long a connection stands that has no session: before its Hello, after a no, after its session's end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from splitfl.channel.timing import Timing
from splitfl.errors import SessionLost
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.keys import AuthorizedClients, Identity
from splitfl.protocol.message import MAX_HELLO_BYTES
from splitfl.protocol.messages import PROTOCOL_VERSION, Fault, Heartbeat, Hello, Open, Refused, Welcome, decode_control, encode
from splitfl.transport.base import Endpoint
from splitfl.transport.zmq_common import curve_client
from tests.unit.channel_world import MODEL, Client, Make, World, inverted, make_worlds, wait_until
from tests.unit.test_channel_limits import PATIENT, Clock

HELLO = encode(Hello(PROTOCOL_VERSION, "run", {}, ""))
LONG = Timing(heartbeat=0.1, silence=20.0, flush=1.0, linger=600.0)


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes worlds over one transport."""
    yield from make_worlds(request.param)


@pytest.fixture
def make_zmq() -> Iterator[Make]:
    yield from make_worlds("zmq")


class Knocker:
    """A control connection of a listed key, spoken on by hand."""

    def __init__(self, world: World, *first: bytes, identity: Identity | None = None) -> None:
        self.transport, self.answers, self.broken = world.client_transport(), [], False
        join = world.join_string
        self.transport.connect_control(join.host, join.port, join.key, identity or world.identity, 3.0)
        self.say(*first)

    def say(self, *frames: bytes) -> None:
        for frame in frames:
            try:
                self.transport.send_control(frame)
            except SessionLost:
                self.broken = True

    def listen(self) -> list[Any]:
        try:
            self.answers += [decode_control(bytes(frame.frame), False) for frame in self.transport.poll(0.01)]
        except SessionLost:
            self.broken = True
        return self.answers

    def is_cut(self) -> bool:
        self.listen()
        return self.broken


def deaf(client: Client) -> Client:
    """A client that goes on as if nobody had told it that its session is over."""
    client.channel._session.receive = lambda frame: None  # type: ignore[method-assign, assignment, return-value]
    return client


def standing(world: World) -> int:
    if world.kind == "memory":
        return len(world.transport._links)
    return len(world.transport._control.connections) + len(world.transport._data.connections)


def test_both_connections_of_a_session_that_was_ended_are_cut(make: Make) -> None:
    world = make()
    client, other = deaf(world.join()), world.join()
    before = standing(world)
    world.server.end(client.channel.opened.session, Fault("stale", "too late"))
    wait_until(lambda: client.lost)
    assert "broke" in str(client.lost[0])
    wait_until(lambda: standing(world) == before // 2)
    assert other.echo(b"ab") == inverted(b"ab")


def test_a_key_that_was_taken_out_loses_its_connections(make: Make, tmp_path: Path) -> None:
    world = make()
    path = tmp_path / "authorized_clients"
    path.write_text(f"{world.identity.public} alice\n")
    world.server._admission._authorized = AuthorizedClients(path)
    clients = [deaf(world.join()) for _ in range(2)]
    opening = Knocker(world, HELLO)
    wait_until(opening.listen)
    path.write_text(f"{Identity.generate().public} bob\n")
    wait_until(lambda: all(client.lost for client in clients) and opening.is_cut())
    wait_until(lambda: standing(world) == 0)
    opening.transport.close(0)


def test_what_is_under_way_when_a_key_is_taken_out_cuts_nobody_before_it_has_heard_why(make: Make) -> None:
    world = make(timing=LONG)
    knocker = Knocker(world, HELLO)
    wait_until(knocker.listen)
    link = next(iter(world.server._sessions._links.values()))
    world.authorized._clients.clear()
    world.server._do(link, lambda: world.server._sessions.end(link, "not-authorized", "your key was removed"))
    wait_until(lambda: any(isinstance(answer, Fault) for answer in knocker.listen()))
    said = len(knocker.answers)
    knocker.say(encode(Heartbeat(0.0)), b"\0", HELLO)
    wait_until(lambda: passed_over(world, link.control_peer) == 3)
    assert not knocker.is_cut()
    assert len(knocker.answers) == said
    assert [code for _, code, _ in world.handler.refused] == ["lost"]
    knocker.transport.close(0)


def passed_over(world: World, peer: bytes) -> int:
    """Messages that came on a control connection after its session."""
    due = world.server._sessions._leaving._due.get((Endpoint.CONTROL, peer))
    return due.frames if due is not None else 0


def test_a_hello_is_charged_once_and_what_comes_after_a_no_is_not_looked_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world, asked = make(timing=PATIENT, clock=Clock()), []
    peer = world.server._admission.peer
    monkeypatch.setattr(world.server._admission, "peer", lambda *who: asked.append(who) or peer(*who))
    no = encode(Hello(PROTOCOL_VERSION, "another run", {}, ""))
    knocker = Knocker(world, no)
    wait_until(knocker.listen)
    (allowance,) = world.server._sessions._entrance._allowances.values()
    assert allowance._control._level == pytest.approx(4096 - 1 - len(no) / 256)
    knocker.say(HELLO, HELLO)
    wait_until(lambda: allowance._control._level == pytest.approx(4096 - 3 - (len(no) + 2 * len(HELLO)) / 256))
    assert len(asked) == 1
    knocker.transport.close(0)


def test_refusals_of_a_key_cannot_fill_the_log(make: Make) -> None:
    world = make(timing=LONG)
    other = world.listed("other")
    refused = [Knocker(world, encode(Hello(PROTOCOL_VERSION, "another run", {}, ""))) for _ in range(8)]
    wait_until(lambda: all(each.listen() for each in refused))
    ended = [Knocker(world, HELLO, b"\0") for _ in range(8)]
    wait_until(lambda: all(len(each.listen()) == 2 for each in ended))
    elsewhere = Knocker(world, encode(Hello(PROTOCOL_VERSION, "another run", {}, "")), identity=other)
    wait_until(lambda: len(world.handler.refused) == 11)
    assert [code for _, code, _ in world.handler.refused] == ["unknown-run"] * 5 + ["lost"] * 5 + ["unknown-run"]
    for each in (*refused, *ended, elsewhere):
        each.transport.close(0)


def test_who_has_not_said_anything_is_nobody_yet(make: Make) -> None:
    world = make(timing=LONG)
    knocker = Knocker(world)
    assert world.transport.connected(str(world.identity.public)) == 0
    knocker.say(HELLO)
    wait_until(knocker.listen)
    assert world.transport.connected(str(world.identity.public)) == 1
    knocker.transport.close(0)


@pytest.mark.parametrize(
    "first",
    [
        b"\0",
        os.urandom(300),
        encode(Heartbeat(0.0)),
        encode(Open(bytes(32), bytes(1184), (AES_256_GCM,), {**MODEL, "x": list(range(1000))}, (1, 1), "a")),
        encode(Hello(PROTOCOL_VERSION, "run", {}, ""))[:-1],
        HELLO + bytes(MAX_HELLO_BYTES),
    ],
    ids=["a byte", "junk", "Heartbeat", "Open", "half a Hello", "too long"],
)
def test_who_begins_with_anything_but_a_hello_is_cut(make: Make, first: bytes) -> None:
    world = make(timing=LONG)
    knocker = Knocker(world, first)
    wait_until(knocker.is_cut)
    wait_until(lambda: standing(world) == 0)
    assert knocker.answers == []
    assert [code for _, code, _ in world.handler.refused] == ["protocol"]
    assert "no Hello" in world.handler.refused[0][2]
    knocker.transport.close(0)


def test_a_hello_of_another_version_is_answered(make: Make) -> None:
    world = make()
    knocker = Knocker(world, b"\x83\xa4type\x01\xa8protocol\xcd\x02\x00\xa1x\xc4\xff" + bytes(255))
    wait_until(knocker.is_cut)
    assert [answer.code for answer in knocker.answers] == ["protocol-version"]
    knocker.transport.close(0)


def test_a_connection_serves_one_session(make: Make) -> None:
    world = make(timing=LONG)
    knocker = Knocker(world, encode(Hello(PROTOCOL_VERSION, "another run", {}, "")))
    wait_until(knocker.listen)
    assert type(knocker.answers[0]) is Refused
    knocker.say(HELLO)
    newcomer = Knocker(world, HELLO)
    wait_until(newcomer.listen)
    assert type(newcomer.answers[0]) is Welcome
    assert len(knocker.listen()) == 1
    for each in (knocker, newcomer):
        each.transport.close(0)


def test_who_floods_after_its_session_was_ended_is_cut_at_once(make: Make) -> None:
    world = make(clock=Clock(), timing=PATIENT)  # no time passes: nothing is cut because it was let stand for long enough
    knocker, honest = Knocker(world, HELLO), world.join(identity=world.listed("honest"), timing=PATIENT)
    wait_until(knocker.listen)
    knocker.say(b"\0")
    wait_until(lambda: any(isinstance(answer, Fault) for answer in knocker.listen()))
    assert not knocker.is_cut()
    sent = 0
    while not knocker.is_cut():
        knocker.say(*[bytes(4096)] * 10)
        sent += 10
        assert sent < 3000
    assert "more control messages" in world.handler.refused[-1][2]
    assert honest.echo(b"ab") == inverted(b"ab")
    knocker.transport.close(0)


def test_a_key_has_so_many_connections_and_no_more(make: Make) -> None:
    world = make(timing=LONG)
    identity, other = world.listed("one", sessions=1), world.listed("other")
    knockers = [Knocker(world, HELLO, identity=identity) for _ in range(1 + 32 + 6)]
    wait_until(lambda: sum(each.is_cut() for each in knockers) == 6)
    wait_until(lambda: all(each.broken or each.listen() for each in knockers))
    assert sum(type(each.answers[0]) is Welcome for each in knockers if each.answers) == 16
    assert sum(type(each.answers[0]) is Refused for each in knockers if each.answers) == 17
    assert world.transport.connected(str(identity.public)) == 33
    assert sum("more connections than" in text for _, _, text in world.handler.refused) >= 1
    assert world.join(identity=other, timing=LONG).echo(b"ab") == inverted(b"ab")
    for each in knockers:
        each.transport.close(0)


def test_who_says_the_same_name_again_is_another_and_cut_again(make_zmq: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_zmq(timing=LONG)
    control, context = world.transport._control.connections, zmq.Context()
    came, take = [], world.server._sessions.take
    monkeypatch.setattr(world.server._sessions, "take", lambda frame: (came.append(frame), take(frame)))
    for times in (1, 2, 3):
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.ROUTING_ID, b"the same")
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        curve_client(sock, world.server_identity.public, world.identity)
        sock.connect(f"tcp://127.0.0.1:{world.transport.control_port}")
        sock.send(b"no Hello")
        wait_until(lambda times=times: len(came) == times and len(control) == 0)
        sock.close(0)
    assert len({frame.peer for frame in came}) == len(world.handler.refused) == 3
    context.term()


def test_nobody_is_cut_for_one_from_elsewhere_that_had_its_number(make_zmq: Make) -> None:
    world = make_zmq(timing=LONG)
    world.join()
    control = world.transport._control
    (ours,) = control.connections
    peer = ours.peer
    part: Any = _Part({"__fd": str(ours.number), "Peer-Address": "192.0.2.1", "User-Id": "another"})
    control._count(part, b"gone")
    assert (ours.peer, ours.user) == (peer, str(world.identity.public))
    control._count(_Part({**part, "Peer-Address": ours.address}), b"theirs")
    assert (ours.peer, ours.user) == (b"theirs", "another")


def test_an_address_of_one_link_alone_is_the_same_with_its_interface(make_zmq: Make) -> None:
    world = make_zmq(timing=LONG)
    world.join()
    control = world.transport._control
    (ours,) = control.connections
    ours.address = "fe80::1"
    control._count(_Part({"__fd": str(ours.number), "Peer-Address": "fe80::1%eth0", "User-Id": "another"}), b"theirs")
    assert (ours.peer, ours.user) == (b"theirs", "another")
    control.refused("fe80::1%eth0")
    assert control._was_refused(ours.address)


class _Part(dict[str, str]):
    """A frame without bytes, with what ZeroMQ says of it."""

    def __len__(self) -> int:
        return 0


def test_who_says_nothing_is_cut(make_zmq: Make) -> None:
    world = make_zmq(timing=LONG)
    client = world.join()
    for endpoint in (world.transport._control, world.transport._data):
        endpoint.silent_seconds = 0.5
    silent = Knocker(world)
    wait_until(silent.is_cut)
    wait_until(lambda: standing(world) == 2)
    assert client.echo(b"ab") == inverted(b"ab")
    silent.transport.close(0)
