"""Messages from records and back: any mixture comes out whole; every way in which a peer with the keys may break the rules."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.assembly import MAX_OPEN, Inbox, Outbox, largest_frame
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.messages import Attach, Forward, encode
from splitfl.protocol.records import (
    FIRST,
    HEADER_BYTES,
    JOINED,
    LAST,
    METADATA,
    OVERHEAD_BYTES,
    PAYLOAD,
    Opener,
    RekeyLimits,
    Sealer,
)

SECRET = bytes(range(32))
RECORD = 1024


def message(size: int, micro: int = 0) -> Forward:
    return Forward(-1, micro, ((size // 2, 0),), 1, "float16", "raw", False, False, True)


class Pipe:
    """An outbox and the inbox that reads it."""

    def __init__(self, *, window: int | None = None, max_message: int = 2**20) -> None:
        self.credit = CreditAccount(window) if window is not None else None
        self.sealer = Sealer(SECRET, AES_256_GCM)
        self.outbox = Outbox(self.sealer, RECORD, self.credit)
        self.allocated: list[int] = []
        self.charged: list[int] = []
        self.inbox = Inbox(
            Opener(SECRET, AES_256_GCM),
            from_client=True,
            record_bytes=RECORD,
            max_message=max_message,
            allocate=self.allocate,
            admit=lambda message: None,
            charge=self.charged.append,
        )

    def allocate(self, message: Any) -> tuple[Any, memoryview]:
        buffer = bytearray(message.payload_bytes)
        self.allocated.append(len(buffer))
        return buffer, memoryview(buffer)

    def carry(self) -> list[tuple[int, bytes]]:
        done = []
        while (frame := self.outbox.next_frame()) is not None:
            got = self.inbox.receive(frame)
            if got is not None:
                done.append((got[0].micro, bytes(got[1])))  # type: ignore[attr-defined]
        return done


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000).map(lambda half: 2 * half), min_size=1, max_size=20))
def test_messages_come_back_whole_in_any_mixture(sizes: list[int]) -> None:
    pipe = Pipe()
    payloads = {micro: os.urandom(size) for micro, size in enumerate(sizes)}
    for micro, payload in payloads.items():
        pipe.outbox.add(message(len(payload), micro), payload)
    assert pipe.outbox.pending == sum(sizes)
    assert dict(pipe.carry()) == payloads
    assert pipe.outbox.pending == 0
    assert not pipe.outbox
    assert sum(pipe.charged) == sum(sizes)


def test_credit_is_charged_for_whole_messages_in_order() -> None:
    pipe = Pipe(window=3000)
    for micro, size in enumerate((2000, 2000, 10)):
        pipe.outbox.add(message(size, micro), bytes(size))
    assert [micro for micro, _ in pipe.carry()] == [0], "the small one must not starve the one before it"
    assert pipe.credit is not None
    pipe.credit.receive(2000)
    assert [micro for micro, _ in pipe.carry()] == [2, 1]
    with pytest.raises(RemoteProtocolError):
        pipe.credit.receive(2011)


def test_a_message_begins_when_it_is_served_or_before_a_smaller_one_behind_it() -> None:
    pipe = Pipe()
    for micro in range(3):
        pipe.outbox.add(message(6000, micro), bytes(6000))
    for _ in range(3):
        pipe.inbox.receive(pipe.outbox.next_frame() or b"")
    assert pipe.allocated == [6000], "the receiver made room for a message that is not under way"
    pipe.outbox.add(message(10, 3), bytes(10))
    assert [micro for micro, _ in pipe.carry()] == [3, 0, 1, 2]
    assert pipe.allocated == [6000, 6000, 6000, 10]


def test_credit_accounts_refuse_what_cannot_be() -> None:
    account = CreditAccount(100)
    account.charge(60)
    with pytest.raises(RemoteProtocolError, match="with a credit of 40"):
        account.charge(41)
    with pytest.raises(LocalProtocolError):
        account.spend(41)
    with pytest.raises(LocalProtocolError):
        account.give(61)
    account.give(60)
    assert account.left == 100


def test_metadata_and_the_first_record_of_the_payload_share_a_frame() -> None:
    pipe = Pipe()
    pipe.outbox.add(message(2 * RECORD), bytes(2 * RECORD))
    first, second = pipe.outbox.next_frame() or b"", pipe.outbox.next_frame() or b""
    assert pipe.outbox.next_frame() is None
    assert (len(first), len(second)) == (2 * OVERHEAD_BYTES + len(encoded(2 * RECORD)) + RECORD, OVERHEAD_BYTES + RECORD)
    assert (pipe.outbox.records, pipe.inbox.records) == (3, 0)
    assert pipe.inbox.receive(first) is None
    assert pipe.inbox.records == 2
    assert pipe.inbox.receive(second) is not None


def test_no_frame_is_larger_than_the_largest() -> None:
    pipe = Pipe()
    wide = Forward(-1, 0, ((1, 2**31 - 1),) * 8000, 1, "float16", "raw", False, False, True)
    assert len(encode(wide)) > 55_000
    pipe.outbox.add(wide, bytes(wide.payload_bytes))
    frame = pipe.outbox.next_frame() or b""
    assert len(frame) - RECORD > 55_000
    assert len(frame) <= largest_frame(RECORD)
    assert largest_frame(RECORD) == RECORD + 65536 + 2 * OVERHEAD_BYTES


def test_keys_may_change_within_a_frame() -> None:
    pipe = Pipe()
    pipe.sealer._limits = RekeyLimits(records=1)
    for micro in range(3):
        pipe.outbox.add(message(RECORD, micro), bytes([micro]) * RECORD)
    assert pipe.carry() == [(micro, bytes([micro]) * RECORD) for micro in range(3)]


def test_a_joined_frame_that_was_tampered_with() -> None:
    """Any bit of its headers and tags, either record alone, the two the other way round, any cut."""
    pipe = Pipe()
    pipe.outbox.add(message(10), bytes(10))
    frame = bytes(pipe.outbox.next_frame() or b"")
    second = len(frame) - 10 - OVERHEAD_BYTES
    sensitive = [*range(HEADER_BYTES), *range(second - 16, second + HEADER_BYTES), *range(len(frame) - 16, len(frame))]
    flipped = [frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :] for at in sensitive for bit in (0, 2, 7)]
    halves = [frame[:second], frame[second:], frame[second:] + frame[:second], frame + frame[second:], frame[:second] * 2]
    for wrong in (*flipped, *halves, *(frame[:cut] for cut in range(len(frame)))):
        fresh = Pipe()
        with pytest.raises(RemoteProtocolError):
            fresh.inbox.receive(wrong)
        with pytest.raises(RemoteProtocolError):
            fresh.inbox.receive(frame)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([(METADATA, FIRST | JOINED, 0, 4, b"")], "too few for two records"),
        ([(METADATA, FIRST | LAST | JOINED, 0, 0, encode(Attach()))], "too few for two records"),
        ([(METADATA, FIRST | JOINED, 0, 4, "4"), (METADATA, FIRST, 1, 4, bytes(4))], "another message"),
        ([(METADATA, FIRST | JOINED, 0, 4, "4"), (PAYLOAD, LAST, 1, 4, bytes(4))], "another message"),
        ([(METADATA, FIRST | JOINED, 0, 4, "4"), (PAYLOAD, LAST | JOINED, 0, 4, bytes(4))], "LAST mark"),
        ([(METADATA, FIRST | JOINED, 0, 4, "4"), (PAYLOAD, 0, 0, 4, bytes(4))], "LAST mark"),
        ([(METADATA, FIRST | JOINED, 0, 4, "4"), (PAYLOAD, LAST, 0, 6, bytes(4))], "not open"),
        ([(METADATA, FIRST | JOINED, 0, 6, "4"), (PAYLOAD, LAST, 0, 6, bytes(6))], "where the metadata says 4"),
        ([(METADATA, FIRST | JOINED, 0, 4, "4"), (PAYLOAD, LAST, 0, 4, bytes(3))], "does not verify"),
        ([(METADATA, FIRST, 0, 4, "4"), (PAYLOAD, LAST, 0, 4, bytes(4))], "does not verify"),
        ([(METADATA, JOINED, 0, 4, "4"), (PAYLOAD, LAST, 0, 4, bytes(4))], "begins out of order"),
        ([(METADATA, FIRST | LAST | JOINED, 0, 4, "4"), (PAYLOAD, LAST, 0, 4, bytes(4))], "begins out of order"),
        ([(METADATA, FIRST | JOINED, 1, 4, "4"), (PAYLOAD, LAST, 1, 4, bytes(4))], "begins out of order"),
        ([(METADATA, FIRST | JOINED, 0, 4, bytes(65537)), (PAYLOAD, LAST, 0, 4, bytes(4))], "metadata of 65537 bytes"),
    ],
)
def test_a_peer_with_the_keys_cannot_join_what_does_not_belong_together(records: list[Any], says: str) -> None:
    """``"4"`` stands for the metadata of a message of four bytes."""
    pipe = Pipe()
    frame = b"".join(pipe.sealer.seal(*record[:4], encoded(4) if record[4] == "4" else record[4]) for record in records)
    with pytest.raises(RemoteProtocolError, match=says):
        pipe.inbox.receive(frame)
    assert sum(pipe.allocated) <= 4


def sealed(pipe: Pipe, *records: tuple[int, int, int, int, bytes]) -> None:
    for record in records:
        pipe.inbox.receive(pipe.sealer.seal(*record))


def encoded(size: int, micro: int = 0) -> bytes:
    return encode(message(size, micro))


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([(METADATA, 0, 0, 4, encoded(4))], "begins out of order"),
        ([(METADATA, FIRST | LAST, 0, 4, encoded(4))], "begins out of order"),
        ([(METADATA, FIRST, 1, 4, encoded(4))], "begins out of order"),
        ([(METADATA, FIRST, 0, 4, encoded(4)), (METADATA, FIRST, 0, 4, encoded(4))], "begins out of order"),
        ([(METADATA, FIRST, 0, 6, encoded(4))], "where the metadata says 4"),
        ([(METADATA, FIRST | LAST, 0, 0, encoded(4))], "where the metadata says 4"),
        ([(METADATA, FIRST, 0, 2**21, encoded(2**21))], "more than 1048576"),
        ([(METADATA, FIRST, 0, 4, bytes(65537))], "metadata of 65537 bytes"),
        ([(METADATA, FIRST, 0, 4, b"\xc1")], "not valid msgpack"),
        ([(PAYLOAD, LAST, 0, 4, bytes(4))], "not open"),
        ([(METADATA, FIRST, 0, 4, encoded(4)), (PAYLOAD, LAST, 0, 6, bytes(4))], "not open"),
        ([(METADATA, FIRST, 0, 4, encoded(4)), (PAYLOAD, 0, 0, 4, bytes(4))], "LAST mark"),
        ([(METADATA, FIRST, 0, 4, encoded(4)), (PAYLOAD, LAST, 0, 4, bytes(3))], "of 3 bytes at offset 0"),
        ([(METADATA, FIRST, 0, 4, encoded(4)), (PAYLOAD, LAST, 0, 4, bytes(5))], "of 5 bytes at offset 0"),
        ([(METADATA, FIRST, 0, 4, encoded(4)), (PAYLOAD, 0, 0, 4, b"")], "of 0 bytes"),
        ([(METADATA, FIRST, 0, 2048, encoded(2048)), (PAYLOAD, LAST, 0, 2048, bytes(1024))], "LAST mark"),
        ([(METADATA, FIRST, n, 4, encoded(4, n)) for n in range(MAX_OPEN + 1)], "too many at once"),
        (
            [(METADATA, FIRST, 0, 4, encoded(4)), (PAYLOAD, LAST, 0, 4, bytes(4)), (PAYLOAD, LAST, 0, 4, bytes(4))],
            "not open",
        ),
    ],
)
def test_a_peer_with_the_keys_cannot_break_the_rules_of_messages(records: list[Any], says: str) -> None:
    pipe = Pipe()
    with pytest.raises(RemoteProtocolError, match=says):
        sealed(pipe, *records)
    assert sum(pipe.allocated) <= 4 * MAX_OPEN + 2048


def test_nothing_is_allocated_that_credit_does_not_cover() -> None:
    pipe = Pipe()

    def refuse(size: int) -> None:
        raise RemoteProtocolError("no credit")

    pipe.inbox._charge = refuse
    with pytest.raises(RemoteProtocolError, match="no credit"):
        sealed(pipe, (METADATA, FIRST, 0, 4, encoded(4)))
    assert pipe.allocated == []


def test_allocate_must_give_what_was_asked() -> None:
    for wrong in (bytearray(3), bytes(4)):
        pipe = Pipe()
        pipe.inbox._allocate = lambda message, wrong=wrong: (wrong, memoryview(wrong))  # type: ignore[misc]
        with pytest.raises(LocalProtocolError, match="4 writable bytes"):
            sealed(pipe, (METADATA, FIRST, 0, 4, encoded(4)))
