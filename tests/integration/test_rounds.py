"""Rounds that average the ends, against a reference that averages N sets of ends in one process, written plainly here."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.central import count_targets
from client_ends.train import prepare_ends, train
from splitfl.adapters import named_trainables
from splitfl.channel.timing import Timing
from splitfl.checkpoint import checkpoint_directory, load_checkpoint
from splitfl.config import LoraSettings
from splitfl.errors import ConfigError
from splitfl.transport.memory import MemoryClientTransport
from tests.integration.test_commands import Run, finish
from tests.integration.test_equality import LOSS, TRUNK
from tests.integration.test_lost import cut, is_lost, is_open, wait_for
from tests.integration.test_resume import again
from tests.integration.test_train import settings
from tests.rounds_world import Reference, assert_equals, batch, batches_of
from tests.trainer import Trainer, train_all
from tests.world import World, running, side_by_side, tiny_llama

QUICK = Timing(heartbeat=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def run_all(world: World, ends: str, steps: int) -> tuple[list[list[float]], dict[int, dict[str, torch.Tensor]]]:
    with running(world):
        losses, weights = train_all(world, batches_of(len(world.keys), steps), ends)
    return losses, dict(enumerate(weights))


@pytest.mark.parametrize(
    ("ends", "rounds", "memory"), [("lora", 1, True), ("lora", 2, False), ("full", 1, True), ("full", 2, True)]
)
def test_ends_and_trunk_equal_the_reference_that_averages(
    tmp_path: Path, model: str, ends: str, rounds: int, memory: bool
) -> None:
    world = World(tmp_path, model, 3, memory=memory, round_steps=rounds, **TRUNK)
    steps = 6
    losses, weights = run_all(world, ends, steps)
    reference = Reference(world, ends)
    for number in range(steps):
        assert losses[number] == pytest.approx(reference.step(number, [0, 1, 2]), rel=LOSS)
        if (number + 1) % rounds == 0:
            reference.average([0, 1, 2], [0, 1, 2])
    assert_equals(reference, world, weights)
    assert all(torch.equal(weights[0][name], weights[client][name]) for client in (1, 2) for name in weights[0])
    events = world.events("round")
    assert [event["step"] for event in events] == list(range(rounds - 1, steps, rounds))
    counted = [sum(count_targets(batch(client, number)) for number in range(rounds)) for client in range(3)]
    assert events[0]["members"] == {f"client{client}": count for client, count in enumerate(counted)}


class Halted:
    """Sends the first ``count`` parts of a trainer's next upload, and the others when told."""

    def __init__(self, trainer: Trainer, count: int) -> None:
        self._rounds, self._count = trainer.split.trunk.session.rounds, count
        self._upload, self._rest = self._rounds._upload, []
        self._rounds._upload = self._halt

    def _halt(self, number: int, send: Callable[[Any, memoryview], None]) -> None:
        parts: list[tuple[Any, memoryview]] = []
        self._upload(number, lambda part, view: parts.append((part, view)))
        for part, view in parts[: self._count]:
            send(part, view)
        self._rest, self._send = parts[self._count :], send

    def release(self) -> None:
        for part, view in self._rest:
            self._send(part, view)
        self._rounds._upload = self._upload


def all_step(trainers: dict[int, Trainer], number: int) -> list[float]:
    clients = list(trainers)
    return side_by_side(len(clients), lambda index: trainers[clients[index]].step(batch(clients[index], number)))


def rejoin(world: World, trainer: Trainer, enrolled: int) -> threading.Thread:
    """Enrol for the next step while one is open; ends with the opening of that step."""
    thread = threading.Thread(target=trainer.split.trunk.session.begin_forward)
    thread.start()
    wait_for(lambda: len(world.server._loop._steps._enrolled) == enrolled)
    return thread


def uploads(world: World) -> dict[str, Any]:
    return world.server._rounds._averager._uploads


