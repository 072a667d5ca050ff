"""AdamW and its schedule, built from settings: the same on the trunk, on the ends and in the central reference."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from splitfl.config import OptimizerSettings

__all__ = ["build_optimizer", "learning_rate_at", "set_learning_rate"]


def build_optimizer(parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over ``parameters``; weight decay falls on matrices only, never on norms and biases."""
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in held if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel runs on CPU, CUDA and MPS, in one pass over the memory instead of a dozen.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate_at(0, settings),
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def learning_rate_at(step: int, settings: OptimizerSettings) -> float:
    """The learning rate of optimizer step ``step`` (from 0), as ``transformers.get_scheduler`` has it: linear warm-up from 0,
    then constant, linear to 0, or half a cosine to 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    remaining = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / remaining)
    factor = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
