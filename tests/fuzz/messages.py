"""Single frames: control messages, and the metadata of data messages, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol import messages as m
from splitfl.protocol.data import MAX_PAYLOAD_BYTES
from splitfl.protocol.message import MAX_CONTROL_BYTES
from tests.fuzz.sentences import check_sentence

__all__ = ["control", "decoded", "metadata"]


def decoded(decode: Callable[[bytes, bool], Any], frame: bytes, from_client: bool) -> Any:
    """The message, or None for a frame that is refused. What is taken can be sent again, and comes back equal."""
    try:
        message = decode(frame, from_client)
    except RemoteProtocolError as error:
        check_sentence(error)
        return None
    try:
        again = m.encode(message)
    except LocalProtocolError:
        # A number may come in fewer bytes than we give it.
        assert len(frame) > MAX_CONTROL_BYTES // 4
        return message
    assert decode(again, from_client) == message
    return message


def control(data: bytes) -> None:
    for from_client in (True, False):
        decoded(m.decode_control, data, from_client)
    hello = decoded(lambda frame, _: m.decode_hello(frame), data, True)
    if hello is not None:
        assert m.decode_control(data, from_client=True) == hello


def metadata(data: bytes) -> None:
    for from_client in (True, False):
        message = decoded(m.decode_data, data, from_client)
        if message is not None:
            assert 0 <= message.payload_bytes <= MAX_PAYLOAD_BYTES
