"""The processes of one server meet in torch.distributed: when torchrun has started them, and each time it starts them anew."""

from __future__ import annotations

import os
import secrets
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from splitfl.errors import SplitflError, first_line

__all__ = ["join_world"]

#: Processes are started together; none takes longer until it is here.
_MEET = timedelta(minutes=10)
_LOOK = 0.05


def join_world(backend: str, *, on_one_machine: bool, rank: int = -1, size: int = -1) -> None:
    """``rank`` and ``size``: where the environment does not say them. Waits ten minutes for the others, at most.

    Raises SplitflError where they cannot meet.
    """
    if on_one_machine:  # nothing of it need leave this machine
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=_MEET))
        store = dist.PrefixStore(_meeting(store, rank, size), store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_MEET)
    except (RuntimeError, ValueError) as error:
        raise SplitflError(f"the server's processes cannot meet ({first_line(error)})") from None


def _meeting(store: Any, rank: int, size: int, patience: timedelta = _MEET) -> str:
    """A name for this meeting that all who are in it agree on, and nobody of an earlier one.

    torchrun may keep the store when it starts processes anew, with what dead ones have left there; and what it says of restarts
    each agent counts for itself. So each process asks rank 0 under a word that is new, and rank 0 answers until all are here.
    """
    if rank != 0:
        asked = secrets.token_hex(8)
        store.set(f"splitfl/asks/{rank}", asked)
        store.wait([f"splitfl/answers/{asked}"], patience)
        name: str = store.get(f"splitfl/answers/{asked}").decode()
        store.set(f"{name}/here/{rank}", "")
        return name
    name = f"splitfl/{secrets.token_hex(8)}"
    answered = set()
    deadline = time.monotonic() + patience.total_seconds()
    missing = set(range(1, size))
    while True:
        for other in sorted(missing):
            if store.check([f"splitfl/asks/{other}"]) and (asked := store.get(f"splitfl/asks/{other}").decode()) not in answered:
                answered.add(asked)
                store.set(f"splitfl/answers/{asked}", name)
        missing = {other for other in missing if not store.check([f"{name}/here/{other}"])}
        if not missing:
            return name
        if time.monotonic() >= deadline:
            raise SplitflError(f"the server's processes cannot meet: of {size} these have not come: {sorted(missing)}")
        time.sleep(_LOOK)
