"""Clipping by the norm of both sides' gradient together, as one process would that holds the whole model.

Whatever clips a model clips ``model.parameters()``. So the trunk stands among them, as one number whose gradient has the norm of
the trunk's gradient: the norm that is found is the whole model's, and what the gradients are multiplied by is known to both
sides. It is no weight: no checkpoint has it, and nothing trains it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from client_ends.session import TrunkSession

__all__ = ["TrunkGradient", "clip", "norm_before_clipping"]


class _StandIn(nn.Parameter):
    """The number. Its gradient is asked of the server when somebody wants it, once a step."""

    _session: TrunkSession
    _gradient: torch.Tensor | None
    _norm: float

    @property
    def grad(self) -> torch.Tensor | None:
        """Of the step under way, as far as its gradients have been sent; None before any has."""
        if not self._session.contributed:
            self._gradient = None
        elif self._gradient is None or self._session.has_sent_since_norm:
            self._norm = self._session.trunk_norm()
            self._gradient = torch.tensor(self._norm, dtype=self.dtype, device=self.device)
        return self._gradient

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        self._gradient = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        return self


class TrunkGradient(nn.Module):
    """Holds the number that stands for the trunk's gradient, and keeps it out of state dicts."""

    def __init__(self, session: TrunkSession) -> None:
        super().__init__()
        self.number = _StandIn(torch.zeros(()), requires_grad=False)
        self.number._session, self.number._gradient, self.number._norm = session, None, 0.0

    @property
    def factor(self) -> float:
        """What the gradients of the present step were multiplied by since."""
        gradient, norm = self.number._gradient, self.number._norm
        return float(gradient) / norm if gradient is not None and norm else 1.0

    def forget(self) -> None:
        """The step is over."""
        self.number.grad = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def norm_before_clipping(parameters: Iterable[nn.Parameter], factor: float) -> float | None:
    """The norm of the gradients of ``parameters`` before they were multiplied by ``factor``; None where it is not finite."""
    gradients = [p.grad for p in parameters if not isinstance(p, _StandIn) and p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients)) / (factor or 1.0) if gradients else 0.0
    return norm if math.isfinite(norm) else None


def clip(model: nn.Module, largest: float) -> float:
    """Clip the gradient of the ends (0: not at all); returns its norm before that. Where the run clips both sides together, it is
    the norm of both that is found, and clipped by.
    """
    if largest:
        return float(nn.utils.clip_grad_norm_(model.parameters(), largest))
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
