"""The engine: however a batch is cut, kept, run again or made smaller, the same numbers come out."""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from server_trunk.engine import Engine
from server_trunk.gradients import GradientSum
from server_trunk.members import BackwardBatch, ForwardBatch, Member
from server_trunk.pieces import Place, cut, gather, is_out_of_memory, places_of, scatter
from server_trunk.training import SharedTraining
from splitfl.adapters import attach_lora, set_trainable
from splitfl.config import LoraSettings, OptimizerSettings
from splitfl.parts.loading import load_trunk
from splitfl.protocol.messages import Backward, Forward
from tests.world import tiny_llama

HIDDEN = 32
#: Two clients, segments of unequal length, one that does not begin at 0.
SEGMENTS = {"a": ((7, 0), (3, 0), (12, 4)), "b": ((5, 0), (5, 0))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def engine_of(model: str, trainables: str = "lora", **options) -> Engine:
    trunk = load_trunk(model, (1, 1))
    if trainables == "lora":
        trunk = attach_lora(trunk, LoraSettings(rank=4), seed=0)
        for name, parameter in trunk.named_parameters():
            if ".lora_B." in name:  # zero at the start, which would hide the gradient of lora_A
                parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    else:
        set_trainable(trunk, trainables)
    return Engine(trunk, SharedTraining(trunk, OptimizerSettings(learning_rate=1e-2)), torch.device("cpu"), **options)


def members_of(*, replayed: bool = False) -> list[Member]:
    draw = torch.Generator().manual_seed(1)
    members = []
    for name, segments in SEGMENTS.items():
        forward = Forward(0, 0, segments, HIDDEN, "float32", "raw", True, True, True)
        member = Member(name, forward, torch.randn(forward.rows, HIDDEN, generator=draw), name, replayed=replayed)
        member.backward = Backward(0, 0, forward.rows, HIDDEN, "float32", "raw", forward.rows, 3.0)
        member.gradient = torch.randn(forward.rows, HIDDEN, generator=draw)
        members.append(member)
    return members


def both_ways(engine: Engine, *, keep: bool = True, members: list[Member] | None = None):
    """(y of each member, dh of each, the gradients in the step's sum)."""
    members = members or members_of()
    outputs, kept = engine.forward(ForwardBatch(0, members, keep))
    gradients = engine.backward(BackwardBatch(0, members, kept))
    return outputs.tensors, gradients.tensors, {name: p.grad for name, p in engine.training.trainables.items()}


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((mine - theirs).norm()) <= 2e-6 * float(theirs.norm())


def assert_same(mine, theirs):
    for own, other in zip(mine[:2], theirs[:2], strict=True):
        for tensor, reference in zip(own, other, strict=True):
            assert_close(tensor, reference)
    assert mine[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        assert float(gradient.norm()) > 0, name
        assert_close(mine[2][name], gradient)


@pytest.mark.parametrize("trainables", ["lora", "full"])
@pytest.mark.parametrize("options", [{"lanes": 2}, {"lanes": 4}, {"in_place": True}, {"lanes": 2, "in_place": True}])
def test_lanes_and_sums_in_place_change_nothing(model, trainables, options):
    assert_same(both_ways(engine_of(model, trainables, **options)), both_ways(engine_of(model, trainables)))


@pytest.mark.parametrize("options", [{}, {"lanes": 2}])
def test_a_graph_computed_again_equals_one_kept(model, options):
    engine = engine_of(model, **options)
    again = both_ways(engine, keep=False)
    assert not engine._graphs
    assert_same(again, both_ways(engine_of(model)))


class ShortOfMemory:
    """A trunk that has room for ``tokens`` (rows times columns) with a graph, and for as many times ``bare`` without."""

    def __init__(self, engine: Engine, tokens: int, bare: int = 1) -> None:
        self.tokens, self.bare, self.sizes = tokens, bare, []
        self.computed = []  # by those for which there was no room
        self._run = engine._trunk.trunk_forward
        engine._trunk.trunk_forward = self

    def __call__(self, hidden, mask, positions):
        size = hidden.shape[0] * hidden.shape[1]
        if size > self.tokens * (1 if torch.is_grad_enabled() else self.bare):
            computed = hidden.clone()
            self.computed.append(weakref.ref(computed))
            raise torch.OutOfMemoryError("no memory (injected)")
        self.sizes.append(size)
        return self._run(hidden, mask, positions)


@pytest.mark.parametrize("lanes", [1, 2])
def test_out_of_memory_makes_the_batch_smaller_and_goes_on(model, lanes):
    told = []
    engine = engine_of(model, lanes=lanes, report=told.append)
    short = ShortOfMemory(engine, 13)
    members = members_of()
    outputs, kept = engine.forward(ForwardBatch(0, members, True))
    assert not kept
    assert told
    assert max(short.sizes) <= 13
    gradients = engine.backward(BackwardBatch(0, members, kept))
    mine = outputs.tensors, gradients.tensors, {name: p.grad for name, p in engine.training.trainables.items()}
    assert_same(mine, both_ways(engine_of(model)))
    # The next batch is cut small from the start: nothing fails any more.
    told.clear()
    engine.forward(ForwardBatch(1, members_of(), False))
    assert not told


def test_out_of_memory_in_the_backward_alone_counts_once(model):
    engine = engine_of(model)
    # The forward fits without its graph; its rerun for the backward does not.
    short = ShortOfMemory(engine, 13, bare=100)
    assert_same(both_ways(engine, keep=False), both_ways(engine_of(model)))
    assert max(short.sizes[1:]) <= 13


@pytest.mark.parametrize("bare", [1, 100])
@pytest.mark.parametrize("lanes", [1, 2])
def test_what_an_attempt_without_room_had_computed_is_free_before_the_next(model, lanes, bare):
    engine = engine_of(model, lanes=lanes)
    short, were_held = ShortOfMemory(engine, 12, bare), []
    engine._free = lambda: were_held.extend(computed() is not None for computed in short.computed)
    assert_same(both_ways(engine, keep=False), both_ways(engine_of(model)))
    assert were_held
    assert not any(were_held)


def test_what_is_kept_for_later_goes_before_batches_get_smaller(model):
    told = []
    engine = engine_of(model, report=told.append)
    short = ShortOfMemory(engine, 13)

    def make_room():
        short.tokens = 1000
        return 7

    engine.make_room = make_room
    assert_same(both_ways(engine), both_ways(engine_of(model)))
    assert not told
    engine = engine_of(model, report=told.append)
    ShortOfMemory(engine, 13)
    engine.make_room = lambda: 7  # which is not enough
    assert_same(both_ways(engine), both_ways(engine_of(model)))
    assert told


def test_out_of_memory_in_the_backward_of_a_kept_graph(model, monkeypatch):
    engine = engine_of(model, lanes=2)
    members = members_of()
    outputs, kept = engine.forward(ForwardBatch(0, members, True))
    for member in members:
        member.hidden = None  # as the loop does: the graph holds what it needs
    failures = [torch.OutOfMemoryError("no memory (injected)")]
    differentiate = torch.autograd.grad

    def once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return differentiate(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", once)
    gradients = engine.backward(BackwardBatch(0, members, kept))
    mine = outputs.tensors, gradients.tensors, {name: p.grad for name, p in engine.training.trainables.items()}
    assert_same(mine, both_ways(engine_of(model)))


def test_a_segment_that_never_fits_fails_and_leaves_the_sum_alone(model):
    engine = engine_of(model)
    ShortOfMemory(engine, 4, bare=100)
    members = members_of()
    engine.forward(ForwardBatch(0, members, False))
    with pytest.raises(torch.OutOfMemoryError):
        engine.backward(BackwardBatch(0, members, False))
    assert all(parameter.grad is None for parameter in engine.training.trainables.values())


def test_a_replayed_member_gets_its_answers_and_adds_nothing(model):
    _, dh, _ = both_ways(engine_of(model))
    outputs, gradients, summed = both_ways(engine_of(model), members=members_of(replayed=True))
    assert all(gradient is None for gradient in summed.values())
    for own, reference in zip(gradients, dh, strict=True):
        assert_close(own, reference)
    assert len(outputs) == 2


def test_an_abandoned_member_counts_as_zero(model):
    members = members_of()
    members[1].backward = members[1].gradient = None
    members[1].abandoned = True
    alone = members_of()[:1]
    mine = both_ways(engine_of(model, lanes=2), members=members)
    theirs = both_ways(engine_of(model), members=alone)
    assert mine[1][1] is None
    assert_same(([mine[0][0]], [mine[1][0]], mine[2]), theirs)


def test_pieces_hold_every_segment_once_and_about_as_much_each():
    places = [Place(0, number, 0, length, 0) for number, length in enumerate([128] * 6 + [64] * 4 + [7, 9])]
    groups = cut(places, 2, padded=False)
    assert sorted(place.number for group in groups for place in group) == list(range(12))
    sizes = [sum(place.length for place in group) for group in groups]
    assert len(groups) == 2
    assert max(sizes) <= 1.3 * min(sizes)
    # Too unequal for two lanes: the threads share every operation instead.
    assert len(cut([Place(0, 0, 0, 500, 0), Place(0, 1, 0, 10, 0)], 2, None)) == 1
    # Where memory is short, no piece has more than asked, save a segment that is longer itself.
    for most in (100, 150, 300):
        groups = cut(places, 1, most)
        assert sorted(place.number for group in groups for place in group) == list(range(12))
        assert all(len(group) * max(p.length for p in group) <= most or len(group) == 1 for group in groups)


def test_rows_come_back_to_where_they_were():
    members = members_of()
    places = places_of(members)
    groups = cut(places, 2, None)
    tensors = [member.hidden for member in members]
    rows = scatter([(group, gather(tensors, group)) for group in groups], members)
    assert all(torch.equal(own, member.hidden) for own, member in zip(rows, members, strict=True))


def test_the_cpu_allocator_s_error_is_known():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**46, dtype=torch.float32)
    assert is_out_of_memory(failure.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_gradient_laid_out_otherwise_than_its_parameter_is_put_right():
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    x = torch.randn(6, 3)
    total = GradientSum([parameter], in_place=False)
    # The gradient of a transposed use comes out transposed in memory too.
    hidden = torch.zeros(3, requires_grad=True)
    out = (parameter.t() * 2).t() @ x + hidden
    total._gradients = [torch.autograd.grad(out.sum(), [parameter], retain_graph=True)[0].t().contiguous().t()]
    assert total._gradients[0].stride() != parameter.stride()
    total.count()
    assert parameter.grad.stride() == parameter.stride()
    assert torch.equal(parameter.grad, total._gradients[0])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite_spoil_nobody_elses_step(model, value, keep):
    others = both_ways(engine_of(model), members=members_of()[1:])
    members = members_of()
    members[0].hidden[0, 0] = value
    members[0].gradient.fill_(math.nan)  # as of a loss over what comes back
    outputs, gradients, total = both_ways(engine_of(model), keep=keep, members=members)
    assert members[0].spoilt
    assert bool(outputs[0].isnan().all())
    assert bool(gradients[0].isnan().all())
    assert_same(((outputs[1],), (gradients[1],), total), others)


def test_a_backward_that_fails_at_its_very_end_has_not_counted(model, monkeypatch):
    engine, members = engine_of(model), members_of()
    _, kept = engine.forward(ForwardBatch(0, members, True))

    def full(*_):
        raise torch.OutOfMemoryError("no memory for what is sent back (injected)")

    monkeypatch.setattr("server_trunk.engine.scatter", full)
    with pytest.raises(torch.OutOfMemoryError):
        engine.backward(BackwardBatch(0, members, kept))
    assert all(parameter.grad is None for parameter in engine.training.trainables.values())


def test_where_weights_may_have_moved_on_nothing_is_computed_again(model):
    engine = engine_of(model, in_place=True, may_recompute=False)
    ShortOfMemory(engine, 13, bare=100)
    with pytest.raises(torch.OutOfMemoryError):
        engine.forward(ForwardBatch(0, members_of(), True))


@pytest.mark.parametrize("moves", [False, True])
def test_an_optimizer_step_that_fails_says_whether_the_weights_are_still_of_a_step(model, monkeypatch, moves):
    engine = engine_of(model)
    both_ways(engine)
    engine.close_step(0, {"a": 4})
    both_ways(engine)

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    if moves:
        monkeypatch.setattr(engine.training.optimizer, "step", broken)
    else:
        monkeypatch.setattr(torch.nn.utils, "get_total_norm", broken)
    with pytest.raises(RuntimeError, match="broken"):
        engine.close_step(1, {"a": 4})
    assert engine.closed == (None if moves else 0)


class Held:
    """An engine of two lanes, one of which stands still in its first forward until it is let go."""

    def __init__(self, model: str, **options):
        self.engine = engine_of(model, lanes=2, **options)
        self.let_go, self._first = threading.Event(), threading.Event()
        self._run, self.engine._run = self.engine._run, self._hold

    def _hold(self, piece, *, grad):
        if not self._first.is_set():
            self._first.set()
            assert self.let_go.wait(30)
        return self._run(piece, grad=grad)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_begins_while_a_lane_still_runs_the_one_before(model, in_place):
    held, heard = Held(model, in_place=in_place), threading.Semaphore(0)
    engine, first, second = held.engine, members_of(), members_of()
    slow = engine.begin_forward(ForwardBatch(0, first, True), heard.release)
    assert heard.acquire(timeout=30)
    assert engine.has_room
    assert not slow.is_done
    assert engine.runs_beside(ForwardBatch(1, second, True))
    quick = engine.begin_forward(ForwardBatch(1, second, True), heard.release)
    outputs, kept = quick.result()
    # Its backward too; what it counts is in the sum whatever becomes of the other.
    gradients = engine.begin_backward(BackwardBatch(1, second, kept), heard.release).result()
    assert not slow.is_done
    held.let_go.set()
    assert_same((slow.result()[0].tensors, (), {}), (outputs.tensors, (), {}))
    engine.backward(BackwardBatch(0, first, True))
    y, dh, total = both_ways(engine_of(model))
    mine = {name: parameter.grad / 2 for name, parameter in engine.training.trainables.items()}
    assert_same((outputs.tensors, gradients.tensors, mine), (y, dh, total))


def test_what_runs_alone_waits_for_what_runs(model):
    held = Held(model)
    engine, members = held.engine, members_of()
    slow = engine.begin_forward(ForwardBatch(0, members, True))
    plain = [replace(member.forward, train=False, grad=False) for member in members_of()]
    evaluated = ForwardBatch(1, [Member(m.session, f, m.hidden) for m, f in zip(members_of(), plain, strict=True)], False)
    assert not engine.runs_beside(evaluated)
    timer = threading.Timer(0.1, held.let_go.set)
    timer.start()
    alone = engine.begin_forward(evaluated)
    assert slow.is_done  # else the mode of the model would have changed below it
    assert_same((slow.result()[0].tensors, (), {}), (alone.result()[0].tensors, (), {}))


def test_a_batch_that_fails_beside_another_leaves_that_alone(model, monkeypatch):
    held = Held(model, may_shrink=False)
    engine, first, second = held.engine, members_of(), members_of()
    slow = engine.begin_forward(ForwardBatch(0, first, True))
    monkeypatch.setattr("server_trunk.engine.run_segments", lambda *_: 1 / 0)
    bad = engine.begin_forward(ForwardBatch(1, second, True))
    with pytest.raises(ZeroDivisionError):
        bad.result()
    monkeypatch.undo()
    held.let_go.set()
    _, kept = slow.result()
    engine.backward(BackwardBatch(0, first, kept))
    total = {name: parameter.grad for name, parameter in engine.training.trainables.items()}
    assert_same(((), (), total), ((), (), both_ways(engine_of(model))[2]))
