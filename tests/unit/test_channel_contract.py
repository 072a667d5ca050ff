"""One contract for every transport: the same assertions over memory and over ZeroMQ on loopback."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from splitfl.channel.client import OpenTerms
from splitfl.channel.server import ServerChannel
from splitfl.errors import (
    ConfigError,
    ConnectError,
    LocalProtocolError,
    ModelError,
    Refused,
    RemoteProtocolError,
    SessionLost,
)
from splitfl.protocol import messages
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import (
    Enrol,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    Pause,
    StepClosed,
    StepDone,
    StepOpened,
    encode,
)
from splitfl.protocol.session import ClientSession
from splitfl.transport.base import Sent
from tests.unit.channel_world import MIB, MODEL, QUICK, Client, World, backward, forward, inverted, wait_until

Make = Callable[..., World]


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes worlds over one transport and closes them."""
    worlds: list[World] = []

    def build(**server: Any) -> World:
        worlds.append(World(request.param, **server))
        return worlds[-1]

    yield build
    for world in worlds:
        world.close()


def test_open_tells_both_sides_who_and_what(make: Make) -> None:
    world = make()
    seen: list[Any] = []

    def answer(welcome: Any) -> Any:
        seen.append((welcome, threading.current_thread()))
        return OpenTerms(MODEL, (1, 1))

    client = world.join(answer=answer)
    assert seen[0][0].config == {"cut": [1, 1]}
    assert seen[0][1] is threading.current_thread()
    assert client.channel.welcome.run == "run"
    assert client.channel.window == client.channel.max_message == 8 * MIB
    assert client.channel.opened.cipher in ("aes-256-gcm", "chacha20-poly1305")
    (session,) = world.handler.opened
    assert session.session == client.channel.opened.session
    assert session.peer.public_key == world.identity.public
    assert (session.peer.name, session.peer.limits) == ("alice", {"max_tokens": 7})
    assert (session.open.cut, session.hello.libraries) == ((1, 1), {"torch": "2"})
    for secret in (session.open.client_secret, client.channel.opened.ticket, client.channel.opened.server_secret):
        assert repr(secret) not in repr(session) + repr(client.channel.opened)


@pytest.mark.parametrize("size", [2, 4096, MIB - 2, MIB, MIB + 2, 5 * MIB + 6, 8 * MIB])
def test_a_payload_comes_back_whole(make: Make, size: int) -> None:
    client = make().join()
    payload = os.urandom(size)
    assert client.echo(payload) == inverted(payload)
    assert client.channel.bytes_sent > size
    assert client.channel.bytes_received > size
    assert client.threads == {"splitfl-client-a"}


def test_a_small_message_overtakes_a_large_one(make: Make) -> None:
    world = make(window=64 * MIB, max_message=64 * MIB)
    client = world.join()
    large, small = os.urandom(40 * MIB), os.urandom(64)
    client.channel.send(forward(len(large), 0), large)
    client.channel.send(forward(len(small), 1), small)
    wait_until(lambda: len(client.data) == 2)
    assert [message.micro for message, _ in client.data] == [1, 0]
    assert [bytes(payload) for _, payload in client.data] == [inverted(small), inverted(large)]


def test_many_messages_interleave_and_arrive_whole(make: Make) -> None:
    client = make(window=16 * MIB, max_message=8 * MIB).join()
    payloads = {micro: os.urandom(2 * (1 + micro * 70001 % (2 * MIB))) for micro in range(24)}
    for micro, payload in payloads.items():
        client.channel.send(forward(len(payload), micro), payload)
    wait_until(lambda: len(client.data) == len(payloads))
    assert {message.micro: bytes(payload) for message, payload in client.data} == {
        micro: inverted(payload) for micro, payload in payloads.items()
    }


def test_credit_holds_the_sender_until_it_comes_back(make: Make) -> None:
    world = make(window=4 * MIB, max_message=2 * MIB)
    world.handler.echo = False
    client = world.join()
    for micro in range(5):
        client.channel.send(forward(2 * MIB, micro), bytes(2 * MIB))
    wait_until(lambda: len(world.handler.data) == 2)
    threading.Event().wait(0.1)
    assert len(world.handler.data) == 2, "the client sent more than its credit"
    session = client.channel.opened.session
    with pytest.raises(LocalProtocolError, match="more than that client has spent"):
        world.server.credit(session, 4 * MIB + 1)
    world.server.credit(session, 2 * MIB)
    wait_until(lambda: len(world.handler.data) == 3)
    world.server.credit(session, 4 * MIB)
    wait_until(lambda: len(world.handler.data) == 5)
    assert [message.micro for _, message, _ in world.handler.data] == [0, 1, 2, 3, 4]


