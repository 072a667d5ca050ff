"""Sums and averages of many tensors over all replicas, in buckets: large enough for the network, small enough to overlap.

Every replica makes the same collectives in the same order, so a tensor that is missing on one counts as zeros. What comes out is
equal on all, to the bit: each element is summed at one place and handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from splitfl.errors import SplitflError

__all__ = ["BUCKET_BYTES", "Averages", "Sums"]

#: As DistributedDataParallel's (Li et al., arXiv 2006.15704): below it latency counts, above it nothing is gained.
BUCKET_BYTES = 25 * 2**20


class _Bucket:
    """Parameters of one dtype and device that travel together. ``flat`` holds them one after the other."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self._numbers = [parameter.numel() for parameter in parameters]

    def flat(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        first = self.parameters[0]
        return torch.empty(sum(self._numbers), dtype=dtype or first.dtype, device=first.device)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """One view a parameter, laid out as it is."""
        parts = flat.split(self._numbers)
        # The fused AdamW of a CPU takes it for granted that a gradient is laid out as its parameter.
        return [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self.parameters, strict=True)]


def _buckets(parameters: Sequence[Parameter]) -> list[_Bucket]:
    """The last parameters first, as their gradients are the first to be there."""
    buckets: list[_Bucket] = []
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        room = buckets[-1] if buckets else None
        first = room.parameters[0] if room else None
        alike = first is not None and (first.dtype, first.device) == (parameter.dtype, parameter.device)
        if room is None or not alike or sum(p.numel() * p.element_size() for p in room.parameters) + size > BUCKET_BYTES:
            buckets.append(_Bucket([parameter]))
        else:
            room.parameters.append(parameter)
    return [_Bucket(bucket.parameters) for bucket in buckets]


def _reduce(tensor: torch.Tensor, group: Any) -> Callable[[], None]:
    """Begin to sum ``tensor`` over all replicas, in place; returns what waits for the end."""
    try:
        work = dist.all_reduce(tensor, group=group, async_op=True)
    except RuntimeError as error:
        raise _gone(error) from error

    def wait() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise _gone(error) from error

    return wait


def _gone(error: Exception) -> SplitflError:
    return SplitflError(f"another replica is gone: {str(error).splitlines()[0]}")


class Sums:
    """The gradients of one step, summed over all replicas; with them, the target tokens they stand for."""

    def __init__(self, parameters: Sequence[Parameter], group: Any) -> None:
        self._parameters, self._group = parameters, group
        self._buckets = [(bucket, flat := bucket.flat(), bucket.views(flat)) for bucket in _buckets(parameters)]
        self._counts = torch.zeros(0)
        self._waits: list[Callable[[], None]] = []

    @property
    def has_begun(self) -> bool:
        return bool(self._waits)

    def begin(self, targets: int) -> None:
        """This replica's gradients leave, and are gone from the parameters."""
        # A parameter without a gradient on any replica is to have none afterwards either: the optimizer passes over it.
        present = [parameter.grad is not None for parameter in self._parameters]
        self._counts = torch.tensor([targets, *present], dtype=torch.int64, device=self._parameters[0].device)
        self._waits = [_reduce(self._counts, self._group)]
        for bucket, flat, views in self._buckets:
            pairs = [(view, p.grad) for view, p in zip(views, bucket.parameters, strict=True) if p.grad is not None]
            if len(pairs) < len(views):
                flat.zero_()
            if pairs:
                torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])
            for parameter in bucket.parameters:
                parameter.grad = None
            self._waits.append(_reduce(flat, self._group))

    def finish(self) -> int:
        """The sums lie in the parameters' ``grad``, until they are cleared; returns the targets of all replicas."""
        for wait in self._waits:
            wait()
        self._waits = []
        targets, *present = self._counts.tolist()
        found = {id(parameter) for parameter, replicas in zip(self._parameters, present, strict=True) if replicas}
        for bucket, _, views in self._buckets:
            for parameter, view in zip(bucket.parameters, views, strict=True):
                parameter.grad = view if id(parameter) in found else None
        return int(targets)


class Averages:
    """The weighted mean of the parameters over all replicas. Half-precision ones are averaged in float32."""

    def __init__(self, parameters: Sequence[Parameter], group: Any) -> None:
        self._device = parameters[0].device
        self._group = group
        self._buckets = _buckets(parameters)

    def take(self, weight: int) -> None:
        """Set the parameters to ``sum_r w_r p_r / sum_r w_r``, with ``weight`` this replica's; leave them where all are zero."""
        total = torch.tensor([weight], dtype=torch.int64, device=self._device)
        _reduce(total, self._group)()
        if not int(total):
            return
        share = weight / int(total)
        finish: Callable[[], None] = lambda: None  # noqa: E731
        for bucket in self._buckets:
            # The next bucket is on its way while this one is waited for; no more of them take memory.
            begun = self._begin(bucket, share)
            finish()
            finish = begun
        finish()

    @torch.no_grad()
    def _begin(self, bucket: _Bucket, share: float) -> Callable[[], None]:
        dtype = bucket.parameters[0].dtype
        flat = bucket.flat(dtype if dtype.itemsize > 2 else torch.float32)
        views = bucket.views(flat)
        if share:
            torch._foreach_copy_(views, [parameter.detach() for parameter in bucket.parameters])
            flat.mul_(share)
        else:
            flat.zero_()  # a weight that is not finite must not count either
        wait = _reduce(flat, self._group)

        def finish() -> None:
            wait()
            torch._foreach_copy_([parameter.detach() for parameter in bucket.parameters], views)

        return finish
