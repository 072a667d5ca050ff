"""Links that break and are had again: what is trained is what the undisturbed run trains, and the client's code sees nothing."""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client_ends.reconnecting import Reconnecting
from client_ends.retrying import may_pass
from client_ends.session import TrunkSession
from splitfl.errors import ConnectError, Refused, SealError, SessionLost, StepMissed
from splitfl.protocol.messages import Fault, RefusalCode, StepClosed
from splitfl.transport.memory import MemoryClientTransport
from tests.integration.test_lost import (
    FLIGHTY,
    QUICK,
    STEADY,
    TRUNK,
    assert_equals_reference,
    cut,
    enrol,
    is_open,
    step,
    wait_for,
)
from tests.world import World, running, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def join(world: World, client: int, **options: Any) -> Any:
    """A client whose link is had again; its ends do not change, but want their gradient back."""
    options = {"channel_options": {"transport": lambda: MemoryClientTransport(world.network)}} | options
    split = world.join_as(client, **options).train()
    split.requires_grad_(False)
    split.get_input_embeddings().weight.requires_grad_(True)
    return split


def go_until(stage: str, world: World, split: Any) -> list[torch.Tensor]:
    """The first step, and the second as far as the stage goes; returns the losses whose backward is still to come."""
    step(split, *FLIGHTY[0])
    wait_for(lambda: is_open(world, 1))
    if stage == "open":
        return []
    losses = [split(**one).loss for one in FLIGHTY[1]]
    if stage == "forward":
        return losses
    losses[0].backward()
    if stage == "one backward":
        return losses[1:]
    losses[1].backward()
    if stage == "done":
        split.step()
        wait_for(lambda: any(part.done for part in world.server._loop._steps._holders.values()))
    return []


def finish(stage: str, split: Any, left: list[torch.Tensor]) -> None:
    if stage == "open":
        step(split, *FLIGHTY[1])
        return
    for loss in left:
        loss.backward()
    if stage != "done":
        split.step()


@pytest.mark.parametrize("stage", ["open", "forward", "one backward", "all backwards", "done"])
def test_under_wait_a_link_that_breaks_changes_nothing(tmp_path, model, stage):
    world = World(tmp_path, model, 2, trainables="full", timing=QUICK, on_loss="wait", step_deadline=0.0, **TRUNK)
    losses: list[float] = []
    said: list[str] = []
    with running(world):
        steady, flighty = join(world, 0), join(world, 1)
        flighty.trunk.session.on_link = said.append
        enrol(steady, flighty)
        beside = threading.Thread(target=lambda: [losses.extend(step(steady, one)) for one in STEADY])
        beside.start()
        left = go_until(stage, world, flighty)
        session = flighty.trunk.session.channel.opened.session
        cut(flighty)
        finish(stage, flighty, left)
        for number in range(2, 5):
            step(flighty, *FLIGHTY[number])
        beside.join(60)
        flighty.wait_step()
        assert flighty.trunk.session.channel.opened.session != session
        flighty.close()
    assert_equals_reference(world, [[one, *two] for one, two in zip(STEADY, FLIGHTY, strict=True)], losses)
    assert [event["parts"]["client1"]["micro_batches"] for event in world.events("step")] == [2] * 5
    assert len(world.events("joined")) == 3
    assert said[0].startswith("the connection to the server broke; connecting again")
    assert said[1].startswith("connected again after")


def test_who_leaves_while_it_is_sent_elsewhere_says_so_there(tmp_path, model, monkeypatch):
    monkeypatch.setattr(Reconnecting, "_restore", lambda session, lost: None)  # it leaves before it has connected again
    world = World(tmp_path, model, 1, timing=QUICK, **TRUNK)
    with running(world):
        split = join(world, 0)
        step(split, STEADY[0])
        split.wait_step()
        moved = split.trunk.session.channel
        world.server.endpoints.end(moved.opened.session, Fault(RefusalCode.MOVED, "elsewhere", True, None))
        wait_for(lambda: moved.ended_by == "moved")
        split.close()
        wait_for(lambda: len(world.events("left")) == 2)
    assert [event["why"] for event in world.events("left")] == ["moved: elsewhere", "the client said goodbye"]
    assert not any(event["lost"] for event in world.events("left"))


