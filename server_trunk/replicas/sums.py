"""The gradients of a step, summed over all replicas, in buckets that leave while the rest is still computed.

As DistributedDataParallel does it (Li et al., arXiv 2006.15704): a bucket leaves once all its gradients are whole, in one order
on all replicas. Unlike there, nobody knows for certain which backward is a step's last. So the counts leave after the buckets,
and say whether any replica has had further gradients since; then all make the same sums once more, of what was late.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from server_trunk.replicas.buckets import Bucket, buckets_of, reduce

__all__ = ["EarlySums", "Sums", "fill"]


class Sums:
    """The sums of one step after another; with them, the target tokens that they stand for."""

    def __init__(self, parameters: Sequence[Parameter], group: Any) -> None:
        self._parameters, self._group = parameters, group
        self._buckets = [(bucket, flat := bucket.flat(), bucket.views(flat)) for bucket in buckets_of(parameters, group)]
        self._counts = torch.zeros(0)
        self._waits: list[Callable[[], None]] = []
        self._present: set[int] = set()  # the parameters, by id, that had a gradient when their bucket left
        self.left = 0  # buckets
        self.is_whole = False  # whether the counts have left too

    @property
    def buckets(self) -> list[list[Parameter]]:
        """The parameters of each, in the order in which they leave."""
        return [bucket.parameters for bucket, _, _ in self._buckets]

    def leave(self, more: dict[int, torch.Tensor] | None = None) -> None:
        """The next bucket leaves, and its gradients are gone from the parameters. ``more``: to be added to them, by id."""
        bucket, flat, views = self._buckets[self.left]
        self._present |= {id(p) for p in bucket.parameters if p.grad is not None or id(p) in (more or {})}
        fill(bucket, flat, views, more)
        self._waits.append(reduce(flat, self._group))
        self.left += 1  # last: where something failed before, it has not left

    def leave_all(self) -> None:
        while self.left < len(self._buckets):
            self.leave()

    def begin(self, targets: int) -> None:
        """Nothing more comes of this replica: what has not left does, and its count of target tokens."""
        self.leave_all()
        late = any(parameter.grad is not None for parameter in self._parameters)
        # A parameter without a gradient on any replica is to have none afterwards either: the optimizer passes over it.
        present = [id(parameter) in self._present or parameter.grad is not None for parameter in self._parameters]
        self._counts = torch.tensor([targets, late, *present], dtype=torch.int64, device=self._parameters[0].device)
        self._waits.append(reduce(self._counts, self._group))
        self.is_whole = True

    def finish(self) -> int:
        """The sums lie in the parameters' ``grad``, until they are cleared; returns the targets of all replicas."""
        for wait in self._waits:
            wait()
        targets, late, *present = self._counts.tolist()
        if late:
            self._add_late()
        self._waits, self._present, self.left, self.is_whole = [], set(), 0, False
        found = {id(parameter) for parameter, replicas in zip(self._parameters, present, strict=True) if replicas}
        for bucket, _, views in self._buckets:
            for parameter, view in zip(bucket.parameters, views, strict=True):
                parameter.grad = view if id(parameter) in found else None
        return int(targets)

    def _add_late(self) -> None:
        for bucket, flat, _ in self._buckets:
            late = bucket.flat()
            fill(bucket, late, bucket.views(late))
            reduce(late, self._group)()
            flat.add_(late)


def fill(bucket: Bucket, flat: torch.Tensor, views: Sequence[torch.Tensor], more: dict[int, torch.Tensor] | None = None) -> None:
    """Bring the gradients of a bucket's parameters together in ``flat``, of which ``views`` are; from where they were they are
    then gone. ``more``: to be added to them, by the parameter's id.
    """
    more = more or {}
    held = [(view, p.grad) for view, p in zip(views, bucket.parameters, strict=True) if p.grad is not None]
    added = [(view, more[id(p)]) for view, p in zip(views, bucket.parameters, strict=True) if id(p) in more]
    if len(held) < len(views):
        flat.zero_()
    if held:
        torch._foreach_copy_([view for view, _ in held], [gradient for _, gradient in held])
    if added:
        torch._foreach_add_([view for view, _ in added], [gradient for _, gradient in added])
    for parameter in bucket.parameters:
        parameter.grad = None


class EarlySums:
    """Has the buckets of a step leave amid the backward that is likely to be its last, on this replica.

    ``in_place``: gradients come into ``.grad``. Else they are the engine's until the whole batch counts: what has left before
    then is not to be counted again (:meth:`has_left`), and is taken back should the batch fail.
    """

    def __init__(self, sums: Sums, *, in_place: bool) -> None:
        self._sums, self._in_place = sums, in_place
        self._lock = threading.Lock()
        self._awaited: list[int] = []  # gradients, by bucket
        self._given: dict[int, torch.Tensor] = {}  # by parameter's id: gradients that are not in ``.grad``
        self._gone: set[int] = set()  # parameters whose bucket has left

    @contextlib.contextmanager
    def amid(self, pieces: int) -> Iterator[None]:
        """Within, each of so many pieces has its backward. What some piece does not reach leaves afterwards, as all behind it."""
        if pieces > 1 and not self._in_place:
            yield  # whatever leaves must be of all pieces; the engine adds them up
            return
        buckets = self._sums.buckets
        self._awaited = [len(parameters) * pieces for parameters in buckets]
        hooks = []
        for index, parameters in enumerate(buckets):
            for parameter in parameters:
                if self._in_place:
                    hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._arrived, index)))
                else:
                    hooks.append(parameter.register_hook(partial(self._arrived, index, parameter)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._given = {key: gradient for key, gradient in self._given.items() if key in self._gone}

    def _arrived(self, index: int, parameter: Parameter, gradient: torch.Tensor | None = None) -> None:
        with self._lock:  # pieces side by side
            if gradient is not None:
                self._given[id(parameter)] = gradient
            self._awaited[index] -= 1
            while self._sums.left < len(self._awaited) and not self._awaited[self._sums.left]:
                self._gone |= {id(other) for other in self._sums.buckets[self._sums.left]}
                self._sums.leave(self._given)

    def has_left(self, parameter: Parameter) -> bool:
        """Whether the gradient that this batch has for it counts already."""
        return id(parameter) in self._given

    def take_back(self) -> None:
        """The batch has failed: what has left of it is subtracted again, among what is late."""
        for parameters in self._sums.buckets:
            for parameter in parameters:
                if self.has_left(parameter):
                    parameter.grad = self._given[id(parameter)].neg()
        self._given.clear()

    def leave(self) -> None:
        """The batch counts: whatever has not left does."""
        self._given.clear()
        self._sums.leave_all()
