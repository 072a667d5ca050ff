"""Servers and clients that start again: the run ends with the weights of the undisturbed one, and makes no step twice."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client_ends.settings import TrainResult, TrainSettings
from client_ends.train import train
from server_trunk.averaging import Averager
from server_trunk.ledger import Ledger
from server_trunk.run_ledger import RunLedger
from server_trunk.server import TrunkServer
from splitfl.channel.timing import Timing
from splitfl.checkpoint import checkpoint_directory, checkpoint_steps, load_checkpoint, newest_checkpoint
from splitfl.errors import CheckpointError, ConfigError, NotWritten, SessionLost
from splitfl.packed_state import unpack_state
from splitfl.protocol.keys import read_identity
from splitfl.transport.memory import MemoryClientTransport, MemoryNetwork, MemoryServerTransport
from tests.integration.test_lost import wait_for
from tests.world import World, running

STEPS = 8
QUICK = Timing(heartbeat=0.05, flush=1.0, linger=0.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory, data) -> Path:
    """A short text: what is read and tokenised takes longer than the training here."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text((data / "text" / "tinyshakespeare" / "input.txt").read_text()[:8000])
    return file


def settings(world: World, text: Path, client: int, **options: Any) -> TrainSettings:
    return TrainSettings(
        trunk=f"splitfl://{world.server.identity.public}@memory:1/{world.server.config.run}",
        identity=str(world.keys[client]),
        data=str(text),
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


def transport_of(world: World) -> dict[str, Any]:
    return {"transport": lambda: MemoryClientTransport(world.network), "timing": QUICK}


class Client(threading.Thread):
    """One client's training; ``result`` or ``error`` once it has ended."""

    def __init__(self, world: World, text: Path, client: int, **options: Any) -> None:
        super().__init__(daemon=True)
        self.result: TrainResult | None = None
        self.error: BaseException | None = None
        self._world, self._settings = world, settings(world, text, client, **options)
        self.start()

    def run(self) -> None:
        try:
            self.result = train(self._settings, channel_options=transport_of(self._world))
        except BaseException as error:
            self.error = error

    def end(self) -> TrainResult:
        self.join(60)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def before_it_is_kept(world: World, step: int, action: Callable[[], None]) -> None:
    """``action()`` comes when the trunk has made ``step``, before that is kept or said."""
    keeper, made = world.server._keeper, world.server._keeper.made

    def watched(ledger: Ledger) -> bool:
        if ledger.step == step:
            action()
        return made(ledger)

    keeper.made = watched


def crash_after(world: World, step: int) -> None:
    """The trunk fails once it has made ``step``."""

    def crash() -> None:
        raise RuntimeError("power cut")

    before_it_is_kept(world, step, crash)


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
    resume = bool(checkpoint_steps(config.out_dir))  # as --resume-if-any
    world.server = TrunkServer(config, resume=resume, transport=transport, timing=QUICK)
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
def undisturbed(tmp_path_factory, text, stories) -> World:
    world = make(tmp_path_factory.mktemp("undisturbed"), stories)
    with running(world):
        for client in [Client(world, text, index) for index in range(2)]:
            client.end()
    return world


def assert_as_undisturbed(world: World, reference: World) -> None:
    assert_equal(weights(world.work / "server"), weights(reference.work / "server"))
    for client in range(2):
        assert_equal(weights(world.work / f"ends{client}"), weights(reference.work / f"ends{client}"))
    assert ledger(world) == ledger(reference)
    assert [step for step, _ in ledger(world)] == list(range(STEPS))


@pytest.mark.parametrize(("every", "after"), [(1, 3), (3, 4), (100, 4)])
def test_a_server_that_is_started_again_goes_on_with_clients_that_waited(tmp_path, text, stories, undisturbed, every, after):
    """With a checkpoint of every step nothing is made again but the open one; else all go back to the newest that all hold. Where
    there is none yet, all begin anew.
    """
    world = make(tmp_path / "run", stories, checkpoint_every=every)
    crash_after(world, after)
    world.server.start()
    clients = [Client(world, text, index) for index in range(2)]
    kill(world)
    start_again(world)
    results = [client.end() for client in clients]
    world.server.stop()
    assert [result.steps for result in results] == [STEPS, STEPS]
    # The log says that the step in which the trunk failed was made; nothing stands for it.
    first = {1: after, 3: 3, 100: 0}[every]
    assert [event["step"] for event in world.events("step")] == [*range(after + 1), *range(first, STEPS)]
    assert_as_undisturbed(world, undisturbed)


def cut(world: World, client: int) -> None:
    """The link of one client breaks without a word."""
    server, key = world.network.server, str(read_identity(world.keys[client]).public)
    for link in [link for link in server._links.values() if link.control_user == key]:
        server.detach(link)


def end_of(client: Client) -> BaseException:
    client.join(60)
    assert client.error is not None
    return client.error


@pytest.mark.parametrize("every", [1, 3])
def test_a_client_that_starts_again_goes_on_with_its_ends(tmp_path, text, stories, undisturbed, every):
    """With a checkpoint of every step it repeats the very one that is held for it; else it goes on with what it has kept."""
    world = make(tmp_path / "run", stories, checkpoint_every=every)
    before_it_is_kept(world, 4, lambda: cut(world, 1))
    with running(world):
        steady, doomed = Client(world, text, 0), Client(world, text, 1, reconnect=0.0)
        assert isinstance(end_of(doomed), SessionLost)
        with pytest.raises(ConfigError, match=r"nothing is left|holds no ends"):
            train(settings(world, text, 1, resume=True, steps=1), channel_options=transport_of(world))
        back = Client(world, text, 1, resume=True)
        steady.end()
        back.end()
    assert [step for step, _ in ledger(world)] == list(range(STEPS))
    assert all(len(parts) == 2 for _, parts in ledger(world))
    if every == 1:
        assert_as_undisturbed(world, undisturbed)


def stopped_amid_step_five(work: Path, text: Path, model: str) -> World:
    """A run whose server fails when it has made step 5: it has kept 4, its clients 5; nothing runs any more."""
    world = make(work, model, checkpoint_every=1)
    crash_after(world, 5)
    world.server.start()
    clients = [Client(world, text, index, reconnect=0.0) for index in range(2)]
    kill(world)
    for client in clients:
        end_of(client)
    assert checkpoint_steps(world.work / "server")[-1] == 4
    assert [checkpoint_steps(world.work / f"ends{client}") for client in range(2)] == [[2, 3, 4, 5]] * 2
    return world


def lose(world: World, client: int, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(checkpoint_directory(world.work / f"ends{client}", step))


def test_a_run_goes_back_to_the_newest_step_that_all_hold(tmp_path, text, stories, undisturbed):
    world = stopped_amid_step_five(tmp_path / "run", text, stories)
    lose(world, 1, 4, 5)
    start_again(world)
    for client in [Client(world, text, index, resume=True) for index in range(2)]:
        client.end()
    world.server.stop()
    assert [event["step"] for event in world.events("went-back")] == [3]
    undone = sorted(each.name for each in (world.work / "ends0" / "checkpoints").glob("undone-*"))
    assert undone == ["undone-step-00000004", "undone-step-00000005"]
    assert_as_undisturbed(world, undisturbed)


def damage(directory: Path, step: int) -> None:
    file = checkpoint_directory(directory, step) / "trainables.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_of_damaged_checkpoints_the_one_before_is_used_on_both_sides(tmp_path, text, stories, undisturbed):
    """Client 1 holds undamaged ends of step 3 and before, the server of that step has a damaged trunk: all go back to 2."""
    world = stopped_amid_step_five(tmp_path / "run", text, stories)
    for step in (4, 5):
        damage(world.work / "ends1", step)
    damage(world.work / "server", 3)
    start_again(world)
    for client in [Client(world, text, index, resume=True) for index in range(2)]:
        client.end()
    world.server.stop()
    assert [event["step"] for event in world.events("checkpoint-damaged")] == [3]
    assert [event["step"] for event in world.events("went-back")] == [2]
    aside = sorted(each.name for each in (world.work / "ends1" / "checkpoints").glob("damaged-*"))
    assert aside == ["damaged-step-00000004", "damaged-step-00000005"]
    assert_as_undisturbed(world, undisturbed)


def test_ends_that_are_all_damaged_are_named(tmp_path, text, stories):
    world = stopped_amid_step_five(tmp_path / "run", text, stories)
    for step in (2, 3, 4, 5):
        damage(world.work / "ends1", step)
    start_again(world)
    with pytest.raises(CheckpointError, match=r"every checkpoint of .*ends1 is damaged: begin anew"):
        raise end_of(Client(world, text, 1, resume=True))
    world.server.stop()


def test_whose_states_are_all_newer_takes_no_part(tmp_path, text, stories):
    world = stopped_amid_step_five(tmp_path / "run", text, stories)
    lose(world, 1, 2, 3, 4)
    start_again(world)
    Client(world, text, 0, resume=True, reconnect=0.0)
    ahead = Client(world, text, 1, resume=True)
    with pytest.raises(CheckpointError, match="goes on from step 5, before which nothing of these ends was kept"):
        raise end_of(ahead)
    world.server.stop()
    assert not world.events("went-back")


def test_the_step_under_way_is_finished_before_a_server_ends_that_means_to_be_back(tmp_path, text, stories, undisturbed):
    """SIGTERM: no checkpoint is due, so the one that is written is of the step under way; clients wait, and go on from there."""
    world = make(tmp_path / "run", stories, checkpoint_every=100)
    world.server.start()
    clients = [Client(world, text, index) for index in range(2)]
    wait_for(lambda: made(world, 2))
    world.server.stop(back=True, patience=20.0)
    last = world.events("step")[-1]["step"]
    assert checkpoint_steps(world.work / "server") == [last]
    start_again(world)
    for client in clients:
        client.end()
    world.server.stop()
    assert [event["step"] for event in world.events("step")] == list(range(STEPS))
    assert_as_undisturbed(world, undisturbed)


def test_a_disk_that_is_full_amid_a_round_is_waited_out(tmp_path, text, stories, monkeypatch):
    """The members' ends are there, the average does not fit: the server says so and ends; clients wait until there is room."""
    rounds = {"round_steps": 2, "checkpoint_every": 1}
    plain = make(tmp_path / "plain", stories, **rounds)
    with running(plain):
        for client in [Client(plain, text, index) for index in range(2)]:
            client.end()
    mean = Averager._mean

    def full(self: Averager, number: int, *rest: Any) -> Any:
        if number == 1 and not world.events("stopped"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return mean(self, number, *rest)

    monkeypatch.setattr(Averager, "_mean", full)
    world = make(tmp_path / "run", stories, **rounds)
    world.server.start()
    clients = [Client(world, text, index) for index in range(2)]
    with pytest.raises(NotWritten, match=r"average .* cannot be written \(No space left on device\): make room"):
        world.server.wait(60)
    with pytest.raises(NotWritten):
        world.server.stop("the server has failed", back=True)
    start_again(world)
    for client in clients:
        client.end()
    world.server.stop()
    assert sum(event["round"] == 1 for event in world.events("round")) == 1
    assert_as_undisturbed(world, plain)
