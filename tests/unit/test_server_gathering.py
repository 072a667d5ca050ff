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


def decode(gathering: Gathering, session: str, gap: float, times: int = 4, began: float = 0.0, sequence: int = 0) -> float:
    """It sends its next token ``gap`` seconds after each answer; returns the clock of the last answer."""
    clock = began
    for _ in range(times):
        gathering.answered(session, sequence, clock)
        clock += gap
        gathering.came(session, {sequence}, clock)
    gathering.answered(session, sequence, clock)
    return clock


def test_nobody_else_is_nobody_to_wait_for(gathering):
    clock = decode(gathering, "a", 0.004)
    gathering.came("a", {0}, clock + 0.004)
    assert gathering.until(1, clock + 0.004) == -math.inf


def test_who_is_expected_before_half_a_batch_is_waited_for(gathering):
    clock = decode(gathering, "b", 0.006)
    gathering.came("a", {0}, clock + 0.002)
    assert gathering.until(1, clock + 0.002) == pytest.approx(clock + 0.002 + BATCH / 2)


def test_the_more_are_here_the_less_they_wait(gathering):
    clock = decode(gathering, "e", 0.004)
    assert gathering.until(3, clock) == -math.inf, "4 ms for a fourth, where 2.5 of a batch of 10 are worth it"
    assert gathering.until(1, clock) == pytest.approx(clock + BATCH / 2)


def test_nobody_waits_for_one_behind_a_slow_link(gathering):
    clock = decode(gathering, "far", 0.080)
    assert gathering.until(1, clock) == -math.inf


def test_who_has_decoded_once_is_not_known_yet(gathering):
    gathering.came("b", {0}, 0.0)
    gathering.answered("b", 0, 0.010)
    gathering.came("a", {0}, 0.011)
    assert gathering.until(1, 0.011) == -math.inf


def test_who_stays_away_is_waited_for_no_more(gathering):
    clock = decode(gathering, "b", 0.002)
    gathering.came("a", {0}, clock + 0.005)
    assert gathering.until(1, clock + 0.005) == -math.inf


def test_who_is_gone_is_waited_for_no_more(gathering):
    clock = decode(gathering, "b", 0.002)
    gathering.forget("b")
    assert gathering.until(1, clock) == -math.inf


def test_what_is_expected_follows_what_comes(gathering):
    clock = decode(gathering, "b", 0.080)
    clock = decode(gathering, "b", 0.002, times=24, began=clock)
    assert gathering.until(1, clock) == pytest.approx(clock + BATCH / 2)


def test_where_most_are_expected_half_of_them_are_waited_for(gathering):
    """Batches that follow one another without a pause: what counts is how many each serves."""
    for session in "bcdefg":
        decode(gathering, session, 0.009)
    clock = 4 * 0.009
    gathering.came("h", {0}, clock)
    assert gathering.until(2, clock) == pytest.approx(clock + BATCH / 2)
    for session in "bcde":
        gathering.came(session, {0}, clock)
    assert gathering.until(6, clock) == -math.inf


@pytest.mark.parametrize(("pause", "is_prompt"), [(60.0, True), (60.0, False), (0.5, True)])
def test_a_pause_before_what_is_asked_next_says_nothing_of_the_next_token(gathering, pause, is_prompt):
    """As a person makes it in a chat, whose next words may be few."""
    clock = decode(gathering, "b", 0.004) + pause
    gathering.came("b", {0}, clock, is_prompt=is_prompt)
    gathering.answered("b", 0, clock)
    assert gathering.until(1, clock) == pytest.approx(clock + BATCH / 2)


def test_each_that_a_session_decodes_at_a_time_is_expected(gathering):
    """As a proxy does: one is here, and two of its own are awaited."""
    for sequence in (1, 2, 3):
        decode(gathering, "proxy", 0.009, sequence=sequence)
    clock = 4 * 0.009
    gathering.came("proxy", {1}, clock)
    assert gathering.until(1, clock) == pytest.approx(clock + BATCH / 2), "9 ms are too long for one, not for most"
    gathering.came("proxy", {2}, clock)
    assert gathering.until(2, clock) == -math.inf


def test_beams_that_change_places_are_the_same_forward(gathering):
    gathering.answered("a", 1, 0.0)
    gathering.came("a", {2, 1, 3}, 0.004)
    assert gathering.until(1, 0.004) == -math.inf, "it waits for itself"


def test_nothing_is_expected_behind_what_is_released(gathering):
    clock = decode(gathering, "b", 0.004)
    gathering.release("b", (0, 7))
    gathering.release("nobody", (0,))
    assert gathering.until(1, clock) == -math.inf


def test_what_is_kept_in_mind_of_a_session_is_bounded(gathering):
    for sequence in range(1000):
        gathering.answered("b", sequence, sequence / 1000)
    assert list(gathering._answered["b"]) == list(range(744, 1000))


def test_what_is_neither_awaited_nor_learnt_from_is_kept_in_mind_no_more(gathering):
    clock = decode(gathering, "idle", 0.004)
    gathering.answered("new", 0, clock)
    gathering.answered("new", 1, clock + 1.0)
    gathering.until(1, clock + 1.9)
    assert [list(own) for own in gathering._answered.values()] == [[0], [0, 1]]
    gathering.until(1, clock + 2.0)
    assert [list(own) for own in gathering._answered.values()] == [[], [1]]
