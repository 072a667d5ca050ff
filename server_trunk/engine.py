"""The trunk's arithmetic: forward, backward, one optimizer step. Only the trunk's thread calls it.

The objective of a step is ``sum_i n_i L_i / sum_i n_i`` with ``n_i`` the target tokens of client ``i``. A client sends the
gradient of its own loss, which is a sum over targets divided by some ``d``; it is scaled by ``d`` here, summed over
everything that comes, and divided by the counted targets when the step closes. So it does not matter how the work was batched.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from server_trunk.scheduler import BackwardBatch, ForwardBatch
from splitfl.adapters import named_trainables
from splitfl.config import OptimizerSettings
from splitfl.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from splitfl.parts.segments import pad_segments, unpad
from splitfl.parts.trunk import find_trunk

__all__ = ["Engine", "StepReport"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. ``grad_norm`` (before clipping) is None where nothing was trained or the gradient was not finite."""

    learning_rate: float
    grad_norm: float | None
    skipped: bool = False


class Engine:
    """The loaded trunk and its optimizer."""

    def __init__(self, model: torch.nn.Module, settings: OptimizerSettings, device: torch.device) -> None:
        self._model = model
        self._trunk = find_trunk(model)
        self._settings = settings
        self._device = device
        self.trainables = named_trainables(model)
        self.optimizer = build_optimizer(self.trainables.values(), settings) if self.trainables else None
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.closed: int | None = -1  # the step after which the weights stand; None while they are moved
        model.eval()

    def forward(self, batch: ForwardBatch) -> list[torch.Tensor]:
        """Run the trunk on the members together; returns each member's ``y: (tokens, hidden)`` in host memory.

        Where the batch keeps its graph, :meth:`backward` or :meth:`discard` must follow under the same number.
        """
        kind = batch.members[0].forward
        sizes = [member.tokens for member in batch.members]
        hidden = [member.hidden.to(self._device, non_blocking=True) for member in batch.members]
        flat = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        segments = [segment for member in batch.members for segment in member.forward.segments]
        if self._model.training != kind.train:
            self._model.train(kind.train)
        with contextlib.ExitStack() as stack:
            if not kind.adapter_on and isinstance(self._model, PeftModel):
                stack.enter_context(self._model.disable_adapter())
            stack.enter_context(torch.set_grad_enabled(kind.grad))
            flat = flat.requires_grad_(kind.grad)
            padded, attention_mask, position_ids = pad_segments(flat, segments)
            out = unpad(self._trunk.trunk_forward(padded, attention_mask, position_ids), segments)
        if kind.grad:
            self._graphs[batch.number] = (flat, out)
        return [part.contiguous() for part in out.detach().to("cpu").split(sizes)]

    def backward(self, batch: BackwardBatch) -> list[torch.Tensor | None]:
        """Add the batch's gradients; returns each member's unweighted ``dh: (tokens, hidden)``, None where nobody wants it.

        A gradient that is not finite counts as zero; its member is marked ``spoilt``.
        """
        flat, out = self._graphs.pop(batch.number)
        gradient = torch.zeros_like(out)
        sizes = [member.tokens for member in batch.members]
        for rows, member in zip(gradient.split(sizes), batch.members, strict=True):
            if member.backward is not None:
                rows.copy_(member.gradient)
                rows.mul_(member.backward.divisor)
                if not bool(torch.isfinite(rows).all()):
                    # One client's overflow must not cost all others the step.
                    rows.zero_()
                    member.spoilt = True
        out.backward(gradient)
        assert flat.grad is not None
        replies: list[torch.Tensor | None] = []
        for rows, member in zip(flat.grad.split(sizes), batch.members, strict=True):
            back = member.backward
            if back is None or not back.want_grad:
                replies.append(None)
            elif member.spoilt:
                # Whoever sends NaN gets NaN back, as from a whole model; nobody is told that all is well.
                replies.append(torch.full_like(rows, math.nan, device="cpu"))
            else:
                replies.append((rows / back.divisor).to("cpu").contiguous())
        return replies

    @staticmethod
    def is_lost(error: Exception) -> bool:
        """Whether the device itself has failed (a CUDA error is never recovered from), not only one batch."""
        # Newer torch has a class of its own for it; being out of memory is none of them.
        kind = getattr(torch, "AcceleratorError", None)
        return kind is not None and isinstance(error, kind) and not isinstance(error, torch.OutOfMemoryError)

    def discard(self, number: int) -> None:
        """Free a graph whose backward will never come."""
        self._graphs.pop(number, None)

    def close_step(self, step: int, targets: int) -> StepReport:
        """Divide by the counted targets, clip, step, and clear the gradients for the next step."""
        report = self._move(targets, learning_rate_at(step, self._settings))
        self.closed = step
        return report

    def _move(self, targets: int, rate: float) -> StepReport:
        if self.optimizer is None:
            return StepReport(rate, None)
        gradients = [p.grad for p in self.trainables.values() if p.grad is not None]
        if targets == 0 or not gradients:
            self.optimizer.zero_grad(set_to_none=True)
            return StepReport(rate, None, skipped=True)
        torch._foreach_div_(gradients, float(targets))
        limit = self._settings.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.trainables.values()), limit))
        finite = math.isfinite(norm)
        if finite:
            set_learning_rate(self.optimizer, rate)
            self.closed = None
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(rate, norm if finite else None, skipped=not finite)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint holds of the trunk: the trained weights by name, and the optimizer's and generator's state."""
        tensors = {name: parameter.detach() for name, parameter in self.trainables.items()}
        extra: dict[str, Any] = {"generator": torch.get_rng_state()}
        if self.optimizer is not None:
            extra["optimizer"] = self.optimizer.state_dict()
        return tensors, extra
