"""Clients that are late: the step goes on, one exception says so, and the session takes part in the next step."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from client_ends.session import TrunkSession
from client_ends.train import train
from splitfl.errors import StepMissed
from splitfl.protocol.messages import Backward, Forward, Heartbeat, StepDone
from tests.integration.test_equality import TRUNK
from tests.integration.test_lost import (
    FLIGHTY,
    QUICK,
    STEADY,
    assert_equals_reference,
    cut,
    enrol,
    is_lost,
    is_open,
    join,
    step,
    wait_for,
)
from tests.integration.test_train import settings
from tests.world import World, running, side_by_side, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def late_world(tmp_path, model, **options) -> World:
    return World(tmp_path, model, 2, trainables="full", timing=QUICK, step_deadline=0.2, **TRUNK, **options)


def rejoin(world: World, late, steady, number: int, losses: list[float]) -> None:
    """The late client's next forward enrols it: it takes part in the step after the one that is open."""
    session = late.trunk.session
    wait_for(lambda: is_open(world, number) and (session._dropped is not None or not session._enrolled))
    session._check_missed()
    waiting = threading.Thread(target=session._take_part)
    waiting.start()
    wait_for(lambda: len(world.server._loop._steps._enrolled) == 2)
    losses += step(steady, STEADY[number])
    waiting.join()
    losses += step(steady, STEADY[number + 1])
    step(late, *FLIGHTY[number + 1])
    steady.wait_step()


@pytest.mark.parametrize("ran", [0, 1])
def test_a_late_client_misses_one_step_and_takes_part_in_the_next(tmp_path, model, ran):
    world = late_world(tmp_path, model)
    losses: list[float] = []
    with running(world):
        steady, late = join(world, 0), join(world, 1)
        enrol(steady, late)
        first, second = [late(**one).loss for one in FLIGHTY[0]]
        if ran:
            first.backward()
        losses += step(steady, STEADY[0])
        wait_for(lambda: is_open(world, 1))
        with pytest.raises(StepMissed, match="step 0"):
            second.backward()
        assert not late.trunk.session.contributed
        with torch.no_grad():
            assert float(late(**FLIGHTY[0][0]).loss) > 0  # the session goes on
        rejoin(world, late, steady, 1, losses)
    assert_equals_reference(world, [[STEADY[0], *FLIGHTY[0][:ran]], [STEADY[1]], [STEADY[2], *FLIGHTY[2]]], losses)
    part = world.events("step")[0]["parts"]["client1"]
    assert (part["dropped"], part["why"], part["micro_batches"]) == (True, "late", ran)
    assert not world.events("left")[0]["why"].startswith("protocol")


def test_a_silent_participant_loses_nothing(tmp_path, model):
    world = late_world(tmp_path, model)
    losses: list[float] = []
    with running(world):
        steady, late = join(world, 0), join(world, 1)
        enrol(steady, late)
        losses += step(steady, STEADY[0])
        rejoin(world, late, steady, 1, losses)  # no exception: it had begun nothing
    assert_equals_reference(world, [[STEADY[0]], [STEADY[1]], [STEADY[2], *FLIGHTY[2]]], losses)


def test_who_hears_that_a_step_is_over_just_before_its_first_forward_leaves_takes_part_in_the_next(tmp_path, model, monkeypatch):
    world = late_world(tmp_path, model)
    losses: list[float] = []
    with running(world):
        steady, late = join(world, 0), join(world, 1)
        enrol(steady, late)
        session, first = late.trunk.session, threading.Event()
        take_part = session._take_part

        def and_hear() -> None:
            take_part()
            if not first.is_set():
                first.set()
                with session._lock:
                    assert session._lock.wait_for(lambda: session._dropped is not None, timeout=20.0)

        monkeypatch.setattr(session, "_take_part", and_hear)
        found: list[torch.Tensor] = []
        forward = threading.Thread(target=lambda: found.append(late(**FLIGHTY[2][0]).loss))
        forward.start()
        wait_for(first.is_set)
        losses += step(steady, STEADY[0])
        wait_for(lambda: is_open(world, 1) and len(world.server._loop._steps._enrolled) == 2)
        losses += step(steady, STEADY[1])
        forward.join()
        found[0].backward()
        for one in FLIGHTY[2][1:]:
            late(**one).loss.backward()
        late.step()
        losses += step(steady, STEADY[2])
        steady.wait_step()
    assert_equals_reference(world, [[STEADY[0]], [STEADY[1]], [STEADY[2], *FLIGHTY[2]]], losses)


@pytest.mark.parametrize("heard", [False, True])
def test_the_end_of_a_part_that_had_counted_is_not_missed_however_late(tmp_path, model, heard):
    world = late_world(tmp_path, model)
    losses: list[float] = []
    with running(world):
        steady, late = join(world, 0), join(world, 1)
        enrol(steady, late)
        for one in FLIGHTY[0]:
            late(**one).loss.backward()
        losses += step(steady, STEADY[0])
        wait_for(lambda: is_open(world, 1) and (not heard or late.trunk.session._dropped is not None))
        late.step()
        rejoin(world, late, steady, 1, losses)
    assert_equals_reference(world, [[STEADY[0], *FLIGHTY[0]], [STEADY[1]], [STEADY[2], *FLIGHTY[2]]], losses)


