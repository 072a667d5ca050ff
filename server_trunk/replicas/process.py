"""The process of one replica, from torchrun's environment to its end."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from server_trunk.replicas.group import Group
from server_trunk.replicas.launch import AGENT, MISTAKEN
from server_trunk.replicas.place import Place
from splitfl.config import RunConfig
from splitfl.errors import ConfigError, SplitflError, UserError
from splitfl.tensors import resolve_device

__all__ = ["run_replica"]

#: A mistake in what all were given is found by all: rank 0 says it, and has this long, seconds.
_FIRST_SPEAKS = 3.0


def run_replica(config: RunConfig, place: Place, serve: Callable[[RunConfig, Group], None]) -> NoReturn:
    """Join the other replicas, ``serve`` and end this process: a group of which one is gone can be left in no other way."""
    code = 1
    try:
        if config.replicas not in (0, place.size):
            raise ConfigError(f"--replicas {config.replicas}, where torchrun has started {place.size}: leave --replicas out")
        config = dataclasses.replace(config, replicas=place.size, device=_device(config.device, place))
        serve(config, Group.join(place, resolve_device(config.device)))
        code = 0
    except (SplitflError, ValueError) as error:
        code = 2 if isinstance(error, UserError | ValueError) else 1
        if code == 2 and not place.is_first:
            time.sleep(_FIRST_SPEAKS)
        print(f"splitfl serve: {error}", file=sys.stderr)
        if code == 2 and os.environ.get(AGENT) == str(os.getppid()):
            os.kill(os.getppid(), MISTAKEN)  # to start again would not mend it
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # A collective that waits for a replica that is gone would hold up the interpreter's own end.
    os._exit(code)


def _device(device: str, place: Place) -> str:
    """``auto`` and ``cuda``: a GPU of this replica's own, or shared where there are fewer than replicas."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{place.local_rank % torch.cuda.device_count()}"
