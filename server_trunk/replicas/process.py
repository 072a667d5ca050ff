"""One process of a server of several, from torchrun's environment to its end: a replica, or a rank of a replica's trunk."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch

from server_trunk.beforehand import run_device
from server_trunk.replicas.group import Group
from server_trunk.replicas.launch import AGENT, MISTAKEN
from server_trunk.replicas.place import Place
from server_trunk.sharding.group import ShardGroup, check_ranks, join_shards, own_device
from server_trunk.siblings import Siblings
from server_trunk.watch import Watch
from splitfl.config import RunConfig
from splitfl.errors import GroupLost, SplitflError, UserError
from splitfl.tensors import resolve_device

__all__ = ["Joined", "run_process"]

#: A mistake in what all were given is found by all: rank 0 says it, and has this long, seconds.
_FIRST_SPEAKS = 3.0
#: Seconds that a process may take to its end once another is gone: to tell its clients, where it has any.
_LAST_WORDS = 30.0
_GOODBYE = 5.0
_LOOK = 0.5


@dataclass(frozen=True, slots=True)
class Joined:
    """What a process is part of. ``group``: the replicas, where there are several; ``shards``: the ranks of its trunk; ``watch``:
    whether all the other processes live; ``siblings``: those of them that this one can end.
    """

    place: Place
    group: Group | None
    shards: ShardGroup | None
    watch: Watch
    siblings: Siblings

    @property
    def leads(self) -> bool:
        """Whether clients talk to this process."""
        return self.shards is None or self.shards.leads


def run_process(config: RunConfig, place: Place, work: Callable[[RunConfig, Joined], None]) -> NoReturn:
    """Join the other processes, do the ``work`` and end: a group of which one is gone can be left in no other way."""
    code = 1
    joined = None
    _end_with_agent()
    try:
        config, joined = _joined(config, place)
        work(config, joined)
        joined.watch.close(_GOODBYE)
        code = 0
    except (SplitflError, ValueError) as error:
        code = 2 if isinstance(error, UserError | ValueError) else 1
        if joined is not None:
            joined.watch.mute()
        # So has what a rank learns from another's end.
        if not place.is_first and (code == 2 or isinstance(error, GroupLost)):
            time.sleep(_FIRST_SPEAKS)
        print(f"splitfl serve: {error}", file=sys.stderr)
        if code == 2 and os.environ.get(AGENT) == str(os.getppid()):
            os.kill(os.getppid(), MISTAKEN)  # to start again would not mend it
    except BaseException:
        traceback.print_exc()
    if joined is not None:
        _end_hung(joined.watch, joined.siblings)
    sys.stdout.flush()
    sys.stderr.flush()
    # A collective that waits for a process that is gone would hold up the interpreter's own end.
    os._exit(code)


def _joined(config: RunConfig, place: Place) -> tuple[RunConfig, Joined]:
    check_ranks(config, place.size)
    device: torch.device | None = None
    if config.ranks > 1:
        device = own_device(config)
    elif config.shard == "layers":
        run_device(config)  # a machine that lacks the GPUs is found out before the others are met
    else:
        config = dataclasses.replace(config, device=_device(config.device, place))
        device = resolve_device(config.device)
    group = None
    if config.mode == "hierarchical":
        config = dataclasses.replace(config, replicas=place.size // config.ranks)
        group = Group.join(place, device, config.ranks)
    shards = join_shards(config)
    siblings = Siblings()
    watch = Watch(config.silence, functools.partial(_end, siblings, shards is None or shards.leads))
    return config, Joined(place, group, shards, watch, siblings)


def _end_with_agent() -> None:
    """Whoever starts the server again, as torchrun's agent has been killed, is to find its ports and its run free."""
    if AGENT not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent = int(os.environ.get(AGENT, os.getppid()))

    def look() -> None:
        while os.getppid() == agent:
            time.sleep(_LOOK)
        print("splitfl serve: torchrun's agent is gone, so this process ends too", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=look, name="agent", daemon=True).start()


def _end(siblings: Siblings, leads: bool, watch: Watch) -> None:
    """Another process is gone. Whoever leads ends by itself, unless it hangs too; a rank may wait for the lost one for ever."""
    time.sleep(_LAST_WORDS if leads else _FIRST_SPEAKS)
    _end_hung(watch, siblings)
    print(f"splitfl serve: {watch.failure}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_hung(watch: Watch, siblings: Siblings) -> None:
    """Make sure that who was taken for dead is: the agent would wait for it to end by itself."""
    if watch.hung is not None:
        siblings.kill(watch.hung)


def _device(device: str, place: Place) -> str:
    """``auto`` and ``cuda``: a GPU of this replica's own, or shared where there are fewer than replicas."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{place.local_rank % torch.cuda.device_count()}"
