"""Rounds over replicas: whoever sits where, there is one average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.test_equality import LOSS, TRUNK, WEIGHTS, fraction_of, snapshot
from tests.replicas import Replicas, serving
from tests.rounds_world import Reference, Trainer, batch
from tests.world import side_by_side, tiny_llama

pytestmark = pytest.mark.slow

CLIENTS, STEPS = 3, 4


@pytest.mark.parametrize("sync", ["step", "2"])
def test_clients_of_two_replicas_get_one_average(tmp_path: Path, sync: str) -> None:
    (tmp_path / "run").mkdir()
    replicas = Replicas(
        tmp_path / "run", tiny_llama(tmp_path / "model"), 2, CLIENTS, sync=sync, round_steps=2, step_deadline=0, **TRUNK
    )

    def client(index: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer = Trainer(replicas, index)
        losses = [trainer.step(batch(index, number)) for number in range(STEPS)]
        trainer.split.wait_step()
        weights = trainer.weights
        trainer.split.close()
        return losses, weights

    with serving(replicas):
        results = side_by_side(CLIENTS, client)
    assert all(replicas.events("joined", replica) for replica in range(2)), "a replica had no clients"
    first, *others = (weights for _, weights in results)
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
        assert [losses[number] for losses, _ in results] == pytest.approx(reference.step(number, [0, 1, 2]), rel=LOSS)
        if number % 2:
            reference.average([0, 1, 2], [0, 1, 2])
    assert fraction_of(replicas.weights(), snapshot(reference.trunk), reference.start) <= WEIGHTS
    assert fraction_of(first, snapshot(reference.ends[0]), reference.ends_start) <= WEIGHTS
    assert max(float((first[name] - mean.detach()).abs().max()) for name, mean in snapshot(reference.ends[0]).items()) <= 1e-5
