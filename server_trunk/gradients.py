"""The gradients of one batch on their way into the step's sum, and back to those whose rows they are of."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch.nn import Parameter

from server_trunk.members import NO_TARGETS, NOT_FINITE, Member
from server_trunk.training import Early
from splitfl.shards import local_of
from splitfl.tensors import DTYPES

__all__ = ["GradientSum", "is_usable", "summed", "unscaled"]

#: Hidden states and gradients beyond this are no model's. The sum of its squares over any width is still a float32.
_LARGEST = 1e15


class GradientSum:
    """The gradients of one batch, on their way into the step's sum: all of them, or, where one fails, none.

    ``in_place``: straight into ``.grad``, piece by piece. That spares a copy of all gradients, and a failure midway is final.
    """

    def __init__(self, parameters: Sequence[Parameter], in_place: bool, early: Early | None = None) -> None:
        """``early``: lets them leave, of the batch that is likely to be the step's last."""
        self._parameters, self._in_place, self._early = parameters, in_place, early
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)
        self._lock = threading.Lock()

    def differentiate(self, out: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The gradient of ``hidden``, for ``weights`` the gradient of ``out``; those of the parameters are added up."""
        if self._in_place and self._parameters:
            out.backward(weights)
            assert hidden.grad is not None
            return hidden.grad
        own, *others = torch.autograd.grad(out, [hidden, *self._parameters], weights, allow_unused=True)
        with self._lock:
            for index, gradient in enumerate(others):
                if gradient is not None:
                    held = self._gradients[index]
                    self._gradients[index] = gradient if held is None else held.add_(gradient)
        return own

    def clear(self) -> None:
        self._gradients = [None] * len(self._parameters)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The batch counts at the end of this, unless it fails within."""
        try:
            yield
        except BaseException:
            if self._early is not None:
                self._early.take_back()
            raise
        self.count()

    def count(self) -> None:
        """All pieces have run: the batch counts."""
        early = self._early
        held: list[torch.Tensor] = []
        added: list[torch.Tensor] = []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if early is not None and early.has_left(parameter):
                continue
            if gradient is not None and parameter.grad is None:
                # Laid out as its parameter: the fused AdamW of a CPU takes that for granted.
                same = gradient.stride() == parameter.stride()
                parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
            elif gradient is not None and parameter.grad is not None:
                # Operations on many tensors at once take no mixture of plain and distributed ones.
                held.append(local_of(parameter.grad))
                added.append(local_of(gradient))
        if held:
            torch._foreach_add_(held, added)


def summed(member: Member) -> torch.Tensor:
    """The gradient ``(tokens, H)`` of the member's *summed* loss: its own scaled by the divisor; zero where none counts."""
    if member.backward is None:
        return torch.zeros(member.tokens, member.forward.hidden, dtype=DTYPES[member.forward.dtype])
    rows: torch.Tensor = member.gradient.mul_(member.backward.divisor)
    if not member.spoilt and not is_usable(rows):
        member.spoilt = NOT_FINITE
    elif not member.spoilt and not member.backward.targets and bool(rows.any()):
        member.spoilt = NO_TARGETS
    if member.spoilt:
        # One client's overflow must not cost all others the step.
        rows.zero_()
    return rows


def is_usable(rows: torch.Tensor) -> bool:
    """Whether all numbers are finite, and small enough that what the trunk makes of them is: it squares them in its norms."""
    least, most = torch.aminmax(rows)  # takes no memory; NaN where one is
    return bool(torch.maximum(most, -least) <= _LARGEST)


def unscaled(member: Member, rows: torch.Tensor) -> torch.Tensor | None:
    """The gradient of the member's own loss, from that of its summed one; None where nobody wants it."""
    back = member.backward
    if back is None or not back.want_grad:
        return None
    if member.spoilt:
        # Whoever sends NaN gets NaN back, as from a whole model; nobody is told that all is well.
        return torch.full_like(rows, math.nan)
    return rows.div_(back.divisor)
