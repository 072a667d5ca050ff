"""All clients train one set of parameters that lie on several ranks.

A rank's AdamW steps what that rank holds, as plain tensors; only the norm of the gradient is everybody's. A checkpoint is either
as of one process, whole tensors gathered one at a time to the leader, or in shards, of which each rank writes its own. From both
a run goes on with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from server_trunk.sharding.group import ShardGroup
from server_trunk.training import SharedTraining
from splitfl.adapters.trainables import check_fits
from splitfl.checkpoint import SHARDS, file_digest
from splitfl.config import OptimizerSettings
from splitfl.parts.sharded import plan_style
from splitfl.parts.trunk import find_trunk
from splitfl.shard_files import can_write_shards, read_shards, read_whole, write_shards
from splitfl.shards import in_shards, like_shard, local_of, part_of, put, whole_of
from splitfl.tensors import DTYPES, dtype_name

__all__ = ["ShardedTraining", "whole_optimizer"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedTraining(SharedTraining):
    """Each rank of ``group`` has one; all are asked the same, in the same order."""

    def __init__(self, model: torch.nn.Module, settings: OptimizerSettings, group: ShardGroup) -> None:
        self._group = group
        super().__init__(model, settings)
        if group.sharding.kind == "tensor":
            self._complete_gradients(find_trunk(model))

    def _complete_gradients(self, trunk: Any) -> None:
        """Make what autograd returns for a parameter its whole gradient, laid out as the parameter.

        A norm inside the sharded heads sees this rank's heads only. Hugging Face sums its ``.grad`` each time something is added
        to it, which is right for one backward a step, not for several.
        """
        for name, parameter in self.trainables.items():
            if plan_style(trunk, name.rpartition(".")[0]) == "replicated_with_grad_allreduce":
                parameter.register_hook(self._summed)
            elif local_of(parameter) is not parameter:
                parameter.register_hook(_laid_out_as(parameter))

    def _summed(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._group.sum(gradient.clone(memory_format=torch.contiguous_format))

    # --- the step ---------------------------------------------------------------------------------------------------------------

    def _held(self) -> list[Parameter]:
        return [p if local_of(p) is p else Parameter(local_of(p).detach()) for p in self._parameters]

    def _bring(self) -> None:
        for parameter, own in zip(self._parameters, self._stepped, strict=True):
            if own is parameter:
                continue
            own.data = local_of(parameter).detach()  # FSDP may have laid it elsewhere in its first run
            if parameter.grad is not None:
                gradient = local_of(parameter.grad)
                # Laid out as its parameter: the fused AdamW of a CPU takes that for granted.
                own.grad = gradient if gradient.stride() == own.stride() else torch.empty_like(own).copy_(gradient)
                parameter.grad = None

    def _collected(self) -> list[torch.Tensor]:
        gradients = super()._collected()
        if self._group.sharding.kind == "fsdp":
            pairs = zip(self._parameters, self._stepped, strict=True)
            self._sum_over_ranks([own.grad for p, own in pairs if own.grad is not None and not in_shards(p)])
        return gradients

    def _sum_over_ranks(self, gradients: list[torch.Tensor]) -> None:
        """Of parameters that every rank holds whole, each has the gradient of its own rows."""
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            total = self._group.sum(torch.cat([gradient.reshape(-1) for gradient in alike]))
            for gradient, part in zip(alike, total.split([gradient.numel() for gradient in alike]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        # What all hold alike counts once, by the leader's reckoning: every rank must come to the same number, to the bit.
        pairs = zip(self._parameters, self._stepped, strict=True)
        shared = [not in_shards(p) for p, own in pairs if own.grad is not None]
        counted = [g for g, alike in zip(gradients, shared, strict=True) if self._group.leads or not alike]
        squares = [norm.double().square() for norm in torch._foreach_norm(counted)] if counted else []
        mine = torch.stack(squares).sum().cpu() if squares else torch.zeros((), dtype=torch.float64)
        return float(self._group.sum(mine.reshape(1)).sqrt())

    def _clear(self) -> None:
        super()._clear()
        for parameter in self._parameters:
            parameter.grad = None

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As :meth:`SharedTraining.state` of one process, on the leader; elsewhere nothing."""
        tensors = {name: self._gathered(parameter) for name, parameter in self.trainables.items()}
        extra: dict[str, Any] = {}
        if self.optimizer is not None:
            extra["optimizer"] = state = self.optimizer.state_dict()
            for index, parameter in enumerate(self._in_order()):
                entry = state["state"].get(index)
                if entry is not None:
                    moments = {key: self._gathered(like_shard(entry[key], parameter)) for key in _MOMENTS}
                    state["state"][index] = {**entry, **moments}
        return (tensors, extra) if self._group.leads else ({}, {})

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = whole_of(tensor.detach())
        # A follower lets it go at once: no more than one whole tensor is ever there.
        return whole.cpu() if self._group.leads else torch.empty(0)

    def sees(self, file: str) -> list[bool]:
        """Whether each rank finds what the leader has put there, and could write beside it."""
        return [bool(vote) for vote in self._group.vote(can_write_shards() and Path(file).exists())]

    def outline(self) -> dict[str, Any]:
        """The optimizer's state without its moments; ``names``: of the parameters, by their numbers there."""
        assert self.optimizer is not None
        state = self.optimizer.state_dict()
        steps = {index: {"step": entry["step"]} for index, entry in state["state"].items()}
        return {"state": steps, "param_groups": state["param_groups"], "names": self._names()}

    def write(self, directory: str) -> dict[str, str]:
        """On all ranks: the weights and moments, each rank's own parts, into directories there.

        Returns the SHA-256 of all files by their path below ``directory``; each rank has read its own.
        """
        tensors = {name: parameter.detach() for name, parameter in self.trainables.items()}
        mine = write_shards(Path(directory) / SHARDS, tensors, self._group.patient)
        for key in _MOMENTS:
            mine += write_shards(Path(directory) / key, self._moments(key), self._group.patient)
        digests = {file.relative_to(directory).as_posix(): file_digest(file) for file in mine}
        return {name: digest for each in self._group.gather(digests) for name, digest in each.items()}

    def read(self, directory: str, optimizer: Mapping[str, Any]) -> None:
        """On all ranks: take back what :meth:`write` has written, on any number of ranks; each reads its own parts.

        ``optimizer``: its ``steps`` by the parameters' numbers, and ``param_groups``.
        """
        read_shards(Path(directory) / SHARDS, {name: p.detach() for name, p in self.trainables.items()}, self._group.patient)
        if self.optimizer is None:
            return
        groups = [{**group, "betas": tuple(group["betas"])} for group in optimizer["param_groups"]]
        empty = {
            index: {"step": torch.tensor(optimizer["steps"][index])}
            | {key: torch.zeros_like(local_of(parameter)) for key in _MOMENTS}
            for index, parameter in enumerate(self._in_order())
            if index in optimizer["steps"]
        }
        self.optimizer.load_state_dict({"state": empty, "param_groups": groups})
        for key in _MOMENTS:
            read_shards(Path(directory) / key, self._moments(key), self._group.patient)

    def _moments(self, key: str) -> dict[str, torch.Tensor]:
        """One moment of each parameter that has one, where it lies on the ranks, by the parameter's name."""
        assert self.optimizer is not None
        held = zip(self._names(), self._in_order(), self._stepped_in_order(), strict=True)
        state = self.optimizer.state
        return {name: like_shard(state[own][key], parameter) for name, parameter, own in held if state.get(own)}

    def _names(self) -> list[str]:
        """As :meth:`_in_order`."""
        names = {id(parameter): name for name, parameter in self.trainables.items()}
        return [names[id(parameter)] for parameter in self._in_order()]

    def _stepped_in_order(self) -> list[Parameter]:
        assert self.optimizer is not None
        return [own for group in self.optimizer.param_groups for own in group["params"]]

    def _in_order(self) -> list[Parameter]:
        """The parameters by their numbers in the optimizer's state."""
        assert self.optimizer is not None
        origin = {id(own): parameter for own, parameter in zip(self._stepped, self._parameters, strict=True)}
        return [origin[id(own)] for own in self._stepped_in_order()]

    def load(self, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        """On the leader: put a checkpoint's values into every rank's part."""
        check_fits(self.trainables, tensors)
        state = extra["optimizer"] if self.optimizer is not None else {"state": {}, "param_groups": []}
        steps = {index: float(entry["step"]) for index, entry in state["state"].items()}
        command = {
            "do": "load",
            "dtypes": {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()},
            "steps": steps,
            "moments": {index: dtype_name(entry[_MOMENTS[0]].dtype) for index, entry in state["state"].items()},
            "groups": state["param_groups"],
        }
        self._group.send(command)
        self.take(command, tensors, state["state"])
        self._group.vote(True)

    def take(
        self, command: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None, moments: Mapping[int, Any] | None = None
    ) -> None:
        """On every rank: what :meth:`load` hands out, a tensor at a time; the leader alone has them."""
        for name, parameter in self.trainables.items():
            put(parameter, self._handed(parameter.shape, command["dtypes"][name], tensors and tensors[name]))
        if self.optimizer is None:
            return
        state: dict[int, dict[str, torch.Tensor]] = {}
        for index, parameter in enumerate(self._in_order()):
            if index not in command["steps"]:
                continue
            state[index] = {"step": torch.tensor(command["steps"][index])}
            for key in _MOMENTS:
                whole = self._handed(parameter.shape, command["moments"][index], moments and moments[index][key])
                state[index][key] = part_of(whole, parameter).clone()
        groups = [{**group, "betas": tuple(group["betas"])} for group in command["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _handed(self, shape: torch.Size, dtype: str, mine: Any) -> torch.Tensor:
        whole: torch.Tensor = torch.empty(shape, dtype=DTYPES[dtype]) if mine is None else mine.contiguous()
        self._group.broadcast(whole.view(torch.uint8))
        return whole


def whole_optimizer(directory: Path, outline: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one process's optimizer, of a checkpoint in shards."""
    state = outline["state"]
    moments = {key: read_whole(directory / key) for key in _MOMENTS} if state else {}
    names = outline["names"]
    whole = {index: {**entry, **{key: found[names[index]] for key, found in moments.items()}} for index, entry in state.items()}
    return {"state": whole, "param_groups": outline["param_groups"]}


def _laid_out_as(parameter: Any) -> Any:
    placements = tuple(parameter.placements)

    def laid_out(gradient: Any) -> Any:
        return gradient if tuple(gradient.placements) == placements else gradient.redistribute(placements=placements)

    return laid_out
