"""A short soak, and whether the verdict on a long one would see what is wrong."""

from __future__ import annotations

import random

import pytest

from tests.soak.site import Life, Site
from tests.soak.slope import Slope
from tests.soak.soak import soak
from tests.soak.verdict import grown, growth, judge, steps_in_order, too_much


def test_a_leak_is_seen_and_a_warm_up_is_none():
    flat = [(float(at), 100.0) for at in range(100)]
    warm = [(at, value if at >= 25 else 3 * at) for at, value in flat]
    leak = [(at, value + at) for at, value in flat]
    assert growth(flat) == growth(warm) == 0
    assert growth(leak) == pytest.approx(35)
    assert growth([*leak[:30], *leak[70:]]) is None


def series(seconds: float, hourly: float, *, warm: float = 0.0, seed: int = 0) -> list[tuple[float, float]]:
    """A sample every 5 s of what grows so fast, under visits that take and give back some MiB, and a warm-up."""
    draw, visits, found = random.Random(seed), 0.0, []
    for number in range(int(seconds / 5)):
        visits = 0.9 * visits + draw.gauss(0.0, 1.0)
        at = 5.0 * number
        found.append((at, 200 + hourly * at / 3600 + visits + warm * min(1.0, 4 * at / seconds)))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_an_hour_tells_a_slow_leak_from_what_comes_and_goes(seed):
    flat, leak = grown(series(3600, 0.0, warm=40.0, seed=seed)), grown(series(3600, 16.0, warm=40.0, seed=seed))
    assert isinstance(flat, Slope)
    assert isinstance(leak, Slope)
    assert not too_much("crowd", {"heap_mib": flat})
    (said,) = too_much("crowd", {"heap_mib": leak})
    assert said.startswith(f"crowd: heap_mib grows by {leak.hourly:.1f} an hour")


def test_shorter_lives_are_judged_by_their_halves_and_the_shortest_not_at_all():
    assert grown(series(100, 0.0)) is None
    found = grown(series(600, 0.0))
    assert isinstance(found, float)
    assert too_much("server, life 0", {"rss_mib": 8.1, "threads": 4.0}) == ["server, life 0: rss_mib grew by 8.1"]
    assert not too_much("crowd", {"rss_mib": 100.0})


def steps(*numbers: int, begun: float = 0.0) -> list[dict]:
    return [{"event": "step", "step": number, "time": begun + place} for place, number in enumerate(numbers)]


def gap(lines: int, time: float) -> dict:
    return {"event": "log-gap", "lines": lines, "time": time}


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([*steps(0, 1, 2), *steps(2, 3, begun=10)], ""),
        ([*steps(0, 1, 2), *steps(3, 4, begun=10)], ""),
        ([*steps(0, 2), *steps(3, begun=10)], "not one after the other"),
        ([*steps(0, 1, 1), *steps(2, begun=10)], "not one after the other"),
        ([*steps(0, 1), *steps(3, begun=10)], "began with step 3, the one before ended with 1"),
        (steps(0, 1), "life 1 of the server made no step"),
        ([*steps(0, 1), gap(4, 2.0), *steps(5, 6, begun=3), *steps(7, begun=10)], ""),
        ([*steps(0, 1), gap(3, 2.0), *steps(6, begun=3), *steps(7, begun=10)], "not one after the other"),
        ([*steps(0, 1), gap(9, 2.0), *steps(3, 5, begun=3), *steps(6, begun=10)], "not one after the other"),
    ],
)
def test_steps_that_are_missing_or_made_twice_are_seen(events, problem):
    lives = [Life(1, 0.0, 9.0, -9), Life(2, 10.0, 20.0, 0)]
    found = steps_in_order(lives, events)
    assert ([problem] if problem else []) == [problem for each in found if problem in each]
    assert len(found) == bool(problem)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_soak(tmp_path):
    """All but what it takes an hour to see: a process's memory is judged from its fourth minute on."""
    site = Site(tmp_path / "soak", 0)
    has_small_disks = site.disks["server"].is_small
    try:
        record = soak(site, 2.0, 0, print)
    finally:
        site.close()
    problems, figures = judge(site, record)
    assert not problems
    assert figures["steps"] > 20
    assert sum(figures["faults"].values()) > 5
    assert ("disk full" in figures["faults"]) == has_small_disks
    assert bool(figures["no_room"]["server"]) == has_small_disks
