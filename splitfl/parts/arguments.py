"""What blocks are given beside the hidden state: comparing two runs, and finding what one block hands another."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch

# What an argument may be without two blocks being able to speak to each other through it.
_INERT = (type(None), bool, int, float, str, bytes, Enum, torch.Tensor, torch.dtype, torch.device)


def leaves(value: Any) -> Iterator[Any]:
    """The items of nested tuples, lists and dicts; an empty list or dict counts as an item itself."""
    if isinstance(value, dict) and value:
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (tuple, list)) and (value or isinstance(value, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def channel_between_blocks(rest: dict[str, Any]) -> str | None:
    """The name of an argument through which a block could pass something on: an empty container, an odd object."""
    for name, value in rest.items():
        for leaf in leaves(value):
            if not isinstance(leaf, _INERT):
                return f"{name} ({type(leaf).__name__})"
    return None


def contains(rest: dict[str, Any], wanted: torch.Tensor) -> str | None:
    """The name of the argument that holds this very tensor."""
    for name, value in rest.items():
        if any(leaf is wanted for leaf in leaves(value)):
            return name
    return None


def first_difference(full: Any, trunk: Any, name: str = "") -> str | None:
    """The name of the first tensor among ``full``'s arguments that ``trunk``'s lack or have with other content."""
    if isinstance(full, torch.Tensor):
        same = isinstance(trunk, torch.Tensor) and trunk.shape == full.shape and trunk.dtype == full.dtype
        return None if same and torch.equal(full, trunk) else name
    if isinstance(full, dict):
        for key in full:
            below = first_difference(full[key], trunk.get(key) if isinstance(trunk, dict) else None, name or str(key))
            if below is not None:
                return below
        if isinstance(trunk, dict):
            return next((str(key) for key in trunk if key not in full and isinstance(trunk[key], torch.Tensor)), None)
        return None
    if isinstance(full, (tuple, list)):
        for index, item in enumerate(full):
            other = trunk[index] if isinstance(trunk, (tuple, list)) and index < len(trunk) else None
            below = first_difference(item, other, name)
            if below is not None:
                return below
        return None
    return name if isinstance(trunk, torch.Tensor) else None


def keeps_apart(rest: Any, restart: int) -> bool:
    """Whether a 4-D mask among a block's arguments hides from token ``restart`` of the first row the one before it."""
    for leaf in leaves(rest):
        if isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and leaf.shape[-1] == leaf.shape[-2]:
            seen = leaf[0, 0, restart, restart - 1]
            return not bool(seen) if leaf.dtype == torch.bool else bool(seen < -1e4)
    return False
