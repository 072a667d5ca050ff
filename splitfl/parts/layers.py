"""A trunk whose blocks lie on several devices of one process, one after another, by accelerate's ``device_map``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from splitfl.errors import ModelError

__all__ = ["layer_map"]


def layer_map(model: nn.Module, blocks: str, held: range, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """A ``device_map`` of a model whose list of blocks is called ``blocks``: those ``held`` in equal runs, the rest where the
    hidden state is on its way in or out.

    Raises ModelError where there are more devices than blocks.
    """
    if len(devices) > len(held):
        raise ModelError(f"{len(held)} blocks cannot be spread over {len(devices)} GPUs: choose a smaller --shard-size")
    found: dict[str, torch.device] = {}
    node: Any = model
    path = ""
    for name in blocks.split("."):
        found |= {path + beside: devices[0] for beside, _ in node.named_children() if beside != name}
        node, path = getattr(node, name), f"{path}{name}."
    for index in range(len(node)):
        place = min(max(index - held[0], 0), len(held) - 1)
        found[f"{blocks}.{index}"] = devices[place * len(devices) // len(held)]
    return found
