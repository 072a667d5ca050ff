"""Attention over packed rows: each segment attends to itself alone, and costs the square of its own length.

A packed row ``(1, tokens, H)`` goes through everything else of a block as it is. Here it falls apart into runs of segments of one
length, each of which is a batch ``(count, heads, length, width)`` for the attention function the model had before: its sdpa, or
its family's own eager function with whatever that knows (soft caps, sinks). In any other run that function is called as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from splitfl.errors import ModelError
from splitfl.parts.cached_attention import attend_cached, mask_of
from splitfl.parts.dropout import keyed_attention
from splitfl.parts.rows import Rows, current_rows
from splitfl.parts.trunk import find_trunk

__all__ = ["install_segment_attention", "remove_segment_attention"]

_PREFIX = "splitfl_"


def install_segment_attention(model: nn.Module) -> str | None:
    """Make a loaded trunk's attention follow the rows it runs on; returns None, or in one sentence why it cannot.

    An implementation that packs by itself (flash attention) stays as it is.
    """
    trunk: Any = find_trunk(model)
    own = trunk.config.get_text_config(decoder=True)._attn_implementation or "eager"
    if own.startswith(_PREFIX) or "flash" in own:
        return None
    if own not in ("sdpa", "eager"):
        return f"its attention, {own}, is not known to keep packed sequences apart"
    if not trunk._can_set_attn_implementation():
        return f"the attention of {type(trunk).__name__} cannot be replaced"
    trunk.set_attn_implementation(_PREFIX + own)
    return None


def remove_segment_attention(model: nn.Module) -> None:
    """The trunk's own attention again."""
    trunk: Any = find_trunk(model)
    own = trunk.config.get_text_config(decoder=True)._attn_implementation or ""
    if own.startswith(_PREFIX):
        trunk.set_attn_implementation(own.removeprefix(_PREFIX))


def _family_eager(module: nn.Module) -> Callable[..., Any]:
    """The eager function of the module's own family; by Hugging Face's convention each modeling file has one, so called."""
    found: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise ModelError(f"{type(module).__module__} has no eager_attention_forward")
    return found


def _attend(
    eager: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A function as ``AttentionInterface`` asks for: query (B, heads, T, width) to (B, T, heads, width)."""
    attention: Callable[..., Any] = _family_eager(module) if eager else sdpa_attention_forward
    rows = current_rows()
    if rows is None or not rows.packed:
        return attention(module, query, key, value, attention_mask, **kwargs)
    if (
        attention_mask is not None
        or kwargs.get("position_bias") is not None
        or (query.shape[2], key.shape[2]) != (rows.tokens,) * 2
    ):
        raise ModelError(f"{type(module).__name__} attends by a mask or bias of its own")
    if rows.past is not None:
        return attend_cached(attention, eager, module, query, key, value, rows, rows.past, kwargs), None
    runs = _runs(rows)
    # Split and not sliced: the gradient of a slice is as large as the whole row.
    split = [tensor.squeeze(0).split([length * count for length, _, count in runs], 1) for tensor in (query, key, value)]
    done: dict[int, torch.Tensor] = {}
    with keyed_attention() as turn_to:
        for length, own in _alike(runs).items():
            counts = [runs[index][2] for index in own]
            # Neighbours of one length are a view; only runs that lie apart are copied together.
            batches = [[t[i].unflatten(1, (n, length)).transpose(0, 1) for i, n in zip(own, counts, strict=True)] for t in split]
            turn_to(_some_of(rows, [runs[index] for index in own]))
            mask = mask_of(eager, module, length, query, kwargs)
            out, _ = attention(module, *(_joined(batch) for batch in batches), mask, **kwargs)
            for index, part in zip(own, out.split(counts), strict=True):
                done[index] = part.flatten(0, 1)
    return _joined([done[index] for index in range(len(runs))])[None], None


def _runs(rows: Rows) -> list[tuple[int, int, int]]:
    """``(length, first, count)``: ``count`` neighbouring segments of one length, from the ``first`` on."""
    runs: list[tuple[int, int, int]] = []
    first = 0
    for length, run in groupby(length for length, _ in rows.wire):
        runs.append((length, first, len(list(run))))
        first += runs[-1][2]
    return runs


def _alike(runs: list[tuple[int, int, int]]) -> dict[int, list[int]]:
    """The numbers of the runs of each length."""
    found: dict[int, list[int]] = {}
    for index, (length, _, _) in enumerate(runs):
        found.setdefault(length, []).append(index)
    return found


def _some_of(rows: Rows, runs: list[tuple[int, int, int]]) -> Rows:
    """The segments of some runs of one length, a row each."""
    chosen = [index for _, first, count in runs for index in range(first, first + count)]
    keys = None if rows.keys is None else tuple(rows.keys[index] for index in chosen)
    return Rows(tuple(rows.wire[index] for index in chosen), False, keys=keys)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mask(make: Callable[..., torch.Tensor | None], *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """A function as ``AttentionMaskInterface`` asks for. Packed rows need no mask: no segment ever meets another."""
    rows = current_rows()
    return None if rows is not None and rows.packed else make(*args, **kwargs)


AttentionInterface.register(_PREFIX + "sdpa", partial(_attend, False))
AttentionInterface.register(_PREFIX + "eager", partial(_attend, True))
AttentionMaskInterface.register(_PREFIX + "sdpa", partial(_mask, sdpa_mask))
AttentionMaskInterface.register(_PREFIX + "eager", partial(_mask, eager_mask))
