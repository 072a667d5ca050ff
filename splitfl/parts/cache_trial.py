"""Whether a loaded trunk can decode, tried before anybody is told that it can."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from splitfl.errors import first_line
from splitfl.parts.cached_attention import KeptSequence
from splitfl.parts.packed import run_segments, short_windows
from splitfl.parts.rows import Rows
from splitfl.parts.trunk import find_trunk

__all__ = ["why_not_cached"]

#: First positions and lengths of the sequences that are tried, longer than the window meanwhile, and how they come: the first
#: together, then pieces of several tokens beside single ones, as prompts and answers of several clients do.
_STARTS = (0, 2, 4)
_PIECES = ((5, 1, 3), (1, 4, 1), (1, 1, 2), (3, 1, 1))


def why_not_cached(model: nn.Module) -> str | None:
    """None, or in one sentence why a loaded trunk keeps no keys and values for decoding. Call it after
    :func:`splitfl.parts.packed.why_not_packed`, which must have found nothing, and before anything else runs the trunk.

    A few sequences run whole, and then piece by piece behind what was kept: what comes out must agree but for rounding.
    """
    trunk: Any = find_trunk(model)
    name = trunk.config.model_type
    own = trunk.config.get_text_config(decoder=True)._attn_implementation or "eager"
    if "flash" in own:
        return f"its attention, {own}, keeps no caches here: set attn to sdpa to decode with them"
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(piece[index] for piece in _PIECES) for index in range(len(_STARTS))]
    rows = [0.1 * torch.randn(length, trunk.layout.hidden_size, generator=generator) for length in lengths]
    rows = [row.to(trunk.device, trunk.dtype) for row in rows]
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad(), short_windows(trunk):
            wire = tuple(zip(lengths, _STARTS, strict=True))
            whole = run_segments(model, torch.cat(rows), Rows(wire, True)).split(lengths)
            found = _piece_by_piece(model, rows)
        difference = max(float((a - b).norm() / (b - h).norm()) for a, b, h in zip(found, whole, rows, strict=True))
        if not difference <= math.sqrt(torch.finfo(trunk.dtype).eps):  # NaN too
            return f"{name} does not go on from what it kept of a sequence (relative difference {difference:.1e})"
    except Exception as error:  # whatever the model's own code raises
        return f"{name} keeps no caches: {first_line(error)}"
    finally:
        trunk.train(training)
    return None


def _piece_by_piece(model: nn.Module, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    kept = tuple(KeptSequence() for _ in rows)
    done: list[list[torch.Tensor]] = [[] for _ in rows]
    for piece in _PIECES:
        wire = tuple((length, start + each.length) for length, start, each in zip(piece, _STARTS, kept, strict=True))
        flat = torch.cat([row[each.length : each.length + n] for row, each, n in zip(rows, kept, piece, strict=True)])
        out = run_segments(model, flat, Rows(wire, True, past=kept))
        for own, each, part in zip(done, kept, out.split(list(piece)), strict=True):
            own.append(part)
            each.commit(part.shape[0])
    return [torch.cat(own) for own in done]