def test_a_client_that_does_not_read_gets_no_more_credit(make: Make) -> None:
    world = make(window=4 * MIB, max_message=MIB)
    client = world.join()
    send = world.transport.send_data
    world.transport.send_data = lambda peer, frame: Sent.FULL
    for micro in range(40):
        client.channel.send(forward(MIB, micro), bytes(MIB))
    # At most one window of answers waits while one window of requests comes in: then credit stops.
    wait_until(lambda: len(world.handler.data) >= 4)
    threading.Event().wait(0.3)
    assert len(world.handler.data) <= 9
    world.transport.send_data = send
    wait_until(lambda: len(client.data) == 40)


def test_a_client_that_overruns_its_credit_is_ended(make: Make) -> None:
    world = make(window=4 * MIB, max_message=4 * MIB)
    world.handler.echo = False
    client = world.join()
    assert client.channel._path is not None
    client.channel._path.credit.left = client.channel._path.credit.window = 64 * MIB  # a client that does not count
    for micro in range(3):
        client.channel.send(forward(2 * MIB, micro), bytes(2 * MIB))
    wait_until(lambda: client.lost and world.handler.closed)
    assert "with a credit of 0" in str(client.lost[0])
    assert len(world.handler.data) <= 2
    assert "with a credit of 0" in world.handler.closed[0][1]


def test_what_the_caller_gets_wrong_is_said_at_once(make: Make) -> None:
    world = make(window=4 * MIB, max_message=2 * MIB)
    client = world.join()
    with pytest.raises(LocalProtocolError, match="smaller micro-batches"):
        client.channel.send(forward(2 * MIB + 2), bytes(2 * MIB + 2))
    with pytest.raises(LocalProtocolError, match="declares 8 payload bytes"):
        client.channel.send(forward(8), bytes(6))
    with pytest.raises(LocalProtocolError, match="which has not opened"):
        client.channel.send(forward(8, step=3, train=True), bytes(8))
    with pytest.raises(LocalProtocolError, match="StepDone"):
        client.channel.tell(StepDone(0, 0, 0, "continue"))
    with pytest.raises(LocalProtocolError, match="a client does not send"):
        client.channel.tell(StepOpened(0))
    with pytest.raises(LocalProtocolError, match="declares 8 payload bytes"):
        world.server.send(client.channel.opened.session, messages.Hidden(0, 0, 4, 1, "float16", "raw"), bytes(9))
    with pytest.raises(LocalProtocolError, match="contiguous"):
        client.channel.send(forward(8), memoryview(bytes(16))[::2])
    assert client.echo(b"ab") == inverted(b"ab"), "the session goes on"


def test_a_step_from_enrol_to_close(make: Make) -> None:
    world = make()
    client = world.join()
    session = client.channel.opened.session
    client.channel.tell(Enrol())
    wait_until(lambda: world.handler.control)
    world.server.tell(session, StepOpened(0))
    wait_until(lambda: client.control)
    assert client.control == [StepOpened(0, 1)]
    client.channel.send(forward(8, 0, 0, train=True), bytes(8))
    client.channel.send(backward(8, 0, 0), bytes(8))
    client.channel.tell(StepDone(0, 1, 1, "pause"))
    wait_until(lambda: len(world.handler.data) == 2 and len(world.handler.control) == 2)
    with pytest.raises(LocalProtocolError, match="after its StepDone"):
        client.channel.send(backward(8, 0, 0), bytes(8))
    world.server.tell(session, StepClosed(0, 4, 1, 1e-3, 0.5))
    world.server.tell(session, Fault("stale", "too late", fatal=False, micro=3))
    wait_until(lambda: len(client.control) == 3)
    assert client.control[1:] == [StepClosed(0, 4, 1, 1e-3, 0.5), Fault("stale", "too late", False, 3)]
    assert [message for _, message in world.handler.control] == [Enrol(), StepDone(0, 1, 1, "pause")]
    assert world.server.tell("gone", StepOpened(9)) is None


