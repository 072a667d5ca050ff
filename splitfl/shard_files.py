"""Tensors that lie on several ranks, as files: each rank writes what it holds, and reads what it is to hold.

torch.distributed.checkpoint does it, in its safetensors form: nothing is pickled, and each file says where its parts belong, so
that what was written by some number of ranks is read by any other, or by one process.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["can_write_shards", "read_shards", "read_whole", "write_shards"]

#: Bytes of a file, over all ranks together, while the tensors are no larger: each is made in memory before it is written.
_FILE_BYTES = 256 * 2**20


def can_write_shards() -> bool:
    """Whether this torch has the form."""
    from torch.distributed import checkpoint

    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    return writer is not None and "save_distributed" in inspect.signature(writer).parameters


def write_shards(directory: Path, tensors: Mapping[str, Tensor], group: Any) -> list[Path]:
    """On all ranks of ``group``: write each tensor's parts from where they lie, what all hold alike once.

    Returns this rank's own files.
    """
    if not tensors:
        return []
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(directory), _files(tensors), save_distributed=True)
    save(dict(tensors), storage_writer=writer, process_group=group)
    return sorted(directory.glob(f"shard-{dist.get_rank(group) + 1:05}-*"))


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of a rank's files each tensor goes to, from 1."""
    places, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        own = tensor.numel() * tensor.element_size()
        if size and size + own > _FILE_BYTES:
            number, size = number + 1, 0
        size += own
        places[name] = number
    return places


def read_shards(directory: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """On all ranks of ``group``: fill ``tensors``, of which each rank reads its own parts alone."""
    if not tensors:
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), process_group=group)


def read_whole(directory: Path) -> dict[str, Tensor]:
    """The whole tensors, in host memory; in one process, whoever has written them."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    about: dict[str, Any] = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in about.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is one process
        load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    return tensors
