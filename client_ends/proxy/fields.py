"""The fields of a JSON body, taken one by one; what is left at the end is something that nobody honours, and is refused."""

from __future__ import annotations

import json
from typing import Any

from client_ends.proxy.problems import ApiError
from splitfl.errors import first_line

__all__ = ["Fields", "read_body"]


def read_body(raw: bytes) -> dict[str, Any]:
    """Raises ApiError."""

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON's")

    try:
        body = json.loads(raw, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        said = "too deeply nested" if isinstance(error, RecursionError) else first_line(error)
        raise ApiError(400, f"the body is not JSON: {said}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


class Fields:
    """A field that is null is as good as absent."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false", param=name)
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self._left.pop(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a whole number from {low} to {high}", param=name)
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        value = self._left.pop(name, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", param=name)
        return float(value)

    def only(self, name: str, *values: Any, why: str) -> None:
        """The field may say one of these, with which nothing changes."""
        value = self._left.pop(name, None)
        if value is not None and value not in values:
            raise ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")

    def end(self) -> None:
        """Raises ApiError where a field is left."""
        for name in self._left:
            shown = name if len(name) <= 60 else name[:60] + "…"
            raise ApiError(400, f"{shown} is not supported here: leave it out", param=shown, code="unsupported_parameter")
