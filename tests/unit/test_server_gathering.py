"""When a batch of next tokens waits for who is expected, and for how long."""

from __future__ import annotations

import math

import pytest

from server_trunk.gathering import Gathering

BATCH = 0.010


@pytest.fixture
def gathering():
    gathering = Gathering()
    gathering.took(BATCH)
    return gathering


def decode(gathering: Gathering, session: str, gap: float, times: int = 4, began: float = 0.0) -> float:
    """It sends its next token ``gap`` seconds after each answer; returns the clock of the last answer."""
    clock = began
    for _ in range(times):
        gathering.answered(session, clock)
        clock += gap
        gathering.came(session, clock)
    gathering.answered(session, clock)
    return clock


def test_nobody_else_is_nobody_to_wait_for(gathering):
    clock = decode(gathering, "a", 0.004)
    gathering.came("a", clock + 0.004)
    assert gathering.until({"a"}, clock + 0.004) == -math.inf


def test_who_is_expected_before_half_a_batch_is_waited_for(gathering):
    clock = decode(gathering, "b", 0.006)
    gathering.came("a", clock + 0.002)
    assert gathering.until({"a"}, clock + 0.002) == pytest.approx(clock + 0.002 + BATCH / 2)


def test_the_more_are_here_the_less_they_wait(gathering):
    clock = decode(gathering, "e", 0.004)
    assert gathering.until({"a", "b", "c"}, clock) == -math.inf, "4 ms for a fourth, where 2.5 of a batch of 10 are worth it"
    assert gathering.until({"a"}, clock) == pytest.approx(clock + BATCH / 2)


def test_nobody_waits_for_one_behind_a_slow_link(gathering):
    clock = decode(gathering, "far", 0.080)
    assert gathering.until({"near"}, clock) == -math.inf


def test_who_has_decoded_once_is_not_known_yet(gathering):
    gathering.came("b", 0.0)
    gathering.answered("b", 0.010)
    gathering.came("a", 0.011)
    assert gathering.until({"a"}, 0.011) == -math.inf


def test_who_stays_away_is_waited_for_no_more(gathering):
    clock = decode(gathering, "b", 0.002)
    gathering.came("a", clock + 0.005)
    assert gathering.until({"a"}, clock + 0.005) == -math.inf


def test_who_is_gone_is_waited_for_no_more(gathering):
    clock = decode(gathering, "b", 0.002)
    gathering.forget("b")
    assert gathering.until({"a"}, clock) == -math.inf


def test_what_is_expected_follows_what_comes(gathering):
    clock = decode(gathering, "b", 0.080)
    clock = decode(gathering, "b", 0.002, times=24, began=clock)
    assert gathering.until({"a"}, clock) == pytest.approx(clock + BATCH / 2)


def test_where_most_are_expected_half_of_them_are_waited_for(gathering):
    """Batches that follow one another without a pause: what counts is how many each serves."""
    for session in "bcdefg":
        decode(gathering, session, 0.009)
    clock = 4 * 0.009
    gathering.came("h", clock)
    assert gathering.until({"a", "h"}, clock) == pytest.approx(clock + BATCH / 2)
    assert gathering.until({"a", "h", "b", "c", "d", "e"}, clock) == -math.inf
