"""What is told of an answer while it is written."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Piece", "TokenScore"]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token, its log-probability (None: of the first of all, which nothing says), and the likeliest ones with theirs."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one choice. ``finish``: why it ends with this piece, ``stop`` or ``length``; None: it does not."""

    choice: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    finish: str | None = None
    tokens: int = 0  # that were written for it
