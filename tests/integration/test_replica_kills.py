"""A server of several replicas and its clients, killed at random moments: the run ends as the undisturbed one, and by itself."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

from server_trunk.run_ledger import RunLedger
from server_trunk.server import load_run_trunk
from splitfl.checkpoint import checkpoint_steps, load_checkpoint, newest_checkpoint
from splitfl.packed_state import unpack_state
from tests.forks import Forked, splitfl
from tests.integration.test_commands import finish
from tests.integration.test_equality import TRUNK, assert_equal, fraction_of, snapshot, story_batches, train_central
from tests.integration.test_kills import short_text
from tests.integration.test_replicas import processes, train
from tests.replicas import Replicas
from tests.unit.channel_world import wait_until

CLIENTS, STEPS = 3, 20
KEPT = {"checkpoint_every": 1, "on_loss": "wait", "step_deadline": 0.0}
VICTIMS = ("replica 0", "replica 1", "client")


def ledger_of(directory: Path) -> list[tuple[int, dict[str, int]]]:
    """What the newest checkpoint says of every step: number, and counted targets by client."""
    return RunLedger.from_state(unpack_state(load_checkpoint(newest_checkpoint(directory))[2]["ledger"])).entries()


def wait_for_step(replicas: Replicas, step: int) -> None:
    """Until all have kept it."""
    log = replicas.out / "log.jsonl"
    wait_until(lambda: log.exists() and any(event["step"] >= step for event in replicas.events("checkpoint")), 120)


def check_disturbed(tmp_path: Path, data: Path, stories: str, number: int, **settings) -> Replicas:
    """Replica 1 gets signal ``number`` amid a run, which goes on from where it was and ends as the reference."""
    steps = 6
    batches = story_batches(data, CLIENTS, steps=steps)
    replicas = Replicas(tmp_path, stories, 2, CLIENTS, trainables="lora", **KEPT, **settings, **TRUNK)

    def disturb() -> None:
        wait_for_step(replicas, 1)
        os.kill(processes(replicas)[1], number)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    mine = train(replicas, batches)
    disturber.join()
    start, theirs = train_central(replicas, batches, "lora")
    assert_equal(mine, theirs, start)
    assert len(replicas.events("resumed")) == 1
    ledger = ledger_of(replicas.out)
    assert [step for step, _ in ledger] == list(range(steps))
    targets = [sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step) for step in batches]
    assert [sum(given.values()) for _, given in ledger] == targets
    return replicas


def test_a_replica_that_is_killed_changes_nothing(tmp_path, data, stories, monkeypatch):
    monkeypatch.setattr("client_ends.retrying._MOST", 0.5)  # seconds between attempts
    check_disturbed(tmp_path, data, stories, signal.SIGKILL)


@pytest.mark.slow
def test_a_replica_that_hangs_is_taken_for_dead_and_changes_nothing(tmp_path, data, stories, monkeypatch):
    monkeypatch.setattr("client_ends.retrying._MOST", 0.5)
    replicas = check_disturbed(tmp_path, data, stories, signal.SIGSTOP, silence=3)
    said = [event["error"] for event in replicas.events("failed")]
    assert said == ["process 1 of this server is gone (silent for 3 s), so this one ends too"]


class Killed(Replicas):
    """Two replicas and three clients, each a process."""

    def __init__(self, work: Path, model: str, text: Path, **settings) -> None:
        work.mkdir()
        plan = {"optimizer.steps": STEPS, "trainables": "full", **KEPT, **TRUNK, **settings}
        super().__init__(work, model, 2, CLIENTS, "--until-done", **plan)
        self.text = text
        self.clients: list[Forked] = []

    def run(self) -> None:
        self.start()
        self.clients = [self.client(index) for index in range(CLIENTS)]

    def client(self, index: int, *options: object) -> Forked:
        return splitfl(
            *("train", "--trunk", self.join, "--identity", self.keys[index], "--model", self.model, "--data", self.text),
            *("--device", "cpu", "--out", self.work / f"ends{index}", "--max-length", 64, "--batch-size", 2 + index),
            *("--evaluate", 0, "--seed", index, "--ends", "full", "--steps", STEPS, *options),
        )

    def kill(self, victim: str, index: int) -> None:
        if victim == "client":
            self.clients[index].kill()
            self.clients[index].communicate()
            kept = checkpoint_steps(self.work / f"ends{index}")
            self.clients[index] = self.client(index, *(["--resume"] if kept else []))
        else:
            os.kill(processes(self)[int(victim[-1])], signal.SIGKILL)

    def finish(self) -> None:
        """All end by themselves, and well."""
        try:
            for client in self.clients:
                code, _, err = finish(client, 240)
                assert code == 0, err
            assert self.process is not None
            assert self.process.wait(60) == 0
        finally:
            for client in self.clients:
                client.kill()
            self.stop()


@pytest.fixture(scope="module")
def text(tmp_path_factory, data) -> Path:
    return short_text(tmp_path_factory.mktemp("text"), data)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stories, text) -> Killed:
    run = Killed(tmp_path_factory.mktemp("undisturbed") / "run", stories, text)
    run.run()
    run.finish()
    return run


def assert_as_undisturbed(run: Killed, undisturbed: Killed) -> float:
    """Weights of all sides, and the ledger; returns the largest difference of any weight."""
    worst = 0.0
    for side in ("server", *(f"ends{client}" for client in range(CLIENTS))):
        mine, theirs = (load_checkpoint(newest_checkpoint(each.work / side)) for each in (run, undisturbed))
        assert mine[1]["step"] == theirs[1]["step"] == STEPS - 1
        worst = max(worst, *(float((mine[0][name] - theirs[0][name]).abs().max()) for name in theirs[0]))
        for name in theirs[0]:
            torch.testing.assert_close(mine[0][name], theirs[0][name], rtol=1e-5, atol=1e-5)
    assert ledger_of(run.out) == ledger_of(undisturbed.out)
    assert [step for step, _ in ledger_of(run.out)] == list(range(STEPS))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_killed_the_run_ends_as_the_undisturbed_one(tmp_path, stories, text, undisturbed, seed):
    moments = random.Random(seed)
    victim, index = VICTIMS[seed % 3], moments.randrange(CLIENTS)
    run = Killed(tmp_path / "run", stories, text)
    began = time.monotonic()
    run.run()
    try:
        step = moments.randrange(STEPS - 5)
        wait_for_step(run, step)
        time.sleep(moments.uniform(0, 0.2))
        run.kill(victim, index)
    finally:
        run.finish()
    worst = assert_as_undisturbed(run, undisturbed)
    who = f"client {index}" if victim == "client" else victim
    print(f"seed {seed:2}  {who:9}  after step {step:2}  {time.monotonic() - began:5.1f} s  largest difference {worst:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_replica_that_is_killed_while_all_start_again_changes_nothing(tmp_path, stories, text, undisturbed, seed):
    moments = random.Random(seed)
    run = Killed(tmp_path / "run", stories, text)
    run.run()
    try:
        wait_for_step(run, moments.randrange(STEPS - 5))
        before = processes(run)
        run.kill(f"replica {moments.randrange(2)}", 0)
        wait_until(lambda: len(processes(run)) == 2 and not set(before.values()) & set(processes(run).values()), 120)
        time.sleep(moments.uniform(0, 10))  # it joins the other, loads, opens its endpoint, serves
        run.kill(f"replica {moments.randrange(2)}", 0)
    finally:
        run.finish()
    assert_as_undisturbed(run, undisturbed)


def losses(run: Killed) -> list[list[float]]:
    """Of each client, its own steps', each as it was made last."""
    found = []
    for client in range(CLIENTS):
        events = map(json.loads, (run.work / f"ends{client}" / "log.jsonl").read_text().splitlines())
        found.append(list({event["step"]: event["loss"] for event in events if event["event"] == "step"}.values()))
    return found


