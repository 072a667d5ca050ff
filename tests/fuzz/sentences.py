"""What a refusal says is short, and cannot act on a terminal."""

from __future__ import annotations

__all__ = ["check_sentence"]


def check_sentence(error: Exception) -> None:
    text = str(error)
    assert text
    assert len(text) < 500, "a peer makes us write at length"
    assert text.isprintable(), "a peer writes to our terminal"
