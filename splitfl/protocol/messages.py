"""Every message of the protocol, and how each becomes bytes: one msgpack map with ``type`` and exactly its fields.

Decoding knows a plain table of type numbers for each direction and checks every field by hand; nothing is looked up by
name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.control import (
    DTYPES,
    AskNorm,
    Bye,
    Closing,
    Credit,
    Ends,
    Enrol,
    Fault,
    Heartbeat,
    Leave,
    Pause,
    RefusalCode,
    RoundClosed,
    RoundOpened,
    StepClosed,
    StepDone,
    StepOpened,
    TrunkNorm,
)
from splitfl.protocol.data import (
    EVALUATION,
    Attach,
    Attached,
    AveragePart,
    Backward,
    DataMessage,
    EndsPart,
    Forward,
    Grad,
    Hidden,
    Release,
)
from splitfl.protocol.handshake import Hello, Open, Opened, Redirect, Refused, Welcome
from splitfl.protocol.message import MAX_CONTROL_BYTES, MAX_HELLO_BYTES, MAX_METADATA_BYTES, PROTOCOL_VERSION, Message

__all__ = [
    "CONTROL_FROM_CLIENT",
    "CONTROL_FROM_SERVER",
    "DTYPES",
    "EVALUATION",
    "MAX_CONTROL_BYTES",
    "MAX_METADATA_BYTES",
    "PROTOCOL_VERSION",
    "AskNorm",
    "Attach",
    "Attached",
    "AveragePart",
    "Backward",
    "Bye",
    "Closing",
    "ControlMessage",
    "Credit",
    "DataMessage",
    "Ends",
    "EndsPart",
    "Enrol",
    "Fault",
    "Forward",
    "Grad",
    "Heartbeat",
    "Hello",
    "Hidden",
    "Leave",
    "Message",
    "Open",
    "Opened",
    "OtherVersionError",
    "Pause",
    "Redirect",
    "RefusalCode",
    "Refused",
    "Release",
    "RoundClosed",
    "RoundOpened",
    "StepClosed",
    "StepDone",
    "StepOpened",
    "TrunkNorm",
    "Welcome",
    "decode_control",
    "decode_data",
    "decode_hello",
    "encode",
]

ControlMessage = Message


def _table(*classes: type[Message]) -> dict[int, type[Message]]:
    return {cls.TYPE: cls for cls in classes}


CONTROL_FROM_CLIENT = _table(Hello, Open, Enrol, StepDone, Pause, Leave, Heartbeat, Bye, Ends, AskNorm)
CONTROL_FROM_SERVER = _table(
    Welcome,
    Opened,
    Refused,
    Redirect,
    StepOpened,
    StepClosed,
    TrunkNorm,
    Credit,
    Heartbeat,
    Fault,
    Closing,
    RoundOpened,
    RoundClosed,
)
DATA_FROM_CLIENT = _table(Attach, Forward, Backward, EndsPart, Release)
DATA_FROM_SERVER = _table(Attached, Hidden, Grad, AveragePart)


class OtherVersionError(RemoteProtocolError):
    """The peer speaks protocol version ``theirs``, whose other fields are not ours to judge."""

    def __init__(self, theirs: int) -> None:
        super().__init__(f"the peer speaks protocol version {theirs}, this program version {PROTOCOL_VERSION}")
        self.theirs = theirs


def encode(message: Message) -> bytes:
    """The bytes of one message. Raises LocalProtocolError when they exceed the limit of its endpoint."""
    frame: bytes = msgpack.packb(message.to_map(), use_bin_type=True)
    limit = MAX_METADATA_BYTES if isinstance(message, DataMessage) else MAX_CONTROL_BYTES
    if len(frame) > limit:
        raise LocalProtocolError(f"{type(message).__name__} has {len(frame)} bytes, more than {limit}")
    return frame


def decode_control(frame: bytes, from_client: bool) -> Message:
    """One control message. Raises RemoteProtocolError (:class:`OtherVersionError` for a Hello or Welcome of another
    version).
    """
    return _decode(frame, CONTROL_FROM_CLIENT if from_client else CONTROL_FROM_SERVER, MAX_CONTROL_BYTES)


def decode_hello(frame: bytes) -> Message:
    """A Hello, and nothing else: other messages are refused before their fields are looked at. Raises as ``decode_control``."""
    return _decode(frame, {Hello.TYPE: Hello}, MAX_HELLO_BYTES)


def decode_data(frame: bytes, from_client: bool) -> DataMessage:
    """The metadata of one data message. Raises RemoteProtocolError."""
    message = _decode(frame, DATA_FROM_CLIENT if from_client else DATA_FROM_SERVER, MAX_METADATA_BYTES)
    assert isinstance(message, DataMessage)
    return message


def _decode(frame: bytes, table: dict[int, type[Message]], limit: int) -> Message:
    fields = _unpack(frame, limit)
    kind = fields.pop("type", None)
    if type(kind) is not int or kind not in table:
        raise RemoteProtocolError(f"a message of unknown type ({_brief(kind)}) in this direction")
    cls = table[kind]
    if cls in (Hello, Welcome):
        theirs = fields.get("protocol")
        if type(theirs) is int and 0 <= theirs < 2**16 and theirs != PROTOCOL_VERSION:
            raise OtherVersionError(theirs)
    if fields.keys() != cls.FIELDS.keys():
        if not all(type(key) is str for key in fields):
            raise RemoteProtocolError("a message that is not a map with text keys")
        odd = _names(fields.keys() - cls.FIELDS.keys()) or _names(cls.FIELDS.keys() - fields.keys())
        raise RemoteProtocolError(f"{cls.__name__}: missing or unknown fields ({odd})")
    try:
        return cls.of(fields)
    except LocalProtocolError as error:
        raise RemoteProtocolError(str(error)) from None


def _unpack(frame: bytes, limit: int) -> dict[str, Any]:
    if len(frame) > limit:
        raise RemoteProtocolError(f"a message of {len(frame)} bytes, more than {limit}")
    try:
        # ext_hook: the protocol has no extension types. strict_map_key alone would still let bytes be keys.
        fields = msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=True, ext_hook=_refuse_ext)
    except Exception:  # msgpack raises a dozen kinds, among them UnicodeDecodeError and its own stack overflow
        raise RemoteProtocolError("a message that is not valid msgpack") from None
    if type(fields) is not dict:
        raise RemoteProtocolError("a message that is not a map with text keys")
    return fields


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _brief(value: object) -> str:
    return repr(value) if type(value) is int else type(value).__name__


def _names(names: Iterable[str]) -> str:
    # The peer chose these names: show little of them, and nothing that a terminal would act on.
    return ", ".join(sorted(ascii(name[:32])[1:-1] for name in names)[:4])