def test_a_client_lost_amid_its_upload_leaves_nothing_and_returns_to_the_average(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 3, round_steps=2, timing=QUICK, **TRUNK)
    reference = Reference(world)
    with running(world):
        trainers = {client: Trainer(world, client) for client in range(3)}
        doomed = trainers[2]
        Halted(doomed, 5)
        for number in range(2):
            assert all_step(trainers, number) == pytest.approx(reference.step(number, [0, 1, 2]), rel=LOSS)
        wait_for(lambda: len(uploads(world)) == 3)
        wait_for(lambda: sum(not upload.left for upload in uploads(world).values()) == 2)
        cut(doomed.split)
        wait_for(lambda: is_lost(world, doomed.split))
        del trainers[2]
        reference.average([0, 1], [0, 1])
        for trainer in trainers.values():
            trainer.split.trunk.session.settle_round()
        assert not uploads(world)
        wait_for(lambda: is_open(world, 2))
        back = Trainer(world, 2)
        waiting = rejoin(world, back, 3)
        assert all_step(trainers, 2) == pytest.approx(reference.step(2, [0, 1]), rel=LOSS)
        waiting.join()
        trainers[2] = back
        reference.begin_anew(2)
        assert all_step(trainers, 3) == pytest.approx(reference.step(3, [0, 1, 2]), rel=LOSS)
        reference.average([0, 1, 2], [0, 1, 2])
        for trainer in trainers.values():
            trainer.split.wait_step()
        assert_equals(reference, world, {client: trainer.weights for client, trainer in trainers.items()})
    first, second = world.events("round")
    assert first["left_out"] == {"client2": "lost"}
    assert list(first["members"]) == ["client0", "client1"]
    # What client 2 counted before it was lost weighs nothing.
    assert second["members"]["client2"] == count_targets(batch(2, 3))


def test_under_wait_a_link_that_breaks_amid_an_upload_changes_nothing(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 2, round_steps=1, timing=QUICK, on_loss="wait", step_deadline=0.0, **TRUNK)
    reference = Reference(world)
    with running(world):
        trainers = {client: Trainer(world, client, **again_by_itself(world)) for client in range(2)}
        Halted(trainers[1], 5)
        for number in range(3):
            assert all_step(trainers, number) == pytest.approx(reference.step(number, [0, 1]), rel=LOSS)
            if number == 0:
                wait_for(lambda: sorted(not upload.left for upload in uploads(world).values()) == [False, True])
                del trainers[1].split.trunk.session.rounds._upload  # in the next session it sends all
                cut(trainers[1].split)
            reference.average([0, 1], [0, 1])
        for trainer in trainers.values():
            trainer.split.wait_step()
        assert_equals(reference, world, {client: trainer.weights for client, trainer in trainers.items()})
    assert [list(event["members"]) for event in world.events("round")] == [["client0", "client1"]] * 3
    assert len(world.events("joined")) == 3


@pytest.mark.parametrize("steps", [2, 0])
def test_who_is_lost_amid_its_last_upload_is_given_the_average_all_the_same(tmp_path: Path, model: str, steps: int) -> None:
    """The run ends with that round, or this client alone leaves with it."""
    world = World(tmp_path, model, 2, round_steps=1, timing=QUICK, **TRUNK | {"optimizer.steps": steps})
    with running(world):
        trainers = {client: Trainer(world, client, **again_by_itself(world)) for client in range(2)}
        all_step(trainers, 0)
        for trainer in trainers.values():
            trainer.split.wait_step()
        slow, lost = Halted(trainers[0], 3), trainers[1].split
        Halted(trainers[1], 3)
        all_step(trainers, 1)
        lost.trunk.session.leave()
        wait_for(lambda: len(uploads(world)) == 2)
        cut(lost)
        wait_for(lambda: len(world.events("joined")) == 3)
        slow.release()
        trainers[0].split.wait_step()
        # In a thread of its own: a client that hangs is to fail this test, not to stop it.
        side_by_side(1, lambda _: lost.wait_step())
        assert all(torch.equal(trainers[1].weights[name], tensor) for name, tensor in trainers[0].weights.items())
    assert [list(event["members"]) for event in world.events("round")] == [["client0", "client1"], ["client0"]]


