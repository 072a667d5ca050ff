"""The scheduler: what runs together, in which order, and when a backward is ready."""

import pytest

from server_trunk import scheduler as scheduling
from server_trunk.scheduler import MAX_UNDERWAY, BackwardBatch, ForwardBatch
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Backward, Forward


class Scheduler(scheduling.Scheduler):
    """A batch has run as soon as it is chosen."""

    def next(self, *args, **options):
        batch = super().next(*args, **options)
        if isinstance(batch, ForwardBatch) and batch.has_backward:
            self.ran(batch)
        return batch


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


def test_whose_gradient_is_here_is_not_waited_for_twice():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None)
    scheduler.add_forward("b", forward(0), None)
    scheduler.next(always)
    scheduler.add_backward("a", backward(0), "dy")
    scheduler.abandon("a")
    assert scheduler.next(always) is None
    scheduler.add_backward("b", backward(0), "dy")
    assert isinstance(scheduler.next(always), BackwardBatch)


def test_a_session_waits_for_its_own_forwards_with_a_graph_alone():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0, train=False), None)
    scheduler.add_forward("b", forward(0), None)
    assert not scheduler.waits("a")
    assert scheduler.waits("b")


def test_members_that_run_apart_have_a_graph_each():
    scheduler = Scheduler(batch_tokens=100)
    for session in "ab":
        scheduler.add_forward(session, forward(0), None)
    apart = scheduler.split(scheduler.next(always))
    assert [members(one) for one in apart] == [[("a", 0)], [("b", 0)]]
    assert scheduler.kept_graph_tokens == 20
    for one in apart:
        scheduler.ran(one)
    scheduler.add_backward("b", backward(0), "dy")
    ready = scheduler.next(always)
    assert (ready.number, members(ready)) == (apart[1].number, [("b", 0)])
    assert scheduler.kept_graph_tokens == 10


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


def served(scheduler, count):
    """Tokens of each client in the next ``count`` batches."""
    tokens = {}
    for _ in range(count):
        for member in scheduler.next(always).members:
            tokens[member.client] = tokens.get(member.client, 0) + member.tokens
    return tokens


def test_a_client_that_sends_much_does_not_push_back_one_that_sends_little():
    scheduler = Scheduler(batch_tokens=100)
    for micro in range(50):
        scheduler.add_forward("much", forward(micro, 100, train=False), None)
    for micro in range(5):
        scheduler.add_forward("little", forward(micro, 100, train=False), None)
    assert served(scheduler, 10) == {"much": 500, "little": 500}


def test_clients_with_small_and_large_micro_batches_get_the_same_tokens():
    scheduler = Scheduler(batch_tokens=100)
    for micro in range(100):
        scheduler.add_forward("small", forward(micro, 10, train=False), None)
        scheduler.add_forward("large", forward(micro, 100, train=False), None)
    tokens = served(scheduler, 12)
    assert abs(tokens["small"] - tokens["large"]) <= 100


def test_a_client_that_was_idle_saves_nothing_up():
    scheduler = Scheduler(batch_tokens=100)
    for micro in range(20):
        scheduler.add_forward("always", forward(micro, 100, train=False), None)
    served(scheduler, 10)
    for micro in range(10):
        scheduler.add_forward("late", forward(micro, 100, train=False), None)
    tokens = served(scheduler, 10)
    assert tokens == {"always": 500, "late": 500}


def test_serial_gives_the_trunk_to_one_client_until_its_backward_has_run():
    scheduler = Scheduler(batch_tokens=1000, policy="serial")
    for session in "ab":
        for micro in range(2):
            scheduler.add_forward(session, forward(micro), None)
    assert members(scheduler.next(always)) == [("a", 0), ("a", 1)]
    assert scheduler.next(always) is None
    scheduler.add_forward("b", forward(7, train=False), None)
    assert members(scheduler.next(always)) == [("b", 7)]  # an evaluation keeps nobody waiting
    for micro in range(2):
        scheduler.add_backward("a", backward(micro), "dy")
    assert isinstance(scheduler.next(always), BackwardBatch)
    assert members(scheduler.next(always)) == [("b", 0), ("b", 1)]


def test_graphs_beyond_the_bound_are_computed_again_and_need_not_wait_for_each_other():
    scheduler = Scheduler(batch_tokens=20, graph_tokens=20)
    for session in "abcd":
        scheduler.add_forward(session, forward(0), None)
    first, second = scheduler.next(always), scheduler.next(always)
    assert first.keep
    assert not second.keep
    assert scheduler.kept_graph_tokens == 20
    # Of a kept graph both are awaited; of the others each runs as it comes.
    scheduler.add_backward("a", backward(0), "dy")
    assert scheduler.next(always) is None
    scheduler.add_backward("c", backward(0), "dy")
    ready = scheduler.next(always)
    assert members(ready) == [("c", 0)]
    assert not ready.kept
    scheduler.add_backward("b", backward(0), "dy")
    assert members(scheduler.next(always)) == [("a", 0), ("b", 0)]
    assert scheduler.kept_graph_tokens == 0
    scheduler.abandon("d")
    assert scheduler.next(always).is_void
    assert not scheduler._open