def test_who_is_sent_elsewhere_and_takes_part_in_no_further_step_says_so_there(tmp_path, model, monkeypatch):
    world = World(tmp_path, model, 1, timing=QUICK, **TRUNK)
    with running(world):
        split = join(world, 0)
        step(split, STEADY[0], then="pause")
        split.wait_step()
        moved, keeper = split.trunk.session.channel, world.server._loop._keeper
        withdrawn: list[str] = []
        monkeypatch.setattr(keeper, "withdraw", withdrawn.append)
        world.server.endpoints.end(moved.opened.session, Fault(RefusalCode.MOVED, "elsewhere", True, None))
        wait_for(lambda: split.trunk.session.channel is not moved)
        wait_for(lambda: withdrawn == [split.trunk.session.channel.opened.session])
        split.close()


def test_under_drop_the_step_goes_on_and_the_client_hears_it_once(tmp_path, model):
    world = World(tmp_path, model, 2, trainables="full", timing=QUICK, step_deadline=0.0, **TRUNK)
    losses: list[float] = []
    with running(world):
        steady, flighty = join(world, 0), join(world, 1)
        enrol(steady, flighty)
        losses += step(steady, STEADY[0])
        (loss,) = go_until("one backward", world, flighty)
        cut(flighty)
        wait_for(lambda: len(world.events("joined")) == 3 and len(world.server._loop._steps._enrolled) == 2)
        losses += step(steady, STEADY[1])
        with pytest.raises(StepMissed, match="which was away"):
            loss.backward()
        losses += step(steady, STEADY[2])
        step(flighty, *FLIGHTY[2])
        flighty.wait_step()
    assert_equals_reference(world, [[STEADY[0], *FLIGHTY[0]], [STEADY[1], FLIGHTY[1][0]], [STEADY[2], *FLIGHTY[2]]], losses)


def test_evaluation_is_asked_again(tmp_path, model):
    world = World(tmp_path, model, 1, trainables="full", timing=QUICK, **TRUNK)
    with running(world):
        split = join(world, 0)
        step(split, *FLIGHTY[0])
        split.trunk.session.pause()
        split.wait_step()
        with torch.no_grad():
            before = float(split(**STEADY[0]).loss)
            cut(split)
            assert float(split(**STEADY[0]).loss) == before
        step(split, *FLIGHTY[1])
        split.wait_step()
    assert [event["parts"]["client0"]["micro_batches"] for event in world.events("step")] == [2, 2]


@pytest.mark.parametrize("then", ["pause", "leave"])
def test_a_part_that_was_done_for_good_is_whole_though_the_word_was_lost(tmp_path, model, then):
    """The link breaks with the word that the part is done still under way."""
    world = World(tmp_path, model, 1, trainables="full", timing=QUICK, on_loss="wait", step_deadline=0.0, **TRUNK)
    with running(world):
        split = join(world, 0)
        for one in FLIGHTY[0]:
            split(**one).loss.backward()
        channel = split.trunk.session.channel
        channel._control_queue = Nowhere()
        split.step(then)
        assert not world.events("step")
        cut(split)
        split.wait_step()
        wait_for(lambda: world.events("step"))
        split.close()
    (event,) = world.events("step")
    assert (event["parts"]["client0"]["micro_batches"], event["parts"]["client0"]["dropped"]) == (2, False)


class Nowhere(deque):
    """A queue that loses what is put into it."""

    def append(self, item: Any) -> None:
        pass


def test_who_is_told_to_go_does_not_come_again(tmp_path, model):
    world = World(tmp_path, model, 1, timing=QUICK, **TRUNK)
    with running(world):
        split = join(world, 0)
        step(split, *FLIGHTY[0])
        (world.work / "authorized_clients").write_text("")
        wait_for(lambda: split.trunk.session._lost is not None)
        with pytest.raises(SessionLost, match="removed from the server's list"):
            step(split, *FLIGHTY[1])
    assert len(world.events("joined")) == 1