@pytest.mark.parametrize(("steps", "cuts"), [(2, 1), (0, 1), (2, 2), (0, 2)])
def test_who_is_lost_amid_the_average_has_it_all_the_same(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, steps: int, cuts: int
) -> None:
    """After the run's last step, which nobody takes part in any more, or amid the run; again and again."""
    settings: dict[str, Any] = {"optimizer.steps": steps, "on_loss": "wait", "step_deadline": 0.0}
    world = World(tmp_path, model, 2, round_steps=1, timing=QUICK, **TRUNK | settings)
    with running(world):
        trainers = {client: Trainer(world, client, **again_by_itself(world)) for client in range(2)}
        all_step(trainers, 0)
        for trainer in trainers.values():
            trainer.split.wait_step()
        lost = trainers[1].split
        doomed = give_nothing_at_first(world, 1, monkeypatch, sessions=cuts)
        all_step(trainers, 1)
        for number in range(cuts):
            wait_for(lambda n=number: len(doomed) == n + 1 and is_placed(lost, doomed[n]))
            wait_for(lambda: lost.trunk.session.rounds._averaged == 1)
            cut(lost)
        side_by_side(2, lambda client: trainers[client].split.wait_step())
        assert lost.trunk.session.rounds.loaded == 1
        assert all(torch.equal(trainers[1].weights[name], tensor) for name, tensor in trainers[0].weights.items())
    assert [list(event["members"]) for event in world.events("round")] == [["client0", "client1"]] * 2


def test_who_has_paused_and_is_lost_amid_the_average_is_given_the_newest(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, model, 2, round_steps=1, timing=QUICK, **TRUNK)
    with running(world):
        trainers = {client: Trainer(world, client, **again_by_itself(world)) for client in range(2)}
        goes_on, lost = trainers[0], trainers[1].split
        all_step(trainers, 0)
        for trainer in trainers.values():
            trainer.split.wait_step()
        doomed = give_nothing_at_first(world, 1, monkeypatch, sessions=1)
        all_step(trainers, 1)
        wait_for(lambda: lost.trunk.session.rounds._averaged == 1)
        lost.trunk.session.pause()
        cut(lost)
        # It is given what is the newest when the next step opens for it, and takes no part in that.
        wait_for(lambda: is_enrolled(world, 1, besides=doomed))
        goes_on.step(batch(0, 2))
        side_by_side(2, lambda client: trainers[client].split.wait_step())
        assert lost.trunk.session.rounds.loaded == 2
        assert all(torch.equal(trainers[1].weights[name], tensor) for name, tensor in goes_on.weights.items())
        goes_on.step(batch(0, 3))
        goes_on.split.wait_step()
    members = [list(event["members"]) for event in world.events("round")]
    assert members == [["client0", "client1"]] * 2 + [["client0"]] * 2


def give_nothing_at_first(world: World, client: int, monkeypatch: pytest.MonkeyPatch, *, sessions: int) -> list[str]:
    """The server announces averages to a client, and sends nothing of them in so many sessions, which are listed here."""
    keeper, doomed = world.server._rounds, []
    give = keeper._give

    def give_later(session: str, average: Any) -> None:
        if keeper.names.get(session) == f"client{client}" and session not in doomed and len(doomed) < sessions:
            doomed.append(session)
        if session not in doomed:
            give(session, average)

    monkeypatch.setattr(keeper, "_give", give_later)
    return doomed


def is_placed(split: Any, session: str) -> bool:
    """Whether the client knows where it stands in this session."""
    mine = split.trunk.session
    return mine._placed and mine.channel.opened.session == session


def is_enrolled(world: World, client: int, *, besides: list[str]) -> bool:
    """In another session than these."""
    enrolled = world.server._loop._steps._enrolled.copy()
    return any(name == f"client{client}" and session not in besides for session, name in enrolled.items())


def again_by_itself(world: World) -> dict[str, Any]:
    return {"channel_options": {"transport": lambda: MemoryClientTransport(world.network), "timing": QUICK}}


