"""Attention with keys and values that are kept: what decoding adds to packed rows.

Each segment of a packed row is the next piece of a sequence, one token or many. Its keys and values are appended to the
sequence's own, and its queries attend to all of them, in the attention function the model had before. So sequences of any length
run in one batch, and no cache is ever padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from splitfl.errors import ModelError
from splitfl.parts.rows import Rows

__all__ = ["KeptSequence", "attend_cached", "mask_of", "room_for"]


def room_for(tokens: int) -> int:
    """How many tokens of memory are made for a sequence of so many: a quarter to spare, so that few tokens make it be copied."""
    return tokens + tokens // 4


class KeptSequence:
    """Keys and values ``(1, heads, tokens, width)`` of one sequence, by layer; each layer's lie on that layer's device.

    ``length`` tokens count. A run of the trunk writes behind them, layer by layer; it counts once :meth:`commit` says so.
    """

    __slots__ = ("_layers", "length")

    def __init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = 0

    @property
    def room(self) -> int:
        """How many tokens its memory is for."""
        return max((keys.shape[2] for keys, _ in self._layers.values()), default=0)

    def commit(self, tokens: int) -> None:
        """The newest ``tokens`` that were written count."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """What lies behind ``length`` tokens counts no more."""
        assert length <= self.length
        self.length = length

    def copy(self, length: int) -> KeptSequence:
        """Another sequence that begins with the first ``length`` tokens of this one."""
        twin = KeptSequence()
        twin.begin_as(self, length)
        return twin

    def begin_as(self, other: KeptSequence, length: int) -> None:
        """Hold, in memory of its own, the first ``length`` tokens of another."""
        for layer, (keys, values) in other._layers.items():
            self._layers[layer] = _grown(keys, length, length), _grown(values, length, length)
        self.length = length

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what follows in ``layer``; returns all keys and values there: ``(1, heads, length + new, width)``, views."""
        end = self.length + keys.shape[2]
        held = self._layers.get(layer)
        if held is None or held[0].shape[2] < end:
            before = held or (keys[:, :, :0], values[:, :, :0])
            held = self._layers[layer] = _grown(before[0], self.length, end), _grown(before[1], self.length, end)
        for memory, new in zip(held, (keys, values), strict=True):
            memory[:, :, self.length : end].copy_(new)
        return held[0][:, :, :end], held[1][:, :, :end]


def _grown(memory: torch.Tensor, length: int, needed: int) -> torch.Tensor:
    """Memory for ``needed`` tokens and some more, which begins with the first ``length`` tokens of ``memory``."""
    batch, heads, _, width = memory.shape
    larger = memory.new_empty((batch, heads, room_for(needed), width))
    larger[:, :, :length].copy_(memory[:, :, :length])
    return larger


def attend_cached(
    attention: Callable[..., Any],
    eager: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    past: Sequence[KeptSequence],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Each segment of packed ``rows`` attends to its own sequence: query ``(1, heads, tokens, width)`` to
    ``(1, tokens, heads, width)``. ``attention``: the model's function; ``eager``: whether that wants its mask as numbers.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    lengths = [length for length, _ in rows.wire]
    window = kwargs.get("sliding_window")
    outs: list[torch.Tensor] = []
    for own, kept, *new in zip(lengths, past, *(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True):
        before = kept.length
        keys, values = kept.append(layer, new[1], new[2])
        mask = None
        if own > 1 or eager or window is not None:
            # No query sees further back than its window: what lies behind all of them is left out.
            seen = before + own if window is None else min(before + own, window - 1 + own)
            keys, values = keys[:, :, -seen:], values[:, :, -seen:]
            if own > 1:
                mask = mask_of(eager, module, own, query, kwargs, past=before, seen=seen)
        out, _ = attention(module, new[0], keys, values, mask, **kwargs)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def mask_of(
    eager: bool,
    module: nn.Module,
    length: int,
    query: torch.Tensor,
    kwargs: dict[str, Any],
    *,
    past: int = 0,
    seen: int | None = None,
) -> torch.Tensor | None:
    """The mask ``(1, 1, length, keys)`` of an unpadded row of ``length`` tokens behind ``past`` others, of whose keys the last
    ``seen`` are given (default: all); None where sdpa needs none.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = kwargs.get("sliding_window")
    if not causal:
        if window is not None or past:
            raise ModelError(f"{type(module).__name__} attends to both sides, and keeps a window or a cache")
        mask_function: Any = bidirectional_mask_function
    else:
        mask_function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    make: Callable[..., torch.Tensor | None] = eager_mask if eager else sdpa_mask
    total = past + length
    keys = total if seen is None else seen
    return make(
        batch_size=1,
        q_length=length,
        kv_length=keys,
        q_offset=past,
        kv_offset=total - keys,
        mask_function=mask_function,
        local_size=window,
        allow_is_causal_skip=causal and not past,
        allow_is_bidirectional_skip=not causal,
        dtype=query.dtype,
        device=query.device,
    )
