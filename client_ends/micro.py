"""One micro-batch under way, and the error of one whose step did not wait for it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from splitfl.errors import CacheLost, SessionLost, SplitflError, StepMissed, UserError
from splitfl.protocol.messages import Fault, RefusalCode

__all__ = ["Micro", "anew", "missed"]


@dataclass(slots=True)
class Micro:
    """One micro-batch under way: ``rows`` tokens went out, as many come back, twice. ``grad``: a backward is to follow."""

    step: int
    rows: int
    hidden: int
    dtype: str
    grad: bool
    y: Future[torch.Tensor] = field(default_factory=Future)
    dh: Future[torch.Tensor] = field(default_factory=Future)

    def fail(self, error: SplitflError) -> None:
        """What has not been answered never will be."""
        for future in (self.y, self.dh):
            if not future.done():
                future.set_exception(error)

    def fate(self, fault: Fault) -> SplitflError:
        """What becomes of a forward that is answered by a fault."""
        if fault.code == RefusalCode.STALE:
            return missed(self.step)
        if fault.code == RefusalCode.EVICTED:
            return CacheLost(fault.text)
        if fault.code == RefusalCode.CACHE_FULL:
            return UserError(fault.text)
        return SessionLost(fault.text, fault.code)


def anew(error: SplitflError) -> SplitflError:
    """Another error that says the same, to be raised in place of one that is kept.

    What is raised gets a traceback, whose frames hold the caller's tensors, whose graph holds the session. The garbage collector
    does not see through a graph: were the session to hold the error too, all of them would stay for good.
    """
    fresh = type(error).__new__(type(error), *error.args)
    fresh.__dict__.update(error.__dict__)
    return fresh


def missed(step: int, why: str = "was late") -> StepMissed:
    """The error of a step that did not wait for this client."""
    return StepMissed(f"step {step} went on without this client, which {why}: go on with the next batch")
