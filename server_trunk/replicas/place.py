"""Where in its group a replica stands, as torchrun's environment says it. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

from splitfl.config import RunConfig
from splitfl.errors import ConfigError

__all__ = ["Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """One process of those torchrun has started. ``machine``: which machine it is on, from 0; ``restarts``: how often the group
    was started anew.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0
    restarts: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """None where torchrun has not started this process. Raises ConfigError where its words are none."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
        fallback = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
        try:
            return cls(*(int(environment.get(name, fallback.get(name, "0"))) for name in names))
        except ValueError:
            raise ConfigError("RANK and WORLD_SIZE are set, but not to numbers: start the replicas by torchrun") from None

    def among_replicas(self, ranks: int) -> Place:
        """Where this process's replica stands, each being ``ranks`` neighbouring processes: counts replicas."""
        return dataclasses.replace(
            self,
            rank=self.rank // ranks,
            size=self.size // ranks,
            local_rank=self.local_rank // ranks,
            local_size=max(1, self.local_size // ranks),
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def log_name(self) -> str:
        return "log.jsonl" if self.is_first else f"log-{self.rank}.jsonl"

    def settle(self, config: RunConfig) -> RunConfig:
        """The config of this replica: ports that no other on its machine has. Port 0 stays any free one.

        Raises ConfigError where a port would be beyond 65535.
        """
        host, _, port = config.bind.rpartition(":")
        advertised, _, outside = config.advertise.rpartition(":")
        metrics_host, _, metrics = config.metrics.rpartition(":")
        changes: dict[str, object] = {
            "bind": f"{host}:{self._port(int(port), 2)}",
            "data_port": self._port(config.data_port, 2),
        }
        if config.advertise:
            changes["advertise"] = f"{advertised}:{self._port(int(outside), 2)}"
        if config.metrics:
            changes["metrics"] = f"{metrics_host}:{self._port(int(metrics), 1)}".lstrip(":")
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]

    def _port(self, port: int, apart: int) -> int:
        mine = port + apart * self.local_rank if port else 0
        if mine > 65535:
            raise ConfigError(f"port {port} leaves no ports for {self.local_size} replicas: choose a lower one")
        return mine
