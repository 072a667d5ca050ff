"""Padding and packing: what travels is real tokens and, for each run of them, its length and first position.

A *segment* is a run of real tokens in one row that attend to one another. Left or right padding makes one segment a
row; packed rows, whose ``position_ids`` restart, make one a sequence. The plain index operations here carry no gradient
of their own: autograd is the remote node's concern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from splitfl.errors import ModelError


class Segment(NamedTuple):
    """``length`` tokens of row ``row`` from column ``begin``; the first has position ``start``."""

    row: int
    begin: int
    length: int
    start: int


@dataclass(frozen=True)
class Segments:
    """The segments of a batch of ``shape`` (B, T), row by row, left to right."""

    items: tuple[Segment, ...]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.items)

    @property
    def tokens(self) -> int:
        """How many real tokens the batch has."""
        return sum(item.length for item in self.items)

    @property
    def wire(self) -> list[tuple[int, int]]:
        """``(length, start)`` of each segment, as a forward message names them."""
        return [(item.length, item.start) for item in self.items]

    @property
    def dense(self) -> bool:
        """Whether the batch is full rows with no padding, so that packing is a reshape."""
        return self.tokens == self.shape[0] * self.shape[1]

    def index(self, device: torch.device | str | None = None) -> torch.Tensor:
        """(tokens,) int64: where each real token lies in the flattened (B * T) batch."""
        columns = self.shape[1]
        runs = [torch.arange(s.row * columns + s.begin, s.row * columns + s.begin + s.length) for s in self.items]
        return (torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)).to(device)


def check_layout(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    packing: bool = True,
    family: str = "this model",
) -> None:
    """Refuses what cannot travel as segments: a ModelError of one sentence. Shapes (B, T); see ``segments_of``."""
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            what = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
            raise ModelError(f"the trunk takes a 2-D attention mask (batch, tokens), not {what}: pass the padding mask")
        real = attention_mask != 0
        # A row without holes rises at most once: 0..0 1..1 0..0.
        rises = (real[:, 1:] & ~real[:, :-1]).sum(dim=1) + real[:, 0]
        if bool((rises > 1).any()):
            raise ModelError(
                f"the attention mask of row {int(torch.nonzero(rises > 1)[0, 0])} has a hole: pad on one side or both, "
                "never between tokens"
            )
    if position_ids is None:
        return
    if position_ids.dim() != 2:
        raise ModelError(f"the trunk takes position_ids (batch, tokens), not {tuple(position_ids.shape)}")
    restarts = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if attention_mask is not None:
        # Both neighbours must be real: Hugging Face's own position_ids for left padding jump among the pads.
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if bool(restarts.any()):
        if attention_mask is not None:
            raise ModelError(
                "position_ids restart inside a row that also has an attention mask, and then Hugging Face attends "
                "across the restart: drop the mask to pack sequences"
            )
        if not packing:
            raise ModelError(
                f"{family} does not keep packed sequences apart by their position_ids: give each sequence a row of its own"
            )


def segments_of(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, shape: tuple[int, int]) -> Segments:
    """The segments of a batch of ``shape`` (B, T).

    Without ``position_ids`` a token's position is its column, pads counted, as Hugging Face counts. A row that is all
    padding has no segment. Raises ModelError for a 4-D mask, a mask with holes, or a mask beside packed positions.
    """
    rows, columns = shape
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] == 1 != rows:
        position_ids = position_ids.expand(rows, -1)
    check_layout(attention_mask, position_ids)
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if tensor is not None and tuple(tensor.shape) != (rows, columns):
            shape_of = tuple(tensor.shape)
            raise ModelError(f"{name} has shape {shape_of}, but the batch has {rows} rows of {columns} tokens")
    spans: list[tuple[int, int, int]] = []
    if attention_mask is None:
        spans = [(row, 0, columns) for row in range(rows) if columns]
    else:
        real = (attention_mask != 0).to("cpu", torch.int64)
        lengths, begins = real.sum(dim=1).tolist(), real.argmax(dim=1).tolist()
        spans = [(row, begins[row], lengths[row]) for row in range(rows) if lengths[row]]
    if position_ids is None:
        return Segments(tuple(Segment(row, begin, length, begin) for row, begin, length in spans), (rows, columns))
    positions = position_ids.to("cpu")
    items: list[Segment] = []
    for row, begin, length in spans:
        own = positions[row, begin : begin + length]
        starts = [0, *(torch.nonzero(own[1:] - own[:-1] != 1).flatten() + 1).tolist(), length]
        for here, there in pairwise(starts):
            items.append(Segment(row, begin + here, there - here, int(own[here])))
    return Segments(tuple(items), (rows, columns))


def pack(h: torch.Tensor, segments: Segments) -> torch.Tensor:
    """(B, T, H) to the real tokens alone, (tokens, H), in segment order."""
    flat = h.reshape(-1, h.shape[-1])
    return flat if segments.dense else flat.index_select(0, segments.index(h.device))


def unpack(flat: torch.Tensor, segments: Segments, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """(tokens, H) back to (B, T, H), zero where there is padding."""
    rows, columns = shape or segments.shape
    if segments.dense:
        return flat.reshape(rows, columns, flat.shape[-1])
    out = flat.new_zeros((rows * columns, flat.shape[-1]))
    out[segments.index(flat.device)] = flat
    return out.reshape(rows, columns, flat.shape[-1])


class PaddedSegments(NamedTuple):
    """A batch of segments, one a row, padded on the right: what a trunk runs on."""

    hidden_states: torch.Tensor  # (S, Tmax, H)
    attention_mask: torch.Tensor | None  # (S, Tmax), None where no row is padded
    position_ids: torch.Tensor  # (S, Tmax)


def pad_segments(flat: torch.Tensor, wire: list[tuple[int, int]]) -> PaddedSegments:
    """(tokens, H) and each segment's ``(length, start)`` to a right-padded batch.

    A pad has the position of the last token before it, so that no row seems longer than it is.
    """
    rows, longest = len(wire), max((length for length, _ in wire), default=0)
    starts = torch.tensor([start for _, start in wire], dtype=torch.int64, device=flat.device)
    position_ids = starts[:, None] + torch.arange(longest, device=flat.device)
    if all(length == longest for length, _ in wire):
        return PaddedSegments(flat.reshape(rows, longest, flat.shape[-1]), None, position_ids)
    lengths = torch.tensor([length for length, _ in wire], device=flat.device)
    mask = torch.arange(longest, device=flat.device) < lengths[:, None]
    hidden_states = flat.new_zeros((rows, longest, flat.shape[-1]))
    hidden_states[mask] = flat
    position_ids = torch.minimum(position_ids, (starts + lengths - 1)[:, None])
    return PaddedSegments(hidden_states, mask.to(torch.int64), position_ids)


def unpad(padded: torch.Tensor, wire: list[tuple[int, int]]) -> torch.Tensor:
    """(S, Tmax, H) back to (tokens, H): the inverse of ``pad_segments``."""
    longest = padded.shape[1]
    if all(length == longest for length, _ in wire):
        return padded.reshape(-1, padded.shape[-1])
    lengths = torch.tensor([length for length, _ in wire], device=padded.device)
    return padded[torch.arange(longest, device=padded.device) < lengths[:, None]]
