"""What a cut means, told before anything is loaded: what each side holds, reads and sends (``splitfl plan``).

Counted on the model's own class built without storage, so that no weight is read or downloaded: shapes come from the
config, files from the index.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from splitfl.parts.blocks import Layout
from splitfl.parts.cut import Cut
from splitfl.parts.hub import SINGLE
from splitfl.parts.loading import CutLike, block_of_tensors, find_model
from splitfl.parts.probe import probe, skeleton

WIRE_DTYPES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Side:
    """What one side holds. ``nbytes``: of its tensors in the checkpoint's dtype; tied weights count once.

    ``files``: the weight files it needs of all there are.
    """

    blocks: tuple[int, ...]
    tensors: int
    parameters: int
    nbytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The plan of one cut through one model; ``render`` prints it."""

    model: str
    family: str
    cut: Cut
    num_blocks: int
    hidden_size: int
    dtype: str
    packing: bool
    files: tuple[str, ...]
    ends: Side
    trunk: Side

    def bytes_per_token(self, dtype: str) -> int:
        """What one token costs in one direction, once: a hidden state of ``hidden_size`` numbers."""
        return self.hidden_size * WIRE_DTYPES[dtype]

    def render(self) -> str:
        """The plan as lines of text for a terminal."""
        lines = [
            f"{self.model}: {self.family}, {self.num_blocks} blocks, hidden size {self.hidden_size}, {self.dtype}",
            f"cut {self.cut}",
            "",
            f"{'':8}{'blocks':<16}{'tensors':>8}{'parameters':>14}{'memory':>12}  weight files",
        ]
        for name, side in (("client", self.ends), ("trunk", self.trunk)):
            files = f"{len(side.files)} of {len(self.files)}"
            lines.append(
                f"{name:8}{_ranges(side.blocks):<16}{side.tensors:>8}{_count(side.parameters):>14}"
                f"{_size(side.nbytes):>12}  {files}"
            )
        lines += ["", "a token in training crosses the network four times (h, y, dy, dh), in use twice (h, y):"]
        for dtype in WIRE_DTYPES:
            once = self.bytes_per_token(dtype)
            lines.append(f"  {dtype:9} {_size(once)} a crossing; training {_size(2 * once)} up, {_size(2 * once)} down")
        if not self.packing:
            lines += ["", "packed sequences are refused: in this family position_ids do not keep them apart"]
        return "\n".join(lines)


def plan(
    path: str | os.PathLike[str],
    cut: CutLike = (1, 1),
    *,
    task: str = "causal-lm",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of ``cut`` through the model at ``path`` (directory or hub id), with a head for ``task``.

    Fetches the config and the index, no weights. Raises ModelError for a model that cannot be split there.
    """
    cut = Cut.of(cut)
    checkpoint, config, full = find_model(path, task, revision=revision, trust_remote_code=trust_remote_code)
    layout = probe(full, config, cut)
    held = set(cut.trunk_range(layout.count))
    model, _ = skeleton(full, config, layout.count)
    if checkpoint.sharded:
        owners = block_of_tensors(full, config, layout, checkpoint.weight_map)
        ends_files = {checkpoint.weight_map[name] for name, block in owners.items() if block not in held}
        trunk_files = {checkpoint.weight_map[name] for name, block in owners.items() if block in held}
        files = tuple(checkpoint.shards)
    else:
        # On the hub, to ask what a single file holds would be to download it.
        names = checkpoint.shards if checkpoint.directory is not None else [SINGLE]
        ends_files = trunk_files = set(names)
        files = tuple(names)
    return Plan(
        model=checkpoint.path,
        family=full.__name__,
        cut=cut,
        num_blocks=layout.count,
        hidden_size=layout.hidden_size,
        dtype=str(config.dtype or torch.get_default_dtype()).removeprefix("torch."),
        packing=layout.packing,
        files=files,
        ends=_side(model, layout, set(range(layout.count)) - held, True, ends_files),
        trunk=_side(model, layout, held, False, trunk_files),
    )


def _side(model: torch.nn.Module, layout: Layout, blocks: set[int], outside: bool, files: set[str]) -> Side:
    prefix = layout.blocks + "."
    own = [
        parameter
        for name, parameter in model.named_parameters()
        if (int(name[len(prefix) :].split(".", 1)[0]) in blocks if name.startswith(prefix) else outside)
    ]
    return Side(
        blocks=tuple(sorted(blocks)),
        tensors=len(own),
        parameters=sum(parameter.numel() for parameter in own),
        nbytes=sum(parameter.nbytes for parameter in own),
        files=tuple(sorted(files)),
    )


def _ranges(blocks: tuple[int, ...]) -> str:
    """Block indices as ranges: ``0, 7-15``; ``none`` for a client with embedding and head alone."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(nbytes: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
