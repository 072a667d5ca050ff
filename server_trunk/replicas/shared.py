"""The gradients of a step, summed over replicas on one machine: in memory that all of them see.

Between processes of one machine gloo goes through sockets: each byte is copied four times and more, by cores that could train.
Here each replica lays its gradients where all can read them, and adds up all of them for itself, in the order of ranks, so that
the sums are equal everywhere to the bit. What gloo still carries are the counts, which say that all is there, and a word that all
is read. Nothing is under way meanwhile, so nothing need leave before a part is whole.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import Parameter

from server_trunk.replicas.buckets import Bucket, buckets_of, reduce
from server_trunk.replicas.group import Group
from server_trunk.replicas.sums import fill

__all__ = ["SharedSums", "share"]

#: Where a tensor may begin, bytes.
_ALIGNED = 64


def share(size: int, group: Group) -> list[torch.Tensor] | None:
    """So many bytes ``(size,)`` of each replica by rank, zero at first, seen by all; None where not all are processes of one
    machine, there is no room, or some replica has nothing to share (0). All replicas must call it at the same point.
    """
    with contextlib.ExitStack() as files:
        try:
            own = os.memfd_create("splitfl-gradients")
            files.callback(os.close, own)
            os.posix_fallocate(own, 0, size)  # else want of memory would be noticed by whoever writes, as a bus error
            machine = f"{group.place.machine} {Path('/proc/sys/kernel/random/boot_id').read_text()}"
        except (AttributeError, OSError):
            own, machine = -1, ""
        offered = group.gather((machine, os.getpid(), own))
        is_one = bool(machine) and {there for there, _, _ in offered} == {machine}
        found = _open_all([(process, number) for _, process, number in offered], size, files) if is_one else None
        # Until all have opened it, it is known only by its owner's number.
        return found if all(group.gather(found is not None)) else None


def _open_all(offered: Sequence[tuple[int, int]], size: int, files: contextlib.ExitStack) -> list[torch.Tensor] | None:
    """``offered``: process and number of each file."""
    found = []
    try:
        for process, number in offered:
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            files.callback(os.close, file)
            found.append(torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8))
    except (OSError, ValueError):
        return None
    return found


class SharedSums:
    """The sums of one step after another, as :class:`~server_trunk.replicas.sums.Sums`, of parameters on the CPU."""

    @classmethod
    def of(cls, parameters: Sequence[Parameter], group: Group) -> SharedSums | None:
        """None where they cannot be had. All replicas must call it at the same point."""
        if group.size < 2:
            return None
        buckets = buckets_of(parameters, group.gradients)
        on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
        regions = share(sum(_room(bucket) for bucket in buckets) if on_cpu else 0, group)
        return None if regions is None else cls(parameters, buckets, regions, group)

    def __init__(
        self, parameters: Sequence[Parameter], buckets: Sequence[Bucket], regions: list[torch.Tensor], group: Group
    ) -> None:
        self._parameters, self._group = parameters, group
        #: Of each bucket: what is summed by rank, the views of this replica's, the sum.
        self._buckets = []
        begin = 0
        for bucket in buckets:
            total = bucket.flat()
            given = [region[begin : begin + total.nbytes].view(total.dtype) for region in regions]
            self._buckets.append((bucket, given, bucket.views(given[group.rank]), total))
            begin += _room(bucket)
        self._counts = torch.zeros(0)
        self._wait: Callable[[], None] = lambda: None
        self._wait_until_read: Callable[[], None] = lambda: None
        self.is_whole = False

    def begin(self, targets: int) -> None:
        """Nothing more comes of this replica: its gradients lie open, and so does its count of target tokens."""
        self._wait_until_read()
        present = [parameter.grad is not None for parameter in self._parameters]
        for bucket, given, views, _ in self._buckets:
            fill(bucket, given[self._group.rank], views)
        self._counts = torch.tensor([targets, *present], dtype=torch.int64)
        self._wait = reduce(self._counts, self._group.gradients)
        self.is_whole = True

    def finish(self) -> int:
        """The sums lie in the parameters' ``grad``, until they are cleared; returns the targets of all replicas."""
        self._wait()
        for _, (first, second, *others), _, total in self._buckets:
            torch.add(first, second, out=total)
            for other in others:
                total.add_(other)
        self._wait_until_read = reduce(torch.zeros(1), self._group.gradients)
        self.is_whole = False
        targets, *present = self._counts.tolist()
        found = {id(parameter) for parameter, replicas in zip(self._parameters, present, strict=True) if replicas}
        for bucket, _, _, total in self._buckets:
            for parameter, view in zip(bucket.parameters, bucket.views(total), strict=True):
                parameter.grad = view if id(parameter) in found else None
        return int(targets)


def _room(bucket: Bucket) -> int:
    """Bytes for a bucket, so that the next one begins where it may."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in bucket.parameters)
    return -(-size // _ALIGNED) * _ALIGNED
