"""The client's half of the data connection, without a connection: what leaves, what is held back, what comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitfl.channel.datapath import DataPath, data_address, outgoing
from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol import messages as m
from splitfl.protocol.assembly import Outbox
from splitfl.protocol.ciphers import AES_256_GCM, make_aead
from splitfl.protocol.records import MIN_RECORD_BYTES, Sealer
from splitfl.protocol.schedule import TrafficSecrets

RECORD = MIN_RECORD_BYTES
SECRETS = TrafficSecrets(bytes(32), bytes([1]) * 32)
OPENED = m.Opened(
    "s", bytes(32), 15, "tcp://*:7001", bytes(32), bytes(1088), AES_256_GCM, 40 * RECORD, 40 * RECORD, RECORD, 0, "sealed"
)


class Wire:
    """Takes ``room`` frames."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sent: list[bytes] = []

    def send_data(self, frame: Any) -> bool:
        if len(self.sent) >= self.room:
            return False
        self.sent.append(bytes(frame))
        return True


def path(opened: m.Opened = OPENED) -> DataPath:
    return DataPath(
        opened,
        SECRETS,
        aead_factory=make_aead,
        allocate=lambda message: _target(message.payload_bytes),
        admit=lambda message: None,
    )


def _target(size: int) -> tuple[bytearray, memoryview]:
    buffer = bytearray(size)
    return buffer, memoryview(buffer)


def forward(size: int, micro: int = 0) -> m.Forward:
    return m.Forward(-1, micro, ((size // 2, 0),), 1, "bfloat16", "raw", False, False, True)


def test_a_full_link_keeps_the_record_and_goes_on_with_it() -> None:
    one, wire = path(), Wire(2)
    one.add(forward(3 * RECORD), bytes(3 * RECORD))
    assert one
    assert not one.pump(wire), "nothing more can leave at once"
    assert one.stuck is not None
    held = bytes(one.stuck)
    assert (one.records_sent, one.bytes_sent) == (3, sum(map(len, wire.sent)))
    wire.room = 9
    assert not one.pump(wire)
    assert wire.sent[2] == held
    assert (one.records_sent, one.stuck) == (4, None)  # metadata and three records
    assert not one


def test_connections_are_read_again_after_a_few_records() -> None:
    one, wire = path(), Wire(1000)
    for micro in range(20):
        one.add(forward(2, micro), b"ab")
    assert one.pump(wire), "there is more to do"
    assert len(wire.sent) < 20
    while one.pump(wire):
        pass
    assert len(wire.sent) == 20
    large = path()
    large.add(forward(40 * RECORD), bytes(40 * RECORD))
    assert large.pump(wire)
    assert large.bytes_sent <= 5 * 2**20


def test_without_credit_nothing_leaves() -> None:
    one, wire = path(replace(OPENED, window=RECORD, max_message=RECORD)), Wire(9)
    for micro in range(2):
        one.add(forward(RECORD, micro), bytes(RECORD))
    one.pump(wire)
    assert len(wire.sent) == 1
    assert one
    one.credit.receive(RECORD)
    one.pump(wire)
    assert len(wire.sent) == 2


def test_what_the_server_sent_comes_out() -> None:
    outbox = Outbox(Sealer(SECRETS.server, AES_256_GCM), RECORD)
    outbox.add(m.Hidden(0, 0, 2, 2, "float32", "raw"), bytes(range(16)))
    one, done = path(), None
    while (frame := outbox.next_frame()) is not None:
        assert done is None
        done = one.receive(frame)
    assert done is not None
    assert bytes(done[1]) == bytes(range(16))
    assert one.records_received == 2


def test_less_credit_than_a_message_may_need() -> None:
    with pytest.raises(RemoteProtocolError, match="less credit than one message may need"):
        path(replace(OPENED, max_message=41 * RECORD))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tcp://*:7", ("dialled", 7)),
        ("tcp://:7", ("dialled", 7)),
        ("tcp://192.0.2.1:7001", ("192.0.2.1", 7001)),
        ("tcp://[::1]:7001", ("::1", 7001)),
    ],
)
def test_where_the_data_endpoint_is(text: str, found: tuple[str, int]) -> None:
    assert data_address(text, "dialled") == found


@pytest.mark.parametrize("text", ["", "tcp://host", "tcp://host:0", "tcp://host:70000", "tcp://[::1:7", "ipc://host:7"])
def test_a_data_address_that_is_none(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed data address"):
        data_address(text, "dialled")


def test_what_is_the_channels_own_is_sent_by_nobody_else() -> None:
    with pytest.raises(LocalProtocolError, match="Attach is the channel's own"):
        outgoing(m.Attach(), b"", RECORD)
    with pytest.raises(LocalProtocolError, match="exceeds the server's limit"):
        outgoing(forward(4), b"abcd", 3)
