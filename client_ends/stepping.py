"""When the user's optimizer steps, the trunk's does: this hears of every optimizer step, and knows whose it is.

The server is told before the ends' optimizer steps, so that both step at the same time; or after it, where what the ends are then
is to be kept or averaged, or where the optimizer makes forwards of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from splitfl.errors import SplitflError, StepMissed

__all__ = ["StepHook", "leaves_of", "step_with"]


def step_with(model: weakref.ref[Any]) -> StepHook:
    """When an optimizer that holds parameters of the ends steps, the trunk's step ends."""
    return StepHook(_Stepping(model))


class _Stepping:
    def __init__(self, model: weakref.ref[Any]) -> None:
        self._model = model
        # Of the word that was sent before the ends stepped, and the optimizer that was about to: what else steps meanwhile, in
        # another thread, or after one that failed, is not to hear of it.
        self._failure: tuple[torch.optim.Optimizer, SplitflError] | None = None

    def before(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        ends = self._ends_of(optimizer)
        if ends is not None:
            self._failure = None
        if ends is None or closure or not ends._remote.session.may_end_before_ends:
            return
        try:
            ends.step()
        except SplitflError as failure:
            self._failure = optimizer, failure  # the ends step all the same, as they would if it were told after

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        ends = self._model()
        try:
            self._after(optimizer)
        except StepMissed as missed:
            if ends is None or ends._on_missed is None:
                raise
            ends._on_missed(missed)

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        if self._failure is not None and self._failure[0] is optimizer:
            (_, failure), self._failure = self._failure, None
            raise failure
        ends = self._ends_of(optimizer)
        if ends is not None:
            ends.step()

    def _ends_of(self, optimizer: torch.optim.Optimizer) -> Any:
        """The model whose part of the step this optimizer ends, if it ends any."""
        ends = self._model()
        if ends is None or not ends._remote.session.contributed:
            return None
        own = {id(parameter) for parameter in ends._own_parameters()}
        groups = optimizer.param_groups
        return ends if any(id(parameter) in own for group in groups for parameter in group["params"]) else None


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

    def __init__(self, stepping: _Stepping) -> None:
        self._stepping = stepping
        with self._lock:
            StepHook._all = (*StepHook._all, self)

    def remove(self) -> None:
        with self._lock:
            StepHook._all = tuple(each for each in StepHook._all if each is not self)

    @classmethod
    def before(cls, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Torch says what `step` was called with: the optimizer itself first, perhaps, and a closure, perhaps.
        closure = any(callable(each) and each is not optimizer for each in (*args, *kwargs.values()))
        for hook in cls._all:
            hook._stepping.before(optimizer, closure=closure)

    @classmethod
    def after(cls, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        failures = []
        for hook in cls._all:
            try:
                hook._stepping.after(optimizer)
            except (
                SplitflError
            ) as failure:  # an optimizer may hold parameters of several models: the others are told all the same
                failures.append(failure)
        if failures:
            raise failures[0]


register_optimizer_step_pre_hook(StepHook.before)
register_optimizer_step_post_hook(StepHook.after)
