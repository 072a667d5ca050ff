"""The state machine: the handshake in order, steps whose messages cross, and what neither side may say."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol import messages as m
from splitfl.protocol.session import TRANSITIONS, ClientSession, ServerSession, State

CIPHER = "aes-256-gcm"


def handshake() -> tuple[ClientSession, ServerSession]:
    client, server = ClientSession(), ServerSession()
    server.receive(client.send(m.Hello(m.PROTOCOL_VERSION, "run", {}, "")))
    client.receive(sent(server.send(m.Welcome(m.PROTOCOL_VERSION, "run", {}, {}, 0.0))))
    server.receive(client.send(client.make_open(ciphers=(CIPHER,), model={}, cut=(1, 1), name="a")))
    _, frame = opened(server)
    client.receive(frame)
    return client, server


def opened(server: ServerSession, cipher: str = CIPHER) -> tuple[m.Opened, bytes]:
    terms: dict[str, Any] = {"ticket_seconds": 15, "data_address": "tcp://*:1", "window": 9, "max_message": 9}
    return server.send_opened(session="s", ticket=bytes(32), cipher=cipher, record=4096, **terms)


def sent(frame: bytes | None) -> bytes:
    assert frame is not None
    return frame


def forward(step: int, train: bool = True) -> m.Forward:
    return m.Forward(step, 0, ((1, 0),), 1, "float32", "raw", train, train, True)


def test_both_sides_derive_the_same_keys() -> None:
    client, server = handshake()
    assert client.state is server.state is State.OUT
    assert client.secrets is not None
    assert client.secrets == server.secrets
    assert client.secrets.client != client.secrets.server
    assert "TrafficSecrets(" not in repr(client.secrets)


def test_a_changed_handshake_gives_other_keys() -> None:
    client, server = ClientSession(), ServerSession()
    server.receive(client.send(m.Hello(m.PROTOCOL_VERSION, "run", {}, "")))
    server.send(m.Welcome(m.PROTOCOL_VERSION, "run", {"lr": 1.0}, {}, 0.0))
    client.receive(m.encode(m.Welcome(m.PROTOCOL_VERSION, "run", {"lr": 2.0}, {}, 0.0)))
    server.receive(client.send(client.make_open(ciphers=(CIPHER,), model={}, cut=(1, 1), name="a")))
    client.receive(opened(server)[1])
    assert client.secrets is not None
    assert client.secrets != server.secrets


def test_a_cipher_that_was_not_offered() -> None:
    client, server = ClientSession(), ServerSession()
    server.receive(client.send(m.Hello(m.PROTOCOL_VERSION, "run", {}, "")))
    client.receive(sent(server.send(m.Welcome(m.PROTOCOL_VERSION, "run", {}, {}, 0.0))))
    server.receive(client.send(client.make_open(ciphers=(CIPHER,), model={}, cut=(1, 1), name="a")))
    with pytest.raises(RemoteProtocolError, match="did not offer"):
        client.receive(opened(server, "none")[1])


def test_a_key_that_is_no_ml_kem_key() -> None:
    client, server = ClientSession(), ServerSession()
    server.receive(client.send(m.Hello(m.PROTOCOL_VERSION, "run", {}, "")))
    server.send(m.Welcome(m.PROTOCOL_VERSION, "run", {}, {}, 0.0))
    server.receive(m.encode(m.Open(bytes(32), b"\xff" * 1184, (CIPHER,), {}, (1, 1), "a")))
    with pytest.raises(RemoteProtocolError, match="ML-KEM"):
        opened(server)


@pytest.mark.parametrize("message", [m.Enrol(), m.Bye(), m.StepDone(0, 0, 0, "continue"), m.Pause(), m.Heartbeat(0.0)], ids=repr)
def test_nothing_before_hello(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        ClientSession().send(message)
    with pytest.raises(RemoteProtocolError, match="while the session is new"):
        ServerSession().receive(m.encode(message))


def test_nothing_twice() -> None:
    client, server = handshake()
    with pytest.raises(RemoteProtocolError):
        server.receive(m.encode(m.Hello(m.PROTOCOL_VERSION, "run", {}, "")))
    with pytest.raises(LocalProtocolError):
        client.send(m.Hello(m.PROTOCOL_VERSION, "run", {}, ""))
    client.send(m.Enrol())
    with pytest.raises(LocalProtocolError):
        client.send(m.Enrol())
    server.receive(m.encode(m.Enrol()))
    server.send(m.StepOpened(3))
    with pytest.raises(LocalProtocolError, match="not after step 3"):
        server.send(m.StepOpened(3))
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        server.send(m.StepOpened(4))


def test_after_the_end_nothing_is_sent_and_nothing_heard() -> None:
    client, server = handshake()
    server.receive(client.send(m.Bye()))
    assert server.state is client.state is State.PARTING
    assert server.receive(m.encode(m.Enrol())) is None
    assert client.receive(m.encode(m.StepOpened(5, 3))) is None
    assert client.receive(sent(server.send(m.Closing("goodbye")))) == m.Closing("goodbye")
    assert server.state is client.state is State.CLOSED
    assert client.receive(m.encode(m.Credit(1))) is None
    for session, message in ((client, m.Enrol()), (server, m.Credit(1))):
        with pytest.raises(LocalProtocolError):
            session.send(message)


def test_a_fault_that_is_not_fatal_changes_nothing() -> None:
    client, server = handshake()
    client.receive(sent(server.send(m.Fault("stale", "late", False, 1))))
    assert client.state is State.OUT
    client.receive(sent(server.send(m.Fault("seal", "broken"))))
    assert client.state is State.CLOSED


def test_data_belongs_to_a_step_that_was_announced() -> None:
    client, server = handshake()
    client.check_send(forward(-1, train=False))
    server.check_receive(forward(-1, train=False))
    with pytest.raises(LocalProtocolError, match="has not opened"):
        client.check_send(forward(0))
    with pytest.raises(RemoteProtocolError, match="has not opened"):
        server.check_receive(forward(0))
    server.receive(client.send(m.Enrol()))
    client.receive(sent(server.send(m.StepOpened(0))))
    client.check_send(forward(0))
    server.check_receive(forward(0))
    client.send(m.StepDone(0, 1, 1, "continue"))
    with pytest.raises(LocalProtocolError, match="after its StepDone"):
        client.check_send(forward(0))
    client.check_send(forward(1))  # ahead of the opening that will come
    server.check_receive(forward(1))
    with pytest.raises(RemoteProtocolError, match="has not opened"):
        server.check_receive(forward(2))
    with pytest.raises(RemoteProtocolError, match="has not opened"):
        server.check_receive(m.Backward(1, 0, 1, 1, "float32", "raw", 1, 1.0))


def test_a_late_step_done_is_what_it_implies() -> None:
    client, server = handshake()
    server.receive(client.send(m.Enrol()))
    client.receive(sent(server.send(m.StepOpened(0))))
    late = client.send(m.StepDone(0, 1, 1, "leave"))
    closed, opened_next = server.send(m.StepClosed(0, 1, 1, 0.1, None)), server.send(m.StepOpened(1))
    assert server.receive(late) == m.Leave()
    assert server.state is State.OUT
    assert client.receive(sent(closed)) == m.StepClosed(0, 1, 1, 0.1, None)
    assert client.receive(sent(opened_next)) is None
    assert client.state is State.OUT


def test_a_late_step_done_that_would_go_on_is_nothing() -> None:
    """Whoever was dropped from the step is out of steps: it says anew that it takes part."""
    client, server = handshake()
    server.receive(client.send(m.Enrol()))
    client.receive(sent(server.send(m.StepOpened(0))))
    late = client.send(m.StepDone(0, 1, 1, "continue"))
    client.receive(sent(server.send(m.StepClosed(0, 1, 1, 0.1, None, dropped=True))))
    assert server.receive(late) is None
    assert server.state is State.OUT


def test_what_this_side_must_not_say_is_its_own_mistake() -> None:
    client, server = ClientSession(), ServerSession()
    with pytest.raises(LocalProtocolError, match="Forward cannot be sent: the session is new"):
        client.check_send(forward(0))
    with pytest.raises(LocalProtocolError, match="a server does not send Enrol"):
        server.send(m.Enrol())
    with pytest.raises(LocalProtocolError, match="none has come"):
        opened(server)


def test_step_done_for_a_step_that_never_was() -> None:
    client, server = handshake()
    server.receive(client.send(m.Enrol()))
    with pytest.raises(RemoteProtocolError, match="has not opened"):
        server.receive(m.encode(m.StepDone(5, 0, 0, "continue")))
    with pytest.raises(RemoteProtocolError, match="out of order"):
        client.receive(m.encode(m.StepOpened(0, enrolment=2)))


def test_the_table_names_only_messages_that_exist() -> None:
    names = {event.partition("+")[0] for events in TRANSITIONS.values() for event in events}
    classes = {*m.CONTROL_FROM_CLIENT.values(), *m.CONTROL_FROM_SERVER.values()}
    assert names == {cls.__name__ for cls in classes}
    assert set(TRANSITIONS) == set(State)


class Wire:
    """Two sessions with messages under way in both directions, delivered in any order that keeps each direction's."""

    def __init__(self) -> None:
        self.client, self.server = handshake()
        self.to_client: deque[bytes] = deque()
        self.to_server: deque[bytes] = deque()
        self.step = -1

    def act(self, what: str) -> None:
        client, server = self.client, self.server
        if what == "hear" and self.to_client:
            client.receive(self.to_client.popleft())
        elif what == "deliver" and self.to_server:
            server.receive(self.to_server.popleft())
        elif what == "open" and server.state is State.ENROLLED:
            self.step += 1
            self.to_client.append(sent(server.send(m.StepOpened(self.step))))
        elif what == "drop" and self.step >= 0:
            self.to_client.append(sent(server.send(m.StepClosed(self.step, 0, 1, 0.0, None, dropped=True))))
        elif what == "close" and self.step >= 0:
            self.to_client.append(sent(server.send(m.StepClosed(self.step, 0, 1, 0.0, None))))
        elif what in ("continue", "pause", "leave") and client.state is State.IN_STEP:
            assert client.step is not None
            self.to_server.append(client.send(m.StepDone(client.step, 0, 0, what)))
        elif what == "enrol" and client.state in (State.OUT, State.DONE_OUT):
            self.to_server.append(client.send(m.Enrol()))
        elif what == "withdraw":
            self.to_server.append(client.send(m.Pause()))


ACTIONS = ["hear", "deliver", "open", "close", "drop", "continue", "pause", "leave", "enrol", "withdraw"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=60))
def test_whatever_crosses_neither_side_errs_and_both_end_up_agreeing(actions: list[Any]) -> None:
    wire = Wire()
    for action in actions:
        wire.act(action)
    while wire.to_client or wire.to_server:
        wire.act("deliver")
        wire.act("hear")
    # All heard, a step that is still open may be known to the server as one the client has left, never the other way
    # round.
    assert wire.client.state is wire.server.state
    if wire.client.state in (State.IN_STEP, State.DONE, State.DONE_OUT, State.DONE_AGAIN):
        assert wire.client.step == wire.server.step
    wire.act("close")
    wire.act("hear")
    assert wire.client.state is wire.server.state
    assert wire.client.state in (State.OUT, State.ENROLLED)