def test_a_pause_that_crosses_an_opening_wins(make: Make) -> None:
    world = make()
    client = world.join()
    session = client.channel.opened.session
    client.channel.tell(Enrol())
    wait_until(lambda: len(world.handler.control) == 1)
    client.channel.tell(Pause())
    client.channel.tell(Enrol())
    wait_until(lambda: len(world.handler.control) == 3)
    world.server.tell(session, StepOpened(4, enrolment=1))  # the scheduler has not heard of the Pause yet
    world.server.tell(session, StepOpened(5, enrolment=2))
    wait_until(lambda: client.control)
    assert client.control == [StepOpened(5, 2)]


# --- Refusals: one clear sentence on the client's side, who and why on the server's. ---


def test_a_key_that_is_not_listed(make: Make) -> None:
    world = make()
    stranger = Identity.generate()
    with pytest.raises(Refused, match="ask the operator to add this line to authorized_clients") as caught:
        world.join(identity=stranger)
    assert caught.value.code == "not-authorized"
    assert str(stranger.public) in str(caught.value)
    wait_until(lambda: world.handler.refused)
    assert str(stranger.public) in world.handler.refused[0][0]
    assert not world.handler.opened


def test_another_server_key(make: Make) -> None:
    world = make()
    wrong = JoinString(Identity.generate().public, "127.0.0.1", world.transport.control_port)
    with pytest.raises(ConnectError, match="has another key than the join string says"):
        world.join(join=wrong)


def test_nothing_listens(make: Make) -> None:
    world = make()
    wrong = JoinString(world.server_identity.public, "127.0.0.1", 9)
    with pytest.raises(ConnectError, match=r"nothing listens at 127\.0\.0\.1:9"):
        world.join(join=wrong)


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"model": {"config": "other"}}, "model-mismatch", "the model differs"),
        ({"cut": (2, 1)}, "cut-mismatch", "the cut differs"),
        ({"run": "other"}, "unknown-run", "no run 'other'"),
    ],
)
def test_refusals_carry_code_and_sentence(make: Make, change: dict[str, Any], code: str, says: str) -> None:
    world = make()
    if "run" in change:
        join = world.join_string
        change = {"join": JoinString(join.key, join.host, join.port, change["run"])}
    with pytest.raises(Refused, match=says) as caught:
        world.join(**change)
    assert caught.value.code == code
    wait_until(lambda: world.handler.refused)
    assert world.handler.refused[0][0].startswith("alice at ")
    assert world.handler.refused[0][1] == code
    assert world.join().echo(b"ab") == inverted(b"ab"), "a refusal leaves the server as it was"