def test_a_client_away_for_a_round_takes_the_average_when_it_returns(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 2, round_steps=1, **TRUNK)
    reference = Reference(world)
    with running(world):
        trainers = {client: Trainer(world, client) for client in range(2)}
        assert all_step(trainers, 0) == pytest.approx(reference.step(0, [0, 1]), rel=LOSS)
        reference.average([0, 1], [0, 1])
        away = trainers.pop(1)
        away.split.trunk.session.pause()
        for number in (1, 2):
            # Whether it is still a participant of step 1 that withdrew from it, nothing of it is there.
            assert all_step(trainers, number) == pytest.approx(reference.step(number, [0]), rel=LOSS)
            reference.average([0], [0])
        wait_for(lambda: is_open(world, 3))
        waiting = rejoin(world, away, 2)
        assert all_step(trainers, 3) == pytest.approx(reference.step(3, [0]), rel=LOSS)
        reference.average([0], [0, 1])
        waiting.join()
        trainers[1] = away
        assert all_step(trainers, 4) == pytest.approx(reference.step(4, [0, 1]), rel=LOSS)
        reference.average([0, 1], [0, 1])
        for trainer in trainers.values():
            trainer.split.wait_step()
        assert_equals(reference, world, {client: trainer.weights for client, trainer in trainers.items()})


def test_a_late_upload_is_gone_on_without_and_its_rest_is_dropped(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 2, round_steps=1, **TRUNK)
    reference = Reference(world)
    with running(world):
        trainers = {client: Trainer(world, client) for client in range(2)}
        slow = Halted(trainers[1], 3)
        world.server._rounds._rounds._deadline = 0.05
        assert all_step(trainers, 0) == pytest.approx(reference.step(0, [0, 1]), rel=LOSS)
        trainers[1].split.wait_step()
        world.server._rounds._rounds._deadline = 0.0
        reference.average([0], [0, 1])
        slow.release()
        for number in (1, 2):
            assert all_step(trainers, number) == pytest.approx(reference.step(number, [0, 1]), rel=LOSS)
            reference.average([0, 1], [0, 1])
        for trainer in trainers.values():
            trainer.split.wait_step()
        assert_equals(reference, world, {client: trainer.weights for client, trainer in trainers.items()})
        wait_for(lambda: all(link.account.left == link.account.window for link in links(world)))
    assert [event["left_out"] for event in world.events("round")] == [{"client1": "late"}, None, None]


def links(world: World) -> list[Any]:
    return list(world.server.endpoints.channel._sessions._sessions.values())


def test_ends_that_are_trained_otherwise_are_refused_in_one_sentence(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 3, needed=1, round_steps=1, **TRUNK)
    with running(world):
        first = Trainer(world, 0)
        first.step(batch(0, 0))
        with pytest.raises(ConfigError, match=r"LoRA of rank 8 .* yours are full weights .* use the same --ends") as caught:
            Trainer(world, 1, "full").step(batch(1, 0))
        assert "\n" not in str(caught.value)
        frozen = prepare_ends(world.join_as(2), "frozen", LoraSettings(), seed=0).train()
        with pytest.raises(ConfigError, match="use --ends lora or full"):
            frozen(**batch(2, 0))
        first.step(batch(0, 1))
        first.split.wait_step()
    assert [list(event["members"]) for event in world.events("round")] == [["client0"]] * 2


def test_ends_that_are_not_finite_are_left_out_and_healed(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 2, round_steps=1, **TRUNK)
    with running(world):
        trainers = {client: Trainer(world, client) for client in range(2)}
        all_step(trainers, 0)
        for trainer in trainers.values():
            trainer.split.wait_step()
        sick = trainers[1]
        parameter = next(iter(named_trainables(sick.model).values()))

        def spoil(*_: Any) -> None:
            parameter.data.fill_(float("nan"))

        sick.optimizer.register_step_pre_hook(spoil)
        all_step(trainers, 1)
        for trainer in trainers.values():
            trainer.split.wait_step()
        mine, theirs = (trainer.weights for trainer in trainers.values())
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].isfinite().all() for name in mine)
    assert world.events("round")[1]["left_out"] == {"client1": "not finite"}


