"""Dropout whose masks depend on whose token it is, and on nothing else.

The mask of a segment is drawn from a generator of its own, seeded with the segment's key and the name of the place in the model.
So it does not matter what a segment is batched with, how the batch is laid out or cut up, or whether it is run again: the mask is
the same. Modules are replaced (:class:`KeyedDropout`); dropout that a family calls as a function, inside its attention too, is
caught on its way (:func:`keyed_run`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from splitfl.parts.rows import Rows, current_rows
from splitfl.parts.trunk import find_trunk

__all__ = ["KeyedDropout", "dropout_key", "install_keyed_dropout", "keyed_attention", "keyed_run"]


def dropout_key(seed: int, step: int, client: str, micro: int, segment: int) -> bytes:
    """What the masks of one segment are keyed by, 16 bytes: the run's seed, the step, and the ``segment``-th segment of
    the client's micro-batch ``micro``.
    """
    return hashlib.blake2b(f"{seed}/{step}/{micro}/{segment}/{client}".encode(), digest_size=16).digest()


class KeyedDropout(nn.Dropout):
    """``nn.Dropout`` with keyed masks. Outside a run of the trunk, or of rows without keys, it is ``nn.Dropout``.

    ``path``: the module's full name, the second half of what its masks are drawn from.
    """

    def __init__(self, p: float, path: str) -> None:
        super().__init__(p)
        self.path = path

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input``: (S, T, ...), (1, tokens, ...), either of them with rows and tokens in one dimension, or attention's
        weights (S, heads, T, T). A tensor of any other shape cannot be keyed, and is dropped from as ever.
        """
        rows = current_rows()
        if not self.training or rows is None or rows.keys is None:
            return super().forward(input)
        return _drop(input, self.p, self.path, rows)


def install_keyed_dropout(model: nn.Module) -> None:
    """Replace every ``nn.Dropout`` with p > 0 in a loaded trunk, PEFT's too, in place; once all adapters are attached.

    Doing it again finds what has come since. Masks are keyed in runs whose rows have keys: see ``packed.run_segments``.
    """
    trunk: Any = find_trunk(model)
    for path, module in list(trunk.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and child.p > 0:
                keyed = KeyedDropout(child.p, f"{path}.{name}")
                setattr(module, name, keyed.train(child.training))
    if not getattr(trunk, "keyed_dropout", False):
        for index, block in enumerate(trunk.layout.block_list(trunk)):
            block.register_forward_pre_hook(_entering(f"{trunk.layout.blocks}.{index}"))
        trunk.keyed_dropout = True


def _entering(path: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        run = _run.get()
        if run is not None:
            run.path, run.calls = path, 0

    return hook


# --- Dropout that is called as a function ---------------------------------------------------------------------------------------


class _KeyedCalls(TorchFunctionMode):
    """While a trunk runs on ``rows``: keys each call of ``F.dropout`` and each attention that drops.

    A place in the model is named by its block and by how many such calls came before it in that block.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.path, self.calls = "", 0
        self.fixed: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def place(self) -> str:
        """A name for the call that is being made."""
        if self.fixed is not None:
            return self.fixed
        self.calls += 1
        return f"{self.path}#{self.calls}"

    def _dropout(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return _drop(input, p, self.place(), self.rows) if training and p > 0 else input

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As torch documents ``scaled_dot_product_attention``, with a mask of our own on its weights."""
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # The least number, not -inf: a padded row may see nothing at all, and must not become NaN.
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return _drop(scores.softmax(-1), dropout_p, self.place(), self.rows) @ value


_run: ContextVar[_KeyedCalls | None] = ContextVar("splitfl_keyed_calls", default=None)


@contextmanager
def keyed_run(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Around one run of the trunk, in training mode: keys the dropout that its family calls as a function."""
    if rows.keys is None or not model.training:
        yield
        return
    with _KeyedCalls(rows) as calls:
        token = _run.set(calls)
        try:
            yield
        finally:
            _run.reset(token)


@contextmanager
def keyed_attention() -> Iterator[Callable[[Rows], None]]:
    """Around one attention that is computed a group of segments at a time. Call what it yields before each group, with the
    group's rows: the same place in the model, other segments.
    """
    calls = _run.get()
    if calls is None:
        yield lambda rows: None
        return
    whole, calls.fixed = calls.rows, calls.place()

    def turn_to(rows: Rows) -> None:
        calls.rows = rows

    try:
        yield turn_to
    finally:
        calls.rows, calls.fixed = whole, None


# --- Masks ----------------------------------------------------------------------------------------------------------------------


def _drop(x: torch.Tensor, p: float, path: str, rows: Rows) -> torch.Tensor:
    views = _by_segment(x.shape, rows)
    if views is None or p >= 1:
        with torch._C.DisableTorchFunction():
            return F.dropout(x, p)
    keep = _keep(x, p, path, rows, views)
    # The mask is kept for backward as it is, a byte an element; a product would keep it as floats.
    return torch.where(keep, x * (1 / (1 - p)), x.new_zeros(()))


def _keep(x: torch.Tensor, p: float, path: str, rows: Rows, views: Sequence[tuple[slice | int, ...]]) -> torch.Tensor:
    """Where ``x`` is kept, bool, of its shape. Each segment's part is drawn from its own generator, padding is kept."""
    assert rows.keys is not None
    keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    generator = torch.Generator(device=x.device)
    for view, key in zip(views, rows.keys, strict=True):
        seed = hashlib.blake2b(key + path.encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(seed) >> 1)
        part = keep[view]
        # Drawn contiguous in any case: what is drawn depends on it.
        part.copy_(torch.empty(part.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator))
    return keep


def _by_segment(shape: Sequence[int], rows: Rows) -> list[tuple[slice | int, ...]] | None:
    """For each segment, where it lies in a tensor of this shape; None for a shape that does not say."""
    lengths = [length for length, _ in rows.wire]
    count, longest = len(lengths), rows.longest
    if not rows.packed:
        if len(shape) == 4 and shape[0] == count and shape[2] == shape[3] == longest:
            return [(row, slice(None), slice(length), slice(length)) for row, length in enumerate(lengths)]
        if len(shape) > 1 and (shape[0], shape[1]) == (count, longest):
            return [(row, slice(length)) for row, length in enumerate(lengths)]
        if shape[0] == count * longest:
            return [(slice(row * longest, row * longest + length),) for row, length in enumerate(lengths)]
        return None
    ends = torch.tensor(lengths).cumsum(0).tolist()
    runs = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    if shape[0] == rows.tokens:
        return [(run,) for run in runs]
    if len(shape) > 1 and (shape[0], shape[1]) == (1, rows.tokens):
        return [(0, run) for run in runs]
    return None
