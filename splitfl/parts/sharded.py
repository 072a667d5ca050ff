"""A trunk whose weights lie on several ranks, through Hugging Face's own loader: each rank reads its shard of each tensor only.

*tensor*: the family's tensor-parallel plan (Megatron-LM, Shoeybi et al., arXiv 1909.08053), attention and MLP cut by heads and
columns; every rank runs all rows. *fsdp*: fully sharded data parallelism (torch FSDP2; Zhao et al., arXiv 2304.11277), each block
gathered while it runs; every rank may run rows of its own.

Hugging Face would lay its mesh over all processes; a trunk here has the mesh of its own group, beside those of other replicas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from splitfl.errors import ModelError
from splitfl.parts.blocks import Layout
from splitfl.shards import local_of

__all__ = ["MESH_AXES", "Sharding", "finish_sharded", "forget_run", "loading_options", "plan_style", "shard_class"]

#: The axes Hugging Face knows a mesh by, outermost first.
MESH_AXES = ("pp", "dp_replicate", "fsdp", "tp")

#: The styles of a tensor-parallel plan whose gradients are held against an unsharded trunk by the tests.
_STYLES = {
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "replicated_with_grad_allreduce",
}
_MEND = "use --shard fsdp or --shard layers"


@dataclass(frozen=True)
class Sharding:
    """How one trunk lies on the ranks of ``mesh``, whose axes are :data:`MESH_AXES`. ``kind``: tensor or fsdp."""

    kind: str
    mesh: DeviceMesh
    device: torch.device

    @property
    def size(self) -> int:
        return self.mesh.size()


def loading_options(sharding: Sharding) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    if sharding.kind == "tensor":
        return {"distributed_config": DistributedConfig(tp_size=sharding.size, tp_plan="auto")}
    return {"distributed_config": DistributedConfig(fsdp_size=sharding.size)}


def shard_class(part: Any, config: Any, layout: Layout, sharding: Sharding) -> Any:
    """The class of a trunk, made to lay its weights on the group's mesh while they are loaded.

    Raises ModelError, naming the alternatives, where the family has no tensor-parallel plan or heads that do not divide.
    """
    if sharding.kind == "tensor":
        _check_heads(config, sharding.size)
    elif not hasattr(FSDPModule, "reset_iter_state"):
        raise ModelError(
            "shard = fsdp needs a newer torch, whose FSDP recovers from a failed run: upgrade it, or use --shard layers"
        )
    inside = f"{layout.blocks}."
    build = part.__init__

    def rebuild(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        # What is planned outside the blocks is the clients'.
        self._tp_plan = {name: style for name, style in (self._tp_plan or {}).items() if name.startswith(inside)}
        self._fsdp_plan = {f"{layout.blocks}.*": "free_full_weight"}
        if sharding.kind == "tensor":
            _check_plan(self)

    def prepare(cls: Any, distributed_config: Any, device_map: Any = None) -> Any:
        return distributed_config, sharding.device, TransformersDeviceMesh(sharding.mesh, sharding.mesh)

    part.__init__ = rebuild
    part.prepare_distribute_model = classmethod(prepare)
    return part


def _check_heads(config: Any, size: int) -> None:
    text = config.get_text_config()
    heads = text.num_attention_heads
    for what, count in (("attention heads", heads), ("key and value heads", getattr(text, "num_key_value_heads", None) or heads)):
        if count % size:
            raise ModelError(
                f"{count} {what} cannot be shared out evenly over {size} ranks: choose a shard_size that divides it, or {_MEND}"
            )


def _check_plan(model: Any) -> None:
    name = model.config.model_type
    if not model._tp_plan:
        raise ModelError(f"{name} has no tensor-parallel plan in transformers: {_MEND}")
    strange = sorted(set(model._tp_plan.values()) - _STYLES)
    if strange:
        raise ModelError(f"the tensor-parallel plan of {name} shards by {strange[0]}, which is not trained here: {_MEND}")


def plan_style(model: Any, module: str) -> str | None:
    """The tensor-parallel style of a module of a loaded trunk, by its name; None where it is whole on every rank."""
    return (model._tp_plan or {}).get(re.sub(r"\.\d+(?=\.|$)", ".*", module))


def finish_sharded(model: Any, sharding: Sharding) -> None:
    """What is left to be done once the weights are there."""
    _own_memory(model)
    if sharding.kind != "fsdp":
        return
    # A trunk is never called by `forward`, which FSDP hooks; its blocks then gather ahead of their turn.
    register_fsdp_forward_method(model, "trunk_forward")
    # The objective is a sum over the rows of all ranks, not a mean. Not every backend scales while it sums.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def forget_run(model: Any) -> None:
    """After a run of a trunk that failed midway: FSDP lets go of what it had gathered and expects no rest of it."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def _own_memory(model: Any) -> None:
    """On a CPU what was read is a view of the file, mapped into memory: keep this rank's part, and let the file go."""
    for parameter in model.parameters():
        local = local_of(parameter)
        if local.device.type != "cpu":
            continue
        if local is parameter:
            parameter.data = parameter.detach().clone()
        else:
            parameter._local_tensor = local.clone()
