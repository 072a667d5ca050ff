"""Sequences of records, messages and words that no honest side sends, drawn by structure; the checks are the fuzzer's targets."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_trunk.ends_book import EndsBook
from splitfl.channel.datapath import data_address
from splitfl.errors import ConnectError, KeyFileError, RemoteProtocolError
from splitfl.protocol import messages as m
from splitfl.protocol.keys import Identity, parse_line
from splitfl.protocol.records import FIRST, LAST, METADATA, PAYLOAD
from splitfl.transport.zmq_client import ZmqClientTransport
from tests.fuzz.handshake import client, server
from tests.fuzz.payloads import payloads
from tests.fuzz.pieces import joined
from tests.fuzz.records import assembly
from tests.fuzz.seeds import DATA_FROM_CLIENT, DATA_FROM_SERVER, FROM_CLIENT, FROM_SERVER, frames_at_once
from tests.fuzz.sentences import check_sentence
from tests.fuzz.texts import replicas
from tests.fuzz.trunk import trunk
from tests.unit.test_protocol_messages import JUNK
from tests.unit.test_protocol_messages import NOT_NEGATIVE as RATE

KEY = str(Identity.from_secret(bytes(range(32))).public)
QUICK = settings(max_examples=100, deadline=None)


def _parts(*messages: tuple[m.Message, int], at_once: bool = False) -> st.SearchStrategy[list[bytes]]:
    """The records of several messages, each message's in order, mixed in any way.
    ``at_once``: each one's metadata and first record in one frame.
    """

    def records(number: int, message: m.Message, size: int) -> list[bytes]:
        total = size.to_bytes(2, "big")
        pieces = [bytes([METADATA, FIRST if size else FIRST | LAST, number]) + total + m.encode(message)]
        for at in range(0, size, 64):
            last = LAST if at + 64 >= size else 0
            pieces.append(bytes([PAYLOAD, last, number]) + total + bytes([number + 1]) * min(64, size - at))
        return frames_at_once(pieces, 0, 5) if at_once else pieces

    each = [records(number, message, size) for number, (message, size) in enumerate(messages)]

    def mixed(turns: list[int]) -> list[bytes]:
        left = [list(pieces) for pieces in each]
        said, begun = [], 0
        for turn in [*turns, *range(99)]:
            at = turn % len(left)
            if left[at] and (at < begun or at == begun):
                said.append(left[at].pop(0))
                begun = max(begun, at + 1)
        return said

    return st.lists(st.integers(0, 7), max_size=20).map(mixed)


FORWARD, PART = DATA_FROM_CLIENT[1], DATA_FROM_CLIENT[4]
MESSAGES = ((FORWARD, 160), (PART, 64), (m.Attach(), 0), (FORWARD, 160))


@QUICK
@given(_parts(*MESSAGES) | _parts(*MESSAGES, at_once=True), st.data())
def test_messages_interleave_as_the_protocol_says_and_not_otherwise(pieces: list[bytes], data: st.DataObject) -> None:
    assembly(joined(pieces))
    at = data.draw(st.integers(0, len(pieces) - 1))
    spoilt = bytearray(pieces[at])
    spoilt[data.draw(st.integers(0, min(len(spoilt) - 1, 7)))] ^= 1 << data.draw(st.integers(0, 7))
    moved = pieces[:at] + pieces[at + 1 :]
    moved.insert(data.draw(st.integers(0, len(moved))), pieces[at])
    for other in ([*pieces[:at], bytes(spoilt), *pieces[at + 1 :]], moved, [*pieces, pieces[at]], pieces[:at] + pieces[at + 1 :]):
        assembly(joined(other))


def _said(act: int, messages: tuple[m.Message, ...]) -> st.SearchStrategy[bytes]:
    return st.sampled_from(messages).map(lambda message: bytes([act]) + m.encode(message))


def _sealed(messages: tuple[m.Message, ...]) -> st.SearchStrategy[bytes]:
    def seal(message: m.Message, number: int) -> bytes:
        size = message.payload_bytes if isinstance(message, m.DataMessage) else 0
        return bytes([2, METADATA, FIRST if size else FIRST | LAST, number]) + size.to_bytes(4, "big") + m.encode(message)

    payload = st.builds(
        lambda number, size: bytes([2, PAYLOAD, LAST, number, 0, 0, 0, size]) + bytes(size), st.integers(0, 3), st.just(160)
    )
    return st.builds(seal, st.sampled_from(messages), st.integers(0, 3)) | payload


@QUICK
@given(
    st.booleans(),
    st.lists(
        _said(0, FROM_CLIENT)
        | _sealed(DATA_FROM_CLIENT)
        | st.builds(lambda act, said: bytes([act]) + said, st.integers(3, 8), st.binary(max_size=3)),
        max_size=12,
    ),
)
def test_a_server_survives_whatever_a_client_says(opens: bool, pieces: list[bytes]) -> None:
    server(joined([*([b"\3"] if opens else []), *pieces]))


@QUICK
@given(
    st.booleans(),
    st.lists(
        _said(0, FROM_SERVER)
        | _sealed(DATA_FROM_SERVER)
        | st.builds(lambda act, said: bytes([act, said]), st.integers(3, 5), st.integers(0, 5)),
        max_size=12,
    ),
)
def test_a_client_survives_whatever_a_server_says(opens: bool, pieces: list[bytes]) -> None:
    client(joined([*([b"\4"] if opens else []), *pieces]))


@QUICK
@given(st.booleans(), st.lists(_said(0, FROM_CLIENT) | _said(1, DATA_FROM_CLIENT) | st.just(b"\2"), max_size=10))
def test_a_gateway_gives_memory_only_for_what_fits_the_run(own: bool, pieces: list[bytes]) -> None:
    payloads(bytes([own]) + joined(pieces))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 47), st.lists(st.lists(st.integers(0, 9), min_size=8, max_size=8).map(bytes), max_size=20))
def test_the_trunk_survives_clients_that_say_what_they_like(kind: int, pieces: list[bytes]) -> None:
    trunk(bytes([kind]) + joined(pieces))


@QUICK
@given(st.lists(JUNK, max_size=10))
def test_words_of_replicas_are_words_or_refused(said: list[Any]) -> None:
    replicas(msgpack.packb(said))


@QUICK
@given(st.lists(st.text(max_size=12) | st.builds(lambda rate: f"rate={rate}", RATE) | st.sampled_from(["#", "..", "a", "n=1"])))
def test_any_line_of_authorized_clients(words: list[str]) -> None:
    for line in (" ".join(words), f"{KEY} {' '.join(words)}"):
        try:
            parsed = parse_line(line)
        except KeyFileError as error:
            check_sentence(error)
        else:
            assert parsed is None or parsed[1].name.strip(".")


@QUICK
@given(st.text(max_size=40) | st.from_regex(r"tcp://[a-z\[\]:@%*.]{0,9}:?[0-9]{0,6}", fullmatch=True))
def test_any_data_address_is_a_host_and_a_port_or_refused(text: str) -> None:
    try:
        host, port = data_address(text, "dialled")
    except RemoteProtocolError:
        return
    assert host
    assert 0 < port < 65536


def test_absurd_ends_do_not_settle_what_the_others_train() -> None:
    book = EndsBook(averaged=True, part_bytes=64)
    with pytest.raises(RemoteProtocolError, match="bytes"):
        book.declare("liar", m.Ends((("a", ("float32", (2**40,) * 8)),)))
    book.left("liar")
    book.declare("honest", m.Ends((("a", ("float32", (2, 8))),)))
    assert book.layout is not None
    assert book.layout.bytes == 64


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".org", ".", "a" * 300])
def test_a_host_that_can_have_no_address(host: str) -> None:
    transport = ZmqClientTransport()
    identity = Identity.generate()
    try:
        with pytest.raises(ConnectError, match="nothing listens"):
            transport.connect_control(host, 1, identity.public, identity, 0.5)
    finally:
        transport.close(0)
