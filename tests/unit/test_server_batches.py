"""Batches under way while events come in: who is ended by what, and the thread that waits for them."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

from server_trunk.gradients import GradientSum
from splitfl.protocol.messages import AskNorm, Enrol, Hidden, Leave, Pause, StepDone, TrunkNorm
from tests.unit.trunkloop_world import Desk, backward, forward, honest
from tests.world import tiny_llama

TWO = ((4, 0), (4, 0))  # a piece for each of two lanes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Gate:
    """Lanes stand still at it until it opens."""

    def __init__(self):
        self.reached, self._open = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self._open.wait(30)

    def open_soon(self) -> None:
        threading.Timer(0.2, self._open.set).start()


@pytest.mark.parametrize("word", [Pause, Leave])
def test_a_client_whose_batch_fails_as_it_leaves_ends_nobody_else(model, tmp_path, word):
    desk, gate = Desk(model, tmp_path, clients=2, lanes=2), Gate()
    desk.join("a", "b")
    run = desk.engine._run

    def fail(piece, *, grad):
        gate.wait()
        raise RuntimeError("index out of range")

    desk.engine._run = fail
    desk.take(("b", forward(0, *TWO)))
    desk.loop._turn()
    assert gate.reached.wait(30)
    gate.open_soon()
    desk.run(("b", word()))
    assert "index out of range" in desk.outlet.ended["b"].text
    desk.engine._run = run
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    assert desk.outlet.closed()


def test_a_last_backward_that_fails_after_its_client_has_left_ends_nobody_else(model, tmp_path, monkeypatch):
    desk, gate = Desk(model, tmp_path, clients=2, lanes=2), Gate()
    desk.engine._in_place, desk.engine.is_atomic = False, True
    desk.join("a", "b")
    desk.run(("b", forward(0, *TWO)))

    def fail(*_):
        gate.wait()
        raise RuntimeError("no")

    monkeypatch.setattr(GradientSum, "differentiate", fail)
    desk.take(("b", backward(0, 8, want=False)))
    desk.loop._turn()
    assert gate.reached.wait(30)
    gate.open_soon()
    desk.run(("b", StepDone(0, 1, 1, "continue")), ("b", Leave()))
    monkeypatch.undo()
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    assert desk.outlet.closed()


def test_the_thread_sleeps_while_the_lanes_are_busy_though_a_batch_has_waited_long_enough(model, tmp_path, monkeypatch):
    desk, gate = Desk(model, tmp_path, clients=3, lanes=2), Gate()
    desk.loop._scheduler.batch_wait = 0.05
    desk.join("a", "b", "c")
    desk.run(("a", forward(0, *TWO)))
    time.sleep(0.06)
    desk.run()
    differentiate = GradientSum.differentiate

    def slow(*args):
        gate.wait()
        return differentiate(*args)

    monkeypatch.setattr(GradientSum, "differentiate", slow)
    desk.take(("b", forward(0)))
    desk.loop._turn()
    assert desk.loop._scheduler.due  # it waits for c's
    desk.take(("a", backward(0, 8)))
    while not desk.loop._batches.are_underway:
        desk.loop._turn()
    gate.open_soon()
    turns = 0
    while desk.loop._batches.are_underway:
        desk.loop._turn()
        turns += 1
    assert turns < 20


def test_no_room_for_the_gradients_of_a_backward_is_that_batch_s_end(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.engine._in_place, desk.engine.is_atomic = False, True
    desk.join("a", "b")
    desk.run(("b", forward(0)))

    def full(tensor):
        raise torch.OutOfMemoryError("no memory (injected)")

    up, desk.engine._transfers.up = desk.engine._transfers.up, full
    desk.run(("b", backward(0)))
    desk.engine._transfers.up = up
    assert "no memory" in desk.outlet.ended["b"].text
    assert not desk.engine._graphs
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    assert desk.outlet.closed()


@pytest.mark.parametrize("clients", ["a", "ab"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_what_a_batch_had_computed_is_free_before_it_runs_again(model, tmp_path, clients, lanes):
    """Whole, as what is kept for later has made room, or member by member; be it a piece that failed or one that ran."""
    desk = Desk(model, tmp_path, clients=2, lanes=lanes)
    desk.engine._may_shrink = False
    desk.engine.make_room = lambda: len(clients) == 1
    desk.join("a", "b")
    run, outs, was_free = desk.engine._run, [], []

    def full_at_last(piece, *, grad):
        first = len(outs) < lanes
        if not first:
            was_free.append(all(out() is None for out in outs))
        found = run(piece, grad=grad)
        if first:
            outs.append(weakref.ref(piece.out))
            if len(outs) == lanes:
                raise torch.OutOfMemoryError("no memory (injected)")
        return found

    desk.engine._run = full_at_last
    desk.run(*((client, forward(0, *TWO)) for client in clients))
    assert was_free
    assert all(was_free)
    assert [session for session, _, _ in desk.outlet.sent] == list(clients)


def test_a_batch_of_one_piece_takes_the_lane_that_is_free_and_holds_no_answer_back(model, tmp_path):
    desk, gate = Desk(model, tmp_path, clients=2, lanes=2), Gate()
    desk.join("a", "b")
    run, where = desk.engine._run, {}

    def held(piece, *, grad):
        where[piece.tokens] = threading.current_thread().name
        if piece.tokens == 4 and piece.places[0].begin:
            gate.wait()  # the second piece of a's
        return run(piece, grad=grad)

    desk.engine._run = held
    desk.take(("a", forward(0, *TWO)))
    desk.loop._turn()
    assert gate.reached.wait(30)
    desk.take(("b", forward(0, (5, 0))))
    while 5 not in where:
        desk.loop._turn()
    assert where[5].startswith("trunk-lane")
    assert not desk.outlet.sent
    gate.open_soon()
    desk.run()
    assert [(session, type(message)) for session, message, _ in desk.outlet.sent] == [("a", Hidden), ("b", Hidden)]


def test_whoever_comes_back_to_its_part_is_told_a_norm_once(model, tmp_path):
    desk = Desk(model, tmp_path, clip=1e-3, on_loss="wait")
    desk.join("a")
    desk.run(("a", forward(0)))
    desk.run(("a", backward(0)))
    desk.run(("a", "lost"))
    desk.run(("a2", "a"))
    desk.run(("a2", Enrol()))
    desk.run(("a2", forward(0)))
    desk.run(("a2", backward(0)))
    desk.run(("a2", AskNorm(0, 1)))
    assert [session for session, message in desk.outlet.told if isinstance(message, TrunkNorm)] == ["a2"]
