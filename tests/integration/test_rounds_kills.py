"""Runs that average the clients' ends, in real processes that are killed and links that are cut: they end as undisturbed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.integration import test_kills as alone
from tests.integration import test_replica_kills as spread

pytestmark = pytest.mark.slow

ROUNDS = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory, data) -> Path:
    return alone.short_text(tmp_path_factory.mktemp("text"), data)


@pytest.fixture(scope="module")
def over_replicas(tmp_path_factory, stories, text) -> spread.Killed:
    run = spread.Killed(tmp_path_factory.mktemp("undisturbed") / "run", stories, text, round_steps=ROUNDS)
    run.run()
    run.finish()
    return run


@pytest.mark.parametrize(("victim", "step"), [("replica 0", 4), ("replica 1", 5), ("client", 7)])
def test_whoever_is_killed_all_ends_are_as_in_the_undisturbed_run(tmp_path, stories, text, over_replicas, victim, step):
    run = spread.Killed(tmp_path / "run", stories, text, round_steps=ROUNDS)
    run.run()
    try:
        spread.wait_for_step(run, step)
        run.kill(victim, 0)
    finally:
        run.finish()
    spread.assert_as_undisturbed(run, over_replicas)
    assert len(run.events("round")) >= spread.STEPS // ROUNDS


@pytest.fixture(scope="module")
def over_a_link(tmp_path_factory, stories, text) -> Path:
    run = alone.Killed(tmp_path_factory.mktemp("undisturbed"), stories, text, "--until-done", "--round-steps", ROUNDS)
    try:
        run.end([run.train(index) for index in range(2)])
    finally:
        run.close()
    return run.work


@pytest.mark.parametrize("seed", range(2))
def test_links_that_are_cut_amid_rounds_change_nothing(tmp_path, stories, text, over_a_link, seed):
    moments = random.Random(seed)
    run = alone.Killed(tmp_path / "run", stories, text, "--on-loss", "wait", "--until-done", "--round-steps", ROUNDS)
    try:
        clients = [run.train(index) for index in range(2)]
        for begin, end in ((1, 6), (8, 12), (14, 18)):
            run.wait_for_step(moments.randrange(begin, end))
            time.sleep(moments.uniform(0, 0.1))
            run.cut()
        run.end(clients, 180)
    finally:
        run.close()
    alone.assert_as_undisturbed(run.work, over_a_link)
