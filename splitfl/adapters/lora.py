"""Attaching LoRA (Hu et al., arXiv 2106.09685) to a part of a model, through PEFT.

Two things are decided here that PEFT leaves open. *Where*: only in linear layers inside the blocks the part holds,
never in the embedding or a head, so that one rule says on both sides what is adapted. Mixture-of-experts layers whose
experts are one fused 3-D parameter are no linear layers and are left out; their attention is adapted. *How it starts*:
each tensor's first values depend on the seed and its name in the full model alone, so that ends and trunk together
start exactly as the unsplit model does, wherever the cut lies and in whatever order parts are loaded.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from splitfl.adapters.names import ADAPTER, full_name
from splitfl.adapters.trainables import classification_head, set_trainable
from splitfl.config import LoraSettings
from splitfl.errors import ConfigError, ModelError
from splitfl.shards import name_whole_features, put

ALL_LINEAR = "all-linear"


def attach_lora(model: Any, settings: LoraSettings, *, seed: int, full_name_prefix: str = "") -> Any:
    """Wrap a part in PEFT's ``PeftModel`` with a fresh adapter; the adapter (and a classification head held) trains.

    ``settings.targets``: ``"all-linear"``, or names of linear layers inside a block, matched from the end as PEFT does.
    ``full_name_prefix`` stands before the names of ``model``'s modules where it is only a submodule of the full model.
    A part that holds no block comes back unwrapped, with nothing but a classification head training. Raises
    ``ConfigError`` where a setting is out of range or a target names no linear layer of the blocks.
    """
    linears = targeted_linears(model, settings)
    names = list(linears)
    head = classification_head(model)
    if not names:
        set_trainable(model, "lora")
        return model

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=plain_alpha(settings.alpha),  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=names,
        modules_to_save=[head] if head else None,
        fan_in_fan_out=is_fan_in_fan_out(linears.values()),
        task_type=_task_type(model, head),
    )
    # PEFT draws first values that are replaced below: the caller's generator shall not notice.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has renamed: nothing a user could mend.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
    # PEFT shortens long lists to suffixes that are unique in what it sees, a part: in the full model they match more.
    config.target_modules = set(names)  # type: ignore[assignment]
    name_whole_features(peft_model)
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." in name:
            put(parameter, lora_start(seed, full_name_prefix + full_name(name), tuple(parameter.shape)))
    set_trainable(peft_model, "lora")
    return peft_model


def targeted_linears(model: Any, settings: LoraSettings) -> dict[str, nn.Module]:
    """The linear layers that ``settings`` adapt, by their names in ``model``: empty where the part holds none of them.

    Raises ``ConfigError`` where a setting is out of range or a target names no linear layer of the blocks.
    """
    _check(settings)
    linears = dict(_block_linears(model))
    return {name: linears[name] for name in _targeted(model, list(linears), settings)}


def is_fan_in_fan_out(linears: Iterable[nn.Module]) -> bool:
    """Whether the layers hold their weights as (in, out), as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return all(isinstance(linear, Conv1D) for linear in linears)


def _check(settings: LoraSettings) -> None:
    if isinstance(settings.rank, bool) or not isinstance(settings.rank, int) or settings.rank < 1:
        raise ConfigError(f"The LoRA rank is a whole number from 1, not {settings.rank!r}.")
    if not math.isfinite(settings.alpha) or settings.alpha <= 0:
        raise ConfigError(f"The LoRA alpha is a number above 0, not {settings.alpha!r}.")
    if not 0 <= settings.dropout < 1:
        raise ConfigError(f"The LoRA dropout is a number from 0 to below 1, not {settings.dropout!r}.")
    if settings.targets != ALL_LINEAR and (isinstance(settings.targets, str) or not settings.targets):
        raise ConfigError(f"The LoRA targets are {ALL_LINEAR!r} or a list of names, not {settings.targets!r}.")


def lora_start(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """First values of the ``lora_A`` tensor (rank, in), fp32, with this full name: Kaiming uniform, a = √5, as PEFT."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def plain_alpha(alpha: float) -> int | float:
    """PEFT's files hold alpha as a whole number where it is one, and other readers expect that."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _task_type(model: nn.Module, head: str | None) -> str | None:
    name = type(model).__name__
    if head is not None and name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    prefix = _block_list_name(model) + "."
    for name, module in model.named_modules():
        if name.startswith(prefix) and isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _block_list_name(model: Any) -> str:
    """The name of the list of blocks: the outermost ``ModuleList`` as long as the model has layers."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError("LoRA is attached to a Hugging Face model; this one has no config.")
    layers = config.get_text_config().num_hidden_layers
    lists: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ModelError(f"{type(model).__name__} has no single list of {layers} blocks, so LoRA cannot be placed in it.")
    return outermost[0]


def _targeted(model: nn.Module, linears: list[str], settings: LoraSettings) -> list[str]:
    if settings.targets == ALL_LINEAR:
        return linears
    chosen = [name for name in linears if any(_matches(target, name) for target in settings.targets)]
    unmatched = [t for t in settings.targets if not any(_matches(t, name) for name in linears)]
    if unmatched:
        # The layer may sit in blocks that another part holds: only the full model can tell.
        everywhere = _linears_of_full_model(model)
        for target in unmatched:
            if not any(_matches(target, name) for name in everywhere):
                known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in everywhere}))
                raise ConfigError(
                    f"The LoRA target {target!r} names no linear layer inside the model's blocks: choose among {known}."
                )
    return chosen


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linears_of_full_model(model: Any) -> list[str]:
    from transformers import AutoModelForCausalLM

    # On the meta device no memory is taken and no value is drawn.
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(model.config)
    return [name for name, _ in _block_linears(full)]
