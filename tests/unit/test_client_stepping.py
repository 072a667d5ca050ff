"""When the server hears that a part is done, and who hears what came of that."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from client_ends.clipping import TrunkGradient
from client_ends.micro import missed
from client_ends.session import TrunkSession
from client_ends.stepping import step_with
from splitfl.errors import StepMissed
from splitfl.protocol.messages import AskNorm, TrunkNorm


class Ends:
    """A model whose step went on without it."""

    def __init__(self):
        self.parameter = torch.nn.Parameter(torch.ones(1))
        self.parameter.grad = torch.ones(1)
        self._remote = self
        self.session = self
        self.contributed, self.may_end_before_ends, self._on_missed = True, True, None

    def _own_parameters(self):
        return [self.parameter]

    def step(self):
        self.contributed = False
        raise StepMissed("step 3 went on without this client")


@pytest.fixture
def ends():
    ends = Ends()
    hook = step_with(weakref.ref(ends))
    yield ends
    hook.remove()


def others() -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    return torch.optim.SGD([parameter], lr=0.1)


class Held(torch.optim.SGD):
    """Steps when it is let go, or fails."""

    def __init__(self, parameters, *, fails=False):
        super().__init__(parameters, lr=0.1)
        self.fails, self.amid, self.go = fails, threading.Event(), threading.Event()

    def step(self, closure=None):
        self.amid.set()
        if self.fails:
            raise RuntimeError("no memory for the moments")
        assert self.go.wait(30)
        return super().step(closure)


def test_a_step_that_was_missed_is_the_business_of_its_own_optimizer(ends):
    own, heard = Held([ends.parameter]), []

    def work() -> None:
        with pytest.raises(StepMissed):
            own.step()
        heard.append(float(ends.parameter.detach()))

    thread = threading.Thread(target=work)
    thread.start()
    assert own.amid.wait(30)
    others().step()  # of another thread, amid that
    own.go.set()
    thread.join(30)
    assert heard == [pytest.approx(0.9)]  # the ends have stepped all the same


def test_an_optimizer_that_fails_leaves_nothing_to_the_next(ends):
    with pytest.raises(RuntimeError, match="no memory"):
        Held([ends.parameter], fails=True).step()
    others().step()


def test_a_norm_is_asked_for_again_after_a_step_that_was_missed():
    session, asked = TrunkSession(), []
    stand_in = TrunkGradient(session)

    def norm() -> float:
        asked.append(session.step)
        session._norm_asked, session._norm = AskNorm(session.step, session._backwards), TrunkNorm(session.step, 10.0)
        return 10.0

    session.trunk_norm = norm
    for step in (5, 6):
        session.step, session._forwards, session._backwards = step, 1, 1
        torch.nn.utils.clip_grad_norm_(stand_in.parameters(), 1.0)
        with session._lock:
            session._befalls(missed(step))
        with pytest.raises(StepMissed):
            session._check_missed()
    assert asked == [5, 6]
