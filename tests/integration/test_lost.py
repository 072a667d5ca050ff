"""Clients that are lost or late at any point of a step: what is trained is exactly what the ledger says counted."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch

from benchmarks.central import Central
from client_ends.train import prepare_ends
from server_trunk.server import load_run_trunk
from splitfl.channel.timing import Timing
from splitfl.config import LoraSettings
from splitfl.errors import SessionLost
from splitfl.parts.loading import load_ends
from tests.integration.test_equality import ENDS, LOSS, TRUNK, WEIGHTS, fraction_of, snapshot
from tests.replicas import Replicas
from tests.world import World, running, side_by_side, tiny_llama

#: So that a broken link is noticed at once.
QUICK = Timing(heartbeat=0.05)
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def batch(seed: int, rows: int = 2, length: int = 10) -> Batch:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


STEADY = [batch(step) for step in range(5)]
FLIGHTY = [[batch(100 + 2 * step, 1), batch(101 + 2 * step, 3)] for step in range(5)]


def join(world: World | Replicas, client: int) -> Any:
    return train_input(world.join_as(client))


def train_input(split: Any) -> Any:
    split.train()
    # Ends that do not change, but want their gradient back: it is awaited, so what has run is known.
    split.requires_grad_(False)
    split.get_input_embeddings().weight.requires_grad_(True)
    return split


def cut(split: Any) -> None:
    """The link breaks without a word."""
    transport = split.trunk.session.channel._transport
    transport._server.detach(transport._link)


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def is_lost(world: World, split: Any) -> bool:
    return split.trunk.session.channel.opened.session not in world.server._loop._names


def step(split: Any, *batches: Batch, then: str = "continue") -> list[float]:
    losses = []
    for one in batches:
        loss = split(**one).loss
        loss.backward()
        losses.append(float(loss.detach()))
    split.step(then)
    return losses


def reference(
    world: World | Replicas, counted: list[list[Batch]], weights: dict[str, torch.Tensor]
) -> tuple[list[list[float]], float]:
    """Central training on ``counted``, by step: every loss, and how far ``weights`` of the server's trunk are from it."""
    config = world.config
    trunk = load_run_trunk(config, torch.device("cpu"))
    start = snapshot(trunk)
    most = max(len(batches) for batches in counted)
    ends = [prepare_ends(load_ends(world.model, config.cut), "frozen", LoraSettings(), seed=0) for _ in range(most)]
    central = Central(trunk, ends, config.optimizer, ENDS)
    sides = central._ends_sides
    losses = []
    for batches in counted:
        central.ends, central._ends_sides = ends[: len(batches)], sides[: len(batches)]
        losses.append(central.step(batches))
    return losses, fraction_of(weights, snapshot(trunk), start)


def assert_equals_reference(world: World | Replicas, counted: list[list[Batch]], losses: list[float]) -> None:
    """``losses``: the steady client's, whose batch is the first of each step."""
    weights = world.weights() if isinstance(world, Replicas) else snapshot(world.server._model)
    theirs, distance = reference(world, counted, weights)
    assert [own for own, *_ in theirs] == pytest.approx(losses, rel=LOSS)
    assert distance <= WEIGHTS
    targets = [sum(int((one["labels"][:, 1:] != -100).sum()) for one in batches) for batches in counted]
    assert [event["targets"] for event in world.events("step")] == targets


#: How far the client comes in step 1 before its link breaks, and how many of its two micro-batches count then.
STAGES = {"ahead": 0, "enrolled": 0, "forward": 0, "one backward": 1, "all backwards": 2, "done": 2}


def enrol(*splits: Any) -> None:
    side_by_side(len(splits), lambda index: splits[index].trunk.session._take_part())


def is_open(world: World, number: int) -> bool:
    steps = world.server._loop._steps
    return steps.is_open and steps.number == number


def send_in_vain(split: Any, one: Batch) -> None:
    with contextlib.suppress(SessionLost):
        split(**one)


