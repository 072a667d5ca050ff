"""The trunk's loop over a real engine, turn by turn: what a session may do to itself, and never to others."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from dataclasses import replace

import pytest
import torch

from server_trunk.gateway import Gateway
from server_trunk.replicas.sums import EarlySums, Sums
from server_trunk.scheduler import MAX_UNDERWAY
from server_trunk.transfers import Landing
from server_trunk.trunkloop import Event
from server_trunk.underway import Underway
from splitfl.config import build_config
from splitfl.errors import GroupLost, RemoteProtocolError
from splitfl.parts.identity import model_identity
from splitfl.protocol.messages import Enrol, Fault, Grad, Hidden, Pause, StepDone, StepOpened
from splitfl.runlog import RunLog
from tests.unit.trunkloop_world import HIDDEN, Desk, backward, forward, honest
from tests.world import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def test_two_micro_batches_of_one_number_end_their_session_and_nobody_waits_for_it(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "liar")
    desk.run(("a", forward(0)), ("liar", forward(7)), ("liar", forward(7)))
    assert "twice" in desk.outlet.ended["liar"].text
    desk.run(*honest("a"))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]


def test_a_position_that_would_grow_the_rotary_table_of_all_is_refused(model):
    config = build_config({"model": model})
    gateway = Gateway(config, model_identity(model), HIDDEN, queue.Queue(), RunLog(None, echo=None), longest=64)
    gateway.allocate("a", forward(0, (4, 60)))
    with pytest.raises(RemoteProtocolError, match="position 64"):
        gateway.allocate("a", forward(0, (4, 0), (4, 61)))


def test_a_flood_of_tiny_forwards_is_bounded(model, tmp_path):
    desk = Desk(model, tmp_path, client_tokens=10**6)
    desk.join("a")
    for micro in range(MAX_UNDERWAY + 1):
        desk.take(("a", forward(micro, (1, 0), step=9, grad=False)))
    desk.loop._receive()
    assert "under way" in desk.outlet.ended["a"].text
    assert not desk.loop._scheduler._waiting
    assert not desk.loop._scheduler._underway


def test_no_number_of_targets_ends_the_loop(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "liar")
    desk.run(("a", forward(0)), ("liar", forward(0)), ("liar", backward(0, targets=2**53 - 1)))
    assert "targets" in desk.outlet.ended["liar"].text
    desk.run(*honest("a"))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]


def test_one_long_sequence_among_many_short_ones_is_refused_before_it_is_padded(model, tmp_path):
    desk = Desk(model, tmp_path)
    desk.join("a")
    desk.run(("a", forward(0, (2000, 0), *[(1, 0)] * 2000, step=0, grad=False)))
    assert desk.outlet.ended["a"].code == "too-many-tokens"


def test_the_budget_of_a_batch_counts_its_pads(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "b")
    sizes = []
    run = desk.engine.begin_forward
    desk.engine.begin_forward = lambda batch, heard: sizes.append(len(batch.members)) or run(batch, heard)
    desk.run(("a", forward(0, (600, 0))), ("b", forward(0, *[(4, 0)] * 8)), ("b", forward(1)))
    assert sizes == [1, 2]  # 9 rows of 600 would be 5400 tokens for 632


def test_a_batch_the_trunk_cannot_run_ends_the_session_that_sent_it(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "b")
    run = desk.engine.begin_forward

    def choke():
        raise RuntimeError("index out of range")

    def begin(batch, heard=None):
        return Underway([], choke) if any(member.session == "b" for member in batch.members) else run(batch)

    desk.engine.begin_forward = begin
    desk.run(("a", forward(0)), ("b", forward(0)))
    assert "index out of range" in desk.outlet.ended["b"].text
    assert "a" not in desk.outlet.ended
    desk.run(*honest("a"))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]
    assert desk.events("forward-failed")[0]["client"] == "b"
    assert not desk.engine._graphs


@pytest.mark.parametrize(("value", "divisor"), [(math.nan, 4.0), (math.inf, 4.0), (1.0, 1e300)])
def test_a_gradient_that_is_not_finite_counts_for_nothing(model, tmp_path, value, divisor):
    weights = []
    for case in ("alone", "together"):
        (tmp_path / case).mkdir()
        desk = Desk(model, tmp_path / case, clients=1 if case == "alone" else 2)
        desk.join(*(["a"] if case == "alone" else ["a", "b"]))
        if case == "together":
            desk.take(("b", forward(0)))
        desk.run(("a", forward(0)))
        if case == "together":
            desk.loop.inbox.put(Event("b", backward(0, divisor=divisor), torch.full((4, HIDDEN), value)))
            desk.take(("b", StepDone(0, 1, 1, "continue")))
        desk.run(*honest("a"))
        (closed,) = desk.outlet.closed()
        assert closed.targets == 4
        assert closed.grad_norm is not None
        weights.append({name: p.detach().clone() for name, p in desk.engine.training.trainables.items()})
    assert desk.events("gradient-not-finite")[0]["client"] == "b"
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-6), name


def test_however_many_gradients_count_for_nothing_the_log_has_a_line_for_a_step(model, tmp_path):
    desk = Desk(model, tmp_path, clients=1)
    desk.join("a")
    for step in range(2):
        for micro in range(3):
            desk.run(("a", forward(micro, step=step)))
            desk.loop.inbox.put(Event("a", backward(micro, step=step), torch.full((4, HIDDEN), math.nan)))
        assert len(desk.events("gradient-not-finite")) == step
        desk.run(("a", StepDone(step, 3, 3, "continue")))
    found = [(event["client"], event["step"], event["micro_batches"]) for event in desk.events("gradient-not-finite")]
    assert found == [("a", 0, 3), ("a", 1, 3)]
    assert sum(isinstance(message, Fault) and message.code == "not-counted" for _, message in desk.outlet.told) == 6
    desk.run(("a", forward(0, step=2)))
    desk.loop.inbox.put(Event("a", backward(0, step=2), torch.full((4, HIDDEN), math.nan)))
    desk.run()
    desk.run(("a", None))
    assert [event["step"] for event in desk.events("gradient-not-finite")] == [0, 1, 2], "who leaves amid a step is named too"


def test_what_has_not_counted_of_a_step_that_never_closes_is_said_at_the_end(model, tmp_path):
    desk = Desk(model, tmp_path, clients=1)
    desk.join("a")
    desk.run(("a", forward(0)))
    desk.loop.inbox.put(Event("a", backward(0), torch.full((4, HIDDEN), math.nan)))
    desk.run()
    assert not desk.events("gradient-not-finite")
    desk.loop.start()
    desk.loop.stop()
    assert [event["micro_batches"] for event in desk.events("gradient-not-finite")] == [1]


def test_a_tiny_divisor_harms_nobody(model, tmp_path):
    desk = Desk(model, tmp_path)
    desk.join("a")
    desk.run(("a", forward(0)))
    desk.run(("a", backward(0, divisor=1e-300)), ("a", StepDone(0, 1, 1, "continue")))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]


def test_what_arrived_for_a_step_never_runs_in_the_next(model, tmp_path):
    """A client that leaves at once after its StepDone: all it declared is here, so all of it counts, in this step."""
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "b")
    for micro in range(3):  # one at a time: a batch each
        desk.run(("b", forward(micro)))
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    backs = [("b", backward(micro, want=False)) for micro in range(3)]
    desk.run(*backs, ("b", StepDone(0, 3, 3, "leave")), ("b", None))
    (closed,) = desk.outlet.closed()
    assert closed.targets == 16
    assert all(parameter.grad is None for parameter in desk.engine.training.trainables.values())
    assert not desk.events("step")[0]["parts"]["b"]["dropped"]


def test_a_forward_that_runs_after_its_end_of_step_holds_nobody_up(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "liar")
    desk.take(("a", forward(0)), ("liar", forward(0)), ("liar", StepDone(0, 1, 0, "continue")))
    desk.run()
    desk.run(*honest("a"))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]


def test_sessions_that_come_and_go_leave_nothing_behind(model, tmp_path):
    desk = Desk(model, tmp_path)
    for index in range(20):
        name = f"s{index}"
        desk.run((name, "open"), (name, Enrol()))
        desk.run((name, forward(0)))
        desk.run((name, None))
    loop = desk.loop
    assert not any([loop._keeper._stale, loop._names, loop._keeper._enrolments, desk.engine._graphs])
    assert not any([loop._steps._enrolled, loop._steps._ahead, loop._steps._missed, loop._steps._holders])
    assert not any([loop._scheduler._open, loop._scheduler._kept, loop._scheduler._ready, loop._scheduler._underway])


def test_whoever_waits_when_the_run_is_complete_is_told(model, tmp_path):
    desk = Desk(model, tmp_path, last=1)
    desk.join("a", "late")
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    faults = {session: message.code for session, message in desk.outlet.told if isinstance(message, Fault)}
    assert faults["late"] == "run-complete"
    assert [session for session, message in desk.outlet.told if isinstance(message, StepOpened)] == ["a"]


def test_a_step_all_withdrew_from_opens_again_under_its_number(model, tmp_path):
    desk = Desk(model, tmp_path)
    desk.join("a")
    desk.run(("a", forward(0)))
    desk.run(("a", Pause()))
    desk.run(("a", Enrol()), ("a", forward(1)))
    desk.run(("a", backward(1)), ("a", StepDone(0, 1, 1, "continue")))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]


def test_stopping_a_loop_that_has_failed_with_a_full_inbox(model, tmp_path):
    desk = Desk(model, tmp_path)
    loop = desk.loop
    loop._engine = None  # whatever it does next fails
    loop.start()
    desk.take(("a", "open"), ("a", Enrol()), ("a", forward(0)))
    assert loop.join(10)
    assert loop.failure is not None
    while not loop.inbox.full():
        loop.inbox.put_nowait(None)
    loop.stop()


@pytest.mark.parametrize("vanishes", [False, True])
def test_a_backward_that_cannot_run_holds_up_nobody(model, tmp_path, vanishes):
    desk = Desk(model, tmp_path, clients=2)
    desk.engine.is_atomic = True
    desk.join("a", "b")
    desk.run(("a", forward(0)))
    desk.run(("b", forward(0)))
    desk.run(*honest("a"))

    def choke():
        raise torch.OutOfMemoryError("no memory (injected)")

    desk.engine.begin_backward = lambda batch, heard: Underway([], choke)
    desk.run(*honest("b"), *([("b", None)] if vanishes else []))
    assert [closed.targets for closed in desk.outlet.closed()] == [4]
    assert ("b" in desk.outlet.ended) is not vanishes


def test_a_replica_that_is_gone_when_gradients_leave_amid_a_backward_is_no_fault_of_a_client(model, tmp_path, monkeypatch):
    def refuse(*given, **options):
        raise RuntimeError("Connection closed by peer (injected)")

    monkeypatch.setattr("torch.distributed.all_reduce", refuse)
    monkeypatch.setattr("torch.distributed.get_backend", lambda group: "nccl")
    desk = Desk(model, tmp_path)
    desk.engine._in_place, desk.engine.is_atomic = False, True
    parameters = desk.engine.training.parameters_of([])
    desk.engine.training.early = lambda *, in_place: EarlySums(Sums(parameters, None), in_place=in_place)
    desk.loop._steps.ends_with = lambda members: True
    desk.join("a")
    desk.run(("a", forward(0)))
    with pytest.raises(GroupLost, match="another replica is gone"):
        desk.run(*honest("a"))
    assert not desk.outlet.ended


def test_a_trunk_that_somebody_keeps_busy_still_drops_who_is_late(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2, deadline=1e-9)
    desk.join("a", "b")
    desk.run(("busy", "open"), ("a", forward(0)))
    desk.take(*honest("a"))
    desk.loop._scheduler.batch_tokens = 1  # so that one forward waits while another runs
    for micro in range(0, 8, 2):
        desk.take(("busy", forward(micro, grad=False)), ("busy", forward(micro + 1, grad=False)))
        desk.loop._turn()
    assert desk.loop._batches.has_work
    assert [closed.targets for closed in desk.outlet.closed()] == [4]
    assert desk.events("late")[0]["client"] == "b"


def test_a_flood_for_a_step_that_has_gone_on_is_bounded(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2)
    desk.join("a", "b")
    # As of a participant that was dropped while the step is held open by another.
    desk.loop._steps.is_stale = desk.loop._steps.is_ending = lambda session, *step: session == "b"
    for micro in range(2 * MAX_UNDERWAY + 10):
        desk.take(("b", forward(micro, (1, 0))))
    desk.loop._receive()
    assert "gone on" in desk.outlet.ended["b"].text
    assert not desk.loop._keeper._stale


def test_an_answer_that_fails_on_its_way_ends_a_loop_that_has_nothing_to_do(model, tmp_path):
    desk = Desk(model, tmp_path)

    def fail():
        raise RuntimeError("the device is gone")

    desk.loop.start()
    desk.loop._batches._mailer.send(Landing([], lambda: 0.0, fail), lambda: None)
    assert desk.loop.join(10)
    assert "gone" in str(desk.loop.failure)
    desk.loop.stop()


def test_a_session_that_stands_for_a_lost_one_ends_it_at_once(model, tmp_path):
    desk = Desk(model, tmp_path, clients=1)
    desk.join("a")
    desk.run(("a", forward(0)))
    desk.run(("new", "a"))
    assert "taken its place" in desk.outlet.ended["a"].text
    desk.run(("stranger", "nobody"), ("other", "open"))
    assert list(desk.outlet.ended) == ["a"]


def test_once_it_is_ending_the_open_step_closes_and_no_other_opens(model, tmp_path):
    desk = Desk(model, tmp_path)
    desk.join("a")
    desk.loop._keeper.ending = True
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    assert [closed.step for closed in desk.outlet.closed()] == [0]
    assert [message.step for _, message in desk.outlet.told if isinstance(message, StepOpened)] == [0]


def test_sums_that_leave_early_leave_behind_the_answers_and_not_those_of_a_batch_that_is_not_the_last(model, tmp_path):
    desk = Desk(model, tmp_path)
    seen: list[object] = []

    class Early:
        @contextlib.contextmanager
        def amid(self, pieces):
            seen.append(pieces)
            yield

        def has_left(self, parameter):
            return False

        def leave(self):
            seen.append([type(message) for _, message, _ in desk.outlet.sent])

    desk.engine.training.early = lambda *, in_place: Early()
    desk.loop._steps.ends_with = lambda members: [member.ordinal for member in members] == [1]
    desk.join("a")
    for ordinal in (0, 1):
        desk.run(("a", replace(forward(ordinal), ordinal=ordinal)))
        desk.run(("a", backward(ordinal)))
    assert seen == [1, [Hidden, Grad, Hidden, Grad]]


@pytest.mark.parametrize("on_loss", ["drop", "wait"])
def test_who_is_lost_while_a_batch_of_it_runs_is_answered_for_first(model, tmp_path, on_loss):
    desk = Desk(model, tmp_path, clients=2, on_loss=on_loss, lanes=2)
    desk.join("a", "b")
    go, run = threading.Event(), desk.engine._run
    desk.engine._run = lambda piece, *, grad: go.wait(30) and run(piece, grad=grad)
    desk.take(("a", forward(0, (4, 0), (4, 0))))
    desk.loop._turn()
    assert desk.loop._batches.are_underway
    assert desk.loop._scheduler.waits("a")
    threading.Timer(0.1, go.set).start()
    desk.run(("a", "lost"), ("b", forward(0, (4, 0), (4, 0))))
    desk.run(("b", backward(0, 8)), ("b", StepDone(0, 1, 1, "continue")))
    assert [(session, type(message)) for session, message, _ in desk.outlet.sent] == [("a", Hidden), ("b", Hidden), ("b", Grad)]
    if on_loss == "wait":
        assert not desk.outlet.closed()
        return
    assert [closed.targets for closed in desk.outlet.closed()] == [4]
    assert not desk.engine._graphs
    assert desk.loop._scheduler.kept_tokens("a") == 0
