"""An adapter a client on one frozen base, all in one forward and one backward of a mixed batch.

Each adapted linear layer computes ``base(x) + scaling_c * B_c A_c dropout(x)`` with ``c`` the client a row belongs to, as
:func:`splitfl.parts.rows.current_rows` says. The base's product runs once over all rows; only the thin products differ by client.
Two ways to compute those, equal up to float order (``benchmarks/adapters.py`` measures them):

- *runs* (CPU): the rows of a client lie together, so each client's product reads its rows where they are and is added in
  place. Nothing is padded, copied or computed for naught.
- *blocks* (any other device): rows are cut into blocks of one client each, ranks padded to the largest, and all blocks
  are one batched product, so that the number of kernels does not grow with the clients (as S-LoRA, arXiv 2311.03285, and Punica,
  arXiv 2310.18547, do for inference).

An adapter is one client's parameters over all layers. They are no parameters of the model: whoever trains them holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from splitfl.adapters.lora import is_fan_in_fan_out, lora_start, targeted_linears
from splitfl.adapters.names import ADAPTER, full_name
from splitfl.adapters.trainables import set_trainable
from splitfl.config import LoraSettings
from splitfl.errors import ModelError
from splitfl.parts.packed import run_segments
from splitfl.parts.rows import Rows, current_rows

__all__ = ["AdapterPair", "ClientLoras", "GroupedLinear", "Runs", "add_in_blocks", "add_in_runs"]

Runs = tuple[tuple[int, int, int], ...]
"""``(pair, begin, end)``: rows ``begin..end`` belong to the ``pair``-th of some adapters. Other rows have none."""

#: Rows of a block: large enough to fill a tensor core's tile, small enough that a client's last block is mostly rows.
_BLOCK = 128

#: Whose rows a part is tried with: no client can be called so.
_TRIAL = ("/one", "/other")


@dataclass(frozen=True, slots=True)
class AdapterPair:
    """One client's adapter of one layer: ``a`` (rank, in), ``b`` (out, rank); ``scaling`` = alpha / rank."""

    a: Parameter
    b: Parameter
    scaling: float


class GroupedLinear(nn.Module):
    """A linear layer of the base with one adapter a client. Rows of the owner ``""``, or outside a run, have none."""

    def __init__(self, base_layer: nn.Module, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        # The name PEFT has for it: dropout keyed by module is then the same as with one shared adapter.
        self.lora_dropout = nn.ModuleDict({ADAPTER: nn.Dropout(dropout) if dropout else nn.Identity()})
        self.of: dict[str, AdapterPair] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of the layer."""
        base: Any = self.base_layer
        return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else (base.nx, base.nf)

    @property
    def weight(self) -> Any:
        """The base's own: some families look at a layer's dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out). Raises ModelError for rows that are not the run's own, as where a family routes them."""
        rows = current_rows()
        owners = list(dict.fromkeys(owner for owner, _, _ in rows.runs if owner)) if rows is not None else []
        if rows is None or not owners:
            return cast(Tensor, self.base_layer(x))
        # Two dimensions: a view of the product, which three would be, could not be added to in place.
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != rows.runs[-1][2]:
            raise ModelError(f"a layer sees {len(flat)} rows in a run of {rows.runs[-1][2]}, so nobody can tell whose they are")
        out = self.base_layer(flat)
        place = {owner: index for index, owner in enumerate(owners)}
        runs = tuple((place[owner], begin, end) for owner, begin, end in rows.runs if owner)
        add = add_in_runs if flat.device.type == "cpu" else add_in_blocks
        out = add(out, self.lora_dropout[ADAPTER](x).reshape(flat.shape), runs, [self.of[owner] for owner in owners])
        return out.reshape(*x.shape[:-1], out.shape[-1])


