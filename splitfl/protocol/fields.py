"""Checks of single message fields: each takes what msgpack decoded and returns the value, or raises
:class:`FieldError`.

A check never trusts a length, never converts silently (a bool is no integer, an integer is a float only where it is
exact), and bounds everything, so that a decoded message is safe to size a buffer from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[object], Any]

# Exactly representable in every language's double: an implementation in JavaScript must be able to speak this protocol.
MAX_INTEGER = 2**53 - 1

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class FieldError(ValueError):
    """A field's value is of the wrong type, out of range, or too long."""


def integer(low: int, high: int = MAX_INTEGER) -> Check:
    """An integer in [low, high]."""

    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise FieldError(f"must be an integer from {low} to {high}")
        return value

    return check


def number(low: float = -math.inf, *, above: bool = False) -> Check:
    """A finite float, at least ``low``, or above it where ``above`` is set."""

    def check(value: object) -> float:
        if type(value) is int and abs(value) <= MAX_INTEGER:
            value = float(value)
        if type(value) is not float or not math.isfinite(value):
            raise FieldError("must be a finite number")
        if value < low or (above and value == low):
            raise FieldError(f"must be {'above' if above else 'at least'} {low}")
        return value

    return check


def boolean(value: object) -> bool:
    """True or False; 0 and 1 are not."""
    if type(value) is not bool:
        raise FieldError("must be true or false")
    return value


def short_text(limit: int, *, empty: bool = True) -> Check:
    """A string of at most ``limit`` UTF-8 bytes, without control characters (it ends up in logs and terminals)."""

    def check(value: object) -> str:
        if type(value) is not str:
            raise FieldError("must be text")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise FieldError("must be valid Unicode") from None
        if size > limit or (not value and not empty):
            raise FieldError(f"must have {0 if empty else 1} to {limit} bytes")
        if _CONTROL_CHARACTERS.search(value):
            raise FieldError("must not hold control characters")
        return value

    return check


def raw(length: int) -> Check:
    """Exactly ``length`` bytes. The value is never part of the error: it may be a secret."""

    def check(value: object) -> bytes:
        if not isinstance(value, bytes) or len(value) != length:
            raise FieldError(f"must be {length} bytes")
        return bytes(value)

    return check


def one_of(allowed: Mapping[str, object] | frozenset[str]) -> Check:
    """One of the named values."""

    def check(value: object) -> str:
        if type(value) is not str or value not in allowed:
            raise FieldError(f"must be one of {', '.join(sorted(allowed))}")
        return value

    return check


def optional(inner: Check) -> Check:
    """``None``, or what ``inner`` accepts."""

    def check(value: object) -> Any:
        return None if value is None else inner(value)

    return check


def sequence(inner: Check, low: int, high: int) -> Check:
    """A list of ``low`` to ``high`` items; becomes a tuple."""

    def check(value: object) -> tuple[Any, ...]:
        if type(value) is not list and type(value) is not tuple:
            raise FieldError("must be a list")
        if not low <= len(value) <= high:
            raise FieldError(f"must have {low} to {high} items")
        return tuple([inner(item) for item in value])

    return check


def pair(first: Check, second: Check) -> Check:
    """A list of exactly two items; becomes a tuple."""

    def check(value: object) -> tuple[Any, Any]:
        if (type(value) is not list and type(value) is not tuple) or len(value) != 2:
            raise FieldError("must be a pair")
        return first(value[0]), second(value[1])

    return check


def texts(limit: int, items: int) -> Check:
    """A map from short names to short texts, at most ``items`` of them."""
    name, content = short_text(64, empty=False), short_text(limit)

    def check(value: object) -> dict[str, str]:
        if type(value) is not dict or len(value) > items:
            raise FieldError(f"must be a map of at most {items} texts")
        return {name(key): content(item) for key, item in value.items()}

    return check


def plain(*, depth: int = 8, nodes: int = 8192) -> Check:
    """A map of plain values (None, bool, int, float, text, bytes, lists and maps of these), bounded in depth and size.

    Lists come back as lists (a tuple becomes one), so that what is sent equals what arrives.
    """
    content, key, whole = short_text(16384), short_text(256, empty=False), integer(-MAX_INTEGER)

    def walk(value: object, left: int, budget: list[int]) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise FieldError(f"must have at most {nodes} values")
        if left < 0:
            raise FieldError(f"must be nested at most {depth} deep")
        if value is None or type(value) is bool:
            return value
        if type(value) is int:
            return whole(value)
        if type(value) is float:
            if not math.isfinite(value):
                raise FieldError("must hold finite numbers")
            return value
        if type(value) is str:
            return content(value)
        if type(value) is bytes:
            return value
        if isinstance(value, (list, tuple)):
            return [walk(item, left - 1, budget) for item in value]
        if type(value) is dict:
            return {key(name): walk(item, left - 1, budget) for name, item in value.items()}
        raise FieldError(f"must hold plain values, not {type(value).__name__}")

    def check(value: object) -> dict[str, Any]:
        if type(value) is not dict:
            raise FieldError("must be a map")
        result: dict[str, Any] = walk(value, depth, [nodes])
        return result

    return check


def presentable(content: str, limit: int) -> str:
    """Text as :func:`short_text` accepts it: control characters become question marks, the rest is cut at ``limit``
    bytes.
    """
    content = _CONTROL_CHARACTERS.sub("?", content.encode(errors="replace").decode())
    return content.encode()[:limit].decode(errors="ignore")