def test_another_protocol_version(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    monkeypatch.setattr("splitfl.channel.client.PROTOCOL_VERSION", 2)
    with pytest.raises(Refused, match="version 2, the server 1: install the same") as caught:
        world.join()
    assert caught.value.code == "protocol-version"
    wait_until(lambda: world.handler.refused)


def test_no_cipher_in_common(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    monkeypatch.setattr("splitfl.channel.client.pick_ciphers", lambda: ("rot13",))
    with pytest.raises(Refused, match="none of the client's ciphers") as caught:
        world.join()
    assert caught.value.code == "cipher"


def test_chacha_works_as_well(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    monkeypatch.setattr("splitfl.channel.client.pick_ciphers", lambda: ("chacha20-poly1305",))
    client = world.join()
    assert client.channel.opened.cipher == "chacha20-poly1305"
    payload = os.urandom(2 * MIB + 2)
    assert client.echo(payload) == inverted(payload)


def test_the_client_may_refuse_the_run(make: Make) -> None:
    world = make()

    def answer(welcome: Any) -> Any:
        raise ModelError("the run trains another model")

    with pytest.raises(ModelError, match="another model"):
        world.join(answer=answer)
    wait_until(lambda: world.handler.refused)
    assert "said goodbye" in world.handler.refused[0][2]
    assert not world.handler.opened


def test_a_server_that_does_not_answer_is_named_in_seconds(make: Make) -> None:
    world = make()
    release = threading.Event()
    world.handler.welcome = lambda peer, hello: release.wait(5)  # type: ignore[method-assign, assignment, return-value]
    try:
        with pytest.raises(ConnectError, match=r"stayed silent|has been silent"):
            world.join(timeout=0.3)
    finally:
        release.set()


def test_a_handler_that_fails_ends_one_session_only(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    world = make()
    well, ill = world.join(), world.join()
    echo = world.handler.on_data

    def on_data(session: str, message: Any, payload: Any) -> None:
        if session == ill.channel.opened.session:
            raise ZeroDivisionError("a bug in the handler")
        echo(session, message, payload)

    world.handler.on_data = on_data  # type: ignore[method-assign]
    ill.channel.send(forward(8), bytes(8))
    wait_until(lambda: ill.lost and world.handler.closed)
    assert getattr(ill.lost[0], "code", "") == "internal"
    assert "a bug in the handler" not in str(ill.lost[0]), "no detail of the server's failure reaches a client"
    assert "a bug in the handler" in caplog.text
    assert world.handler.closed[0][0] == ill.channel.opened.session
    assert well.echo(b"abcd") == inverted(b"abcd")


def test_a_handler_that_refuses_a_message(make: Make) -> None:
    world = make()

    def allocate(session: str, message: Any) -> Any:
        raise RemoteProtocolError("hidden must be 64")

    world.handler.allocate = allocate  # type: ignore[method-assign]
    client = world.join()
    client.channel.send(forward(8), bytes(8))
    wait_until(lambda: client.lost)
    assert "hidden must be 64" in str(client.lost[0])


def test_words_of_a_handler_cannot_break_the_server(make: Make) -> None:
    world = make()

    def refuse(*_: Any) -> Any:
        raise Refused("full\x07", "\x1b[2J" + "é" * 9000)

    world.handler.admit = refuse  # type: ignore[method-assign]
    with pytest.raises(Refused) as caught:
        world.join()
    assert caught.value.code == "full?"
    assert str(caught.value).startswith("?[2Jé")
    del world.handler.admit  # type: ignore[method-assign]
    client = world.join()
    world.handler.allocate = refuse  # type: ignore[method-assign]
    client.channel.send(forward(8), bytes(8))
    wait_until(lambda: client.lost)
    assert str(client.lost[0]).startswith("?[2Jé")
    del world.handler.allocate  # type: ignore[method-assign]
    assert world.join().echo(b"ab") == inverted(b"ab")


def test_a_failure_while_sealing_ends_one_session_only(make: Make) -> None:
    world = make()
    well, ill = world.join(), world.join()
    link = world.server._sessions.find(ill.channel.opened.session)
    assert link is not None
    link.outbox._sealer._sequence = 2**63  # type: ignore[union-attr]
    ill.channel.send(forward(8), bytes(8))
    wait_until(lambda: ill.lost)
    assert getattr(ill.lost[0], "code", "") == "internal"
    assert well.echo(b"ab") == inverted(b"ab")


# --- Endings ---


def test_close_sends_what_is_queued_and_leaves(make: Make) -> None:
    world = make(window=64 * MIB, max_message=8 * MIB)
    world.handler.echo = False
    client = world.join()
    payloads = [os.urandom(3 * MIB + 2) for _ in range(12)]
    for micro, payload in enumerate(payloads):
        client.channel.send(forward(len(payload), micro), payload)
    client.channel.close()
    wait_until(lambda: world.handler.closed)
    assert [bytes(payload) for _, _, payload in world.handler.data] == payloads
    assert [message for _, message in world.handler.control] == [Leave()]
    assert world.handler.closed == [(client.channel.opened.session, "the client said goodbye")]
    assert not client.lost
    for late in (lambda: client.channel.tell(Enrol()), lambda: client.channel.send(forward(2), b"ab")):
        with pytest.raises(SessionLost, match="closed"):
            late()
    client.channel.close()


def test_credit_that_comes_after_goodbye_harms_nothing(make: Make) -> None:
    world = make(window=64 * MIB)
    client = world.join()
    for micro in range(8):
        client.channel.send(forward(6 * MIB, micro), bytes(6 * MIB))
    client.channel.close()
    wait_until(lambda: world.handler.closed)
    assert world.handler.closed[0][1] == "the client said goodbye"
    assert len(world.handler.data) == 8


def test_close_without_leaving(make: Make) -> None:
    world = make()
    client = world.join()
    client.channel.close(leave=False)
    wait_until(lambda: world.handler.closed)
    assert world.handler.control == []


def test_the_server_stops_in_good_order(make: Make) -> None:
    world = make()
    client = world.join()
    world.server.stop("maintenance")
    wait_until(lambda: client.lost)
    assert "maintenance" in str(client.lost[0])
    assert getattr(client.lost[0], "code", "") == "closing"
    assert world.handler.closed == [(client.channel.opened.session, "maintenance")]
    with pytest.raises(SessionLost, match="maintenance"):
        client.channel.tell(Enrol())


def test_end_tells_the_client_why(make: Make) -> None:
    world = make()
    client = world.join()
    world.server.end(client.channel.opened.session, Fault("stale", "the step went on without you"))
    wait_until(lambda: client.lost)
    assert getattr(client.lost[0], "code", "") == "stale"
    assert "went on without you" in str(client.lost[0])
    wait_until(lambda: world.handler.closed)
    world.server.send(client.channel.opened.session, messages.Hidden(0, 0, 4, 1, "float16", "raw"), bytes(8))
    world.server.credit(client.channel.opened.session, 8)


def silence(world: World, client: Client) -> None:
    """The client's thread lives on and says nothing: its machine sleeps."""
    transport: Any = client.channel._transport
    transport.send_control = lambda frame: None
    transport.send_data = lambda frame: True


def test_a_client_that_falls_silent_is_noticed(make: Make) -> None:
    world = make()
    client = world.join()
    silence(world, client)
    wait_until(lambda: world.handler.closed, 5)
    assert "silent for 1 s" in world.handler.closed[0][1]


def test_a_server_that_falls_silent_is_noticed(make: Make) -> None:
    world = make()
    client = world.join()
    poll = client.channel._transport.poll
    client.channel._transport.poll = lambda timeout: poll(timeout)[:0]  # type: ignore[method-assign]
    wait_until(lambda: client.lost, 5)
    assert "silent for 1 s" in str(client.lost[0])


def test_heartbeats_keep_an_idle_session(make: Make) -> None:
    world = make()
    client = world.join()
    threading.Event().wait(2.2 * QUICK.silence)
    assert not client.lost
    assert not world.handler.closed
    assert client.echo(b"ab") == inverted(b"ab")


def test_a_second_session_after_a_loss_has_fresh_keys(make: Make) -> None:
    world = make()
    first = world.join()
    kept = world.handler.opened[0].open
    world.server.end(first.channel.opened.session, Fault("internal", "lost"))
    wait_until(lambda: first.lost)
    second = world.join()
    assert second.echo(b"again!") == inverted(b"again!")
    fresh = world.handler.opened[1].open
    assert kept.client_secret != fresh.client_secret
    assert kept.kem_public != fresh.kem_public
    one, two = first.channel.opened, second.channel.opened
    assert one.session != two.session
    assert one.ticket != two.ticket
    assert one.server_secret != two.server_secret
    keys = [client.channel._session.secrets for client in (first, second)]
    assert len({secret for pair in keys if pair for secret in (pair.client, pair.server)}) == 4


def test_a_key_removed_from_the_list_loses_its_session(make: Make) -> None:
    world = make()
    client = world.join()
    world.authorized._clients.clear()
    world.authorized.generation += 1
    wait_until(lambda: client.lost)
    assert getattr(client.lost[0], "code", "") == "not-authorized"
    with pytest.raises(Refused):
        world.join()


def test_many_sessions_at_once(make: Make) -> None:
    world = make()
    identities = [Identity.generate() for _ in range(12)]
    for number, identity in enumerate(identities):
        world.allow(identity.public, f"client-{number}")
    failures: list[BaseException] = []

    def work(identity: Identity) -> None:
        try:
            client = world.join(identity=identity)
            for micro in range(4):
                payload = os.urandom(600_002)
                assert client.echo(payload, micro) == inverted(payload)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(identity,)) for identity in identities]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({session.session for session in world.handler.opened}) == 12
    assert {session.peer.name for session in world.handler.opened} == {f"client-{number}" for number in range(12)}


# --- Tickets ---


def opened_by_hand(world: World) -> tuple[Any, Any]:
    """A session up to Opened, spoken by hand: (the transport, Opened)."""
    transport, session = world.client_transport(), ClientSession()
    join = world.join_string
    transport.connect_control(join.host, join.port, join.key, world.identity, 3.0)
    transport.send_control(session.send(Hello(1, "run", {}, "")))
    while True:
        for frame in transport.poll(0.1):
            message = session.receive(bytes(frame.frame))
            if isinstance(message, messages.Welcome):
                asked = session.make_open(ciphers=(AES_256_GCM,), model=MODEL, cut=(1, 1), name="a")
                transport.send_control(session.send(asked))
            elif isinstance(message, messages.Opened):
                transport.set_record_limit(2 * MIB)
                return transport, message


def data_port(world: World) -> int:
    return int(world.transport.data_port)


def test_a_ticket_works_once(make: Make) -> None:
    world = make()
    transport, opened = opened_by_hand(world)
    transport.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    thief, _ = opened_by_hand(world)
    with pytest.raises(Refused, match="refused the session's ticket"):
        thief.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    wait_until(lambda: world.handler.refused)
    assert "data connection" in world.handler.refused[0][0]
    transport.close(0)
    thief.close(0)


def test_a_ticket_expires(make: Make) -> None:
    now = [1000.0]
    world = make(clock=lambda: now[0])
    transport, opened = opened_by_hand(world)
    now[0] += opened.ticket_seconds
    with pytest.raises(Refused, match="used or too old"):
        transport.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    transport.close(0)


def test_a_made_up_ticket_is_refused(make: Make) -> None:
    world = make()
    transport, _ = opened_by_hand(world)
    with pytest.raises(Refused):
        transport.connect_data("127.0.0.1", data_port(world), os.urandom(32), 3.0)
    transport.close(0)


def test_a_ticket_without_the_keys_opens_nothing(make: Make) -> None:
    world = make()
    transport, opened = opened_by_hand(world)
    transport.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    transport.send_data(bytes(100))
    wait_until(lambda: world.handler.refused)
    assert "seal" in world.handler.refused[0][2]
    assert not world.handler.opened
    transport.close(0)


# --- Hostile bytes on an open session ---


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x81\xa4type\x03", os.urandom(300), encode(Heartbeat(1.0))[:-1]])
def test_junk_on_control_ends_that_session_only(make: Make, junk: bytes) -> None:
    world = make()
    well, ill = world.join(), world.join()
    ill.channel._control_queue.append(junk or b"\x00")
    ill.channel._transport.wake()
    if junk == b"\x81\xa4type\x03":  # a perfectly good Enrol
        wait_until(lambda: world.handler.control)
        return
    wait_until(lambda: ill.lost and world.handler.closed)
    assert getattr(ill.lost[0], "code", "") == "protocol"
    assert "broke the protocol" in world.handler.closed[0][1]
    assert well.echo(b"ab") == inverted(b"ab")


@pytest.mark.parametrize("junk", [b"x", bytes(32), bytes(48), os.urandom(1000)])
def test_junk_on_data_ends_that_session_only(make: Make, junk: bytes) -> None:
    world = make()
    well, ill = world.join(), world.join()
    ill.channel._path.stuck = bytearray(junk)
    ill.channel._transport.wake()
    wait_until(lambda: ill.lost and world.handler.closed)
    assert getattr(ill.lost[0], "code", "") == "seal"
    assert "seal" in world.handler.closed[0][1]
    assert well.echo(b"ab") == inverted(b"ab")


def test_what_an_ended_session_still_sends_is_passed_over(make: Make) -> None:
    world = make()
    client = world.join()
    transport = client.channel._transport
    client.channel._session.receive = lambda frame: None  # type: ignore[method-assign, assignment, return-value]
    world.server.end(client.channel.opened.session, Fault("stale", "too late"))
    wait_until(lambda: world.handler.closed)
    for _ in range(20):
        client.channel._control_queue.append(encode(Heartbeat(0.0)))
        client.channel._data_queue.append((forward(8), memoryview(bytes(8))))
        transport.wake()
    assert world.join().echo(b"ab") == inverted(b"ab")
    assert len(world.handler.closed) == 1
    assert world.handler.refused == []
    assert world.handler.control == []


def test_a_frame_over_the_limit_cuts_the_connection(make: Make) -> None:
    world = make()
    well, ill = world.join(), world.join()
    ill.channel._control_queue.append(bytes(65 * 1024))
    ill.channel._transport.wake()
    wait_until(lambda: ill.lost and world.handler.closed)
    assert "broke" in str(ill.lost[0])
    assert well.echo(b"ab") == inverted(b"ab")


def test_settings_that_cannot_work_are_refused(make: Make) -> None:
    world = make()
    for wrong in ({"window": 1, "max_message": 2}, {"record": 1024}):
        with pytest.raises(ConfigError):
            ServerChannel(world.transport, world.handler, authorized=world.authorized, **wrong)  # type: ignore[arg-type]