class _AddInRuns(torch.autograd.Function):
    """``out[run] += scaling B A x[run]`` for each run, in place. Gradients go to ``out`` (unchanged), ``x`` and each A and B."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, runs: Runs, scalings: Sequence[float], *weights: Tensor) -> Tensor:
        inner = []
        for pair, begin, end in runs:
            a, b = weights[2 * pair].to(x.dtype), weights[2 * pair + 1].to(x.dtype)
            z = x[begin:end] @ a.T  # (rows, rank)
            out[begin:end].addmm_(z, b.T, alpha=scalings[pair])
            inner.append(z)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, *weights, *inner)
        ctx.runs, ctx.scalings = runs, scalings
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, *held = ctx.saved_tensors
        weights, inner = held[: 2 * len(ctx.scalings)], held[2 * len(ctx.scalings) :]
        dx = torch.empty_like(x) if sum(end - begin for _, begin, end in ctx.runs) == len(x) else torch.zeros_like(x)
        found: list[Tensor | None] = [None] * len(weights)
        for (pair, begin, end), z in zip(ctx.runs, inner, strict=True):
            a, b = weights[2 * pair].to(x.dtype), weights[2 * pair + 1].to(x.dtype)
            rows = dy[begin:end]
            dz = (rows @ b).mul_(ctx.scalings[pair])
            torch.mm(dz, a, out=dx[begin:end])
            for place, gradient in (
                (2 * pair, dz.T @ x[begin:end]),
                (2 * pair + 1, (rows.T @ z).mul_(ctx.scalings[pair])),
            ):
                before = found[place]
                found[place] = gradient.to(weights[place].dtype) if before is None else before.add_(gradient)
        return dy, dx, None, None, *found


def add_in_runs(out: Tensor, x: Tensor, runs: Runs, pairs: Sequence[AdapterPair]) -> Tensor:
    """``out`` (rows, out) with each run's adapter added, in place where it is no view. ``x`` (rows, in): the adapters' input."""
    weights = [weight for pair in pairs for weight in (pair.a, pair.b)]
    whole = out.clone() if out._is_view() else out
    return cast(Tensor, _AddInRuns.apply(whole, x, runs, [pair.scaling for pair in pairs], *weights))


@lru_cache(maxsize=64)
def _blocks(runs: Runs, rows: int, block: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """How rows become blocks: the pair of each block, the row of each place in the blocks (``rows``: none), the place of each
    row (the number of places: none), rows of a block. The second and third are None where blocks are the rows as they lie.
    """
    sizes = {end - begin for _, begin, end in runs}
    if len(sizes) == 1 and sum(end - begin for _, begin, end in runs) == rows:
        return torch.tensor([pair for pair, _, _ in runs], device=device), None, None, sizes.pop()
    pairs: list[int] = []
    row_of: list[Tensor] = []
    place_of = torch.full((rows,), -1, dtype=torch.int64)
    for pair, begin, end in runs:
        count = -(-(end - begin) // block)
        places = torch.full((count * block,), rows, dtype=torch.int64)
        places[: end - begin] = torch.arange(begin, end)
        place_of[begin:end] = len(pairs) * block + torch.arange(end - begin)
        pairs += [pair] * count
        row_of.append(places)
    place_of[place_of < 0] = len(pairs) * block
    return torch.tensor(pairs, device=device), torch.cat(row_of).to(device), place_of.to(device), block


def _stacked(pairs: Sequence[AdapterPair], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All A ``(pairs, rank, in)`` and all B ``(pairs, out, rank)``, zero beyond a pair's own rank; a few kernels for any number.

    Gradients of the parts come back contiguous, as the fused optimizer wants them.
    """
    ranks = tuple(pair.a.shape[0] for pair in pairs)
    rank, into, out = max(ranks), pairs[0].a.shape[1], pairs[0].b.shape[0]
    a = torch.cat([pair.a for pair in pairs])
    b = torch.cat([pair.b.reshape(-1) for pair in pairs])
    if any(own != rank for own in ranks):
        rows, places = _padding(ranks, out, a.device)
        a = a.new_zeros(len(pairs) * rank, into).index_copy(0, rows, a)
        b = b.new_zeros(len(pairs) * out * rank).index_copy(0, places, b)
    return a.reshape(-1, rank, into).to(dtype), b.reshape(-1, out, rank).to(dtype)


