"""Changes that a byte flip seldom makes: a field of a msgpack map, an item of a list, a piece of a session."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import msgpack

from tests.fuzz.pieces import joined, split

__all__ = ["mutate_frame", "mutate_pieces"]

_INTEGERS = (0, 1, -1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**40 + 1, 2**53 - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, "", "a", "raw", "float32", "x" * 70, "\x1b[2J", "\u202e", b"", b"\0" * 32, b"\xff" * 1184),
    *(
        [],
        [[]],
        {},
        [1, 2],
        [[1, 0]],
        {"a": 1},
        {"a": {"b": {"c": 1}}},
        [0] * 40,
        msgpack.Timestamp(1, 2),
        msgpack.ExtType(5, b""),
    ),
)
_VALUES: tuple[Any, ...] = (*_INTEGERS, *_FLOATS, *_OTHERS)

Raw = Callable[[bytes], bytes]


def _changed(value: Any, draw: random.Random) -> Any:
    """``value`` with one thing in it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if draw.random() < 0.05:
            return value | {draw.choice(["type", "step", "extra", "x" * 40]): draw.choice(_VALUES)}
        return value | {key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        if draw.random() < 0.3:
            return value[:at] + value[at + 1 :] if draw.random() < 0.5 else value[: at + 1] + value[at:]
        return [*value[:at], _changed(value[at], draw), *value[at + 1 :]]
    if type(value) is int and draw.random() < 0.5:
        return value + draw.choice([-1, 1])
    if type(value) is bool and draw.random() < 0.7:
        return not value
    return draw.choice(_VALUES)


def mutate_frame(frame: bytes, draw: random.Random, raw: Raw) -> bytes:
    """A msgpack frame with a field changed, or its bytes as ``raw`` changes them."""
    if draw.random() < 0.4:
        return raw(frame)
    try:
        value = msgpack.unpackb(frame, strict_map_key=False)
        for _ in range(draw.choice([1, 1, 2, 3])):
            value = _changed(value, draw)
        packed: bytes = msgpack.packb(value)
    except Exception:
        return raw(frame)
    return packed


def mutate_pieces(data: bytes, draw: random.Random, raw: Raw) -> bytes:
    """The pieces of a session with one changed, left out, said twice or moved. The first byte of a piece says what it is."""
    pieces = split(data)
    if not pieces or draw.random() < 0.15:
        return raw(data)
    at = draw.randrange(len(pieces))
    what = draw.random()
    if what < 0.55:
        head, body = pieces[at][:1], pieces[at][1:]
        pieces[at] = head + mutate_frame(body, draw, raw)
    elif what < 0.65:
        pieces[at] = raw(pieces[at])
    elif what < 0.75:
        del pieces[at]
    elif what < 0.88:
        pieces.insert(draw.randrange(len(pieces) + 1), pieces[at])
    else:
        pieces.insert(draw.randrange(len(pieces)), pieces.pop(at))
    return joined(piece[:65535] for piece in pieces)