def assert_trained_alike(run: Killed, undisturbed: Killed) -> None:
    """The last losses of each client are those of the undisturbed run, within what they vary there from step to step."""
    for mine, theirs in zip(losses(run), losses(undisturbed), strict=True):
        noise = statistics.stdev(theirs[-10:])
        assert abs(statistics.fmean(mine[-5:]) - statistics.fmean(theirs[-5:])) <= noise, (mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
def test_at_any_moment_anybody_may_die(tmp_path, stories, text, undisturbed, seed):
    """Between two checkpoints, and (every other seed) before the first. Who goes back together makes the same steps again.

    A client that comes back with older ends, or new ones, has lost what it had learned since; the trunk counts nothing twice.
    """
    moments = random.Random(f"any {seed}")
    victim, index = VICTIMS[seed % 3], moments.randrange(CLIENTS)
    run = Killed(tmp_path / "run", stories, text, checkpoint_every=6)
    run.run()
    try:
        step = moments.randrange(5) if seed % 2 else moments.randrange(6, STEPS - 5)
        log = run.out / "log.jsonl"
        wait_until(lambda: log.exists() and any(event["step"] >= step for event in run.events("step")), 240)
        time.sleep(moments.uniform(0, 0.2))
        run.kill(victim, index)
    finally:
        run.finish()
    assert [step for step, _ in ledger_of(run.out)] == list(range(STEPS))
    assert all(len(given) == CLIENTS for _, given in ledger_of(run.out))
    if victim != "client":
        assert_as_undisturbed(run, undisturbed)
    assert_trained_alike(run, undisturbed)


@pytest.fixture(scope="module")
def apart(tmp_path_factory, stories, text) -> Killed:
    run = Killed(tmp_path_factory.mktemp("apart") / "run", stories, text, sync="4")
    run.run()
    run.finish()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS[:2])
def test_replicas_that_meet_now_and_then_go_on_from_where_they_met(tmp_path, stories, text, apart, victim):
    """Optimizer state in a checkpoint is rank 0's, so weights differ from there on; what was trained on does not."""
    run = Killed(tmp_path / "run", stories, text, sync="4")
    run.run()
    try:
        wait_for_step(run, 7)
        run.kill(victim, 0)
    finally:
        run.finish()
    ledger = ledger_of(run.out)
    assert ledger == ledger_of(apart.out)
    assert [step for step, _ in ledger] == list(range(STEPS))
    assert [step for step, given in ledger if given] == [3, 7, 11, 15, 19]
    assert all(sorted(given) == ["client0", "client1", "client2"] for _, given in ledger if given)
    assert len(run.events("resumed")) == 1
    start = snapshot(load_run_trunk(run.config, torch.device("cpu")))
    assert fraction_of(run.weights(), apart.weights(), start) < 0.5
    assert_trained_alike(run, apart)