def test_a_resumed_run_has_its_average(tmp_path: Path, model: str) -> None:
    world = World(tmp_path, model, 2, round_steps=2, checkpoint_every=1, **TRUNK)
    reference = Reference(world)
    for begin, end in ((0, 3), (3, 6)):
        if begin:
            again(world)
        with running(world):
            trainers = {client: Trainer(world, client) for client in range(2)}
            for number in range(begin, end):
                assert all_step(trainers, number) == pytest.approx(reference.step(number, [0, 1]), rel=LOSS)
                if number % 2:
                    reference.average([0, 1], [0, 1])
            for trainer in trainers.values():
                trainer.split.wait_step()
            assert_equals(reference, world, {client: trainer.weights for client, trainer in trainers.items()})
        if not begin:
            reference.begin_anew(0)
            reference.begin_anew(1)
    assert [event["round"] for event in world.events("round")] == [0, 1, 2]


@pytest.mark.parametrize("memory", [True, False])
def test_large_ends_stream_in_parts_that_never_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=24000, **sizes)).save_pretrained(tmp_path / "model")
    window, held, most, parts = 1 << 20, 0, 0, 0

    def give_back(size: int) -> None:
        nonlocal held
        held -= size

    from server_trunk import gateway

    buffer = gateway.receive_buffer

    def counting(rows: int, hidden: int, dtype: torch.dtype, **options: Any) -> Any:
        nonlocal held, most, parts
        tensor, view = buffer(rows, hidden, dtype, **options)
        if dtype is torch.uint8:
            held, parts = held + hidden, parts + 1
            most = max(most, held)
            weakref.finalize(tensor, give_back, hidden)
        return tensor, view

    monkeypatch.setattr(gateway, "receive_buffer", counting)
    monkeypatch.setattr("server_trunk.averaging._SLICE", 10_000)
    world = World(tmp_path, str(tmp_path / "model"), 2, memory=memory, window=window, round_steps=1, **TRUNK)
    _, weights = run_all(world, "full", 1)
    reference = Reference(world, "full")
    reference.step(0, [0, 1])
    reference.average([0, 1], [0, 1])
    assert_equals(reference, world, weights)
    total = sum(tensor.numel() * 4 for tensor in weights[0].values())
    assert total > 5 * window
    assert parts > 2 * total // (256 << 10)
    # The credit of both, and a part in the hands of whoever has just given credit for it.
    assert most <= 2 * window + (256 << 10)


def test_train_keeps_the_average(tmp_path: Path, stories: str, data: Path) -> None:
    # The last step is kept by itself before the round that it ends.
    with running(World(tmp_path, stories, 2, memory=False, round_steps=2, **{"optimizer.steps": 4})) as world:
        results = side_by_side(2, lambda client: train(settings(world, data, client, steps=4, seed=client)))
    first, second = (load_checkpoint(result.checkpoint)[0] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [event["step"] for event in world.events("round")] == [1, 3]


@pytest.mark.slow
def test_the_commands_average_too(tmp_path: Path, stories: str, data: Path) -> None:
    text = data / "text" / "tinyshakespeare" / "input.txt"
    run = Run(tmp_path, stories, 2, "--round-steps", 2, "--steps", 4, "--until-done")
    try:
        clients = [run.client(index, text, "--steps", 4, "--evaluate", 0, "--batch-size", 2 + index) for index in range(2)]
        for client in clients:
            code, _, err = finish(client)
            assert code == 0, err
        assert finish(run.server)[0] == 0
    finally:
        run.close()
    first, second = (load_checkpoint(checkpoint_directory(tmp_path / f"ends{index}", 3))[0] for index in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [event["step"] for event in run.events("server", "round")] == [1, 3]
    assert all(len(event["members"]) == 2 and event["bytes_received"] > 0 for event in run.events("server", "round"))
