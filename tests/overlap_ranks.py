"""One replica of ``test_replicas_overlap``: the same steps with sums that leave early, in every way that can go wrong.

Each replica knows what all contribute, so each also computes what one server would have made of it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import ClassVar

import torch

from server_trunk.engine import Engine
from server_trunk.members import BackwardBatch, ForwardBatch, Member
from server_trunk.replicas import buckets
from server_trunk.replicas.group import Group
from server_trunk.replicas.place import Place
from server_trunk.replicas.training import ReducedTraining
from server_trunk.training import SharedTraining
from splitfl.adapters import attach_lora, set_trainable
from splitfl.config import LoraSettings, OptimizerSettings
from splitfl.parts.loading import load_trunk
from splitfl.protocol.messages import Backward, Forward

HIDDEN, STEPS = 32, 3
SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, eps=1e-3)  # to divide by almost nothing tells nothing
SEGMENTS = ((5, 0), (7, 0), (4, 2))
TARGETS = 11

buckets.BUCKET_BYTES["gloo"] = 2048  # several


@functools.cache
def loaded(model: str, trainables: str) -> torch.nn.Module:
    trunk = load_trunk(model, (1, 1))
    if trainables == "lora":
        trunk = attach_lora(trunk, LoraSettings(rank=4), seed=0)
    else:
        set_trainable(trunk, trainables)
    return trunk


def trunk_of(model: str, trainables: str) -> torch.nn.Module:
    return copy.deepcopy(loaded(model, trainables))


def member_of(rank: int, step: int, ordinal: int) -> Member:
    draw = torch.Generator().manual_seed(1000 * rank + 10 * step + ordinal)
    forward = Forward(step, ordinal, SEGMENTS, HIDDEN, "float32", "raw", True, True, True, ordinal)
    member = Member(f"client{rank}", forward, torch.randn(forward.rows, HIDDEN, generator=draw), f"client{rank}", ordinal)
    member.backward = Backward(step, ordinal, forward.rows, HIDDEN, "float32", "raw", TARGETS, 3.0)
    member.gradient = torch.randn(forward.rows, HIDDEN, generator=draw)
    return member


class Case:
    """One replica's way through some steps. ``backwards``: of each replica in each step. ``foreseen``: which of its own is taken
    for the last, None: none.
    """

    backwards = (2, 2)
    options: ClassVar = {"in_place": True}
    trainables = "full"
    foreseen: tuple[int | None, int | None] = (1, 1)
    leaves_amid = True  # whether something leaves before the backward has ended

    def __init__(self, model: str, group: Group) -> None:
        self.rank = group.rank
        trunk = trunk_of(model, self.trainables)
        self.training = ReducedTraining(trunk, SETTINGS, group)
        self.engine = Engine(trunk, self.training, torch.device("cpu"), **self.options)
        reference = trunk_of(model, self.trainables)
        self.reference = Engine(reference, SharedTraining(reference, SETTINGS), torch.device("cpu"))
        self.amid: list[int] = []

    def batch(self, engine: Engine, member: Member, *, last: bool = False) -> None:
        _, kept = engine.forward(ForwardBatch(member.ordinal, [member], True))
        engine.backward(BackwardBatch(member.ordinal, [member], kept, last))
        if last:
            self.amid.append(self.training._sums.left)
        engine.release()

    def counts(self, rank: int, step: int, ordinal: int) -> bool:
        return True

    def ours(self, step: int) -> None:
        for ordinal in range(self.backwards[self.rank]):
            member = member_of(self.rank, step, ordinal)
            self.prepare(member)
            self.batch(self.engine, member, last=ordinal == self.foreseen[self.rank])

    def prepare(self, member: Member) -> None:
        """Whatever befalls it."""

    def step(self, step: int) -> None:
        self.ours(step)
        counted = {rank: sum(self.counts(rank, step, n) for n in range(count)) for rank, count in enumerate(self.backwards)}
        mine = {f"client{self.rank}": counted[self.rank] * TARGETS}
        if step % 2:
            self.training.begin(sum(mine.values()))  # else the closing does it
        report = self.engine.close_step(step, mine)
        for rank, count in enumerate(self.backwards):
            for ordinal in range(count):
                if self.counts(rank, step, ordinal):
                    self.batch(self.reference, member_of(rank, step, ordinal))
        theirs = self.reference.close_step(step, {"all": sum(counted.values()) * TARGETS})
        assert report.skipped == theirs.skipped, (report, theirs)
        if report.grad_norm is not None:
            assert abs(report.grad_norm - theirs.grad_norm) <= 1e-4 * theirs.grad_norm, (report, theirs)

    def run(self) -> dict:
        for step in range(STEPS):
            self.step(step)
        return {
            "mine": {name: p.detach() for name, p in self.training.trainables.items()},
            "theirs": {name: p.detach() for name, p in self.reference.training.trainables.items()},
            "amid": self.amid,
            "buckets": len(self.training._sums.buckets),
            "leaves_amid": self.leaves_amid and self.foreseen[self.rank] is not None,
        }


class InPlace(Case):
    """Straight into ``.grad``."""


class Lanes(Case):
    """Two threads that each bring a gradient for every parameter."""

    options: ClassVar = {"in_place": True, "lanes": 2}


class Apart(Case):
    """Gradients of a batch that are summed apart first."""

    options: ClassVar = {}


class Lora(Case):
    options: ClassVar = {}
    trainables = "lora"


class LoraInLanes(Case):
    """Several pieces whose gradients are summed apart: what leaves must be of all, so it does after the backward."""

    options: ClassVar = {"lanes": 2}
    trainables = "lora"
    leaves_amid = False


class Nobody(Case):
    """A replica without clients takes part with zeros."""

    backwards = (0, 2)
    foreseen = (None, 1)


class OneForesees(Case):
    """The other hears from its clients."""

    foreseen = (1, None)


class Late(Case):
    """More comes than was foreseen, on one replica, twice."""

    backwards = (3, 1)
    foreseen = (0, 0)


class LateApart(Late):
    options: ClassVar = {}


class Spoilt(Case):
    """The last gradient is not finite: it counts as zero, and its targets do not count."""

    def prepare(self, member: Member) -> None:
        if self.rank == 0 and member.ordinal == 1:
            member.gradient[0, 0] = float("inf")

    def counts(self, rank: int, step: int, ordinal: int) -> bool:
        return (rank, ordinal) != (0, 1)


class Overflows(Case):
    """In one step, of a client whose rows are all finite: nobody makes that step, and the next is as if nothing had been."""

    def batch(self, engine: Engine, member: Member, *, last: bool = False) -> None:
        hooks = []
        if (member.client, member.forward.step, member.ordinal) == ("client0", 1, 1):
            for parameter in engine.training.parameters_of(["client0"]):
                hooks.append(parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf"))))
        super().batch(engine, member, last=last)
        for hook in hooks:
            hook.remove()


class OverflowsApart(Overflows):
    options: ClassVar = {}


class Fails(Case):
    """The last backward fails when something of it has left: nothing of it counts. A batch comes after."""

    options: ClassVar = {"may_shrink": False}
    backwards = (3, 2)
    error: type[Exception] = RuntimeError

    def batch(self, engine: Engine, member: Member, *, last: bool = False) -> None:
        if engine is not self.engine or self.rank or not last:
            return super().batch(engine, member, last=last)
        failures = [self.error("no memory (injected)")]

        def fail(gradient: torch.Tensor) -> None:
            if failures:
                self.amid.append(self.training._sums.left)
                raise failures.pop()

        hook = self.first.register_hook(fail)
        try:
            super().batch(engine, member, last=last)
        except self.error:
            pass  # its clients lose their sessions
        finally:
            hook.remove()

    @property
    def first(self) -> torch.nn.Parameter:
        """The parameter whose gradient is the last to come."""
        return self.training._sums.buckets[-1][-1]

    def counts(self, rank: int, step: int, ordinal: int) -> bool:
        return (rank, ordinal) != (0, 1)


class OutOfMemory(Fails):
    """As :class:`Fails`, but it is run again in smaller pieces, and counts once."""

    options: ClassVar = {}
    error = torch.OutOfMemoryError

    def counts(self, rank: int, step: int, ordinal: int) -> bool:
        return True


CASES = [
    *(InPlace, Lanes, Apart, Lora, LoraInLanes, Nobody, OneForesees, Late, LateApart, Spoilt),
    *(Overflows, OverflowsApart, Fails, OutOfMemory),
]


def main(model: str, out: str) -> None:
    torch.set_num_threads(1)
    place = Place.from_environment()
    group = Group.join(dataclasses.replace(place, machine=place.rank), torch.device("cpu"))  # as if on two
    found = {case.__name__: case(model, group).run() for case in CASES}
    torch.save(found, f"{out}/{group.rank}.pt")
