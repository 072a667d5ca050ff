"""A client that is moved to another replica in a run that averages the ends: what it has counted weighs where it goes on, and an
average that it has yet to take finds it there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server_trunk.replicas.assignment import REST
from splitfl.errors import SessionLost
from tests.integration.test_equality import LOSS, TRUNK, WEIGHTS, fraction_of
from tests.replicas import Replicas, UntilMoved, serving
from tests.rounds_world import Federated, Reference
from tests.trainer import Batch, Trainer, snapshot
from tests.world import side_by_side, tiny_llama

pytestmark = pytest.mark.slow

CLIENTS = 4
ORDER = (1, 0, 3, 2)  # of arrival: both heavy ones are on the first replica
MOVED = 1  # of two that are alike the first


def batch(client: int, step: int) -> Batch:
    """Clients 1 and 3 bring much, 0 and 2 little."""
    shape = (4, 12 - step % 3) if client % 2 else (1, 7 + client)
    ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(100 * client + step))
    return {"input_ids": ids, "labels": ids.clone()}


def cut(trainer: Trainer) -> None:
    """The link breaks without a word."""

    def poll(timeout: float) -> Any:
        raise SessionLost("the link was cut")

    transport = trainer.split.trunk.session.channel._transport
    transport.poll = poll
    transport.wake()


class Run:
    """Four clients of two replicas, until one is moved; afterwards what the log says, by round, and the reference's training."""

    def __init__(self, work: Path, rounds: int, **settings: Any) -> None:
        (work / "run").mkdir()
        model = tiny_llama(work / "model")
        self.replicas = Replicas(work / "run", model, 2, CLIENTS, round_steps=rounds, **TRUNK | settings)

    def train(self, upload: Callable[[Trainer, int, Callable[[Any, memoryview], None]], bool] = lambda *args: True) -> None:
        """``upload(trainer, round, send)``: stands before each upload of the client that will be moved; returns whether that is
        to be sent.
        """
        until = UntilMoved(self.replicas, CLIENTS)

        def client(index: int) -> tuple[list[float], dict[str, torch.Tensor]]:
            trainer = trainers[index]
            losses = [trainer.step(batch(index, step)) for step in until.steps(index)]
            trainer.end()
            return losses, trainer.weights

        with serving(self.replicas):
            trainers = {index: Trainer(self.replicas, index) for index in ORDER}
            rounds = trainers[MOVED].split.trunk.session.rounds
            send_all = rounds._upload
            rounds._upload = lambda number, send: upload(trainers[MOVED], number, send) and send_all(number, send)
            results = side_by_side(CLIENTS, client)
        self.losses = [list(step) for step in zip(*(losses for losses, _ in results), strict=True)]
        self.weights = [weights for _, weights in results]
        self.rounds = list(zip(*(self.replicas.events("round", replica) for replica in range(2)), strict=True))
        (self.moved,) = self.replicas.events("moved")
        joined = [{event["client"] for event in self.replicas.events("joined", replica)} for replica in range(2)]
        assert joined == [{"client1", "client3"}, {"client0", "client2", f"client{MOVED}"}]
        assert self.moved["client"] == f"client{MOVED}"

    def members(self, number: int) -> dict[str, int]:
        """Of a round, with their weights, over both replicas."""
        here, there = self.rounds[number]
        return here["members"] | there["members"]

    def seats(self, step: int) -> list[list[int]]:
        """The clients of each replica in a step."""
        return [[3], [0, 1, 2]] if step > self.moved["after"] else [[1, 3], [0, 2]]

    def assert_equals_reference(self) -> None:
        """Each round averages whom the log names, weighted by what they have counted since the round before."""
        local = self.replicas.config.local_steps > 1
        reference = Federated(self.replicas, self.seats, batch) if local else Reference(self.replicas, batch=batch)
        everybody = list(range(CLIENTS))
        for number, losses in enumerate(self.losses):
            assert losses == pytest.approx(reference.step(number, everybody), rel=LOSS)
            if (number + 1) % reference.rounds == 0:
                members = self.members(number // reference.rounds)
                assert members == {
                    f"client{index}": reference.counted[index] for index in everybody if f"client{index}" in members
                }
                reference.average([index for index in everybody if f"client{index}" in members], everybody)
        assert fraction_of(self.replicas.weights(), snapshot(reference.trunk), reference.start) <= WEIGHTS
        for index, mine in enumerate(self.weights):
            theirs = snapshot(reference.ends[index])
            assert fraction_of(mine, theirs, reference.ends_start) <= WEIGHTS
            assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= 1e-5


@pytest.mark.parametrize("rounds", [1, 12])
def test_a_client_that_moves_weighs_what_it_has_counted_and_goes_on_from_the_average(tmp_path: Path, rounds: int) -> None:
    run = Run(tmp_path, rounds, step_deadline=0)
    run.train()
    assert all(len(run.members(number)) == CLIENTS for number in range(len(run.rounds)))
    assert len(run.losses) == rounds * len(run.rounds)
    run.assert_equals_reference()


@pytest.mark.parametrize(("sync", "rounds"), [(2, 2), (3, 9)])
def test_a_client_moves_where_replicas_meet_that_make_steps_of_their_own_in_between(
    tmp_path: Path, sync: int, rounds: int
) -> None:
    """Also amid a round, of which it has counted some on either replica."""
    run = Run(tmp_path, rounds, step_deadline=0, sync=str(sync))
    run.train()
    after, met = run.moved["after"], run.replicas.events("step")
    assert (after + 1) % sync == 0
    assert [event["step"] for event in met if event["met"]] == list(range(sync - 1, len(run.losses), sync))
    for number in range(len(run.losses)):
        for replica, seated in enumerate(run.seats(number)):
            parts = run.replicas.events("step", replica)[number]["parts"]
            assert parts.keys() == {f"client{index}" for index in seated}
    assert all(len(run.members(number)) == CLIENTS for number in range(len(run.rounds)))
    run.assert_equals_reference()


def test_a_member_that_was_late_with_its_ends_and_is_moved_then_finds_the_average_where_it_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, 1, step_deadline=4)

    def upload(trainer: Trainer, number: int, send: Callable[[Any, memoryview], None]) -> bool:
        """Shortly before it can be moved, and until then, it keeps the others waiting amid its upload."""
        if number < REST or run.replicas.events("moved"):
            return True
        rounds, sent = trainer.split.trunk.session.rounds, 0

        def some(part: Any, view: memoryview) -> None:
            nonlocal sent
            sent += 1
            if sent < 4:
                send(part, view)

        type(rounds)._upload(rounds, number, some)
        return False

    run.train(upload)
    number = run.moved["after"]
    assert run.rounds[number][0]["left_out"] == {f"client{MOVED}": "late"}
    assert f"client{MOVED}" not in run.members(number)
    assert run.rounds[number + 1][1]["members"].keys() == {"client0", f"client{MOVED}", "client2"}
    run.assert_equals_reference()


@pytest.mark.parametrize(("sync", "rounds"), [("step", 1), ("2", 2)])
def test_a_link_that_breaks_amid_the_upload_before_a_move_changes_nothing_under_wait(
    tmp_path: Path, sync: str, rounds: int
) -> None:
    run = Run(tmp_path, rounds, step_deadline=0, on_loss="wait", sync=sync)
    broken: set[int] = set()

    def upload(trainer: Trainer, number: int, send: Callable[[Any, memoryview], None]) -> bool:
        if number < REST // rounds or number in broken or run.replicas.events("moved"):
            return True
        broken.add(number)
        cut(trainer)
        return False

    run.train(upload)
    assert (run.moved["after"] + 1) / rounds - 1 in broken
    joined = [[event["client"] for event in run.replicas.events("joined", replica)] for replica in range(2)]
    assert joined[0].count(f"client{MOVED}") == 1 + len(broken)
    assert joined[1].count(f"client{MOVED}") == 1
    assert all(len(run.members(number)) == CLIENTS for number in range(len(run.rounds)))
    run.assert_equals_reference()
