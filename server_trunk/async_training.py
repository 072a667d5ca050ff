"""Training where graphs stay open while the optimizer steps.

An optimizer step in place would change weights that the backward of an open graph still needs. So the optimizer's parameters are
kept apart: the trunk's modules hold **working copies**, replaced by new ones after each optimizer step. An old copy lives in the
graphs that used it and goes with the last of them. Whatever gradient a copy receives, old or new, is added to that of the
parameter it was copied from, so that each gradient is exact for the weights its forward used.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module, Parameter

from server_trunk.training import SharedTraining, StepReport
from splitfl.config import OptimizerSettings

__all__ = ["AsyncTraining"]


class AsyncTraining(SharedTraining):
    """All clients train the same parameters, each on weights of its own age. The engine must add gradients up in place."""

    def __init__(self, model: Module, settings: OptimizerSettings) -> None:
        super().__init__(model, settings)
        own = {id(parameter): parameter for parameter in self._parameters}
        self._slots: list[tuple[Module, str, Parameter]] = [
            (module, name, own[id(parameter)])
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in own
        ]
        self._lock = threading.Lock()  # pieces of a batch may run backwards side by side
        self._working: list[Parameter] = []
        self._renew()

    def parameters_of(self, owners: Sequence[str]) -> Sequence[Parameter]:
        return self._working

    def close(self, step: int, targets: Mapping[str, int]) -> StepReport:
        report = super().close(step, targets)
        if not report.skipped:
            self._renew()
        return report

    def load(self, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        super().load(tensors, extra)
        self._renew()

    def _renew(self) -> None:
        """Put copies of the present weights into the modules."""
        copies: dict[int, Parameter] = {}
        for module, name, parameter in self._slots:
            if id(parameter) not in copies:
                copies[id(parameter)] = self._copy(parameter)
            setattr(module, name, copies[id(parameter)])
        self._working = list(copies.values())

    def _copy(self, parameter: Parameter) -> Parameter:
        copy = Parameter(parameter.detach().clone())

        def pass_on(received: torch.Tensor) -> None:
            gradient, received.grad = received.grad, None
            assert gradient is not None
            with self._lock:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

        copy.register_post_accumulate_grad_hook(pass_on)
        return copy
