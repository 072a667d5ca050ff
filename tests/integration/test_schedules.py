"""However the trunk's work is scheduled, cut, laid out, kept or computed again, the same training comes out, dropout included."""

from __future__ import annotations

import pytest

from server_trunk.server import load_run_trunk
from tests.integration.test_equality import TRUNK, WEIGHTS, fraction_of, snapshot, story_batches, train_split
from tests.world import World

CLIENTS, STEPS = 3, 6

#: With dropout on the adapters: equal masks, or nothing is equal.
COMMON = TRUNK | {"trainables": "lora", "lora.dropout": 0.2}

SCHEDULES = [
    {"policy": "serial"},
    {"graphs": "recompute"},
    {"graph_tokens": 64},
    {"batch_tokens": 1},
    {"batch_wait": 0.02},
    {"layout": "padded", "lanes": 1},
    {"layout": "packed", "lanes": 2},
    {"layout": "padded", "lanes": 2, "graphs": "recompute", "policy": "serial"},
]


@pytest.fixture(scope="module")
def reference(data, stories, tmp_path_factory):
    """(first weights of the trunk, what training them came to, the losses), as scheduled by default."""
    work = tmp_path_factory.mktemp("reference")
    world = World(work, stories, CLIENTS, **COMMON)
    start = snapshot(load_run_trunk(world.server.config, world.server._device))
    return start, train_split(world, story_batches(data, CLIENTS, STEPS), "full")


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()))
def test_every_schedule_trains_the_same(tmp_path, data, stories, reference, settings):
    start, expected = reference
    world = World(tmp_path, stories, CLIENTS, **COMMON | settings)
    mine = train_split(world, story_batches(data, CLIENTS, STEPS), "full")
    for ours, theirs in zip(mine.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)
    assert fraction_of(mine.trunk, expected.trunk, start) <= WEIGHTS


def test_dropout_is_there(tmp_path, data, stories, reference):
    start, expected = reference
    world = World(tmp_path, stories, CLIENTS, **COMMON | {"lora.dropout": 0.0})
    other = train_split(world, story_batches(data, CLIENTS, STEPS), "full")
    assert fraction_of(other.trunk, expected.trunk, start) > 100 * WEIGHTS
