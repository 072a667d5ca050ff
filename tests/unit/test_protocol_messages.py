"""Messages: what is encoded comes back equal, and no bytes make a decoder raise anything but RemoteProtocolError."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol import messages as m
from splitfl.protocol.data import MAX_SEGMENTS
from splitfl.protocol.fields import MAX_INTEGER

WORD = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=8)
TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=15)
STEP, MICRO, COUNT = st.integers(0, MAX_INTEGER), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NOT_NEGATIVE = st.floats(0, 1e300)
LIBRARIES = st.dictionaries(WORD, TEXT, max_size=8)
LEAF = st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | FINITE | TEXT | st.binary(max_size=40)
NESTED = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3), max_leaves=6)
PLAIN = st.dictionaries(WORD, NESTED, max_size=4)
ROWS, HIDDEN = st.integers(1, 2**17), st.integers(1, 2**15)
DTYPE = st.sampled_from(sorted(m.DTYPES))
RAW = st.just("raw")
SHAPE = st.lists(st.integers(1, 2**20), max_size=8).map(tuple)
SEGMENTS = st.lists(st.tuples(st.integers(1, 2**12), st.integers(0, 2**20)), min_size=1, max_size=40).map(tuple)


def decoding(segments: list[tuple[tuple[int, int], tuple[int, int]]], step: int, micro: int) -> m.Forward:
    """A forward of so many segments, each with the ``(parent, kept)`` that it follows; those that keep nothing have no parent."""
    sequences = tuple((i, (parent if kept else -1, kept)) for i, (_, (parent, kept)) in enumerate(segments))
    wire = tuple(segment for segment, _ in segments)
    return m.Forward(step, micro, wire, 8, "float32", "raw", False, False, True, 0, sequences)


FOLLOWING = st.tuples(st.tuples(st.integers(1, 2**12), st.integers(0, 2**20)), st.tuples(COUNT, st.integers(0, 3) | COUNT))


def exactly(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=length, max_size=length)


FROM_CLIENT = st.one_of(
    st.builds(m.Hello, st.just(m.PROTOCOL_VERSION), WORD, LIBRARIES, TEXT),
    st.builds(
        m.Open,
        exactly(32),
        exactly(1184),
        st.lists(st.just("aes-256-gcm"), min_size=1, max_size=3).map(tuple),
        PLAIN,
        st.tuples(st.integers(0, 99), st.integers(0, 99)),
        WORD,
        st.dictionaries(WORD, COUNT | NOT_NEGATIVE, max_size=4),
        TEXT,
    ),
    st.builds(m.Enrol, st.lists(STEP, max_size=16).map(tuple), st.booleans()),
    st.builds(m.StepDone, STEP, COUNT, COUNT, st.sampled_from(["continue", "pause", "leave"]), st.none() | NOT_NEGATIVE),
    st.builds(m.AskNorm, STEP, st.integers(1, 2**31 - 1)),
    st.builds(m.Pause),
    st.builds(m.Leave),
    st.builds(m.Heartbeat, FINITE, STEP, STEP),
    st.builds(m.Bye, STEP),
    st.builds(m.Ends, st.lists(st.tuples(WORD, st.tuples(DTYPE, SHAPE)), min_size=1, max_size=5).map(tuple), st.booleans()),
)
FROM_SERVER = st.one_of(
    st.builds(m.Welcome, st.just(m.PROTOCOL_VERSION), WORD, PLAIN, LIBRARIES, FINITE),
    st.builds(
        m.Opened,
        WORD,
        exactly(32),
        st.integers(1, 3600),
        WORD,
        exactly(32),
        exactly(1088),
        WORD,
        st.integers(1, 2**40),
        st.integers(1, 2**40),
        st.integers(4096, 2**22),
        STEP,
        st.sampled_from(["sealed", "curve"]),
    ),
    st.builds(m.Refused, WORD, TEXT),
    st.builds(m.Redirect, WORD, st.integers(1, 65535)),
    st.builds(m.StepOpened, STEP, COUNT),
    st.builds(m.StepClosed, STEP, STEP, COUNT, NOT_NEGATIVE, st.none() | NOT_NEGATIVE, STEP, st.booleans(), COUNT, st.booleans()),
    st.builds(m.Credit, st.integers(1, 2**40)),
    st.builds(m.Heartbeat, FINITE, STEP, STEP),
    st.builds(m.Fault, WORD, TEXT, st.booleans(), st.none() | MICRO),
    st.builds(m.Closing, TEXT, st.booleans()),
    st.builds(m.RoundOpened, STEP),
    st.builds(m.RoundClosed, STEP, COUNT, STEP),
    st.builds(m.TrunkNorm, STEP, st.none() | NOT_NEGATIVE),
)
DATA_FROM_CLIENT = st.one_of(
    st.builds(m.Attach),
    st.builds(m.Forward, STEP, MICRO, SEGMENTS, HIDDEN, DTYPE, RAW, st.booleans(), st.booleans(), st.booleans(), COUNT),
    st.builds(m.Forward, st.just(-1), MICRO, SEGMENTS, HIDDEN, DTYPE, RAW, st.just(False), st.booleans(), st.booleans()),
    st.builds(m.Backward, STEP, MICRO, ROWS, HIDDEN, DTYPE, RAW, STEP, st.floats(1e-9, 1e9), st.booleans()),
    st.builds(m.EndsPart, STEP, COUNT, STEP, st.integers(1, 2**31 - 1)),
    st.builds(decoding, st.lists(FOLLOWING, min_size=1, max_size=9), STEP, MICRO),
    st.builds(m.Release, st.lists(COUNT, min_size=1, max_size=9).map(tuple)),
)
DATA_FROM_SERVER = st.one_of(
    st.builds(m.Attached),
    st.builds(m.Hidden, STEP, MICRO, ROWS, HIDDEN, DTYPE, RAW),
    st.builds(m.Grad, st.just(-1), MICRO, ROWS, HIDDEN, DTYPE, RAW),
    st.builds(m.AveragePart, STEP, COUNT, STEP, st.integers(1, 2**31 - 1)),
)
ANY = FROM_CLIENT | FROM_SERVER | DATA_FROM_CLIENT | DATA_FROM_SERVER
JUNK = st.recursive(
    LEAF | st.floats() | st.integers(-(2**63), 2**64 - 1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LEAF.filter(lambda k: k == k), inner, max_size=3),
    max_leaves=5,
)
KINDS = sorted({*m.CONTROL_FROM_CLIENT, *m.CONTROL_FROM_SERVER, 64, 65, 66, 67, 68, 96, 97, 98, 99})


@settings(deadline=None)
@given(FROM_CLIENT)
def test_control_from_client_comes_back_equal(message: Any) -> None:
    assert m.decode_control(m.encode(message), from_client=True) == message


@settings(deadline=None)
@given(FROM_SERVER)
def test_control_from_server_comes_back_equal(message: Any) -> None:
    assert m.decode_control(m.encode(message), from_client=False) == message


@settings(deadline=None)
@given(DATA_FROM_CLIENT)
def test_data_from_client_comes_back_equal(message: Any) -> None:
    assert m.decode_data(m.encode(message), from_client=True) == message


@settings(deadline=None)
@given(DATA_FROM_SERVER)
def test_data_from_server_comes_back_equal(message: Any) -> None:
    assert m.decode_data(m.encode(message), from_client=False) == message


def decode_all(frame: bytes) -> None:
    """Every decoder takes the frame or raises RemoteProtocolError; what it takes is a message that can be sent
    again.
    """
    decoders: tuple[Any, ...] = (m.decode_control, m.decode_data)
    for decode in decoders:
        for from_client in (True, False):
            try:
                message = decode(frame, from_client)
            except RemoteProtocolError as error:
                text = str(error)
                message = None
            else:
                text = ""
                m.encode(message)
            assert len(text) < 500
            assert text.isprintable()
            if isinstance(message, m.DataMessage):
                assert 0 <= message.payload_bytes <= 2**40


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(frame: bytes) -> None:
    decode_all(frame)


@settings(deadline=None)
@given(ANY, st.data())
def test_damaged_messages(message: Any, data: st.DataObject) -> None:
    frame = bytearray(m.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decode_all(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    decode_all(bytes(frame))


@settings(max_examples=300, deadline=None)
@given(ANY, st.data())
def test_fields_of_the_wrong_kind(message: Any, data: st.DataObject) -> None:
    fields = message.to_map()
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(JUNK)
    decode_all(msgpack.packb(fields))


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.dictionaries(st.text(max_size=80) | st.binary(max_size=9) | st.integers(-5, 5), JUNK))
def test_maps_of_anything(kind: int, fields: dict[Any, Any]) -> None:
    decode_all(msgpack.packb({**fields, "type": kind}))


def test_each_direction_refuses_the_other() -> None:
    with pytest.raises(RemoteProtocolError, match="unknown type"):
        m.decode_control(m.encode(m.Credit(5)), from_client=True)
    with pytest.raises(RemoteProtocolError, match="unknown type"):
        m.decode_control(m.encode(m.Enrol()), from_client=False)
    with pytest.raises(RemoteProtocolError, match="unknown type"):
        m.decode_data(m.encode(m.Hidden(0, 0, 1, 1, "float32", "raw")), from_client=True)


FORWARD = m.Forward(0, 0, ((3, 0), (2, 7)), 16, "bfloat16", "raw", True, True, True).to_map()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": True}, "Forward.step must be an integer"),
        ({"step": -2}, "Forward.step"),
        ({"step": 2**53}, "Forward.step"),
        ({"step": 1.0}, "Forward.step"),
        ({"step": -1}, "must name a step when train is set"),
        ({"train": 1}, "Forward.train must be true or false"),
        ({"segments": []}, "Forward.segments"),
        ({"segments": [[0, 0]]}, "Forward.segments"),
        ({"segments": [[1, -1]]}, "Forward.segments"),
        ({"segments": [[1, 2, 3]]}, "pair"),
        ({"segments": [[1, 0]] * (MAX_SEGMENTS + 1)}, "items"),
        ({"segments": [[2**31 - 1, 0]] * 2}, "tokens"),
        ({"segments": [[2**31 - 1, 0]], "hidden": 2**24}, "payload"),
        ({"hidden": 0}, "Forward.hidden"),
        ({"dtype": "int8"}, "must be one of bfloat16"),
        ({"dtype": ["float32"]}, "must be one of"),
        ({"codec": "zip"}, "must be one of raw"),
        ({"extra": 1}, "extra"),
        ({"sequences": [[0, [-1, 0]], [1, [-1, 0]]]}, "must be empty when train or grad"),
        ({"train": False, "grad": False, "sequences": [[0, [-1, 0]]]}, "one sequence for each segment"),
        ({"train": False, "grad": False, "sequences": [[0, [-1, 0]]] * 2}, "each sequence once"),
        ({"train": False, "grad": False, "sequences": [[0, [-1, 3]], [1, [0, 3]]]}, "keep one token or more"),
        ({"train": False, "grad": False, "sequences": [[0, [-1, 0]], [1, [0, 0]]]}, "keep one token or more"),
        ({"sequences": [[0, [-2, 0]]]}, "Forward.sequences"),
        ({"sequences": [[2**31, [-1, 0]]]}, "Forward.sequences"),
        ({"sequences": [[0, 1, 2]]}, "pair"),
        ({"sequences": [[0, [-1, 0]]] * (MAX_SEGMENTS + 1)}, "items"),
    ],
)
def test_forward_refuses(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        m.decode_data(msgpack.packb({**FORWARD, **change}), from_client=True)


def test_missing_fields_are_named() -> None:
    fields = dict(FORWARD)
    del fields["grad"]
    with pytest.raises(RemoteProtocolError, match=r"unknown fields \(grad\)"):
        m.decode_data(msgpack.packb(fields), from_client=True)


@pytest.mark.parametrize("divisor", [0.0, -1.0, float("nan"), float("inf")])
def test_backward_needs_a_divisor(divisor: float) -> None:
    with pytest.raises(LocalProtocolError, match="divisor"):
        m.Backward(0, 0, 1, 1, "float32", "raw", 1, divisor)


def test_a_divisor_may_be_a_whole_number() -> None:
    message = m.Backward(0, 0, 1, 1, "float32", "raw", 1, 3)
    assert message.divisor == 3.0
    assert type(message.divisor) is float


def test_payload_bytes() -> None:
    assert m.decode_data(msgpack.packb(FORWARD), from_client=True).payload_bytes == 5 * 16 * 2
    assert m.Grad(0, 0, 7, 3, "float64", "raw").payload_bytes == 7 * 3 * 8
    assert m.Attach().payload_bytes == 0


def test_limits_on_size_and_depth() -> None:
    deep: Any = 1
    for _ in range(12):
        deep = [deep]
    with pytest.raises(LocalProtocolError, match="nested"):
        m.Welcome(1, "run", {"deep": deep}, {}, 0.0)
    with pytest.raises(LocalProtocolError, match="values"):
        m.Welcome(1, "run", {"wide": [0] * 9000}, {}, 0.0)
    with pytest.raises(LocalProtocolError, match="more than 65536"):
        m.encode(m.Welcome(1, "run", {"long": ["x" * 16000] * 5}, {}, 0.0))
    with pytest.raises(RemoteProtocolError, match="more than 65536"):
        m.decode_control(bytes(65537), from_client=True)
    nested = b"\x91" * 60000 + b"\x00"
    decode_all(nested)


def test_text_for_terminals_holds_no_control_characters() -> None:
    with pytest.raises(RemoteProtocolError, match="control characters"):
        m.decode_control(msgpack.packb({"type": 41, "text": "\x1b[2J", "back": False}), from_client=False)
    assert m.Closing("two\nlines").text == "two\nlines"


def test_another_version_is_told_apart_whatever_else_it_says() -> None:
    frame = msgpack.packb({"type": 1, "protocol": 7, "news": [1, 2]})
    with pytest.raises(m.OtherVersionError) as caught:
        m.decode_control(frame, from_client=True)
    assert caught.value.theirs == 7


def test_secrets_are_not_shown() -> None:
    message = m.Open(b"\xaa" * 32, b"\xbb" * 1184, ("aes-256-gcm",), {}, (1, 1), "n")
    assert "\\xaa" not in repr(message)
    opened = m.Opened("s", b"\xaa" * 32, 15, "tcp://*:1", b"\xbb" * 32, b"\xcc" * 1088, "aes-256-gcm", 9, 9, 4096)
    assert not any(mark in repr(opened) for mark in ("\\xaa", "\\xbb", "\\xcc"))
    with pytest.raises(LocalProtocolError) as caught:
        m.Open(b"secret", b"", (), {}, (1, 1), "n")
    assert "secret'" not in str(caught.value)


def test_an_open_carries_what_the_client_asks_for_its_adapter() -> None:
    asked = {"rank": 16, "learning_rate": 1e-4}
    message = m.Open(bytes(32), bytes(1184), ("aes-256-gcm",), {}, (1, 1), "n", asked)
    assert m.decode_control(m.encode(message), from_client=True) == message
    assert m.Open(bytes(32), bytes(1184), ("aes-256-gcm",), {}, (1, 1), "n").adapter == {}
    with pytest.raises(LocalProtocolError, match="adapter must be a map"):
        m.Open(bytes(32), bytes(1184), ("aes-256-gcm",), {}, (1, 1), "n", ["rank"])  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError, match="adapter must be nested at most 2 deep"):
        m.Open(bytes(32), bytes(1184), ("aes-256-gcm",), {}, (1, 1), "n", {"a": {"b": {"c": 1}}})


@pytest.mark.parametrize("said", [{"type": m.Pause.TYPE, b"a": 1}, {"type": m.Pause.TYPE, b"a": 1, "b": 2}, [1], 5])
def test_a_message_is_a_map_with_text_keys(said: object) -> None:
    with pytest.raises(RemoteProtocolError, match="not a map with text keys"):
        m.decode_control(msgpack.packb(said), from_client=True)
