"""Clients that are lost amid a round that averages the ends: amid their uploads, amid the average, or for a whole round."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.central import count_targets
from splitfl.channel.timing import Timing
from splitfl.transport.memory import MemoryClientTransport
from tests.integration.test_equality import LOSS, TRUNK
from tests.integration.test_lost import cut, is_lost, is_open, wait_for
from tests.rounds_world import Halted, Reference, all_step, assert_equals, batch
from tests.trainer import Trainer
from tests.world import World, running, side_by_side, tiny_llama

QUICK = Timing(heartbeat=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("model"))


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
