"""Servers and clients that start again: the run ends with the weights of the undisturbed one, and makes no step twice."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from client_ends.settings import TrainResult, TrainSettings
from client_ends.train import train
from server_trunk.ledger import Ledger
from server_trunk.run_ledger import RunLedger
from server_trunk.server import TrunkServer
from splitfl.channel.timing import Timing
from splitfl.checkpoint import load_checkpoint, newest_checkpoint, unpack_state
from splitfl.transport.memory import MemoryClientTransport, MemoryNetwork, MemoryServerTransport
from tests.integration.test_lost import wait_for
from tests.world import World, running

STEPS = 8
QUICK = Timing(heartbeat=0.05, flush=1.0, linger=0.0)


def settings(world: World, data: Path, client: int, **options: Any) -> TrainSettings:
    return TrainSettings(
        trunk=f"splitfl://{world.server.identity.public}@memory:1/{world.server.config.run}",
        identity=str(world.keys[client]),
        data=str(data / "text" / "tinyshakespeare" / "input.txt"),
        model=world.model,
        max_length=16,
        batch_size=2,
        accumulate=2,
        seed=client,
        evaluate=0,
        device="cpu",
        out=str(world.work / f"ends{client}"),
        **({"steps": STEPS, "ends": "full", "reconnect": 60.0} | options),
    )


def make(work: Path, model: str, **options: Any) -> World:
    work.mkdir(exist_ok=True)
    options = {"on_loss": "wait", "step_deadline": 0.0, "optimizer.learning_rate": 1e-3, "optimizer.eps": 1e-6, **options}
    return World(work, model, 2, trainables="full", timing=QUICK, **options)


class Client(threading.Thread):
    """One client's training; ``result`` or ``error`` once it has ended."""

    def __init__(self, world: World, data: Path, client: int, **options: Any) -> None:
        super().__init__(daemon=True)
        self.result: TrainResult | None = None
        self.error: BaseException | None = None
        self._world, self._settings = world, settings(world, data, client, **options)
        self.start()

    def run(self) -> None:
        try:
            transport = {"transport": lambda: MemoryClientTransport(self._world.network)}
            self.result = train(self._settings, channel_options=transport)
        except BaseException as error:
            self.error = error

    def end(self) -> TrainResult:
        self.join(60)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def crash_after(world: World, step: int) -> None:
    """The trunk fails once it has made ``step``, before that is kept or said."""
    keeper, made = world.server._keeper, world.server._keeper.made

    def crash(ledger: Ledger) -> bool:
        if ledger.step == step:
            raise RuntimeError("power cut")
        return made(ledger)

    keeper.made = crash


def kill(world: World) -> None:
    """Wait until the trunk has failed; then the server is gone without a last checkpoint, and without a word."""
    wait_for(lambda: world.server._loop.failure is not None, 60)
    world.server._engine.closed = None
    network, server = world.network, world.network.server
    network.server = None
    for link in list(server._links.values()):
        server.detach(link)
    world.server.stop()


def start_again(world: World) -> None:
    network = MemoryNetwork()
    config = dataclasses.replace(world.server.config)
    transport = MemoryServerTransport(network, world.server.identity)
    world.server = TrunkServer(config, resume=True, transport=transport, timing=QUICK)
    world.network = network
    world.server.start()


def made(world: World, step: int) -> bool:
    return any(event["step"] >= step for event in world.events("step"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(newest_checkpoint(directory))[0]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6), name


def ledger(world: World) -> list[tuple[int, dict[str, int]]]:
    files = load_checkpoint(newest_checkpoint(world.server.config.out_dir))[2]
    return RunLedger.from_state(unpack_state(files["ledger"])).entries()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data, stories) -> World:
    world = make(tmp_path_factory.mktemp("undisturbed"), stories)
    with running(world):
        for client in [Client(world, data, index) for index in range(2)]:
            client.end()
    return world


def assert_as_undisturbed(world: World, reference: World) -> None:
    assert_equal(weights(world.work / "server"), weights(reference.work / "server"))
    for client in range(2):
        assert_equal(weights(world.work / f"ends{client}"), weights(reference.work / f"ends{client}"))
    assert ledger(world) == ledger(reference)
    assert [step for step, _ in ledger(world)] == list(range(STEPS))


@pytest.mark.parametrize(("every", "after"), [(1, 3), (3, 4)])
def test_a_server_that_is_started_again_goes_on_with_clients_that_waited(tmp_path, data, stories, undisturbed, every, after):
    """With a checkpoint of every step nothing is made again but the open one; else all go back to the newest that all hold."""
    world = make(tmp_path / "run", stories, checkpoint_every=every)
    crash_after(world, after)
    world.server.start()
    clients = [Client(world, data, index) for index in range(2)]
    kill(world)
    start_again(world)
    results = [client.end() for client in clients]
    world.server.stop()
    assert [result.steps for result in results] == [STEPS, STEPS]
    # The log says that the step in which the trunk failed was made; nothing stands for it.
    first = after if every == 1 else 3
    assert [event["step"] for event in world.events("step")] == [*range(after + 1), *range(first, STEPS)]
    assert_as_undisturbed(world, undisturbed)
