"""Adapters of clients over several replicas: as on one server, and each wherever its client goes."""

from __future__ import annotations

import pytest

from splitfl.checkpoint import checkpoint_directory, checkpoint_steps, client_directory, load_checkpoint, load_meta
from tests.integration.test_client_adapters import SETTINGS, train, worst
from tests.integration.test_equality import LOSS, WEIGHTS, fraction_of, story_batches
from tests.replicas import Replicas, serving
from tests.world import World, running, side_by_side

CLIENTS, STEPS, FIRST = 3, 8, 5


def kept(run):
    """Each client's adapter in the newest checkpoint, as the run names it."""
    named = load_meta(checkpoint_directory(run, checkpoint_steps(run)[-1]))["clients"]
    return {
        client: load_checkpoint(checkpoint_directory(client_directory(run, client), step))[0] for client, step in named.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 3])
def test_each_adapter_is_where_its_client_is_and_equals_that_of_one_server(tmp_path, data, stories, then):
    steps = story_batches(data, CLIENTS, steps=STEPS)
    own = [[step[client] for step in steps] for client in range(CLIENTS)]
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one = World(tmp_path / "one", stories, CLIENTS, **SETTINGS)
    start: dict = {}
    with running(one):
        losses = side_by_side(CLIENTS, lambda client: train(one, client, own[client], ends="frozen"))
    theirs = kept(one.config.out_dir)

    many = Replicas(tmp_path / "many", stories, 2, CLIENTS, checkpoint_every=2, **SETTINGS)
    with serving(many):
        mine = side_by_side(CLIENTS, lambda client: train(many, client, own[client][:FIRST], ends="frozen"))
    joined = [{event["client"] for event in many.events("joined", replica)} for replica in range(2)]
    assert all(joined)
    assert sorted(joined[0] | joined[1]) == ["client0", "client1", "client2"]
    assert not joined[0] & joined[1]
    for client, weights in kept(many.out).items():
        start[client] = {name: weight.clone() for name, weight in weights.items()}
    # Whoever was on another replica left its adapter there; each now finds it on one of its own, and asks for nothing.
    many.settings["replicas"], many._flags = then, ("--resume",)
    with serving(many):
        rest = side_by_side(CLIENTS, lambda client: train(many, client, own[client][FIRST:], ends="frozen", asked={}))
    now = [{event["client"] for event in many.events("joined", replica)[-CLIENTS:]} for replica in range(then)]
    assert now[0] | joined[0] != joined[0] if then == 1 else now[2]
    for client in range(CLIENTS):
        assert worst(mine[client] + rest[client], losses[client]) <= LOSS
        name = f"client{client}"
        assert fraction_of(kept(many.out)[name], theirs[name], start[name]) <= WEIGHTS
    assert [event["step"] for event in many.events("step")] == list(range(STEPS))