@lru_cache(maxsize=64)
def _padding(ranks: tuple[int, ...], out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the rows of all A, and the elements of all B, one after another, lie among those padded to the largest rank."""
    rank = max(ranks)
    own = torch.arange(rank) < torch.tensor(ranks)[:, None]  # (pairs, rank)
    elements = own[:, None].expand(-1, out, -1)
    return own.flatten().nonzero().flatten().to(device), elements.flatten().nonzero().flatten().to(device)


def add_in_blocks(out: Tensor, x: Tensor, runs: Runs, pairs: Sequence[AdapterPair], *, block: int = _BLOCK) -> Tensor:
    """As :func:`add_in_runs`, by batched products over blocks of ``block`` rows with one adapter each, and never in place."""
    pair_of, row_of, place_of, block = _blocks(runs, len(x), block, x.device)
    a, b = _stacked(pairs, x.dtype)
    scaling = torch.tensor([pair.scaling for pair in pairs], dtype=x.dtype, device=x.device)
    # One row of zeros more, which the places without a row read.
    held = x if row_of is None else nn.functional.pad(x, (0, 0, 0, 1)).index_select(0, row_of)
    blocks = held.reshape(-1, block, x.shape[-1])
    inner = torch.bmm(blocks, a.index_select(0, pair_of).transpose(1, 2)) * scaling.index_select(0, pair_of)[:, None, None]
    delta = torch.bmm(inner, b.index_select(0, pair_of).transpose(1, 2)).reshape(-1, out.shape[-1])
    if place_of is None:
        return out + delta
    return out + nn.functional.pad(delta, (0, 0, 0, 1)).index_select(0, place_of)


class ClientLoras:
    """The adapted layers of a part, and the adapters in them."""

    def __init__(self, model: Any, settings: LoraSettings, *, seed: int) -> None:
        """Put a :class:`GroupedLinear` around each linear layer that ``settings`` target, and freeze the model.

        ``settings.rank`` and ``settings.alpha`` are not used: each adapter has its own. Raises ConfigError as
        ``attach_lora`` does.
        """
        self.seed = seed
        linears = targeted_linears(model, settings)
        set_trainable(model, "none")
        self.layers = {name: GroupedLinear(linear, settings.dropout) for name, linear in linears.items()}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        self.fan_in_fan_out = is_fan_in_fan_out(linears.values())

    def try_out(self, model: Any) -> None:
        """Run the part on two owners' rows. Raises ModelError where its layers do not see each token's row in its place."""
        size = model.layout.hidden_size
        like = next(model.parameters())
        for owner in _TRIAL:
            self.add(owner, rank=1, alpha=1.0)
        try:
            with torch.no_grad():
                flat = torch.ones(5, size, device=like.device, dtype=like.dtype)
                run_segments(model, flat, Rows(((3, 0), (2, 0)), False, _TRIAL))
        except ModelError as error:
            raise ModelError(
                f"{model.config.model_type} cannot have an adapter for each client in these layers, {error}: choose others with "
                "--lora-targets, or --adapters shared"
            ) from None
        finally:
            for owner in _TRIAL:
                self.remove(owner)

    def add(self, owner: str, *, rank: int, alpha: float) -> dict[str, Parameter]:
        """A fresh adapter for ``owner``, as :func:`attach_lora` starts it; returns its parameters by their full names, sorted."""
        named: dict[str, Parameter] = {}
        for name, layer in self.layers.items():
            weight = next(layer.base_layer.parameters())
            # As PEFT: fp32 over a base in half precision.
            dtype = torch.float32 if weight.dtype.itemsize < 4 or not weight.is_floating_point() else weight.dtype
            into, out = layer.shape
            name_a, name_b = (full_name(f"{name}.{which}.weight") for which in ("lora_A", "lora_B"))
            start = lora_start(self.seed, name_a, (rank, into))
            a = Parameter(start.to(device=weight.device, dtype=dtype))
            b = Parameter(torch.zeros(out, rank, device=weight.device, dtype=dtype))
            layer.of[owner] = AdapterPair(a, b, alpha / rank)
            named |= {name_a: a, name_b: b}
        return dict(sorted(named.items()))

    def remove(self, owner: str) -> None:
        """Take an adapter out of the layers."""
        for layer in self.layers.values():
            layer.of.pop(owner, None)
