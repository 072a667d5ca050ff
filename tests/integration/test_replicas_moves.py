"""A client that is moved from one replica to another between two steps: nothing of the training changes."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from client_ends.train import prepare_ends
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings
from splitfl.optimizer import build_optimizer
from tests.integration.test_equality import ENDS, TRUNK, Outcome, assert_equal, snapshot, story_batches, train_central
from tests.replicas import Replicas, serving
from tests.world import side_by_side

CLIENTS, MOST = 4, 300


def uneven_batches(data):
    """Clients 1 and 3 bring much, 0 and 2 little."""
    steps = story_batches(data, CLIENTS, steps=20)
    return [
        [{key: value[:2] if index % 2 else value[:1, :12] for key, value in batch.items()} for index, batch in enumerate(step)]
        for step in steps
    ]


@pytest.mark.parametrize("on_loss", ["drop", pytest.param("wait", marks=pytest.mark.slow)])
def test_heavy_clients_on_one_replica_are_spread_and_the_training_is_the_same(tmp_path, data, stories, on_loss):
    batches = uneven_batches(data)
    replicas = Replicas(tmp_path, stories, 2, CLIENTS, on_loss=on_loss, **TRUNK)
    last = [MOST]
    barrier = threading.Barrier(CLIENTS)

    def client(index: int):
        split = splits[index]
        model = prepare_ends(split, "lora", LoraSettings(), seed=0)
        model.train()
        parameters = list(named_trainables(model).values())
        optimizer = build_optimizer(parameters, ENDS)
        losses = []
        for step in itertools.count():
            barrier.wait(100)
            if index == 0 and step and last[0] == MOST and replicas.events("moved"):
                last[0] = step + 5
            barrier.wait(100)
            if step >= last[0]:
                break
            loss = model(**batches[step % len(batches)][index]).loss
            loss.backward()
            losses.append(float(loss.detach()))
            torch.nn.utils.clip_grad_norm_(parameters, ENDS.clip)
            optimizer.step()
            optimizer.zero_grad()
        split.wait_step()
        split.close()
        return losses, snapshot(model)

    with serving(replicas):
        # So both heavy ones are on the first replica.
        splits = {index: replicas.join_as(index) for index in (1, 0, 3, 2)}
        results = side_by_side(CLIENTS, client)
    moved = [event["client"] for event in replicas.events("moved")]
    assert len(moved) == 1
    assert moved[0] in ("client1", "client3")
    joined = [[event["client"] for event in replicas.events("joined", replica)] for replica in range(2)]
    assert joined == [["client1", "client3"], ["client0", "client2", *moved]]
    losses = [list(step) for step in zip(*(own for own, _ in results), strict=True)]
    mine = Outcome(losses, replicas.weights(), [weights for _, weights in results])
    start, theirs = train_central(replicas, [batches[step % len(batches)] for step in range(len(losses))], "lora")
    assert_equal(mine, theirs, start)
    assert all(event["targets"] == replicas.events("step", 1)[at]["targets"] for at, event in enumerate(replicas.events("step")))
