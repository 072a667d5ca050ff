"""The reference everything is held against: one process that holds one trunk and N sets of ends. No network, no scheduler.

Each step minimises ``sum_i n_i L_i / sum_i n_i`` over the trunk and, for each client, ``L_i`` over its own ends; ``n_i`` are the
target tokens of client ``i`` and ``L_i`` its mean loss over them. Written as plainly as it can be, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitfl.adapters import named_trainables
from splitfl.config import OptimizerSettings
from splitfl.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from splitfl.parts.loading import attach_trunk

__all__ = ["Central", "count_targets"]


def count_targets(batch: Mapping[str, Any]) -> int:
    """Target tokens of a batch: causal labels ``(B, T)`` after the shift by one, or one label a row ``(B,)``."""
    labels = batch["labels"]
    return int(((labels[:, 1:] if labels.ndim == 2 else labels) != -100).sum())


@dataclass
class _Side:
    """Parameters that one optimizer moves."""

    parameters: list[torch.nn.Parameter]
    settings: OptimizerSettings
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def of(cls, model: torch.nn.Module, settings: OptimizerSettings) -> _Side:
        parameters = list(named_trainables(model).values())
        return cls(parameters, settings, build_optimizer(parameters, settings) if parameters else None)

    def move(self, gradients: Sequence[torch.Tensor | None], step: int) -> None:
        if self.optimizer is None:
            return
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        set_learning_rate(self.optimizer, learning_rate_at(step, self.settings))
        self.optimizer.step()


class Central:
    """``trunk`` and each of ``ends`` as loaded and adapted for a split run; they are trained in place."""

    def __init__(
        self,
        trunk: torch.nn.Module,
        ends: Sequence[torch.nn.Module],
        trunk_settings: OptimizerSettings,
        ends_settings: OptimizerSettings,
    ) -> None:
        self.trunk, self.ends = trunk.train(), [end.train() for end in ends]
        for end in self.ends:
            attach_trunk(end, trunk)
        self._trunk_side = _Side.of(trunk, trunk_settings)
        self._ends_sides = [_Side.of(end, ends_settings) for end in ends]
        self._step = 0

    def step(self, batches: Sequence[Mapping[str, Any]]) -> list[float]:
        """One optimizer step on one batch a client; returns each client's mean loss before it."""
        shared = self._trunk_side.parameters
        total: list[torch.Tensor | None] = [None] * len(shared)
        counts = [count_targets(batch) for batch in batches]
        losses: list[float] = []
        moves = []
        for end, side, batch, count in zip(self.ends, self._ends_sides, batches, counts, strict=True):
            loss = end(**batch).loss
            gradients = torch.autograd.grad(loss, side.parameters + shared, allow_unused=True)
            moves.append((side, gradients[: len(side.parameters)]))
            for index, gradient in enumerate(gradients[len(side.parameters) :]):
                if gradient is not None:
                    weighted = gradient * (count / sum(counts))
                    held = total[index]
                    total[index] = weighted if held is None else held + weighted
            losses.append(float(loss.detach()))
        for side, own in moves:
            side.move(own, self._step)
        self._trunk_side.move(total, self._step)
        self._step += 1
        return losses
