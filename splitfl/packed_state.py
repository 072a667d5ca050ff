"""Nested state, an optimizer's or a generator's, without pickle: one safetensors file, whose header has the structure as JSON.
Reading it can never run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors_bytes
from safetensors.torch import save as save_safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor

from splitfl.errors import CheckpointError

__all__ = ["pack_state", "unpack_state", "write_state"]

_STRUCTURE = "splitfl.structure"


def pack_state(state: Any) -> bytes:
    """Nested state, such as an optimizer's ``state_dict``, as safetensors bytes.

    It may hold dict, list, tuple, tensor, str, int, float, bool and None; floats keep their bits, dictionary keys their
    type (str or int). Raises ``TypeError`` on anything else.
    """
    tensors, structure = _take_apart(state)
    return save_safetensors_bytes(tensors, metadata=structure)


def write_state(file: str | os.PathLike[str], state: Any) -> None:
    """What :func:`pack_state` gives, as a file, without a copy of it in memory."""
    tensors, structure = _take_apart(state)
    save_file(tensors, file, metadata=structure)


def unpack_state(content: bytes) -> Any:
    """What :func:`pack_state` was given; tensors on the CPU. Raises ``CheckpointError`` on anything else."""
    try:
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        structure = header.pop("__metadata__")[_STRUCTURE]
        return _unflatten(json.loads(structure), _tensors_of(header, memoryview(content)[begin:]))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"A saved state is damaged ({error}): use another checkpoint.") from error


def _tensors_of(header: Mapping[str, Any], data: memoryview) -> dict[str, Tensor]:
    """As safetensors has them, one by one: it holds the GIL while it copies, of an optimizer's state for a minute and more, in
    which this process would give no sign of life.
    """
    tensors: dict[str, Tensor] = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position or not begin <= end <= len(data):
            raise ValueError("its tensors do not lie end to end")
        alone = json.dumps({name: {**entry, "data_offsets": [0, end - begin]}}).encode()
        tensors |= load_safetensors_bytes(b"".join([len(alone).to_bytes(8, "little"), alone, data[begin:end]]))
        position = end
    if position != len(data):
        raise ValueError("it is longer than its tensors")
    return tensors


def _take_apart(state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_flatten(state, tensors), allow_nan=True)
    memories: set[int] = set()
    for name, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        if memory in memories:  # two entries of a state may share memory, which safetensors refuses
            tensors[name] = value.clone()
        memories.add(memory)
    return tensors, {_STRUCTURE: structure}


def _flatten(state: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``state``: containers become ``[tag, content]``, tensors go to ``tensors`` and leave their number."""
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().cpu().contiguous()
        return ["tensor", name]
    if isinstance(state, dict):
        for key in state:
            if type(key) not in (str, int):
                raise TypeError(f"state keys are str or int, not {type(key).__name__}")
        return ["dict", [[key, _flatten(value, tensors)] for key, value in state.items()]]
    if isinstance(state, (list, tuple)):
        return [type(state).__name__, [_flatten(value, tensors) for value in state]]
    if state is None or type(state) in (str, int, float, bool):
        return state
    raise TypeError(f"a {type(state).__name__} cannot be part of a saved state")


def _unflatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, list):
        return node
    tag, content = node
    if tag == "tensor":
        return tensors[content]
    if tag == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    values = [_unflatten(value, tensors) for value in content]
    if tag == "list":
        return values
    if tag == "tuple":
        return tuple(values)
    raise ValueError(f"unknown tag {tag!r}")
