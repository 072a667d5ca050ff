"""Asynchronous runs: nobody waits for anybody, gradients are exact for the weights their forward used, staleness is bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from client_ends.train import prepare_ends, train
from server_trunk.async_training import AsyncTraining
from server_trunk.server import load_run_trunk
from server_trunk.training import SharedTraining
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings, build_config
from splitfl.errors import ConfigError, RunComplete, StepMissed
from splitfl.parts.loading import attach_trunk, load_ends
from tests.integration.test_equality import LOSS, TRUNK, WEIGHTS, fraction_of, snapshot, story_batches
from tests.integration.test_lost import Batch, batch, enrol, join, step, wait_for
from tests.integration.test_train import settings
from tests.world import World, running, side_by_side, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def async_world(tmp_path, model, clients=2, contributions=1, staleness=8, **options) -> World:
    values = {"mode": "async", "async_contributions": contributions, "max_staleness": staleness, "trainables": "full"}
    return World(tmp_path, model, clients, **(values | TRUNK | options))


def optimizer_steps(world: World) -> int:
    return world.server._loop._steps.number


class Reference:
    """The trunk trained by hand: gradients at given weights, applied in a given order."""

    def __init__(self, world: World) -> None:
        config = world.server.config
        self.trunk = load_run_trunk(config, torch.device("cpu"))
        self.start = snapshot(self.trunk)
        self.training = SharedTraining(self.trunk, config.optimizer)
        self.ends = prepare_ends(load_ends(world.model, config.cut), "frozen", LoraSettings(), seed=0).train()
        attach_trunk(self.ends, self.trunk)

    def gradient(self, one: Batch) -> tuple[float, list[torch.Tensor], int]:
        """Loss, gradient of the summed loss, and targets, at the present weights."""
        self.trunk.train()
        loss = self.ends(**one).loss
        targets = int((one["labels"][:, 1:] != -100).sum())
        return float(loss.detach()), list(torch.autograd.grad(loss * targets, list(self.training.trainables.values()))), targets

    def apply(self, step: int, *gradients: tuple[float, list[torch.Tensor], int]) -> None:
        for index, parameter in enumerate(self.training.trainables.values()):
            parameter.grad = sum((found[index] for _, found, _ in gradients), torch.zeros_like(parameter))
        self.training.close(step, {"all": sum(targets for _, _, targets in gradients)})


def test_a_gradient_that_comes_late_is_exact_for_the_weights_its_forward_used(tmp_path, model):
    world = async_world(tmp_path, model)
    with running(world):
        fast, slow = join(world, 0), join(world, 1)
        enrol(fast, slow)
        reference = Reference(world)
        old = reference.gradient(batch(50))
        loss = slow(**batch(50)).loss
        for number in range(3):
            own = reference.gradient(batch(number))
            assert step(fast, batch(number)) == pytest.approx([own[0]], rel=LOSS)
            reference.apply(number, own)
            wait_for(lambda number=number: optimizer_steps(world) == number + 1)
        loss.backward()
        slow.step()
        closed = slow.wait_step()
        wait_for(lambda: optimizer_steps(world) == 4)
        reference.apply(3, old)
    assert float(loss.detach()) == pytest.approx(old[0], rel=LOSS)
    assert fraction_of(snapshot(world.server._model), snapshot(reference.trunk), reference.start) <= WEIGHTS
    assert (closed.staleness, closed.counted, closed.dropped) == (3, 18, False)
    assert world.events("step")[3]["parts"]["client1"]["staleness"] == 3


def test_the_sum_of_several_contributions_is_weighed_by_its_targets(tmp_path, model):
    world = async_world(tmp_path, model, contributions=2)
    with running(world):
        one, other = join(world, 0), join(world, 1)
        enrol(one, other)
        reference = Reference(world)
        found = [reference.gradient(batch(1, rows=1)), reference.gradient(batch(2, rows=3))]
        step(one, batch(1, rows=1))
        one.wait_step()
        assert optimizer_steps(world) == 0
        step(other, batch(2, rows=3))
        wait_for(lambda: optimizer_steps(world) == 1)
        reference.apply(0, *found)
    assert fraction_of(snapshot(world.server._model), snapshot(reference.trunk), reference.start) <= WEIGHTS


def test_a_slow_client_holds_nobody_up(tmp_path, model):
    world = async_world(tmp_path, model, staleness=100)
    with running(world):
        fast, slow = join(world, 0), join(world, 1)
        enrol(fast, slow)
        for _ in range(2):
            loss = slow(**batch(9)).loss
            for number in range(5):
                step(fast, batch(number))
            fast.wait_step()
            loss.backward()
            slow.step()
        slow.wait_step()
    given = [event["parts"] for event in world.events("step")]
    assert len(given) == 12
    assert sum("client0" in parts for parts in given) == 10
    assert [parts["client1"]["staleness"] for parts in given if "client1" in parts] == [5, 5]


@pytest.mark.parametrize("bound", [0, 2])
def test_staleness_is_bounded(tmp_path, model, bound):
    world = async_world(tmp_path, model, staleness=bound)
    with running(world):
        fast, slow = join(world, 0), join(world, 1)
        enrol(fast, slow)
        loss = slow(**batch(9)).loss
        for number in range(6):
            step(fast, batch(number))
        fast.wait_step()
        assert optimizer_steps(world) == bound  # held back; the fast client goes on all the same
        loss.backward()
        slow.step()
        slow.wait_step()
        wait_for(lambda: optimizer_steps(world) == bound + 1)
    stale = [part["staleness"] for event in world.events("step") for part in event["parts"].values()]
    assert max(stale) == bound
    # Nothing is lost by being held back.
    assert sum(event["targets"] for event in world.events("step")) == 7 * 18


def test_a_silent_client_holds_back_no_longer_than_the_deadline(tmp_path, model):
    world = async_world(tmp_path, model, staleness=0, step_deadline=0.2)
    with running(world):
        fast, silent = join(world, 0), join(world, 1)
        enrol(fast, silent)
        loss = silent(**batch(9)).loss
        step(fast, batch(0))
        wait_for(lambda: optimizer_steps(world) == 1)
        wait_for(lambda: silent.trunk.session._dropped is not None)
        with pytest.raises(StepMissed):
            loss.backward()
        step(silent, batch(9))
        wait_for(lambda: optimizer_steps(world) == 2)
    assert [list(event["parts"]) for event in world.events("step")] == [["client0"], ["client1"]]


def test_a_client_that_vanishes_leaves_what_it_gave(tmp_path, model):
    world = async_world(tmp_path, model, contributions=2, staleness=0)
    with running(world):
        steady, flighty = join(world, 0), join(world, 1)
        enrol(steady, flighty)
        flighty(**batch(1)).loss.backward()
        flighty(**batch(2))
        flighty.close()
        wait_for(lambda: len(world.server._loop._names) == 1)
        step(steady, batch(3), then="leave")
        # Nobody is left to make up the number: what is in the sum is used.
        wait_for(lambda: optimizer_steps(world) == 1)
    (event,) = world.events("step")
    assert {name: part["targets"] for name, part in event["parts"].items()} == {"client0": 18, "client1": 18}


def test_pausing_and_evaluating_never_wait(tmp_path, model):
    world = async_world(tmp_path, model, contributions=3)
    with running(world):
        one, other = join(world, 0), join(world, 1)
        enrol(one, other)
        step(one, batch(0), then="pause")
        with torch.no_grad():
            assert float(one.eval()(**batch(0)).loss) > 0
        step(one.train(), batch(1))
        one.trunk.session.pause()
        step(one, batch(2))
        wait_for(lambda: optimizer_steps(world) == 1)
    assert world.events("step")[0]["targets"] == 3 * 18


def test_equal_speeds_and_the_loss_falls_on_real_text(tmp_path, data, stories):
    clients, rounds = 3, 25
    world = World(
        tmp_path, stories, clients, mode="async", async_contributions=clients, max_staleness=2, trainables="full", **TRUNK
    )
    batches = story_batches(data, clients, steps=5)

    def client(index: int) -> list[float]:
        split = world.join_as(index).train()
        split.requires_grad_(False)
        losses: list[float] = []
        for number in range(rounds):
            losses += step(split, batches[number % 5][index])
        split.wait_step()
        split.close()
        return losses

    with running(world):
        losses = side_by_side(clients, client)
        given = rounds // 5 * sum(int((one["labels"][:, 1:] != -100).sum()) for step in batches for one in step)
        wait_for(lambda: sum(event["targets"] for event in world.events("step")) == given)
    events = world.events("step")
    # Parts that end together are used together, so there may be fewer steps, never more.
    assert rounds // 2 <= len(events) <= rounds
    assert max(part["staleness"] for event in events for part in event["parts"].values()) <= 2
    for own in losses:
        assert sum(own[-5:]) < 0.95 * sum(own[:5])


def test_the_run_ends_for_all_when_its_optimizer_steps_are_made(tmp_path, data, stories):
    world = World(tmp_path, stories, 2, memory=False, mode="async", **{"optimizer.steps": 6})
    with running(world):
        results = side_by_side(2, lambda index: train(settings(world, data, index, epochs=50)))
        late = world.join_as(0).train()
        with pytest.raises(RunComplete, match="6 steps"):
            late(**{key: value[:, :8] for key, value in batch(0).items()})
        late.close()
    assert [event["step"] for event in world.events("step")] == list(range(6))
    assert sum(result.steps for result in results) >= 6


def test_a_working_copy_is_what_the_modules_hold_and_the_checkpoint_holds_the_same(tmp_path, model):
    world = async_world(tmp_path, model, trainables="lora")
    training: Any = world.server._engine.training
    assert isinstance(training, AsyncTraining)
    with running(world):
        one, other = join(world, 0), join(world, 1)
        enrol(one, other)
        step(one, batch(0))
        one.wait_step()
        wait_for(lambda: optimizer_steps(world) == 1)
    tensors, extra = training.state()
    held = named_trainables(world.server._model)
    assert tensors.keys() == held.keys()
    assert all(torch.equal(tensors[name], held[name]) and tensors[name] is not held[name] for name in tensors)
    training.load({name: tensor + 1 for name, tensor in tensors.items()}, extra)
    after = named_trainables(world.server._model)
    assert all(torch.equal(after[name], held[name] + 1) for name in tensors)


@pytest.mark.parametrize(
    "contradiction", [{"on_loss": "wait"}, {"policy": "serial"}, {"graphs": "recompute"}, {"graph_tokens": 9}]
)
def test_settings_that_contradict_an_asynchronous_run(contradiction):
    with pytest.raises(ConfigError, match="asynchronous run"):
        build_config({"model": "m", "mode": "async"} | contradiction)
