"""What trains: choosing it, and naming it as in the full model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn import Parameter

from splitfl.adapters.names import full_name
from splitfl.errors import CheckpointError, ConfigError
from splitfl.shards import put

Trainables = Literal["lora", "full", "none"]

# What Hugging Face calls the head of a sequence classifier. It starts at random, hence trains beside any adapter.
_HEADS = ("score", "classifier")


def classification_head(model: nn.Module) -> str | None:
    """The name of the classification head that ``model`` holds, or None (a trunk, a language model)."""
    for name in _HEADS:
        head = getattr(_unwrapped(model), name, None)
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
            return name
    return None


def set_trainable(model: nn.Module, trainables: Trainables) -> None:
    """Make exactly the chosen parameters of a part require a gradient.

    ``lora``: the attached adapter and, where the part holds one, the classification head. ``full``: every parameter
    held (tied weights are one parameter). ``none``: nothing. Raises ``ConfigError`` where the two are mixed.
    """
    wrapped = _unwrapped(model) is not model
    if trainables == "full" and wrapped:
        raise ConfigError("Full weights cannot train while a LoRA adapter is attached: choose either lora or full.")
    if trainables not in ("lora", "full", "none"):
        raise ConfigError(f"What trains is lora, full or none, not {trainables!r}.")
    head = classification_head(model)
    for name, parameter in model.named_parameters():
        if trainables == "lora":
            # PEFT keeps the untouched head as ``original_module`` beside the copy that trains.
            trains_head = head is not None and full_name(name).startswith(f"{head}.") and ".original_module." not in name
            parameter.requires_grad_(".lora_" in name or trains_head)
        else:
            parameter.requires_grad_(trainables == "full")


def named_trainables(model: nn.Module) -> dict[str, Parameter]:
    """The parameters that require a gradient, by their names in the full model, sorted; tied parameters appear once.

    LoRA tensors are called ``<module>.lora_A.weight`` (rank, in) and ``<module>.lora_B.weight`` (out, rank).
    """
    trainables = {full_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    return dict(sorted(trainables.items()))


def load_trainables(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved values into the parameters that train. Raises ``CheckpointError`` where names or shapes differ."""
    copy_into(named_trainables(model), tensors)


def copy_into(mine: Mapping[str, Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put saved values into parameters of the same full names. Raises ``CheckpointError`` where names or shapes differ."""
    check_fits(mine, tensors)
    for name, parameter in mine.items():
        put(parameter, tensors[name])


def check_fits(mine: Mapping[str, Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Raises ``CheckpointError`` where names or shapes of saved values are not those of the parameters."""
    if mine.keys() != tensors.keys():
        name = min(mine.keys() ^ tensors.keys())
        where = "the checkpoint alone" if name in tensors else "the model alone"
        raise CheckpointError(
            f"The checkpoint does not fit what trains, {name} is in {where}: resume with the same cut and trainables."
        )
    for name, parameter in mine.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"The checkpoint does not fit what trains, {name} has the shape {list(tensors[name].shape)}, here "
                f"{list(parameter.shape)}: resume with the same model and rank."
            )


def _unwrapped(model: Any) -> nn.Module:
    """The Hugging Face model inside a PEFT model; the model itself where nothing is wrapped."""
    # Only PEFT's wrapper has both; importing PEFT to ask would be slow and is not needed.
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return cast(nn.Module, model.get_base_model())
    return cast(nn.Module, model)
