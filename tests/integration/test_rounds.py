"""Rounds that average the ends, against a reference that averages N sets of ends in one process, written plainly here."""

from __future__ import annotations

import weakref
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
from tests.integration.test_commands import Run, finish
from tests.integration.test_equality import LOSS, TRUNK
from tests.integration.test_lost import wait_for
from tests.integration.test_resume import again
from tests.integration.test_train import settings
from tests.rounds_world import Halted, Reference, all_step, assert_equals, batch, batches_of
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
