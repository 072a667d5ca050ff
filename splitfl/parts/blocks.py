"""The blocks of a Hugging Face language model: where they are, and what stands in for those a side does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitfl.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """What splitting needs to know of an architecture; the probe finds it out, nothing here is written per family.

    ``blocks``: dotted path of the block list. ``backbone``: dotted path of the module whose ``forward`` takes the 2-D
    mask and the positions. ``tuple_length``: how many items a block returns, 0 where it returns a bare tensor.
    ``positions``: whether the backbone takes ``position_ids``. ``packing``: whether a restart of ``position_ids`` keeps
    two sequences of one row apart. ``longest``: the last position plus one up to which the rotary table is the same for
    every batch; None for most, whose table never changes.
    """

    blocks: str
    count: int
    backbone: str
    hidden_size: int
    tuple_length: int = 0
    positions: bool = True
    packing: bool = True
    longest: int | None = None

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        found = model.get_submodule(self.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    def callers(self, model: nn.Module) -> list[nn.Module]:
        """The modules from the backbone inwards to the one that owns the block list, outermost first."""
        names = self.blocks.split(".")[:-1]
        depth = len(self.backbone.split("."))
        return [model.get_submodule(".".join(names[:end])) for end in range(depth, len(names) + 1)]


def find_blocks(model: nn.Module, count: int) -> str:
    """The dotted path of the one ModuleList that holds ``count`` blocks.

    Raises ModelError where there is none, more than one, or where two of its entries share weights.
    """
    name = type(model).__name__
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(next(block.parameters(), None) is not None for block in module)
    ]
    outermost = [path for path in found if not any(path.startswith(other + ".") for other in found)]
    if len(outermost) > 1:
        get_decoder: Any = getattr(model, "get_decoder", lambda: model)
        inside = {id(module) for module in get_decoder().modules()}
        outermost = [path for path in outermost if id(model.get_submodule(path)) in inside] or outermost
    if not outermost:
        raise ModelError(f"{name} cannot be split: it has no list of its {count} blocks (num_hidden_layers) to cut between")
    if len(outermost) > 1:
        raise ModelError(f"{name} cannot be split: {' and '.join(outermost)} could each be its {count} blocks")
    path: str = outermost[0]
    owners: dict[int, int] = {}
    blocks: Any = model.get_submodule(path)
    for index, block in enumerate(blocks):  # not children(), which names a block that occurs twice once
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise ModelError(
                    f"{name} cannot be split: blocks {owners[id(parameter)]} and {index} share weights, "
                    "so a cut between them would train two copies"
                )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if target.startswith(path + ".") or source.startswith(path + "."):
            raise ModelError(f"{name} cannot be split: {target} is tied to {source}, so no cut keeps both on one side")
    return path


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state among a block's arguments: the first positional one, or ``hidden_states``. (B, T, H)."""
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden_states: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another hidden state in its place."""
    if args:
        return (hidden_states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_states}


class StandIn(nn.Module):
    """A parameterless module at a block's index. Subclasses say what becomes of the hidden state."""

    def __init__(self, block: nn.Module, tuple_length: int) -> None:
        super().__init__()
        self.tuple_length = tuple_length
        # The backbone may read plain attributes of a block, such as the attention type that selects its mask.
        for name, value in vars(block).items():
            plain = value is None or isinstance(value, (str, int, float, bool))
            if plain and not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)

    def answer(self, hidden_states: torch.Tensor) -> Any:
        """The hidden state, in the form in which this family's blocks return it."""
        if self.tuple_length == 0:
            return hidden_states
        return (hidden_states, *[None] * (self.tuple_length - 1))


class PassThrough(StandIn):
    """A block this side does not hold: what comes in goes out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(hidden_argument(args, kwargs))


class NotHeld(nn.Module):
    """Stands in, on the trunk, for an embedding, norm or head that belongs to the client.

    A hidden state passes unchanged; for token, position or mask input the answer is a scalar zero, which adds nothing
    to whatever it is added to. Neither ever reaches a block: see ``splitfl.parts.trunk``.
    """

    def __init__(self, path: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.path = path
        self.dtype = dtype or torch.get_default_dtype()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for value in tensors:
            if value.is_floating_point() and value.dim() > 2:
                return value
        return torch.zeros((), dtype=self.dtype, device=tensors[0].device if tensors else None)

    def __getattr__(self, name: str) -> Any:
        # Only for what is missing: hasattr still answers no.
        raise AttributeError(f"{vars(self).get('path')}.{name} belongs to the client")


def leave_unread(model: Any, pattern: str) -> None:
    """Tensors of the checkpoint whose names match are the other side's: the loader neither reads nor mentions them."""
    known = model._keys_to_ignore_on_load_unexpected
    # A set in newer transformers, a list in older ones, and each adds only its own kind to it.
    model._keys_to_ignore_on_load_unexpected = known | {pattern} if isinstance(known, set) else [*(known or ()), pattern]
