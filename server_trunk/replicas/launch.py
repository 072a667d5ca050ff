"""``--replicas N``, ``--shard tensor | fsdp``: this process becomes torchrun's agent for all processes on this machine.

The agent starts them, starts all again when one dies, and passes SIGINT and SIGTERM on. Imports torch only once it starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from splitfl.config import RunConfig
from splitfl.errors import ConfigError, SplitflError

__all__ = ["AGENT", "MISTAKEN", "launch"]

#: The variable that names the agent's process to a replica, and the signal that tells it not to start the replicas again.
AGENT, MISTAKEN = "SPLITFL_AGENT", signal.SIGUSR1
#: Seconds that replicas have to write a checkpoint and say goodbye before they are killed.
_GRACE = 60
_TRIES = 50
#: Below those that systems give to outgoing connections, of which the processes open many before they listen.
_PORTS = range(16384, 32000)


class _MistakeError(Exception):
    """A process has found a mistake of the user's, and said it."""


def launch(config: RunConfig, arguments: Sequence[str]) -> int:
    """Run all processes that the config asks for, each ``python -m server_trunk *arguments``; returns the exit code."""
    replicas = config.replicas or 1
    processes = replicas * config.ranks
    # Each event of the agent is a line or ten; what a replica failed of, it has said itself.
    logging.disable()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    # Processes share the cores; left alone, torchrun would set one thread, and say so.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads or max(1, cores // processes)))
    os.environ[AGENT] = str(os.getpid())

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from server_trunk.replicas.loopback import LOOPBACK, register_loopback

    def mistaken(*_: Any) -> None:
        signal.signal(MISTAKEN, signal.SIG_IGN)  # each process may say it, and the first word ends them all
        raise _MistakeError

    signal.signal(MISTAKEN, mistaken)
    register_loopback()
    options = ["--rdzv-backend", LOOPBACK, "--nproc-per-node", str(processes), "--max-restarts", str(config.restarts)]
    asked = torchrun.parse_args([*options, "-m", "server_trunk"])
    # Its parser would take flags of ours for its own: --run for the beginning of --run-path.
    asked.training_script_args = [*arguments, *_ports(config, replicas)]
    try:
        torchrun.run(asked)
    except _MistakeError:
        return 2
    except SignalException:
        return 0
    except ChildFailedError as error:
        raise _failure(failure.exitcode for failure in error.failures.values()) from None
    return 0


def _ports(config: RunConfig, replicas: int) -> list[str]:
    """Where any port will do: free ones, that a server which starts again will have again, so that clients find it."""
    host, port = config.address
    if port or config.data_port:
        return []
    count = 2 * replicas
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = random.choice(_PORTS)
            if all(_bound(stack, host, first + further) for further in range(count)):
                return [f"--bind={config.bind.rpartition(':')[0]}:{first}", f"--data-port={first + 1}"]
    raise ConfigError(f"no {count} free ports side by side for {replicas} replicas: choose the first by --bind HOST:PORT")


def _bound(stack: contextlib.ExitStack, host: str, port: int) -> int:
    """Hold a port for now; returns it. Raises OSError where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = stack.enter_context(socket.socket(family))
    held.bind(("" if host == "*" else host, port))
    return int(held.getsockname()[1])


def _failure(codes: Iterable[int]) -> SplitflError:
    signals = sorted({signal.Signals(-code).name for code in codes if code < 0})
    because = f", {' and '.join(signals)}" if signals else ""
    return SplitflError(f"the server's processes have failed too often{because}: the lines above and the run's logs say why")
