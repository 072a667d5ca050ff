"""A batch in pieces, each a micro-batch: the ends overlap with network and trunk, whatever the family's forward does inside.

A family's forward is one call from tokens to loss. Here it runs in two halves: first for every piece as far as the trunk, where
the hidden states are sent and an exception leaves the forward; then for every piece again, its input blocks standing aside, from
the trunk's answer on. So one piece travels while the ends compute another. Autograd runs the newest node first, so the backward
is this order mirrored: the last piece's ``dy`` leaves before the output end of the one before it runs, and each ``dh`` is awaited
when the input end is about to go on from it. Nothing but the embedding is computed twice.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from client_ends.objective import Objective
from client_ends.remote import HiddenSent, RemoteTrunk, cut_rows
from splitfl.parts.blocks import PassThrough
from splitfl.parts.ends import EndsPart

__all__ = ["forward_in_pieces", "pieces_of"]

#: What is known to have one row a sequence. A forward with another tensor among its arguments runs in one piece.
_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels", "shift_labels")
#: Tensors that hold for the whole batch.
_WHOLE = ("num_items_in_batch",)
#: Wishes for more than logits and loss, which only a forward in one piece fulfils.
_MORE = ("output_hidden_states", "output_attentions", "past_key_values")


def pieces_of(arguments: Mapping[str, Any], config: Any, count: int) -> list[range]:
    """Cut the rows of a forward's arguments into about ``count`` pieces of like length; one piece where it cannot be cut."""
    tokens = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
    if count < 2 or not isinstance(tokens, torch.Tensor) or tokens.shape[0] < 2:
        return []
    tensors = {name for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    if tensors - {*_BY_ROW, *_WHOLE} or any(arguments.get(name) or getattr(config, name, False) for name in _MORE):
        return []
    if arguments.get("return_dict", config.return_dict) is False:
        return []
    batch, length = tokens.shape[:2]
    mask = arguments.get("attention_mask")
    given = isinstance(mask, torch.Tensor) and mask.ndim == 2
    lengths = [int(n) for n in mask.sum(1).tolist()] if given and mask is not None else [length] * batch
    pieces = cut_rows(lengths, count)
    return pieces if len(pieces) > 1 else []


def forward_in_pieces(
    model: EndsPart,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    pieces: list[range],
    remote: RemoteTrunk,
    objective: Objective | None,
    *,
    per_token: bool,
) -> Any:
    """The family's ``forward(model, **arguments)`` over ``pieces``; returns its output, logits and loss of the whole batch.

    ``objective`` says how many targets stand behind each piece's loss, ``per_token`` whether they are tokens.
    """
    batch = pieces[-1].stop
    parts = [{name: _rows(name, value, rows, batch) for name, value in arguments.items()} for rows in pieces]
    sent = []
    for rows, part in zip(pieces, parts, strict=True):
        with remote.first_half(rows.start), contextlib.suppress(HiddenSent):
            forward(model, **part)
        sent.append(remote.take_sent())
    outputs = []
    with _input_blocks_aside(model):
        for part, underway in zip(parts, sent, strict=True):
            with remote.second_half(underway):
                outputs.append(forward(model, **part))
    joined: dict[str, Any] = {}
    for name in outputs[0]:
        values = [out[name] for out in outputs]
        if name == "loss":
            # Classifiers take the count of items, and return a mean all the same.
            summed = per_token and arguments.get("num_items_in_batch") is not None
            joined[name] = _loss(values, pieces, objective, summed=summed)
        elif all(isinstance(value, torch.Tensor) for value in values):
            joined[name] = torch.cat(values)
    return type(outputs[0])(**joined)


def _rows(name: str, value: Any, rows: range, batch: int) -> Any:
    if name in _BY_ROW and isinstance(value, torch.Tensor) and value.shape[0] == batch:
        return value[rows.start : rows.stop]
    return value


def _loss(losses: list[torch.Tensor], pieces: list[range], objective: Objective | None, *, summed: bool) -> torch.Tensor:
    """The batch's loss: the sum of the pieces' where each was divided by the whole batch's items, else their mean by targets."""
    counts = [sum(objective.targets[row] for row in rows) if objective is not None else len(rows) for rows in pieces]
    if summed or not sum(counts):
        return torch.stack(losses).sum()
    # A piece without targets has no mean.
    counted = [(loss, count) for loss, count in zip(losses, counts, strict=True) if count]
    return torch.stack([loss * (count / sum(counts)) for loss, count in counted]).sum()


@contextlib.contextmanager
def _input_blocks_aside(model: EndsPart) -> Iterator[None]:
    """The blocks before the trunk do nothing meanwhile: what they would compute has been sent."""
    layout, held = model.layout, model.cut.input_blocks
    blocks: Any = layout.block_list(model)  # type: ignore[arg-type]
    real = list(itertools.islice(blocks, held))
    try:
        for index, block in enumerate(real):
            blocks[index] = PassThrough(block, layout.tuple_length)
        yield
    finally:
        for index, block in enumerate(real):
            blocks[index] = block
