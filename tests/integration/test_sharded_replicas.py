"""Replicas whose trunks lie on two ranks each, four real processes: the same training as one process."""

from __future__ import annotations

import pytest

from tests.integration.test_equality import TRUNK, assert_equal, fraction_of, story_batches, train_central
from tests.integration.test_replicas import CLIENTS, check_killed, federated, train
from tests.replicas import Replicas

SHARDS = [(shard, trunk) for shard in ("tensor", "fsdp") for trunk in ("lora", "full")]


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "trunk"), SHARDS)
def test_gradients_summed_over_replicas_of_two_ranks_equal_central_training(tmp_path, data, stories, shard, trunk):
    batches = story_batches(data, 3, steps=8)
    replicas = Replicas(tmp_path, stories, 2, 3, trainables=trunk, shard=shard, shard_size=2, **TRUNK)
    mine = train(replicas, batches)
    start, theirs = train_central(replicas, batches, "lora")
    assert_equal(mine, theirs, start)
    assert sorted(len(replicas.events("joined", replica)) for replica in range(2)) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["tensor", "fsdp"])
def test_weights_averaged_over_replicas_of_two_ranks_equal_federated_averaging(tmp_path, data, stories, shard):
    batches = story_batches(data, CLIENTS, steps=7)
    plan = {"sync": "3", "trainables": "full", "optimizer.steps": 7}
    replicas = Replicas(tmp_path, stories, 2, CLIENTS, shard=shard, shard_size=2, **plan, **TRUNK)
    mine = train(replicas, batches)
    seats = [[int(event["client"][-1]) for event in replicas.events("joined", replica)] for replica in range(2)]
    start, theirs = federated(replicas, batches, seats, 3)
    for ours, reference in zip(mine.losses, theirs.losses, strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)
    # Tensor-parallel sums round otherwise, and AdamW's first steps make the most of it.
    pairs = zip([mine.trunk, *mine.ends], [theirs.trunk, *theirs.ends], [start.trunk, *start.ends], strict=True)
    assert max(fraction_of(*each) for each in pairs) <= 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 2])
def test_a_rank_that_is_killed_costs_no_step_and_no_client(tmp_path, data, stories, killed):
    """The first replica's second rank, the second replica's leader."""
    check_killed(tmp_path, data, stories, killed, shard="tensor", shard_size=2)
