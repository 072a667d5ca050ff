"""The processes of one server meet in torch.distributed: when torchrun has started them, and each time it starts them anew."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from splitfl.errors import SplitflError

__all__ = ["join_world"]


def join_world(
    backend: str, *, restarts: int, on_one_machine: bool, rank: int = -1, size: int = -1, timeout: timedelta | None = None
) -> None:
    """``restarts``: how often the processes were started anew. ``rank`` and ``size``: where the environment does not say them.

    Raises SplitflError where they cannot meet.
    """
    if on_one_machine:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of it need leave this machine
    try:
        store, rank, size = next(rendezvous("env://", rank, size))
        # torchrun keeps the store when it starts the group anew; what the one before has left there is of dead processes.
        store = dist.PrefixStore(f"splitfl-{restarts}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise SplitflError(f"the server's processes cannot meet ({str(error).splitlines()[0][:200]})") from None
