"""One contract for every transport: the same assertions over memory and over ZeroMQ on loopback."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from splitfl.channel.opening import OpenTerms
from splitfl.errors import (
    ConnectError,
    LocalProtocolError,
    ModelError,
    Refused,
    RemoteProtocolError,
)
from splitfl.protocol import messages
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import (
    Enrol,
    Fault,
    Pause,
    StepClosed,
    StepDone,
    StepOpened,
)
from splitfl.transport.base import Sent
from tests.unit.channel_world import (
    MIB,
    MODEL,
    Make,
    backward,
    forward,
    inverted,
    make_worlds,
    wait_until,
)


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes worlds over one transport."""
    yield from make_worlds(request.param)


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


def test_a_little_credit_is_kept_until_it_is_more_or_needed(make: Make) -> None:
    world = make(window=16 * MIB, max_message=8 * MIB)
    client = world.join()
    path = client.channel._path
    assert path is not None
    told: list[int] = []
    receive = path.credit.receive
    path.credit.receive = lambda size: (told.append(size), receive(size))[1]  # type: ignore[method-assign]
    for micro in range(64):
        client.echo(bytes(MIB // 8), micro)
    assert len(told) <= 8, "a message about credit for each message"
    client.echo(bytes(MIB // 8), 64)
    world.handler.give_credit = False
    for micro in (65, 66):  # not covered both, without what is kept
        client.channel.send(forward(8 * MIB, micro), bytes(8 * MIB))
    wait_until(lambda: len(client.data) == 67)


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
    monkeypatch.setattr("splitfl.channel.opening.PROTOCOL_VERSION", 1)
    with pytest.raises(Refused, match="version 1, the server 3: install the same") as caught:
        world.join()
    assert caught.value.code == "protocol-version"
    wait_until(lambda: world.handler.refused)


def test_no_cipher_in_common(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    monkeypatch.setattr("splitfl.channel.opening.pick_ciphers", lambda: ("rot13",))
    with pytest.raises(Refused, match="none of the client's ciphers") as caught:
        world.join()
    assert caught.value.code == "cipher"


def test_chacha_works_as_well(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    monkeypatch.setattr("splitfl.channel.opening.pick_ciphers", lambda: ("chacha20-poly1305",))
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
