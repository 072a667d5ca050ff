"""The trunk: the full model's class with the client's modules taken out.

``forward`` takes a hidden state in place of tokens. The backbone runs as Hugging Face wrote it, ``inputs_embeds=h``, so
that masks, rotary tables and the choice of attention per block are its own. Whatever it does to its input before the
first block (a multiplier, positions, dropout) is the client's work, done there already: on the way into the first held
block the result is thrown away and the true ``h`` put back; on the way out of the last held block ``y`` is taken aside,
before a norm or anything else comes. Hooks run outside a block's gradient checkpoint, so recomputing is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from splitfl.parts.blocks import Layout, NotHeld, PassThrough, leave_unread, with_hidden
from splitfl.parts.cut import Cut

TrunkCallable = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""``(hidden_states (B, T, H), attention_mask (B, T) | None, position_ids (B, T) | None) -> (B, T, H)``."""


@dataclass
class _Crossing:
    """One call's hidden state on its way through the trunk."""

    entering: torch.Tensor
    leaving: torch.Tensor | None = None


# A context variable, not an attribute: two threads may run one trunk, each with its own call in flight.
_crossing: ContextVar[_Crossing | None] = ContextVar("splitfl_trunk_crossing", default=None)


class TrunkPart:
    """What a loaded trunk is besides a Hugging Face model. Mixed into the model's class by ``trunk_class``."""

    cut: Cut
    layout: Layout

    def trunk_forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """``h`` (B, T, H) at the first cut to ``y`` (B, T, H) at the second.

        ``attention_mask`` (B, T), 1 for a real token; ``position_ids`` (B, T), ignored where the family has none. ``attention``:
        further arguments for the attention function, as transformers' ``FlashAttentionKwargs``.
        """
        backbone = cast(nn.Module, self).get_submodule(self.layout.backbone)
        arguments: dict[str, Any] = {"inputs_embeds": hidden_states.detach(), "attention_mask": attention_mask}
        if self.layout.positions:
            arguments["position_ids"] = position_ids
        crossing = _Crossing(hidden_states)
        token = _crossing.set(crossing)
        try:
            backbone(**arguments, **attention, use_cache=False, return_dict=True)
        finally:
            _crossing.reset(token)
        assert crossing.leaving is not None, "the last held block was not run"
        # Where the blocks lie on several devices, it comes out on the last.
        return crossing.leaving.to(hidden_states.device)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    crossing = _crossing.get()
    assert crossing is not None, "a trunk is run with trunk_forward, never through its backbone"
    return with_hidden(args, kwargs, crossing.entering)


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    crossing = _crossing.get()
    assert crossing is not None
    crossing.leaving = output if isinstance(output, torch.Tensor) else output[0]


def trunk_class(full: type[PreTrainedModel], layout: Layout, cut: Cut) -> type[PreTrainedModel]:
    """A subclass of the model's own class, under its own name, that builds the trunk's blocks alone."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        full.__init__(self, config, *args, **kwargs)
        make_trunk(self, layout, cut)

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y: torch.Tensor = self.trunk_forward(hidden_states, attention_mask, position_ids)
        return y

    # The name and module stay the family's: Hugging Face keys weight conversions and output recorders by them.
    body = {
        "__init__": build,
        "forward": forward,
        "__module__": full.__module__,
        "__qualname__": full.__qualname__,
        "__doc__": f"The trunk of {full.__name__}.",
        # What is tied is embedding and head, and both are the client's.
        "_tied_weights_keys": None,
    }
    return cast(type[PreTrainedModel], type(full.__name__, (TrunkPart, full), body))


def make_trunk(model: Any, layout: Layout, cut: Cut) -> None:
    """Takes everything out of ``model`` that the trunk does not hold, in place."""
    held = cut.trunk_range(layout.count)
    blocks = layout.block_list(model)
    for index in range(layout.count):
        if index not in held:
            blocks[index] = PassThrough(blocks[index], layout.tuple_length)
    _remove_rest(model, blocks, model.config.dtype, "")
    blocks[held[0]].register_forward_pre_hook(_enter, with_kwargs=True)
    blocks[held[-1]].register_forward_hook(_leave)
    model.cut = cut
    model.layout = layout
    model.all_tied_weights_keys = {}
    inside = "|".join(str(index) for index in held)
    tail = layout.blocks.rsplit(".", 1)[-1]
    leave_unread(model, rf"^(?!(.*\.)?{tail}\.({inside})\.)")


def _remove_rest(module: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype | None, path: str) -> None:
    """Replaces each module beside the blocks that owns parameters; goes into those the blocks lie in."""
    for name, child in list(module.named_children()):
        if child is blocks:
            continue
        if any(inner is blocks for inner in child.modules()):
            _remove_rest(child, blocks, dtype, f"{path}{name}.")
        elif any(True for _ in child.parameters()):
            setattr(module, name, NotHeld(path + name, dtype))
    for name, _ in list(module.named_parameters(recurse=False)):
        setattr(module, name, None)


def trunk_forward(
    trunk: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a loaded trunk, bare or wrapped by PEFT: (B, T, H) to (B, T, H). See ``TrunkPart.trunk_forward``."""
    return find_trunk(trunk).trunk_forward(hidden_states, attention_mask, position_ids)


def find_trunk(model: Any) -> TrunkPart:
    """The trunk in whatever wraps it: itself, or the model under a PEFT model. Raises TypeError if there is none."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, TrunkPart):
                return module
    raise TypeError(f"{type(model).__name__} is not, and does not hold, a trunk from load_trunk")
