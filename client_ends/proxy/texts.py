"""Tokens to text as they come: whole characters only, and nothing that a stop may yet take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["GrowingText", "StopFinder", "spell"]

#: Tokens before an answer that are decoded with it: whether it begins with a space, only they tell.
_CONTEXT = 6

_INCOMPLETE = "�"


class GrowingText:
    """The text of an answer, token by token. ``before``: the tokens that it follows."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_CONTEXT:])
        self._said = len(self._ids)  # of the ids: those whose text is out

    def add(self, token: int) -> str:
        """What can be said now; nothing amid a character."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._drop_old()
        return new

    def rest(self) -> str:
        """What is left when no token comes any more: of half a character, what it decodes to."""
        new = self._new()
        self._said = len(self._ids)
        return new

    def _new(self) -> str:
        before, now = self._decode(self._ids[: self._said]), self._decode(self._ids)
        # Not `now[len(before):]`: the last character before may have been half of one.
        return now[_alike(before, now) :]

    def _drop_old(self) -> None:
        # Cut only where the text is known to be whole.
        del self._ids[: self._said]
        self._said = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopFinder:
    """Text goes through, save what may be the beginning of a stop, until one is found. The stop itself is not given out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be given out."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, when no text comes any more."""
        text, self._held = self._held, ""
        return text


def _alike(first: str, second: str) -> int:
    """With how many characters both begin."""
    return next((place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), len(first))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` the stop begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def spell(tokenizer: Any, token: int, before: int | None = None) -> str:
    """One token as text, special ones too; behind ``before``, with its space."""

    def decode(*ids: int) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    if before is not None:
        both, first = decode(before, token), decode(before)
        if both.startswith(first):
            return both[len(first) :]
    return decode(token)
