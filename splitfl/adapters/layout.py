"""What of the ends trains, as it travels: named tensors in order, and the parts they are cut into."""

from __future__ import annotations

import builtins
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.control import DTYPES, MAX_NAMED
from splitfl.protocol.messages import Ends
from splitfl.tensors import dtype_name

__all__ = ["Layout", "PartCursor", "TensorSpec", "part_bytes_for"]

#: The largest part, bytes.
_PART_BYTES = 4 << 20

#: What the ends of one client may have, bytes: who says more would have all others refused, as theirs are not like it.
_MOST_BYTES = 2**40


def part_bytes_for(window: int) -> int:
    """Bytes of a full part where a client may have ``window`` bytes under way: several at a time, and whole elements."""
    return min(_PART_BYTES, window // 4) // 8 * 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor. ``dtype``: its name on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """Tensors by ascending name."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Of tensors by name. Raises ValueError for a dtype that does not travel."""
        specs = (TensorSpec(name, dtype_name(one.dtype), tuple(one.shape)) for name, one in sorted(tensors.items()))
        return cls(tuple(specs))

    @classmethod
    def from_messages(cls, messages: Sequence[Ends]) -> Layout:
        """What :meth:`messages` said. Raises RemoteProtocolError where names do not ascend, or no machine could hold it."""
        tensors = [TensorSpec(name, dtype, shape) for message in messages for name, (dtype, shape) in message.tensors]
        if any(first.name >= second.name for first, second in itertools.pairwise(tensors)):
            raise RemoteProtocolError("the tensors of the ends are not by ascending name")
        if sum(spec.bytes for spec in tensors) > _MOST_BYTES:
            raise RemoteProtocolError(f"ends of more than {_MOST_BYTES} bytes")
        return cls(tuple(tensors))

    def messages(self) -> list[Ends]:
        """The layout as a client says it."""
        plain = [(spec.name, (spec.dtype, spec.shape)) for spec in self.tensors]
        pieces = [tuple(plain[begin : begin + MAX_NAMED]) for begin in range(0, len(plain), MAX_NAMED)]
        return [Ends(piece, more=index + 1 < len(pieces)) for index, piece in enumerate(pieces)]

    def to_bytes(self) -> builtins.bytes:
        """For another process of this server."""
        return json.dumps([(spec.name, spec.dtype, spec.shape) for spec in self.tensors]).encode()

    @classmethod
    def from_bytes(cls, said: builtins.bytes) -> Layout:
        """What :meth:`to_bytes` gave."""
        return cls(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(said)))

    @functools.cached_property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.tensors)

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Where each tensor begins when they lie behind one another, bytes."""
        offsets, end = [], 0
        for spec in self.tensors:
            offsets.append(end)
            end += spec.bytes
        return offsets

    def parts(self, part_bytes: int) -> Iterator[tuple[int, int, int]]:
        """``(tensor, offset, size)`` of every part, in the order in which they travel; a part lies within one tensor."""
        for index, spec in enumerate(self.tensors):
            for offset in range(0, spec.bytes, part_bytes):
                yield index, offset, min(part_bytes, spec.bytes - offset)

    def describe(self) -> str:
        """In the user's words."""
        ranks = sorted({spec.shape[0] for spec in self.tensors if ".lora_A." in spec.name and spec.shape})
        kind = f"LoRA of rank {', '.join(map(str, ranks))}" if ranks else "full weights"
        return f"{kind} ({len(self.tensors)} tensors, {self.bytes} bytes)"

    def difference(self, other: Layout) -> str | None:
        """Where ``other`` differs first, in a few words; None: nowhere."""
        mine, theirs = ({spec.name: spec for spec in layout.tensors} for layout in (self, other))
        for name in sorted(mine.keys() | theirs.keys()):
            here, there = mine.get(name), theirs.get(name)
            if here is None or there is None:
                return f"{name} is in {'yours' if here is None else 'the others'} alone"
            if here != there:
                return f"{name} is {there.dtype} {list(there.shape)} in yours, {here.dtype} {list(here.shape)} in the others"
        return None


class PartCursor:
    """Holds the parts of one transfer against their order, as they begin."""

    def __init__(self, layout: Layout, part_bytes: int) -> None:
        self._parts = layout.parts(part_bytes)
        self._next = next(self._parts, None)

    @property
    def at_end(self) -> bool:
        """Whether every part has begun."""
        return self._next is None

    def take(self, message: Any) -> None:
        """Raises RemoteProtocolError where ``message`` is not the next part."""
        if (message.tensor, message.offset, message.size) != self._next:
            raise RemoteProtocolError(f"a part of the ends out of order: tensor {message.tensor} from {message.offset}")
        self._next = next(self._parts, None)
