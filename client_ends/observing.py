"""The family's forward, watched: the remote trunk learns the mode, and what the labels and the loss say of the objective."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from client_ends.objective import Objective, objective_of, without_targets_after_padding
from client_ends.pieces import forward_in_pieces, pieces_of
from client_ends.stepping import leaves_of

__all__ = ["ObservedForward"]

#: TRL's name for the adapter that holds what a preference loss refers to: where training began.
_REFERENCE = "ref"


class ObservedForward:
    """The ``forward`` of a split model's class. Libraries give single models a forward of their own (TRL's fused head,
    accelerate's autocast), which may call the backbone past the class's: such a one is watched as well.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._of_class = _observed(forward, inspect.signature(forward), in_pieces=True)

    def __get__(self, model: Any, owner: Any = None) -> Any:
        if model is None:
            return self._of_class
        given = model.__dict__.get("_given_forward")
        return MethodType(self._of_class if given is None else self._watched(given), model)

    def _watched(self, given: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(self._of_class)
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            return given(*args, **kwargs)

        return _observed(call, inspect.signature(self._of_class), in_pieces=False)

    def __set__(self, model: Any, forward: Callable[..., Any]) -> None:
        model.__dict__["_given_forward"] = forward

    def __delete__(self, model: Any) -> None:
        del model.__dict__["_given_forward"]


def _observed(forward: Callable[..., Any], signature: inspect.Signature, *, in_pieces: bool) -> Callable[..., Any]:
    names = {name for name, each in signature.parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD} - {"self"}

    @functools.wraps(forward)
    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, *args).arguments
        arguments = {**bound, **kwargs}
        if self._per_token and isinstance(arguments.get("labels"), torch.Tensor):
            labels = without_targets_after_padding(arguments["labels"], arguments.get("attention_mask"))
            arguments["labels"] = labels
            if "labels" in kwargs:
                kwargs["labels"] = labels
            else:  # given by position; `self` is the first
                place = list(bound).index("labels") - 1
                args = (*args[:place], labels, *args[place + 1 :])
        objective = _objective(self, arguments)
        remote = self._remote
        if torch.is_grad_enabled():
            remote.session.await_leftovers()
        if self.training and torch.is_grad_enabled():
            self._fed_by = leaves_of(arguments.get("inputs_embeds"))
            remote.session.begin_forward()
        remote.training = self.training
        remote.ends_adapter_on = not _is_adapter_off(self)
        remote.objective = objective
        named = {name: arguments[name] for name in arguments if name in names or name in kwargs}
        pieces = pieces_of(named, self.config, remote.micro_batches) if in_pieces else []
        try:
            if pieces:
                out = forward_in_pieces(self, forward, named, pieces, remote, objective, per_token=self._per_token)
            else:
                out = forward(self, *args, **kwargs)
        finally:
            remote.objective = None
        if objective is not None:
            _watch(objective, out)
        return out

    return observed


def _objective(model: Any, arguments: Mapping[str, Any]) -> Objective | None:
    """What stands behind the loss of this forward, as far as it is known before it."""
    if model._set_objective is not None:
        stated: Objective = model._set_objective
        return stated
    if model._declare is not None and model.training and torch.is_grad_enabled():
        declared: Objective | None = model._declare(arguments)
        if declared is not None:
            return declared
    return objective_of(arguments, per_token=model._per_token)


def _watch(objective: Objective, out: Any) -> None:
    loss = out.get("loss") if hasattr(out, "get") else out[0] if isinstance(out, tuple) else None
    if isinstance(loss, torch.Tensor):
        objective.watch(loss)
    fused = out.get("log_probs") if hasattr(out, "get") else None
    if isinstance(fused, torch.Tensor) and not objective.is_stated:
        objective.learn(fused)


def _is_adapter_off(model: torch.nn.Module) -> bool:
    """Whether the ends run without what is trained, as in the reference pass of a preference loss."""
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (bool(layer.disable_adapters) or _REFERENCE in layer.active_adapters)
