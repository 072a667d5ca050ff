"""The ends: the full model's class with one module, the trunk slot, in place of the trunk's blocks."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from splitfl.errors import ModelError
from splitfl.parts.blocks import Layout, PassThrough, StandIn, hidden_argument, leave_unread
from splitfl.parts.cut import Cut
from splitfl.parts.segments import check_layout
from splitfl.parts.trunk import TrunkCallable, TrunkPart, find_trunk


class TrunkCache(ABC):
    """A key-value cache, given to the ends as ``past_key_values``, whose part for the trunk's blocks lies where those are."""

    @abstractmethod
    def trunk_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The trunk on the next tokens ``(B, T, H)``, behind those that the cache has; ``attention_mask`` (B, cached + T) is of
        all, ``position_ids`` (B, T) of the new ones.
        """


@dataclass
class _Given:
    """The 2-D mask and the positions (B, T) of the call in progress, and the module they were given to."""

    module: nn.Module
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cache: TrunkCache | None = None


# A context variable, not an attribute of the slot: a copy of the ends has hooks and a slot that find each other.
_given: ContextVar[_Given | None] = ContextVar("splitfl_ends_given", default=None)


class _Attached:
    """Holds the trunk, so that it is no submodule of the slot; a copy of the ends talks to the same trunk."""

    def __init__(self, trunk: TrunkCallable) -> None:
        self.trunk = trunk

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        return self


class TrunkSlot(StandIn):
    """The place of the trunk in the ends, at the index of the trunk's first block.

    The trunk is a callable, not a submodule: its parameters, if it has any here, are not the ends' parameters.
    """

    def __init__(self, block: nn.Module, tuple_length: int) -> None:
        super().__init__(block, tuple_length)
        self._attached: _Attached | None = None

    def attach(self, trunk: TrunkCallable | None) -> None:
        self._attached = None if trunk is None else _Attached(trunk)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._attached is None:
            raise ModelError("these ends have no trunk yet: give them one with attach_trunk(ends, trunk)")
        h = hidden_argument(args, kwargs)
        given = _given.get()
        assert given is not None, "the blocks run within a call of the backbone"
        trunk = self._attached.trunk if given.cache is None else given.cache.trunk_forward
        y = trunk(h, given.attention_mask, given.position_ids)
        if y.shape != h.shape:
            raise ModelError(f"the trunk returned a hidden state of shape {tuple(y.shape)} for one of {tuple(h.shape)}")
        return self.answer(y)


class EndsPart:
    """What loaded ends are besides a Hugging Face model. Mixed into the model's class by ``ends_class``."""

    cut: Cut
    layout: Layout
    made_anew: frozenset[str] = frozenset()  # weights that the checkpoint lacks: of a new classification head

    @property
    def trunk_slot(self) -> TrunkSlot:
        return cast(TrunkSlot, self.layout.block_list(cast(nn.Module, self))[self.cut.input_blocks])


def ends_class(full: type[PreTrainedModel], layout: Layout, cut: Cut) -> type[PreTrainedModel]:
    """A subclass of the model's own class, under its own name, that builds the ends alone."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        full.__init__(self, config, *args, **kwargs)
        make_ends(self, layout, cut)

    # The name and module stay the family's: Hugging Face keys weight conversions and output recorders by them.
    body = {
        "__init__": build,
        "__module__": full.__module__,
        "__qualname__": full.__qualname__,
        "__doc__": f"The ends of {full.__name__}.",
    }
    return cast(type[PreTrainedModel], type(full.__name__, (EndsPart, full), body))


def make_ends(model: Any, layout: Layout, cut: Cut) -> None:
    """Puts the trunk slot and pass-throughs in the place of the trunk's blocks, in place."""
    held_by_trunk = cut.trunk_range(layout.count)
    blocks = layout.block_list(model)
    for index in held_by_trunk:
        stand_in = TrunkSlot if index == held_by_trunk[0] else PassThrough
        blocks[index] = stand_in(blocks[index], layout.tuple_length)
    for module in layout.callers(model):
        _watch(module, layout, type(model).__name__)
    model.cut = cut
    model.layout = layout
    inside = "|".join(str(index) for index in held_by_trunk)
    tail = layout.blocks.rsplit(".", 1)[-1]
    leave_unread(model, rf"^(.*\.)?{tail}\.({inside})\.")


def _watch(module: nn.Module, layout: Layout, family: str) -> None:
    """Notes for the slot what mask and positions ``module`` is called with, unless a module around it was called first.

    A family may enter its backbone at more than one level (OPT's language model calls the decoder inside the backbone),
    and further in the mask may already be 4-D.
    """
    signature = inspect.signature(type(module).forward)

    def take_layout(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer = _given.get()
        # A call that KeyboardInterrupt ended has left its note behind: torch calls hooks after an Exception, not after that.
        if outer is not None and outer.module is not module and any(inner is module for inner in outer.module.modules()):
            return args, kwargs
        given = signature.bind_partial(module, *args, **kwargs).arguments
        mask, positions, cache = given.get("attention_mask"), given.get("position_ids"), given.get("past_key_values")
        if cache is None:
            check_layout(mask, positions, packing=layout.packing, family=family)
        elif not isinstance(cache, TrunkCache):
            raise ModelError(
                "this key-value cache has no part in the trunk: leave past_key_values out, take it from model.make_cache(), or "
                "pass use_cache=False to generate()"
            )
        if layout.longest is not None:
            _check_length(given, positions, layout.longest)
        if kwargs.get("output_router_logits") or given.get("output_router_logits"):
            raise ModelError("the auxiliary loss multiplies sums over all blocks: leave out output_router_logits")
        _given.set(_Given(module, mask, positions, cache))
        if cache is not None:
            return args, kwargs
        # A cache of the held blocks alone serves nobody, and its presence switches off Hugging Face's packing.
        return args, {**kwargs, "use_cache": False}

    def forget_layout(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = _given.get()
        if given is not None and given.module is module:
            _given.set(None)

    module.register_forward_pre_hook(take_layout, with_kwargs=True)
    module.register_forward_hook(forget_layout, always_call=True)


def _check_length(given: dict[str, Any], positions: torch.Tensor | None, longest: int) -> None:
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    reached = int(positions.max()) + 1 if positions is not None else 0 if tokens is None else tokens.shape[1]
    if reached > longest:
        raise ModelError(
            f"rows of more than {longest} tokens change this model's rotary table for all who share a batch with them: "
            f"keep rows within {longest} tokens, or use a model whose table is fixed"
        )


def attach_trunk(ends: Any, trunk: Any) -> None:
    """Gives loaded ends, bare or wrapped by PEFT, their trunk.

    ``trunk`` is a ``TrunkCallable`` or a model from ``load_trunk``, bare or wrapped by PEFT. It does not become a
    submodule: the ends' parameter names and ``state_dict`` stay as they are. None detaches.
    """
    if isinstance(trunk, nn.Module) and any(isinstance(module, TrunkPart) for module in trunk.modules()):
        trunk = find_trunk(trunk).trunk_forward
    find_ends(ends).trunk_slot.attach(trunk)


def find_ends(model: Any) -> EndsPart:
    """The ends inside whatever wraps them: themselves, or the model under a PEFT model. Raises TypeError if none."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, EndsPart):
                return module
    raise TypeError(f"{type(model).__name__} is not, and does not hold, ends from load_ends")
