"""Tensors that lie on several ranks (``DTensor``), beside plain ones that each rank holds whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["in_shards", "like_shard", "local_of", "name_whole_features", "part_of", "put", "whole_of"]


def in_shards(tensor: Tensor) -> bool:
    """Whether each rank holds only a part of it."""
    return _is_distributed(tensor) and any(placement.is_shard() for placement in _any(tensor).placements)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one that shares its memory."""
    return _any(tensor)._local_tensor if _is_distributed(tensor) else tensor


def put(target: Tensor, whole: Tensor) -> None:
    """Copy the whole of a tensor into ``target``; each rank takes its own part. Talks to nobody."""
    with torch.no_grad():
        local_of(target).copy_(part_of(whole, target))


def part_of(whole: Tensor, target: Tensor) -> Tensor:
    """This rank's part of a tensor that is to lie on the ranks as ``target`` does: a view."""
    if not _is_distributed(target):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    held = _any(target)
    shape, offset = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
    return whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, shape, strict=True))]


def like_shard(local: Tensor, like: Tensor) -> Tensor:
    """This rank's part ``local`` of a tensor that lies on the ranks as ``like`` does."""
    if not _is_distributed(like):
        return local
    from torch.distributed.tensor import DTensor

    held = _any(like)
    return DTensor.from_local(local, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride())


def name_whole_features(module: Any) -> None:
    """Make linear layers in ``module`` say how wide they are on all ranks together, as whoever cuts their input expects.

    PEFT makes those it adds to a sharded layer as narrow as this rank's part of it.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and _is_distributed(layer.weight):
            layer.out_features, layer.in_features = layer.weight.shape


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Where it is in shards all ranks must call this together."""
    return _any(tensor).full_tensor() if _is_distributed(tensor) else tensor


def _is_distributed(tensor: Tensor) -> bool:
    # Where nobody has made such a tensor, torch.distributed.tensor need not be imported to say so.
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def _any(tensor: Any) -> Any:
    return tensor
