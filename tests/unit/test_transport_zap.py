"""The authenticator, asked as libzmq asks it (RFC 27), and as it never would."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import zmq

from splitfl.protocol.keys import Identity, PublicKey
from splitfl.transport.zap import CONTROL_DOMAIN, DATA_DOMAIN, Zap
from splitfl.transport.zmq_common import FRAMES_A_TURN

KEY, TICKET = Identity.generate().public, os.urandom(32)
PASSWORD = TICKET.hex().encode()


class Desk:
    """A gate that knows one key and one ticket; ``refused``: what was told of others."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str, str, bool]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = Zap(self._context, self, lambda *told: self.refused.append(told))  # type: ignore[arg-type]
        self._asker = self._context.socket(zmq.DEALER)
        self._asker.connect("inproc://zeromq.zap.01")

    def admit_key(self, key: PublicKey, address: str) -> str | None:
        return "the client" if key == KEY else None

    def admit_ticket(self, shown: bytes, address: str) -> str | None:
        return "its session" if shown == TICKET else None

    def ask(self, *frames: bytes) -> list[bytes] | None:
        """The answer without its envelope; None where none comes."""
        self._asker.send_multipart([b"", *frames])
        self._zap.answer()
        return self._asker.recv_multipart()[1:] if self._asker.poll(0) else None

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def asked(domain: bytes, mechanism: bytes, *credentials: bytes) -> list[bytes]:
    return [b"1.0", b"7", domain, b"10.0.0.9", b"", mechanism, *credentials]


@pytest.mark.parametrize(
    ("domain", "mechanism", "credentials", "user"),
    [
        (CONTROL_DOMAIN, b"CURVE", (KEY.raw,), b"the client"),
        (DATA_DOMAIN, b"PLAIN", (b"splitfl", PASSWORD), b"its session"),
        (DATA_DOMAIN, b"CURVE", (TICKET,), b"its session"),
    ],
)
def test_who_is_known_is_let_in(desk: Desk, domain: bytes, mechanism: bytes, credentials: tuple[bytes, ...], user: bytes) -> None:
    assert desk.ask(*asked(domain, mechanism, *credentials)) == [b"1.0", b"7", b"200", b"", user, b""]
    assert not desk.refused


@pytest.mark.parametrize(
    ("domain", "mechanism", "credentials", "why"),
    [
        (CONTROL_DOMAIN, b"CURVE", (os.urandom(32),), "not on the list"),
        (CONTROL_DOMAIN, b"PLAIN", (b"splitfl", PASSWORD), "neither a key nor a ticket"),
        (CONTROL_DOMAIN, b"NULL", (b"",), "neither"),
        (CONTROL_DOMAIN, b"CURVE", (KEY.raw, KEY.raw), "neither"),
        (DATA_DOMAIN, b"PLAIN", (b"splitfl", os.urandom(32).hex().encode()), "ticket is unknown"),
        (DATA_DOMAIN, b"PLAIN", (b"splitfl", b"not hexadecimal"), "ticket is unknown"),
        (DATA_DOMAIN, b"PLAIN", (b"splitfl", b"\xff" * 64), "ticket is unknown"),
        (DATA_DOMAIN, b"PLAIN", (b"somebody", PASSWORD), "neither"),
        (DATA_DOMAIN, b"PLAIN", (b"splitfl",), "neither"),
        (DATA_DOMAIN, b"NULL", (b"",), "neither"),
        (b"", b"PLAIN", (b"splitfl", PASSWORD), "neither"),
        (b"another", b"CURVE", (KEY.raw,), "neither"),
    ],
)
def test_nobody_else_is(desk: Desk, domain: bytes, mechanism: bytes, credentials: tuple[bytes, ...], why: str) -> None:
    assert desk.ask(*asked(domain, mechanism, *credentials)) == [b"1.0", b"7", b"400", b"refused", b"", b""]
    ((address, _, text, is_data),) = desk.refused
    assert (address, is_data) == ("10.0.0.9", domain == DATA_DOMAIN)
    assert why in text


def test_a_key_that_is_none_is_refused_without_a_word(desk: Desk) -> None:
    answer = desk.ask(*asked(CONTROL_DOMAIN, b"CURVE", b"short"))
    assert answer is not None
    assert answer[2] == b"400"
    assert not desk.refused


def test_what_is_no_question_gets_no_answer(desk: Desk) -> None:
    assert desk.ask(b"1.0", b"7", b"splitfl.data") is None
    assert desk.ask(b"2.0", *asked(DATA_DOMAIN, b"CURVE", TICKET)[1:]) is None
    assert desk.ask(*asked(DATA_DOMAIN, b"CURVE", TICKET)) is not None


def test_many_questions_are_answered_turn_by_turn(desk: Desk) -> None:
    for _ in range(FRAMES_A_TURN):
        desk._asker.send_multipart([b"", *asked(DATA_DOMAIN, b"CURVE", TICKET)])
    desk.ask(*asked(DATA_DOMAIN, b"CURVE", TICKET))
    assert sum(1 for _ in iter(lambda: desk._asker.poll(0) and desk._asker.recv_multipart(), 0)) == FRAMES_A_TURN - 1
    desk._zap.answer()
    assert desk._asker.poll(0)
