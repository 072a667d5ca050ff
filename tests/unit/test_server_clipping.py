"""The norm of the trunk's gradient, asked for before a step ends, and what it is clipped by."""

from __future__ import annotations

import math

import pytest
import torch

from splitfl.adapters import named_trainables
from splitfl.protocol.messages import AskNorm, StepDone, TrunkNorm
from tests.unit.trunkloop_world import Desk, backward, forward
from tests.world import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def desk(model, tmp_path):
    desk = Desk(model, tmp_path, clip=1e-3, eps=1e-3)
    desk.join("a")
    return desk


def told(desk: Desk) -> list[TrunkNorm]:
    return [message for _, message in desk.outlet.told if isinstance(message, TrunkNorm)]


def norm_of(desk: Desk) -> float:
    gradients = [p.grad for p in named_trainables(desk.trunk).values() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def test_the_norm_is_told_when_what_it_is_asked_of_has_run(desk):
    desk.run(("a", forward(0)))
    desk.run(("a", forward(1)), ("a", AskNorm(0, 2)), ("a", backward(0)))
    assert not told(desk)
    desk.run(("a", backward(1)))
    (answer,) = told(desk)
    assert answer.step == 0
    assert answer.norm == pytest.approx(norm_of(desk) / 8, rel=1e-6)


def test_a_forward_whose_gradient_never_came_holds_nobody_up(desk):
    desk.take(("a", forward(0)), ("a", forward(1)))
    desk.run()
    desk.run(("a", backward(0)))
    assert not norm_of(desk), "the two ran in one batch, which waits for both"
    desk.run(("a", AskNorm(0, 1)))
    assert told(desk)[0].norm == pytest.approx(norm_of(desk) / 4, rel=1e-6)


def test_the_step_is_clipped_by_both_norms(model, tmp_path):
    moved = []
    for number, ends in enumerate((None, 3.0)):
        (tmp_path / str(number)).mkdir()
        # Adam with an epsilon far beyond the gradient moves by learning rate * gradient / epsilon.
        desk = Desk(model, tmp_path / str(number), clip=0.5, eps=1e-1, beta1=0.0)
        desk.join("a")
        before = torch.cat([p.detach().flatten().double() for p in named_trainables(desk.trunk).values()])
        desk.run(("a", forward(0)))
        desk.run(("a", backward(0)), ("a", AskNorm(0, 1)), ("a", StepDone(0, 1, 1, "continue", ends)))
        after = torch.cat([p.detach().flatten().double() for p in named_trainables(desk.trunk).values()])
        moved.append(float((after - before).norm()))
    (answer,) = told(desk)
    assert answer.norm is not None
    both = math.hypot(answer.norm, 3.0)
    assert min(answer.norm, both) > 0.5, "nothing was clipped"
    assert moved[1] / moved[0] == pytest.approx(answer.norm / both, rel=0.1)


@pytest.mark.parametrize(
    ("second", "said"),
    [(AskNorm(0, 2), "twice"), (AskNorm(0, 1), "fewer gradients than were sent")],
)
def test_questions_that_cannot_be(desk, second, said):
    desk.run(("a", forward(0)), ("a", forward(1)))
    desk.run(("a", backward(0)), ("a", backward(1)))
    if said == "twice":
        desk.run(("a", AskNorm(0, 3)))
    desk.run(("a", second))
    assert said in desk.outlet.ended["a"].text


def test_a_question_about_another_step_is_passed_over(desk):
    desk.run(("a", forward(0)))
    desk.run(("a", backward(0)), ("a", StepDone(0, 1, 1, "continue")))
    desk.run(("a", AskNorm(0, 1)))
    assert not told(desk)
    assert not desk.outlet.ended