def test_messages_that_cross_the_end_of_their_step_end_nothing(tmp_path, model, monkeypatch):
    """The late client has not heard yet when it sends a forward, a gradient and the end of its part."""
    world = late_world(tmp_path, model)
    losses: list[float] = []
    with running(world):
        steady, late = join(world, 0), join(world, 1)
        enrol(steady, late)
        loss = late(**FLIGHTY[0][0]).loss
        session = late.trunk.session
        heard: list[object] = []
        monkeypatch.setattr(session.channel, "_on_control", heard.append)
        receive = session.channel._session.receive
        deaf: list[bytes] = []
        monkeypatch.setattr(session.channel._session, "receive", deaf.append)
        losses += step(steady, STEADY[0])
        wait_for(lambda: is_open(world, 1))
        number, width = session._next_micro - 1, late.config.hidden_size
        tensor = memoryview(torch.zeros(10, width).numpy()).cast("B")
        session.channel.send(Backward(0, number, 10, width, "float32", "raw", 9, 9.0), tensor)
        session.channel.tell(StepDone(0, 1, 1, "continue"))
        session.channel.send(Forward(1, 77, ((10, 0),), width, "float32", "raw", True, True, True), tensor)
        wait_for(lambda: not session.channel._data_queue and not session.channel._control_queue)
        monkeypatch.undo()
        for frame in deaf:
            message = receive(frame)
            if message is not None and not isinstance(message, Heartbeat):  # a heartbeat is true of the moment when it comes
                session.channel._control(message)
        with pytest.raises(StepMissed):
            loss.backward()
        rejoin(world, late, steady, 1, losses)
    assert_equals_reference(world, [[STEADY[0]], [STEADY[1]], [STEADY[2], *FLIGHTY[2]]], losses)


def test_a_lost_client_is_awaited_no_longer_than_the_deadline(tmp_path, model):
    world = late_world(tmp_path, model, on_loss="wait")
    with running(world):
        steady, lost = join(world, 0), join(world, 1)
        enrol(steady, lost)
        lost(**FLIGHTY[0][0])
        cut(lost)
        wait_for(lambda: is_lost(world, lost))
        losses = [loss for number in range(3) for loss in step(steady, STEADY[number])]
        steady.wait_step()
    assert_equals_reference(world, [[STEADY[0]], [STEADY[1]], [STEADY[2]]], losses)
    assert world.events("step")[0]["parts"]["client1"]["why"] == "lost"


def test_nobody_is_late_while_nobody_waits(tmp_path, model):
    world = late_world(tmp_path, model)
    with running(world):
        alone, other = join(world, 0), join(world, 1)
        enrol(alone, other)
        time.sleep(0.5)  # longer than the deadline
        losses = [split(**STEADY[0]).loss for split in (alone, other)]
        time.sleep(0.5)
        for loss in losses:
            loss.backward()
        alone.step()
        other.step()
        alone.wait_step()
    (event,) = world.events("step")
    assert [part["micro_batches"] for part in event["parts"].values()] == [1, 1]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_clients_that_are_late_at_any_moment_end_no_session_and_hold_nobody_up(tmp_path, model, mode):
    """Deadlines as short as the sleeps, so that every message crosses every end of a step sooner or later."""
    settings = {"mode": mode} | ({"max_staleness": 0} if mode == "async" else {})
    world = World(tmp_path, model, 3, trainables="full", timing=QUICK, step_deadline=0.02, **settings)
    missed = [0, 0, 0]

    def client(index: int) -> None:
        split, draw = join(world, index), random.Random(index)
        session = split.trunk.session
        for _ in range(30):
            try:
                for one in FLIGHTY[0]:
                    loss = split(**one).loss
                    time.sleep(draw.choice((0, 0, 0.02, 0.04)))
                    loss.backward()
                    time.sleep(draw.choice((0, 0, 0.02, 0.04)))
                if draw.random() < 0.2:
                    split.step("pause")
                    with torch.no_grad():
                        split(**STEADY[0])
                else:
                    split.step()
            except StepMissed:
                missed[index] += 1
        session.pause()
        split.wait_step()
        split.close()

    with running(world):
        side_by_side(3, client)
        wait_for(lambda: not world.server._loop._names)
        loop = world.server._loop
        assert loop.failure is None
        assert not loop._keeper._stale
        assert not loop._scheduler._waiting
    assert sum(missed) > 0
    assert [event["why"] for event in world.events("left")] == ["the client said goodbye"] * 3


def test_the_command_goes_on_after_a_step_it_missed(tmp_path, data, stories, monkeypatch):
    world = World(tmp_path, stories, 2, memory=False, step_deadline=0.3)
    send = TrunkSession.send_backward
    slept: list[int] = []

    def late_once(self: TrunkSession, number: int, *args, **options) -> None:
        if self is sleepy and self.step >= 1 and not slept:
            slept.append(self.step)
            wait_for(lambda: len(world.events("step")) > self.step)
        send(self, number, *args, **options)

    sleepy = None
    opened = TrunkSession.open.__func__

    def remember(cls, join, identity, *args, **options):
        nonlocal sleepy
        session = opened(cls, join, identity, *args, **options)
        if str(identity.public) in mine:
            sleepy = session
        return session

    mine = (tmp_path / "authorized_clients").read_text().splitlines()[1]
    monkeypatch.setattr(TrunkSession, "open", classmethod(remember))
    monkeypatch.setattr(TrunkSession, "send_backward", late_once)
    with running(world):
        steady, late = side_by_side(2, lambda index: train(settings(world, data, index, steps=6, ends="full")))
    assert (late.missed, late.steps) == (1, 5)
    assert (steady.missed, steady.steps) == (0, 6)
