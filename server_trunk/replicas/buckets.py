"""What is summed over all replicas travels in buckets: large enough for the network, small enough to overlap. And averages.

Every replica makes the same collectives in the same order, so a tensor that is missing on one counts as zeros. What comes out is
equal on all, to the bit: each element is summed at one place and handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from splitfl.errors import GroupLost, first_line

__all__ = ["BUCKET_BYTES", "Averages", "Bucket", "buckets_of", "reduce"]

#: By backend. NCCL's as DistributedDataParallel's (Li et al., arXiv 2006.15704). To gloo a byte of a bucket of 1 MB costs no
#: more CPU than of one of 20 (of 0.3 MB twice as much), and the smaller the last one is, the less is left when a backward ends.
BUCKET_BYTES = {"nccl": 25 * 2**20, "gloo": 2 * 2**20}


class Bucket:
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


def buckets_of(parameters: Sequence[Parameter], group: Any) -> list[Bucket]:
    """The last parameters first, as their gradients are the first to be there."""
    most = BUCKET_BYTES[dist.get_backend(group)]
    buckets: list[Bucket] = []
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        room = buckets[-1] if buckets else None
        first = room.parameters[0] if room else None
        alike = first is not None and (first.dtype, first.device) == (parameter.dtype, parameter.device)
        if room is None or not alike or sum(p.numel() * p.element_size() for p in room.parameters) + size > most:
            buckets.append(Bucket([parameter]))
        else:
            room.parameters.append(parameter)
    return [Bucket(bucket.parameters) for bucket in buckets]


def reduce(tensor: torch.Tensor, group: Any) -> Callable[[], None]:
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


def _gone(error: Exception) -> GroupLost:
    return GroupLost(f"another replica is gone: {first_line(error)}")


class Averages:
    """The weighted mean of the parameters over all replicas. Half-precision ones are averaged in float32."""

    def __init__(self, parameters: Sequence[Parameter], group: Any) -> None:
        self._device = parameters[0].device
        self._group = group
        self._buckets = buckets_of(parameters, group)

    def take(self, weight: int) -> None:
        """Set the parameters to ``sum_r w_r p_r / sum_r w_r``, with ``weight`` this replica's; leave them where all are zero."""
        total = torch.tensor([weight], dtype=torch.int64, device=self._device)
        reduce(total, self._group)()
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
    def _begin(self, bucket: Bucket, share: float) -> Callable[[], None]:
        dtype = bucket.parameters[0].dtype
        flat = bucket.flat(dtype if dtype.itemsize > 2 else torch.float32)
        views = bucket.views(flat)
        if share:
            torch._foreach_copy_(views, [parameter.detach() for parameter in bucket.parameters])
            flat.mul_(share)
        else:
            flat.zero_()  # a weight that is not finite must not count either
        wait = reduce(flat, self._group)

        def finish() -> None:
            wait()
            torch._foreach_copy_([parameter.detach() for parameter in bucket.parameters], views)

        return finish