def test_backwards_to_be_computed_again_run_together_within_the_budget():
    scheduler = Scheduler(batch_tokens=20, graph_tokens=0)
    for session in "abc":
        scheduler.add_forward(session, forward(0), None)
    while scheduler.next(always) is not None:
        pass
    for session in "abc":
        scheduler.add_backward(session, backward(0), "dy")
    assert members(scheduler.next(always)) == [("a", 0), ("b", 0)]
    assert members(scheduler.next(always)) == [("c", 0)]


def test_a_graph_for_which_there_was_no_memory_is_forgotten():
    scheduler = Scheduler(batch_tokens=100)
    for session in "ab":
        scheduler.add_forward(session, forward(0), None)
    batch = scheduler.next(always)
    scheduler.unkeep(batch)
    scheduler.ran(batch)
    assert scheduler.kept_graph_tokens == 0
    scheduler.add_backward("a", backward(0), "dy")
    ready = scheduler.next(always)
    assert members(ready) == [("a", 0)]
    assert not ready.kept


def test_a_batch_that_is_not_full_waits_for_more_but_not_for_ever():
    scheduler = Scheduler(batch_tokens=30, batch_wait=2.0)
    scheduler.add_forward("a", forward(0), None, now=10.0)
    assert scheduler.next(always, 11.0, more_expected=True) is None
    scheduler.add_forward("b", forward(0), None, now=11.5)
    assert scheduler.next(always, 11.9, more_expected=True) is None
    assert members(scheduler.next(always, 12.0, more_expected=True)) == [("a", 0), ("b", 0)]
    scheduler.add_forward("a", forward(1), None, now=13.0)
    assert len(scheduler.next(always, 13.0, more_expected=False).members) == 1  # nobody else will come
    for session in "cde":
        scheduler.add_forward(session, forward(0), None, now=14.0)
    assert len(scheduler.next(always, 14.0, more_expected=True).members) == 3  # full


def test_packed_batches_count_no_pads():
    def two(**options):
        scheduler = Scheduler(batch_tokens=110, **options)
        scheduler.add_forward("a", forward(0, 100), None)
        scheduler.add_forward("b", forward(0, 10), None)
        return len(scheduler.next(always).members)

    assert two() == 1
    assert two(packed=True) == 2


def test_replayed_forwards_run_by_themselves():
    scheduler = Scheduler(batch_tokens=100)
    scheduler.add_forward("a", forward(0), None, replayed=True)
    scheduler.add_forward("b", forward(0), None)
    assert members(scheduler.next(always)) == [("a", 0)]


def test_where_the_policy_holds_everything_back_there_is_no_work():
    scheduler = Scheduler(batch_tokens=100, policy="serial")
    scheduler.add_forward("a", forward(0), None)
    scheduler.next(always)
    scheduler.add_forward("b", forward(0), None)
    assert not scheduler.has_work(always)
    scheduler.add_backward("a", backward(0), "dy")
    assert scheduler.has_work(always)


def test_a_batch_that_waits_for_more_says_until_when():
    scheduler = Scheduler(batch_tokens=100, batch_wait=2.0)
    scheduler.add_forward("a", forward(0), None, now=10.0)
    assert not scheduler.has_work(always, 11.0, more_expected=True)
    assert scheduler.due == 12.0
    assert scheduler.has_work(always, 12.0, more_expected=True)
    assert scheduler.due is None


def test_thousands_of_micro_batches_in_one_batch_are_settled_one_by_one():
    # Each word about one of them must not look at all the others: that took hours for as many as a session may have.
    scheduler = Scheduler(batch_tokens=10**6)
    for micro in range(MAX_UNDERWAY):
        scheduler.add_forward("a", forward(micro, 1), None)
    batch = scheduler.next(always)
    for micro in range(MAX_UNDERWAY - 1):
        scheduler.add_backward("a", backward(micro, 1), "dy")
    assert not scheduler.has_work(always)
    for _ in range(100):
        scheduler.abandon("a", 0)
    assert members(scheduler.next(always)) == members(batch)
    assert scheduler.next(always) is None
    assert scheduler.kept_graph_tokens == scheduler.kept_tokens("a") == 0


def test_a_client_s_micro_batches_run_one_by_one_beside_those_of_others():
    scheduler = Scheduler(batch_tokens=1000)
    for micro in range(2):
        for session in "ab":
            scheduler.add_forward(session, forward(micro, 100), None)
    assert members(scheduler.next(always)) == [("a", 0), ("b", 0)]
    assert members(scheduler.next(always)) == [("a", 1), ("b", 1)]
    for micro in range(2, 4):
        scheduler.add_forward("a", forward(micro, 10), None)
    assert members(scheduler.next(always)) == [("a", 2), ("a", 3)]


def test_a_backward_runs_once_its_forward_has_whatever_settles_it_before():
    scheduler = scheduling.Scheduler(batch_tokens=100)
    for session in "ab":
        scheduler.add_forward(session, forward(0), None)
    batch = scheduler.next(always)
    assert scheduler.waits("a")
    with pytest.raises(RemoteProtocolError, match="not kept"):
        scheduler.add_backward("a", backward(0), "dy")  # it has seen no answer yet
    scheduler.forget("a")
    scheduler.forget("b")
    assert scheduler.next(always) is None
    scheduler.ran(batch)
    assert not scheduler.waits("b")
    assert scheduler.next(always).is_void
    assert (scheduler.kept_tokens("a"), scheduler.kept_graph_tokens) == (0, 0)
