"""Replicas in real processes: the same training as one server, whoever sits where."""

from __future__ import annotations

import pytest
import torch

from client_ends.train import prepare_ends
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings
from splitfl.optimizer import build_optimizer
from tests.integration.test_equality import ENDS, TRUNK, Outcome, assert_equal, snapshot, story_batches, train_central
from tests.replicas import Replicas, serving
from tests.world import side_by_side

CLIENTS, STEPS = 5, 12


def train(replicas: Replicas, batches, ends: str = "lora") -> Outcome:
    """Plain loops, a thread a client."""

    def client(index: int):
        split = replicas.join_as(index)
        model = prepare_ends(split, ends, LoraSettings(), seed=0)
        model.train()
        parameters = list(named_trainables(model).values())
        optimizer = build_optimizer(parameters, ENDS)
        losses = []
        for step in batches:
            loss = model(**step[index]).loss
            loss.backward()
            losses.append(float(loss.detach()))
            torch.nn.utils.clip_grad_norm_(parameters, ENDS.clip)
            optimizer.step()
            optimizer.zero_grad()
        split.wait_step()
        split.close()
        return losses, snapshot(model)

    with serving(replicas):
        results = side_by_side(len(replicas.keys), client)
    losses = [list(step) for step in zip(*(own for own, _ in results), strict=True)]
    return Outcome(losses, replicas.weights(), [weights for _, weights in results])


@pytest.mark.parametrize(
    ("count", "trunk"),
    [(2, "lora"), pytest.param(2, "full", marks=pytest.mark.slow), pytest.param(4, "full", marks=pytest.mark.slow)],
)
def test_gradients_summed_at_every_step_equal_central_training(tmp_path, data, stories, count, trunk):
    batches = story_batches(data, CLIENTS, steps=STEPS)
    replicas = Replicas(tmp_path, stories, count, CLIENTS, trainables=trunk, **TRUNK)
    mine = train(replicas, batches)
    start, theirs = train_central(replicas, batches, "lora")
    assert_equal(mine, theirs, start)
    targets = [sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step) for step in batches]
    joined = [len(replicas.events("joined", replica)) for replica in range(count)]
    assert sum(joined) == CLIENTS
    assert all(joined)
    for replica in range(count):
        assert [event["targets"] for event in replicas.events("step", replica)] == targets
