"""The crowd benchmark's arithmetic, and that a small crowd is served without an error."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.crowd import TOKENS, Served, jain, measure, slope, summary


def test_jain_is_one_among_equals_and_falls_to_one_in_n():
    assert jain([5, 5, 5, 5]) == 1
    assert jain([1, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 0
    assert jain([4, 2]) == pytest.approx(36 / 40)


def test_slope_is_that_of_a_line():
    assert slope([(x, 3 * x + 1) for x in range(10)]) == pytest.approx(3)
    assert slope([(1.0, 2.0)]) == 0


def test_a_summary_names_the_worst_served_and_counts_errors():
    found = summary([Served(10, 1), Served(20, 2), Served(30, 3, ["lost"])], seconds=2.0)
    assert (found["worst_share"], found["best_share"], found["errors"], found["steps"]) == (0.5, 1.5, 1, 1)
    assert found["tokens_per_second"] == 30


@pytest.mark.slow
def test_a_small_crowd_is_served(tmp_path):
    found = measure(argparse.Namespace(clients=5, seconds=1.5, processes=1, batch_tokens=3 * TOKENS))
    assert found["errors"] == 0
    assert found["refused_or_lost"] == {}
    assert found["steps_made"] > 0
    assert found["steps"]["bytes_received"] > 0
    assert found["evaluate"]["tokens_per_second"] > 0
    assert 1 <= found["evaluate"]["members_of_a_batch"] <= 3
