"""The scheduler: what runs together, in which order, and when a backward is ready."""

import pytest

from server_trunk.scheduler import BackwardBatch, ForwardBatch, Scheduler
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Backward, Forward


def forward(micro: int, tokens: int = 10, *, train: bool = True, step: int = 0) -> Forward:
    return Forward(step, micro, ((tokens, 0),), 4, "float32", "raw", train, train, True)


def backward(micro: int, tokens: int = 10, *, step: int = 0) -> Backward:
    return Backward(step, micro, tokens, 4, "float32", "raw", tokens, float(tokens))


def always(_):
    return True


def members(batch):
    return [(member.session, member.forward.micro) for member in batch.members]


def test_waiting_forwards_of_one_kind_run_together_within_the_budget():
    scheduler = Scheduler(batch_tokens=25)
    for session in "abc":
        scheduler.add_forward(session, forward(0), None)
    first = scheduler.next(always)
    assert members(first) == [("a", 0), ("b", 0)]
    assert members(scheduler.next(always)) == [("c", 0)]
    assert scheduler.next(always) is None


def test_a_micro_batch_above_the_budget_runs_alone():
    scheduler = Scheduler(batch_tokens=5)
    scheduler.add_forward("a", forward(0), None)
    assert members(scheduler.next(always)) == [("a", 0)]


def test_training_and_evaluation_never_share_a_batch():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.add_forward("b", forward(0, train=False), None)
    assert len(scheduler.next(always).members) == 1
    assert len(scheduler.next(always).members) == 1


def test_a_backward_waits_for_every_member_and_goes_first():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.add_forward("b", forward(0), None)
    batch = scheduler.next(always)
    assert isinstance(batch, ForwardBatch)
    scheduler.add_backward("a", backward(0), "dy")
    assert scheduler.next(always) is None
    scheduler.add_forward("c", forward(0), None)
    scheduler.add_backward("b", backward(0), "dy")
    ready = scheduler.next(always)
    assert isinstance(ready, BackwardBatch)
    assert ready.number == batch.number
    assert isinstance(scheduler.next(always), ForwardBatch)


def test_a_lost_member_is_not_waited_for():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.add_forward("b", forward(0), None)
    scheduler.next(always)
    scheduler.add_backward("a", backward(0), "dy")
    scheduler.forget("b")
    ready = scheduler.next(always)
    assert isinstance(ready, BackwardBatch)
    assert [member.backward is not None for member in ready.members] == [True, False]
    assert scheduler.kept_tokens("a") == scheduler.kept_tokens("b") == 0


def test_a_batch_nobody_is_left_in_is_void():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.next(always)
    scheduler.forget("a")
    assert scheduler.next(always).is_void


def test_forwards_whose_step_is_not_open_are_held_back():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0, step=1), None)
    scheduler.add_forward("b", forward(0, step=0), None)
    batch = scheduler.next(lambda member: member.forward.step == 0)
    assert members(batch) == [("b", 0)]
    assert scheduler.next(lambda member: member.forward.step == 0) is None
    assert members(scheduler.next(always)) == [("a", 0)]


@pytest.mark.parametrize("wrong", [backward(1), backward(0, tokens=11), backward(0, step=1)])
def test_a_backward_without_its_forward_is_the_peers_error(wrong):
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.next(always)
    with pytest.raises(RemoteProtocolError):
        scheduler.add_backward("a", wrong, "dy")


def test_a_backward_comes_once():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.add_forward("b", forward(0), None)
    scheduler.next(always)
    scheduler.add_backward("a", backward(0), "dy")
    with pytest.raises(RemoteProtocolError):
        scheduler.add_backward("a", backward(0), "dy")


def test_kept_tokens_count_waiting_and_kept_ones():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.add_forward("a", forward(1, tokens=7), None)
    assert scheduler.kept_tokens("a") == 17
    scheduler.next(always)
    assert scheduler.kept_tokens("a") == 17
    scheduler.add_backward("a", backward(0), "dy")
    scheduler.abandon("a", 0)
    scheduler.next(always)
    assert scheduler.kept_tokens("a") == 0