def go_until(stage: str, world: World, split: Any) -> None:
    """The first step, and the second as far as the stage goes."""
    step(split, *FLIGHTY[0])
    if stage == "ahead":
        threading.Thread(target=send_in_vain, args=(split, FLIGHTY[1][0])).start()
        wait_for(lambda: world.server._loop._scheduler._waiting)
        return
    wait_for(lambda: is_open(world, 1))
    if stage == "enrolled":
        return
    losses = [split(**one).loss for one in FLIGHTY[1]]
    if stage == "forward":
        return
    losses[0].backward()
    if stage == "one backward":
        return
    losses[1].backward()
    if stage == "done":
        split.step()
        wait_for(lambda: any(part.done for part in world.server._loop._steps._holders.values()))


def lose_at(stage: str, world: World, steady: Any, flighty: Any) -> list[float]:
    """Both begin, and one's link breaks at that stage; returns the other's loss in the first step."""
    enrol(steady, flighty)
    losses = [] if stage == "ahead" else step(steady, STEADY[0])
    go_until(stage, world, flighty)
    cut(flighty)
    wait_for(lambda: is_lost(world, flighty))
    return step(steady, STEADY[0]) if stage == "ahead" else losses


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_lost_client_has_given_counts_and_no_more(tmp_path, model, stage):
    world = World(tmp_path, model, 2, trainables="full", timing=QUICK, **TRUNK)
    with running(world):
        steady, flighty = join(world, 0), join(world, 1)
        losses = lose_at(stage, world, steady, flighty)
        losses += step(steady, STEADY[1])
        # A new session takes part in the next step to open.
        wait_for(lambda: is_open(world, 2))
        back = join(world, 1)
        waiting = threading.Thread(target=back.trunk.session._take_part)
        waiting.start()
        wait_for(lambda: len(world.server._loop._steps._enrolled) == 2)
        losses += step(steady, STEADY[2])
        waiting.join()
        losses += step(steady, STEADY[3])
        step(back, *FLIGHTY[3])
        steady.wait_step()
    counted = [[STEADY[0], *FLIGHTY[0]], [STEADY[1], *FLIGHTY[1][: STAGES[stage]]], [STEADY[2]], [STEADY[3], *FLIGHTY[3]]]
    assert_equals_reference(world, counted, losses)
    part = world.events("step")[1]["parts"].get("client1")
    if stage == "ahead":
        assert part is None
    else:
        assert part["micro_batches"] == STAGES[stage]
        assert part["dropped"] == (stage != "done")
        assert part.get("why") == (None if stage == "done" else "lost")
    said = [(event["client"], event["step"], event["why"]) for event in world.events("dropped")]
    assert said == ([] if stage in ("ahead", "done") else [("client1", 1, "lost")])
    first = world.events("left")[0]
    assert (first["client"], first["lost"]) == ("client1", True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_waits_equals_the_undisturbed_run(tmp_path, model, stage):
    world = World(tmp_path, model, 2, trainables="full", timing=QUICK, on_loss="wait", step_deadline=0.0, **TRUNK)
    held = 2 if stage == "done" else 1  # where the lost client's part was whole, the next step waits for it
    with running(world):
        steady, flighty = join(world, 0), join(world, 1)
        losses = lose_at(stage, world, steady, flighty)
        for number in range(1, held + 1):
            losses += step(steady, STEADY[number])
        with torch.no_grad():  # evaluation goes on meanwhile
            held_loss = float(steady(**STEADY[held]).loss)
        assert held_loss == pytest.approx(losses[-1])
        assert len(world.events("step")) == held
        back = join(world, 1)
        for number in range(held, 4):
            step(back, *FLIGHTY[number])
            if number > held:
                losses += step(steady, STEADY[number])
        steady.wait_step()
    assert_equals_reference(world, [[STEADY[number], *FLIGHTY[number]] for number in range(4)], losses)
    assert not any(part["dropped"] for event in world.events("step") for part in event["parts"].values())
    assert [event["parts"]["client1"]["micro_batches"] for event in world.events("step")] == [2] * 4
    assert [event["client"] for event in world.events("held")] == ["client1"]
    assert not world.events("dropped")