def test_a_link_that_cannot_be_had_again_is_given_up(tmp_path, model):
    world = World(tmp_path, model, 1, timing=QUICK, **TRUNK)
    with running(world):
        split = join(world, 0, reconnect=0.2)
        step(split, *FLIGHTY[0])
        world.network.server, gone = None, world.network.server
        gone.detach(split.trunk.session.channel._transport._link)
        with pytest.raises(SessionLost, match=r"broke; no other session could be had for 0\.2 s: nothing listens"):
            step(split, *FLIGHTY[1])


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (SessionLost("silent"), True),
        (SessionLost("the server closed the session", "restarting"), True),
        (SessionLost("the server closed the session", "closing"), False),
        (SessionLost("broken", "seal"), True),
        (SealError("a tag"), True),
        (SessionLost("removed", "not-authorized"), False),
        (SessionLost("taken", "replaced"), False),
        (SessionLost("ours", "protocol"), False),
        (SessionLost("too large", "too-many-tokens"), False),
        (ConnectError("nothing listens"), True),
        (Refused("full", "later"), True),
        (Refused("model-mismatch", "another model"), False),
        (ValueError("a bug"), False),
    ],
)
def test_what_may_pass(error, passes):
    assert may_pass(error) == passes


def test_the_run_ends_while_the_link_is_had_again(tmp_path, model):
    """The last part is whole at the server, and the word that its step has closed goes to a session that is gone."""
    world = World(
        tmp_path, model, 2, trainables="full", timing=QUICK, on_loss="wait", step_deadline=0.0, **TRUNK | {"optimizer.steps": 2}
    )
    with running(world):
        steady, flighty = join(world, 0), join(world, 1)
        enrol(steady, flighty)
        step(steady, STEADY[0])
        go_until("done", world, flighty)
        cut(flighty)
        wait_for(lambda: len(world.server._loop._steps._enrolled) == 2)
        step(steady, STEADY[1])
        waiting = threading.Thread(target=flighty.wait_step, daemon=True)
        waiting.start()
        waiting.join(10)
        assert not waiting.is_alive(), "it waits for ever"
        flighty.close()


def test_a_run_whose_only_client_has_lost_its_link_is_not_done(tmp_path, model):
    world = World(
        tmp_path, model, 1, trainables="full", timing=QUICK, on_loss="wait", step_deadline=0.0, until_done=True, **TRUNK
    )
    with running(world):
        split = join(world, 0)
        left = go_until("one backward", world, split)
        cut(split)
        finish("one backward", split, left)
        split.wait_step()
        assert not world.server._done.is_set()
        split.close()
        assert world.server.wait(10)


def test_an_asynchronous_part_whose_end_was_not_heard_is_not_waited_for(tmp_path, model):
    world = World(tmp_path, model, 1, trainables="full", timing=QUICK, mode="async", **TRUNK)
    with running(world):
        split = join(world, 0)
        tell = world.server.endpoints.tell
        world.server.endpoints.tell = lambda session, message: None if isinstance(message, StepClosed) else tell(session, message)
        for one in FLIGHTY[0]:
            split(**one).loss.backward()
        split.step("leave")
        wait_for(lambda: world.events("step"))
        cut(split)
        waiting = threading.Thread(target=split.wait_step, daemon=True)
        waiting.start()
        waiting.join(10)
        assert not waiting.is_alive(), "it waits for ever"


def test_a_link_that_breaks_as_it_is_taken_is_no_link():
    class Breaking(threading.Condition):
        """The loss of the link comes first to the lock."""

        def __enter__(self) -> bool:
            session._broken = SessionLost("the link broke")
            return super().__enter__()

    session = TrunkSession()
    closed: list[bool] = []
    channel: Any = SimpleNamespace(
        opened=SimpleNamespace(step=0), welcome=SimpleNamespace(config={"mode": "sync"}), bytes_sent=0, bytes_received=0
    )
    channel.close = lambda leave: closed.append(leave)
    session._channel, session._lock = channel, Breaking()
    assert not session._take(channel)
    assert closed == [False]
