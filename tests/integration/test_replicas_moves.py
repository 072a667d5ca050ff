"""A client that is moved from one replica to another between two steps: nothing of the training changes."""

from __future__ import annotations

import threading

import pytest
import torch

from server_trunk.replicas.assignment import REST
from tests.integration.test_client_adapters import ASKED, SETTINGS, worst
from tests.integration.test_equality import (
    LOSS,
    TRUNK,
    WEIGHTS,
    Outcome,
    assert_equal,
    fraction_of,
    story_batches,
    train_central,
)
from tests.integration.test_replicas_adapters import kept
from tests.replicas import Replicas, UntilMoved, serving
from tests.trainer import Trainer
from tests.world import World, running, side_by_side

CLIENTS, MOST = 4, 300
ORDER = (1, 0, 3, 2)  # of arrival: both heavy ones are on the first replica


def uneven_batches(data):
    """Clients 1 and 3 bring much, 0 and 2 little."""
    steps = story_batches(data, CLIENTS, steps=20)
    return [
        [{key: value[:2] if index % 2 else value[:1, :12] for key, value in batch.items()} for index, batch in enumerate(step)]
        for step in steps
    ]


@pytest.mark.slow  # moves among random words are under test in test_replicas_steps.py
@pytest.mark.parametrize("on_loss", ["drop", "wait"])
def test_heavy_clients_on_one_replica_are_spread_and_the_training_is_the_same(tmp_path, data, stories, on_loss):
    batches = uneven_batches(data)
    replicas = Replicas(tmp_path, stories, 2, CLIENTS, on_loss=on_loss, **TRUNK)
    until = UntilMoved(replicas, CLIENTS)

    def client(index: int):
        trainer = trainers[index]
        losses = [trainer.step(batches[step % len(batches)][index]) for step in until.steps(index)]
        trainer.end()
        return losses, trainer.weights

    with serving(replicas):
        trainers = {index: Trainer(replicas, index) for index in ORDER}
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


@pytest.mark.slow
def test_an_adapter_moves_along_with_its_client(tmp_path, data, stories):
    batches = uneven_batches(data)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    settings = SETTINGS | {"optimizer.steps": MOST}
    many = Replicas(tmp_path / "many", stories, 2, CLIENTS, checkpoint_every=3, **settings)
    one = World(tmp_path / "one", stories, CLIENTS, **settings)
    until, mine = UntilMoved(many, CLIENTS), []

    def train(split, index: int, steps):
        losses = []
        for step in steps:
            loss = split.train()(**batches[step % len(batches)][index]).loss
            loss.backward()
            split.step()
            losses.append(float(loss.detach()))
        split.wait_step()
        split.close()
        return losses

    for server in (many, one):
        with serving(many) if server is many else running(one):
            splits = {index: server.join_as(index, adapter=ASKED[index % 3]) for index in ORDER}
            for split in splits.values():
                split.requires_grad_(False)
            steps = [until.steps(index) if server is many else range(len(mine[index])) for index in range(CLIENTS)]
            found = side_by_side(CLIENTS, lambda index, s=splits, n=steps: train(s[index], index, n[index]))
        if server is many:
            mine = found
    assert len(many.events("moved")) == 1
    assert many.events("moved")[0]["after"] % 3 == 2
    assert len(many.events("joined", 1)) == 3
    for ours, theirs in zip(mine, found, strict=True):
        assert worst(ours, theirs) <= LOSS
    for client, weights in kept(many.out).items():
        theirs = kept(one.config.out_dir)[client]
        start = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        assert fraction_of(weights, theirs, start) <= WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"reconnect": 0}])
def test_who_dials_the_replica_that_it_was_moved_from_takes_part_there_and_is_sent_there_from_then_on(
    tmp_path, data, stories, options
):
    batch = uneven_batches(data)[0]
    replicas = Replicas(tmp_path, stories, 2, CLIENTS, on_loss="wait", step_deadline=0, **TRUNK)
    over = threading.Event()

    def sessions(kind: str, client: str) -> int:
        """Of the second replica."""
        return [event["client"] for event in replicas.events(kind, 1)].count(client)

    def is_first_moved(client: str) -> bool:
        return [event["client"] for event in replicas.events("moved", 1)][:1] == [client]

    def train(index: int) -> None:
        trainer, name = trainers[index], f"client{index}"
        while not is_first_moved(name) and not over.is_set():
            trainer.step(batch[index])
        trainer.step(batch[index])
        trainer.end()
        if is_first_moved(name):
            goes_back(index)

    def goes_back(index: int) -> None:
        """First by dialling that replica itself."""
        front, name = replicas.join, f"client{index}"
        (serves,) = replicas.events("serving", 1)
        try:
            for join in (serves["join"], front):
                replicas.join = join
                trainer = Trainer(replicas, index, **options)
                for _ in range(3):
                    trainer.step(batch[index])
                trainer.end()
        finally:
            over.set()
        sent_on = 0 if options else 1
        assert (sessions("moved", name), sessions("joined", name)) == (1 + sent_on, 3 + sent_on)
        assert [name in event["parts"] for event in replicas.events("step", 1)].count(True) >= REST + 6

    with serving(replicas):
        trainers = {index: Trainer(replicas, index) for index in range(CLIENTS)}  # both heavy ones are on the second replica
        side_by_side(CLIENTS, train)
