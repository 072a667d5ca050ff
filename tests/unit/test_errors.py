"""What is told of errors that others raise."""

from __future__ import annotations

import pytest

from splitfl.errors import first_line, in_one_line, kind_and_line


@pytest.mark.parametrize(
    ("said", "first", "whole"),
    [
        ("too large", "too large", "too large"),
        ("\n  not valid:\n\n    the  heads do not divide\n", "not valid:", "not valid: the heads do not divide"),
        (" \n", "ValueError", "ValueError"),
        ("x" * 400, "x" * 300, "x" * 300),
    ],
)
def test_an_error_is_said_in_a_line(said: str, first: str, whole: str) -> None:
    error = ValueError(said)
    assert (first_line(error), in_one_line(error)) == (first, whole)
    assert kind_and_line(error) == ("ValueError" if first == "ValueError" else f"ValueError: {first}")
