"""The rule by which a text may part from the whole model's: only where both tokens are as good as equal, and counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.divergences import Count, parted

#: A row's logits at each of two tokens behind a prompt of one: clear, then tokens 1 and 2 as good as equal.
CLEAR, TIED = [0.0, 3.0, 1.0, 0.0], [0.0, 2.0, 2.0 - 4e-6, 1.0]


def said(*rows: list[int], logits: tuple[list[float], ...] = (CLEAR, TIED)) -> SimpleNamespace:
    return SimpleNamespace(sequences=torch.tensor(rows), logits=[torch.tensor([each] * len(rows)) for each in logits])


def test_equal_texts_part_nowhere() -> None:
    count = Count()
    assert parted(said([7, 1, 1], [7, 1, 1]), said([7, 1, 1], [7, 1, 1]), count=count) == 0
    assert count.summary() == ["generate(): 2 texts compared, 0 excused divergence(s)"]


def test_a_tie_is_excused_and_counted() -> None:
    count = Count()
    assert parted(said([7, 1, 1], [7, 1, 1]), said([7, 1, 1], [7, 1, 2]), "a test", count) == 1
    assert count.summary() == [
        "generate(): 2 texts compared, 1 excused divergence(s)",
        "a test, row 1, token 1: the logits differ by 4.1e-06",
    ]


@pytest.mark.parametrize(
    ("found", "logits", "why"),
    [
        ([7, 2, 1], (CLEAR, TIED), "parts at token 0, where the best logit leads by 2.0"),
        ([7, 1, 3], (CLEAR, TIED), "parts at token 1, where the best logit leads by 1.0"),
        ([7, 1, 2], (CLEAR, [0.0, 2.0, 2.0 - 2e-5, 1.0]), "parts at token 1, where the best logit leads by 2.0e-05"),
        ([6, 1, 1], (CLEAR, TIED), "differs in its prompt"),
        ([7, 1, 1, 1], (CLEAR, TIED), "4 tokens long, not 3"),
    ],
)
def test_anything_else_is_a_failure(found: list[int], logits: tuple[list[float], ...], why: str) -> None:
    count = Count()
    with pytest.raises(AssertionError, match=why):
        parted(said([7, 1, 1], logits=logits), said(found), count=count)
    assert not count.excused


def test_a_draw_that_is_not_the_likeliest_is_no_tie() -> None:
    with pytest.raises(AssertionError, match=r"leads by 1\.0"):
        parted(said([7, 1, 3]), said([7, 1, 1]), count=Count())


def test_nothing_is_said_where_nothing_was_compared() -> None:
    assert Count().summary() == []
