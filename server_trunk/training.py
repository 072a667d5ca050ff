"""What the trunk's gradients do: which parameters they go to, and the optimizer step that uses them.

The engine computes; a :class:`Training` owns parameters and optimizers. One a mode: here the one in which all clients train one
set of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import Parameter

from splitfl.adapters.trainables import copy_into, named_trainables
from splitfl.config import OptimizerSettings
from splitfl.optimizer import build_optimizer, learning_rate_at, set_learning_rate

__all__ = ["Early", "SharedTraining", "StepReport", "Training"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. ``grad_norm`` (before clipping) is None where nothing was trained or the gradient was not finite;
    ``clients``: a report of each client, where each trains parameters of its own.
    """

    learning_rate: float
    grad_norm: float | None
    skipped: bool = False
    clients: Mapping[str, StepReport] = field(default_factory=dict)

    def of(self, client: str) -> StepReport:
        """What ``client`` is told."""
        return self.clients.get(client, self)


class Early(Protocol):
    """Gradients of a step on their way to other processes before its last backward has ended."""

    def amid(self, pieces: int) -> AbstractContextManager[None]:
        """Around the backward of so many pieces; in lanes, side by side."""

    def has_left(self, parameter: Parameter) -> bool:
        """Whether the gradient that this batch has for it counts already."""

    def take_back(self) -> None:
        """The batch has failed: nothing of it is to count."""

    def leave(self) -> None:
        """The batch counts: whatever has not left does."""


class Training(Protocol):
    """Called from the trunk's thread only. ``owners`` and ``clients`` are names from the operator's list."""

    def joined(self, client: str) -> None:
        """A session of this client has opened: what it trains must be there before any of its rows run. Raises CheckpointError
        where that was kept and cannot be read.
        """

    def parameters_of(self, owners: Sequence[str]) -> Sequence[Parameter]:
        """The parameters that rows of these clients have a gradient for."""

    def early(self, *, in_place: bool) -> Early | None:
        """What lets the gradients of a step leave amid its last backward; None where they do not. ``in_place``: they are added up
        in ``.grad`` piece by piece.
        """

    def close(self, step: int, targets: Mapping[str, int]) -> StepReport:
        """Divide the summed gradients by the counted ``targets`` (by client), clip, step, and clear them."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint holds: the trained weights by their full names, and further state by file name."""

    def load(self, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave. Raises CheckpointError where names or shapes differ."""

    def moved(self) -> bool:
        """Whether the newest :meth:`close`, should it have failed, may have moved weights, which are then of no step."""


class SharedTraining:
    """All clients train the same parameters towards ``sum_i n_i L_i / sum_i n_i``; one AdamW."""

    def __init__(self, model: torch.nn.Module, settings: OptimizerSettings) -> None:
        self.trainables = named_trainables(model)
        self._settings = settings
        self._parameters = list(self.trainables.values())
        self._stepped = self._held()
        self.optimizer = build_optimizer(self._stepped, settings) if self._parameters else None
        self._moved = False
        self._ends_norm = 0.0  # of the gradient that the next step is clipped together with

    def _held(self) -> list[Parameter]:
        """What the optimizer of this process steps."""
        return self._parameters

    def _bring(self) -> None:
        """See to it that the gradients there are of the step lie in what is stepped."""

    def _collected(self) -> list[torch.Tensor]:
        """The step's summed gradients, of what is stepped."""
        self._bring()
        return [p.grad for p in self._stepped if p.grad is not None]

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(gradients))

    def _clear(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)

    def joined(self, client: str) -> None:
        pass  # there is one set of parameters, and it is there

    def parameters_of(self, owners: Sequence[str]) -> Sequence[Parameter]:
        return self._parameters

    def early(self, *, in_place: bool) -> Early | None:
        return None

    def norm(self, targets: int) -> float | None:
        """The norm of the gradient as it is summed now, over so many targets; None where nothing of it is to be used."""
        gradients = self._collected()
        norm = self._norm(gradients) / targets if targets and gradients else math.nan
        return norm if math.isfinite(norm) else None

    def clip_with(self, ends_norm: float) -> None:
        """The next step is clipped by the norm of its gradient and the ends' together."""
        self._ends_norm = ends_norm

    def close(self, step: int, targets: Mapping[str, int]) -> StepReport:
        return self._step(step, sum(targets.values()))

    def _step(self, step: int, counted: int) -> StepReport:
        self._moved = False
        ends_norm, self._ends_norm = self._ends_norm, 0.0
        rate = learning_rate_at(step, self._settings)
        if self.optimizer is None:
            return StepReport(rate, None)
        gradients = self._collected()
        if counted == 0 or not gradients:
            self._clear()
            return StepReport(rate, None, skipped=True)
        norm = self._norm(gradients) / counted
        finite = math.isfinite(norm)
        if finite:
            # Division and clipping in one pass over the gradients; the small number is clip_grad_norm_'s own.
            both = math.hypot(norm, ends_norm)
            clip = min(1.0, self._settings.clip / (both + 1e-6)) if self._settings.clip else 1.0
            torch._foreach_mul_(gradients, clip / counted)
            set_learning_rate(self.optimizer, rate)
            self._moved = True
            self.optimizer.step()
        self._clear()
        return StepReport(rate, norm if finite else None, skipped=not finite)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {name: parameter.detach() for name, parameter in self.trainables.items()}
        return tensors, {"optimizer": self.optimizer.state_dict()} if self.optimizer is not None else {}

    def load(self, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        copy_into(self.trainables, tensors)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(extra["optimizer"])

    def moved(self) -> bool:
        return self._moved
