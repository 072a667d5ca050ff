"""Rounds over replicas: whoever sits where, there is one average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.test_equality import LOSS, TRUNK, WEIGHTS, fraction_of
from tests.replicas import Replicas, serving
from tests.rounds_world import Reference, batches_of
from tests.trainer import snapshot, train_all
from tests.world import tiny_llama

pytestmark = pytest.mark.slow

CLIENTS, STEPS = 3, 4


@pytest.mark.parametrize("sync", ["step", "2"])
def test_clients_of_two_replicas_get_one_average(tmp_path: Path, sync: str) -> None:
    (tmp_path / "run").mkdir()
    replicas = Replicas(
        tmp_path / "run", tiny_llama(tmp_path / "model"), 2, CLIENTS, sync=sync, round_steps=2, step_deadline=0, **TRUNK
    )
    with serving(replicas):
        losses, weights = train_all(replicas, batches_of(CLIENTS, STEPS))
    assert all(replicas.events("joined", replica) for replica in range(2)), "a replica had no clients"
    first, *others = weights
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    rounds = [replicas.events("round", replica) for replica in range(2)]
    assert [event["targets"] for event in rounds[0]] == [event["targets"] for event in rounds[1]]
    for number, (here, there) in enumerate(zip(*rounds, strict=True)):
        assert here["step"] == there["step"] == 2 * number + 1
        assert sorted([*here["members"], *there["members"]]) == [f"client{index}" for index in range(CLIENTS)]
        assert sum([*here["members"].values(), *there["members"].values()]) == here["targets"]
    if sync != "step":
        return  # between meetings the trunk is another than the reference's
    reference = Reference(replicas)
    for number in range(STEPS):
        assert losses[number] == pytest.approx(reference.step(number, [0, 1, 2]), rel=LOSS)
        if number % 2:
            reference.average([0, 1, 2], [0, 1, 2])
    assert fraction_of(replicas.weights(), snapshot(reference.trunk), reference.start) <= WEIGHTS
    assert fraction_of(first, snapshot(reference.ends[0]), reference.ends_start) <= WEIGHTS
    assert max(float((first[name] - mean.detach()).abs().max()) for name, mean in snapshot(reference.ends[0]).items()) <= 1e-5
