"""When the user's optimizer steps, the trunk's does: this hears of every optimizer step, and knows whose it is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["StepHook", "leaves_of", "step_with"]


def step_with(model: weakref.ref[Any]) -> StepHook:
    """When an optimizer that holds parameters of the ends steps, the trunk's step ends."""

    def stepped(optimizer: torch.optim.Optimizer) -> None:
        ends = model()
        if ends is None or not ends._remote.session.contributed:
            return
        own = {id(parameter) for parameter in ends._own_parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            ends.step()

    return StepHook(stepped)


def leaves_of(fed: Any) -> tuple[torch.nn.Parameter, ...]:
    """The parameters that a tensor was computed from, which a model is fed with in place of tokens: soft prompts."""
    return tuple(_leaves(fed.grad_fn)) if isinstance(fed, torch.Tensor) and fed.grad_fn is not None else ()


def _leaves(root: Any) -> Iterator[torch.nn.Parameter]:
    seen, left = {root}, [root]
    while left:
        node = left.pop()
        if isinstance(leaf := getattr(node, "variable", None), torch.nn.Parameter):
            yield leaf
        for earlier, _ in node.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                left.append(earlier)


class StepHook:
    """Hears of every optimizer step until it is removed. Torch's own table of such hooks must not change while an optimizer of
    another thread goes through it, so one entry of it serves all, and the list behind that entry is replaced, never changed.
    """

    _all: ClassVar[tuple[StepHook, ...]] = ()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, stepped: Callable[[torch.optim.Optimizer], None]) -> None:
        self._stepped = stepped
        with self._lock:
            StepHook._all = (*StepHook._all, self)

    def remove(self) -> None:
        with self._lock:
            StepHook._all = tuple(each for each in StepHook._all if each is not self)

    @classmethod
    def heard(cls, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for hook in cls._all:
            hook._stepped(optimizer)


register_optimizer_step_post_hook(StepHook.heard)
