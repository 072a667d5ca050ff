"""Replicas in real processes: the same training as one server, whoever sits where."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import psutil
import pytest
import torch

from benchmarks.central import Central, count_targets
from client_ends.settings import TrainSettings
from client_ends.train import prepare_ends
from client_ends.train import train as train_ends
from server_trunk.run_ledger import RunLedger
from server_trunk.server import load_run_trunk
from splitfl.checkpoint import checkpoint_directory, load_checkpoint
from splitfl.config import LoraSettings
from splitfl.packed_state import unpack_state
from splitfl.parts.loading import load_ends
from tests.integration.test_equality import TRUNK, Outcome, assert_equal, story_batches, train_central
from tests.replicas import Replicas, serving
from tests.rounds_world import average_trunks
from tests.trainer import ENDS, snapshot, train_all
from tests.unit.channel_world import wait_until

CLIENTS, STEPS = 5, 12


def train(replicas: Replicas, batches, ends: str = "lora") -> Outcome:
    """Plain loops, a thread a client."""
    with serving(replicas):
        losses, weights = train_all(replicas, batches, ends)
    return Outcome(losses, replicas.weights(), weights)


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


def federated(replicas: Replicas, batches, seats: list[list[int]], every: int) -> tuple[Outcome, Outcome]:
    """FedAvg as it stands in the paper: each replica trains with the clients that sit there; every so many steps their trunks
    are averaged, weighted by target tokens.
    """
    config = replicas.config
    trunks = [load_run_trunk(config, torch.device("cpu")) for _ in seats]
    parts = {
        client: prepare_ends(load_ends(replicas.model, config.cut), "lora", LoraSettings(), seed=0) for client in range(CLIENTS)
    }
    start = Outcome([], snapshot(trunks[0]), [snapshot(parts[client]) for client in range(CLIENTS)])
    centrals = [
        Central(trunk, [parts[client] for client in seat], config.optimizer, ENDS)
        for trunk, seat in zip(trunks, seats, strict=True)
    ]
    losses = []
    counted = [0] * len(seats)
    for number, step in enumerate(batches):
        found = {}
        for replica, seat in enumerate(seats):
            mine = [step[client] for client in seat]
            found |= dict(zip(seat, centrals[replica].step(mine), strict=True))
            counted[replica] += sum(count_targets(batch) for batch in mine)
        losses.append([found[client] for client in range(CLIENTS)])
        if (number + 1) % every == 0 or number + 1 == len(batches):
            average_trunks(trunks, counted)
            counted = [0] * len(seats)
    return start, Outcome(losses, snapshot(trunks[0]), [snapshot(parts[client]) for client in range(CLIENTS)])


@pytest.mark.parametrize(
    ("count", "every"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (2, 5),
        pytest.param(4, 3, marks=pytest.mark.slow),
        pytest.param(2, 100, marks=pytest.mark.slow),
    ],
)
def test_weights_averaged_now_and_then_equal_federated_averaging(tmp_path, data, stories, count, every):
    batches = story_batches(data, CLIENTS, steps=STEPS)
    settings = {"sync": str(every), "trainables": "full", "checkpoint_every": 4}
    if every < STEPS:
        settings["optimizer.steps"] = STEPS  # else they meet for the first time when the server stops
    replicas = Replicas(tmp_path, stories, count, CLIENTS, **settings, **TRUNK)
    mine = train(replicas, batches)
    seats = [[int(event["client"][-1]) for event in replicas.events("joined", replica)] for replica in range(count)]
    start, theirs = federated(replicas, batches, seats, every)
    assert_equal(mine, theirs, start)
    kept = [event["step"] for event in replicas.events("checkpoint")]
    assert kept[-1] == STEPS - 1
    assert all((step + 1) % every == 0 for step in kept[:-1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sync", "0"], "must be step, or a number of steps"),
        (["--adapters", "per-client", "--sync", "2"], "leave it at step"),
        (["--authorized-clients", "nowhere"], "does not exist"),
        pytest.param(["--cut", "9:9"], "cut", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_starts_again(tmp_path, stories, flags, said):
    replicas = Replicas(tmp_path, stories, 2, 1)
    replicas._flags = tuple(flags)
    with pytest.raises(AssertionError, match="no join string"):
        replicas.start()
    assert replicas.stop() == 2
    sentences = [line for line in (tmp_path / "stderr").read_text().splitlines() if not line.startswith("loading")]
    assert len(sentences) == 1, sentences
    assert said in sentences[0]


def settings(replicas: Replicas, data, client: int, **options) -> TrainSettings:
    return TrainSettings(
        trunk=replicas.join,
        identity=str(replicas.keys[client]),
        data=str(data / "text" / "tinyshakespeare" / "input.txt"),
        model=replicas.model,
        max_length=32,
        batch_size=2,
        evaluate=0,
        seed=client,
        device="cpu",
        ends="full",
        out=str(replicas.work / f"ends{client}"),
        **options,
    )


def processes(replicas: Replicas) -> dict[int, int]:
    """The replicas' process ids by rank."""
    assert replicas.process is not None
    found = {}
    for child in psutil.Process(replicas.process.pid).children():
        with contextlib.suppress(psutil.Error, KeyError):  # gone, or about to become a replica
            found[int(child.environ()["RANK"])] = child.pid
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_replica_that_is_killed_costs_no_step_and_no_client(tmp_path, data, stories, killed):
    check_killed(tmp_path, data, stories, killed)


def check_killed(tmp_path, data, stories, killed: int, **spread) -> None:
    """One run that nothing happens to, one in which the process of rank ``killed`` is killed: the same training."""
    steps, clients = 30, 3
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    ends = []
    for work in (whole, broken):
        work.mkdir()
        plan = {"optimizer.steps": steps, "checkpoint_every": 5, "on_loss": "wait", "trainables": "full"} | spread
        replicas = Replicas(work, stories, 2, clients, "--until-done", **plan, **TRUNK)
        with serving(replicas):
            runs = [
                threading.Thread(target=train_ends, args=(settings(replicas, data, client, reconnect=120.0),), daemon=True)
                for client in range(clients)
            ]
            for run in runs:
                run.start()
            if work is broken:
                wait_until(lambda replicas=replicas: any(event["step"] >= 12 for event in replicas.events("step")), 120)
                os.kill(processes(replicas)[killed], signal.SIGKILL)
            for run in runs:
                run.join(100)
                assert not run.is_alive(), (work / "stderr").read_text()[-4000:]
            assert replicas.process is not None
            assert replicas.process.wait(60) == 0
        _, _, extra = load_checkpoint(checkpoint_directory(replicas.out, steps - 1))
        ledger = RunLedger.from_state(unpack_state(extra["ledger"])).entries()
        assert [step for step, _ in ledger] == list(range(steps))
        assert all(sorted(given) == ["client0", "client1", "client2"] for _, given in ledger)
        ends.append(replicas.weights())
    for name, weights in ends[0].items():
        torch.testing.assert_close(ends[1][name], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_where_one_replica_is_asked_to_end_the_clients_of_all_wait_for_the_next_server(tmp_path, stories):
    """As on several machines, each of which ends its own."""
    replicas = Replicas(tmp_path, stories, 2, 2)
    with serving(replicas):
        sessions = [replicas.join_as(client, reconnect=0).trunk.session for client in range(2)]
        os.kill(processes(replicas)[1], signal.SIGTERM)
        wait_until(lambda: all(session._lost is not None for session in sessions), 60)
        assert [session._lost.code for session in sessions] == ["restarting", "restarting"]
        assert replicas.process is not None
        assert replicas.process.wait(60) == 0
