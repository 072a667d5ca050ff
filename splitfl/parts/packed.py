"""A trunk run on segments, padded or packed, and the test whether a loaded trunk can run packed.

*Padded*: a segment a row, ``(S, Tmax, H)``. *Packed*: all behind one another in one row ``(1, tokens, H)``, so that linear layers
and norms see real tokens only and attention costs the sum of the squares of the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from splitfl.errors import first_line
from splitfl.parts.dropout import KeyedDropout, keyed_run
from splitfl.parts.rows import Rows, running_on
from splitfl.parts.segment_attention import install_segment_attention, remove_segment_attention
from splitfl.parts.segments import pad_segments, unpad
from splitfl.parts.trunk import find_trunk

__all__ = ["drops", "run_segments", "short_windows", "why_not_keyed", "why_not_packed"]

#: The segments a trunk is tried on, as ``(length, start)``: longer than the window below, restarts at 0 and elsewhere, one token.
_TRIAL = ((5, 0), (9, 2), (5, 0), (1, 4), (7, 0))
_WINDOW = 3


def run_segments(trunk: nn.Module, flat: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Run a loaded trunk, bare or wrapped by PEFT, on ``rows``: (tokens, H) to (tokens, H).

    Packed rows only for a trunk for which :func:`why_not_packed` found nothing. Several threads may run one trunk at once.
    """
    if not rows.packed:
        with running_on(rows), keyed_run(trunk, rows):
            padded, mask, positions = pad_segments(flat, list(rows.wire))
            return unpad(find_trunk(trunk).trunk_forward(padded, mask, positions), list(rows.wire))
    part: Any = find_trunk(trunk)
    positions = torch.cat([torch.arange(start, start + length) for length, start in rows.wire])[None].to(flat.device)
    # Flash attention is told where segments end: from positions alone it would only know of those that start alike.
    own = is_flash_attention_requested(part.config.get_text_config(decoder=True))
    with running_on(rows), keyed_run(trunk, rows):
        y: torch.Tensor = part.trunk_forward(flat[None], None, positions, **(_varlen(rows, flat.device) if own else {}))
    return y.squeeze(0)


def _varlen(rows: Rows, device: torch.device) -> dict[str, Any]:
    """Where the segments lie, in transformers' ``FlashAttentionKwargs``."""
    ends = torch.tensor([0, *(length for length, _ in rows.wire)]).cumsum(0).to(device, torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": rows.longest, "max_length_k": rows.longest}


# --- Tried, not believed --------------------------------------------------------------------------------------------------------


def why_not_packed(model: nn.Module) -> str | None:
    """Make a loaded trunk ready for packed runs; returns None, or in one sentence why it can only run padded.

    The trunk itself runs on a few short segments: each alone, with its own attention, then all of them padded, then packed.
    Outputs and gradients must agree but for rounding. Windows and chunks of attention are made short meanwhile, so call it before
    anything else runs the trunk. Takes seven small forward and backward runs.
    """
    trunk: Any = find_trunk(model)
    name, training = trunk.config.model_type, trunk.training
    trunk.eval()
    try:
        with short_windows(trunk):
            alone = _tried(trunk, [Rows((segment,), False) for segment in _TRIAL])
            reason = install_segment_attention(trunk)
            if reason is not None:
                return reason
            padded, packed = (_tried(trunk, [Rows(_TRIAL, layout)]) for layout in (False, True))
            limit = max(math.sqrt(torch.finfo(alone[0].dtype).eps), 4 * _difference(padded, alone))
            found = _difference(packed, alone)
            if not found <= limit:  # NaN too
                reason = f"{name} does not keep packed sequences apart (relative difference {found:.1e})"
    except Exception as error:  # whatever the model's own code raises
        reason = f"{name} does not run on packed rows: {first_line(error)}"
    finally:
        trunk.train(training)
    if reason is not None:
        remove_segment_attention(trunk)
    return reason


def drops(model: nn.Module) -> bool:
    """Whether anything in a loaded trunk is dropped in training: only then its rows need keys. Call it after
    ``install_keyed_dropout``.
    """
    if any(isinstance(module, KeyedDropout) for module in model.modules()):
        return True  # its effect may not show yet: a new LoRA adds nothing
    trunk: Any = find_trunk(model)
    training = trunk.training
    trunk.train()
    try:
        with torch.random.fork_rng(devices=[]):
            one, other = (_tried(trunk, [Rows(_TRIAL, False, keys=(key,) * len(_TRIAL))])[0] for key in (b"1", b"2"))
    finally:
        trunk.train(training)
    return not torch.equal(one, other)


def why_not_keyed(model: nn.Module) -> str | None:
    """Whether all of a loaded trunk's dropout is keyed: None, or in one sentence what follows if it is not.

    The trunk runs in training mode on a few short segments, each alone and all padded, with the same keys. Call it after
    ``install_keyed_dropout``.
    """
    trunk: Any = find_trunk(model)
    training = trunk.training
    trunk.train()
    keys = tuple(bytes([index] * 16) for index in range(len(_TRIAL)))
    try:
        with torch.random.fork_rng(devices=[]):
            rows = [Rows((segment,), False, keys=(key,)) for segment, key in zip(_TRIAL, keys, strict=True)]
            alone, padded = _tried(trunk, rows), _tried(trunk, [Rows(_TRIAL, False, keys=keys)])
    finally:
        trunk.train(training)
    if _difference(padded, alone) <= max(math.sqrt(torch.finfo(alone[0].dtype).eps), 1e-3):
        return None
    return (
        f"{trunk.config.model_type} drops out in a place that cannot be keyed, so what is dropped depends on how clients are "
        "batched: set that dropout to 0 in the config, or attn to sdpa or eager"
    )


def _tried(trunk: Any, runs: Sequence[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the blocks add to the trial's hidden states going forward, and to their gradient going back: (tokens, H) each."""
    generator = torch.Generator().manual_seed(0)
    total = sum(length for length, _ in _TRIAL)
    # Small, so that in half precision what is added is not lost beside it.
    h, dy = (0.1 * torch.randn(total, trunk.layout.hidden_size, generator=generator).to(trunk.device, trunk.dtype) for _ in "hd")
    h.requires_grad_()
    parts = h.split([rows.tokens for rows in runs])
    with torch.enable_grad():
        y = torch.cat([run_segments(trunk, part, rows) for part, rows in zip(parts, runs, strict=True)])
        (dh,) = torch.autograd.grad(y, h, dy)
    return (y - h).detach(), dh - dy


def _difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(one, other, strict=True))


@contextmanager
def short_windows(trunk: nn.Module) -> Iterator[None]:
    """Attention windows and chunks of three tokens, in the config and in what was built from it."""
    names = ("sliding_window", "attention_chunk_size")
    owners: list[Any] = [*trunk.modules()]
    configs = {id(owner.config): owner.config for owner in owners if hasattr(owner, "config")}
    changed: list[tuple[Any, str, int]] = []
    try:
        for owner in (*configs.values(), *owners):
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > _WINDOW:
                    changed.append((owner, name, value))
                    setattr(owner, name, _WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
