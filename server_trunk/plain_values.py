"""Plain values of several processes, for each of them: as msgpack, so that nothing which comes over a wire is ever run."""

from __future__ import annotations

from typing import Any

import msgpack
import torch
import torch.distributed as dist

__all__ = ["gather_values"]


def gather_values(value: Any, group: Any = None) -> list[Any]:
    """The value of every process of a group that carries host memory, by rank; all must call it. Lists come as tuples.

    Raises RuntimeError where one is gone.
    """
    own = torch.frombuffer(bytearray(msgpack.packb(value)), dtype=torch.uint8)
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([own.numel()]), group=group)
    longest = max(int(length) for length in lengths)
    found = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(found, torch.nn.functional.pad(own, (0, longest - own.numel())), group=group)
    return [
        msgpack.unpackb(content[: int(length)].numpy().tobytes(), use_list=False, strict_map_key=False)
        for length, content in zip(lengths, found, strict=True)
    ]
