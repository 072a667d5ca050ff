"""What a server's answers are held against before memory is made for them."""

from __future__ import annotations

import re

import pytest
import torch

from client_ends.micro import Micro, anew, missed
from client_ends.rounds import EndsRounds
from client_ends.session import TrunkSession
from splitfl.errors import RemoteProtocolError, RunWentBack, SessionLost, SplitflError, StepMissed
from splitfl.protocol.messages import AveragePart, Grad, Hidden


def session_of(*micros: int) -> TrunkSession:
    """It has sent micro-batches 0 to 2, and awaits these: 4 rows of 8, in step 5."""
    session = TrunkSession()
    session._next_micro = 3
    session._micros = {number: Micro(5, 4, 8, "float32", True) for number in micros}
    return session


@pytest.mark.parametrize("kind", [Hidden, Grad])
def test_an_answer_gets_memory_of_the_shape_that_was_sent(kind: type[Hidden | Grad]) -> None:
    tensor, view = session_of(1)._allocate(kind(5, 1, 4, 8, "float32", "raw"))
    assert tensor is not None
    assert (tensor.shape, tensor.dtype, len(view)) == ((4, 8), torch.float32, 4 * 8 * 4)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Hidden(5, 3, 4, 8, "float32", "raw"), "micro-batch 3, which was never sent"),
        (Hidden(5, 2**31 - 1, 4, 8, "float32", "raw"), "never sent"),
        (Hidden(6, 1, 4, 8, "float32", "raw"), "another shape, step or dtype"),
        (Hidden(5, 1, 5, 8, "float32", "raw"), "another shape, step or dtype"),
        (Grad(5, 1, 4, 2**24, "float32", "raw"), "another shape, step or dtype"),
        (Grad(5, 1, 4, 8, "bfloat16", "raw"), "another shape, step or dtype"),
        (AveragePart(0, 0, 0, 4), "ends that are this client's own"),
    ],
)
def test_what_nobody_asked_for_gets_none(answer: Hidden | Grad | AveragePart, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        session_of(1)._allocate(answer)


def test_an_answer_to_what_is_awaited_no_more_is_received_and_dropped() -> None:
    session = session_of()
    tensor, _ = session._allocate(Hidden(4, 2, 2, 8, "float32", "raw"))
    assert tensor is not None
    session._on_data(Hidden(4, 2, 2, 8, "float32", "raw"), tensor)


def test_an_average_goes_to_the_rounds() -> None:
    session, ends = session_of(), {"a": torch.nn.Parameter(torch.zeros(2))}
    session.rounds = EndsRounds(1, 8, lambda: ends)
    session.rounds.declare()
    assert session._allocate(AveragePart(0, 0, 0, 8))[0] is None
    with pytest.raises(RemoteProtocolError):
        session._allocate(AveragePart(0, 0, 0, 8))


@pytest.mark.parametrize("error", [missed(5), RunWentBack(2), SessionLost("gone")])
def test_an_error_that_is_kept_never_gets_a_traceback(error: SplitflError) -> None:
    """Its frames would hold the caller's loss, whose graph holds the session, and with it the model: for good."""
    session = session_of(1)
    session._micros[1].fail(error)
    with pytest.raises(type(error), match=re.escape(str(error))):
        session.await_hidden(1)
    session._away = error
    with pytest.raises(type(error)):
        session._check_missed()
    session._lost = error
    with pytest.raises(type(error)):
        session._check()
    assert error.__traceback__ is None


def test_an_error_that_is_raised_anew_says_the_same() -> None:
    for error in (RunWentBack(7), SessionLost("gone", "stale"), StepMissed("late")):
        again = anew(error)
        assert again is not error
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
