"""The run config's form: what there is to say of a run, and its defaults. Nothing here imports torch.

:mod:`splitfl.settings` names every setting once; :mod:`splitfl.config` reads and checks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitfl.settings import MIB

__all__ = ["LimitSettings", "LoraSettings", "OptimizerSettings", "RunConfig"]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): ``W + alpha / rank * B A`` in each target.

    ``targets`` is ``"all-linear"`` (every linear layer inside a block) or the last names of the modules, as PEFT takes them.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"

    def to_plain(self) -> dict[str, Any]:
        """As JSON and msgpack give it back: a list where targets are named."""
        return dataclasses.asdict(self) | {"targets": self.targets if isinstance(self.targets, str) else list(self.targets)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LoraSettings:
        """Of what :meth:`to_plain` gave."""
        targets = plain["targets"]
        return cls(**{**plain, "targets": targets if isinstance(targets, str) else tuple(targets)})


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with a schedule over optimizer steps. ``clip`` 0 means no clipping;
    ``clipping``: by the norm of the trunk's gradient, or ``joint``ly with the ends', by that of both together.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    steps: int = 0
    clip: float = 1.0
    clipping: str = "separate"


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What a client may ask for its own adapter, where each client has one."""

    max_rank: int = 64
    max_learning_rate: float = 0.01


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything the server needs to know. Sizes are bytes or tokens as their names say, times are seconds."""

    model: str
    revision: str | None = None
    cut: str = "1:1"
    run: str = "run"
    out: str = ""
    seed: int = 0
    clients: int = 1
    mode: str = "sync"
    async_contributions: int = 1
    max_staleness: int = 8
    replicas: int = 0
    sync: str = "step"
    restarts: int = 3
    silence: float = 60.0
    on_loss: str = "drop"
    step_deadline: float = 300.0
    round_steps: int = 0
    trainables: str = "lora"
    adapters: str = "shared"
    lora: LoraSettings = field(default_factory=LoraSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    device: str = "auto"
    dtype: str = "float32"
    attn: str = ""
    shard: str = "none"
    shard_size: int = 1
    quantize: str = "none"
    threads: int = 0
    trust_remote_code: bool = False
    bind: str = "127.0.0.1:0"
    host: str = ""
    data_port: int = 0
    advertise: str = ""
    identity: str = ""
    authorized_clients: str = ""
    bulk: str = "sealed"
    window: int = 64 * MIB
    policy: str = "client-batching"
    batch_tokens: int = 16384
    batch_wait: float = 0.0
    layout: str = "auto"
    lanes: int = 0
    graphs: str = "auto"
    graph_tokens: int = 0
    client_tokens: int = 262144
    cache_tokens: int = 131072
    client_cache_tokens: int = 32768
    checkpoint_every: int = 100
    checkpoint_keep: int = 3
    until_done: bool = False
    status_every: float = 10.0
    metrics: str = ""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the control endpoint; an IPv6 host without its brackets."""
        host, _, port = self.bind.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def local_steps(self) -> int:
        """Optimizer steps of a replica between two meetings of all."""
        return 1 if self.sync == "step" else int(self.sync)

    @property
    def kept_every(self) -> int:
        """Steps between checkpoints, of both sides: ``checkpoint_every``, rounded up to where all replicas meet."""
        return -(-self.checkpoint_every // self.local_steps) * self.local_steps

    @property
    def ranks(self) -> int:
        """Processes that hold one trunk together."""
        return self.shard_size if self.shard in ("tensor", "fsdp") else 1

    @property
    def caches(self) -> tuple[int, int]:
        """Tokens whose keys and values are kept: of all clients, and of one."""
        return self.cache_tokens, min(self.cache_tokens, self.client_cache_tokens)

    @property
    def out_dir(self) -> Path:
        return Path(self.out or Path("runs") / self.run)

    def terms(self) -> dict[str, Any]:
        """What a client that joins is told: the part of the config that binds both sides. Plain values only."""
        local = Path(self.model).exists()
        return {
            "model": Path(self.model).name if local else self.model,
            "model_is_local": local,
            "revision": self.revision,
            "cut": self.cut,
            "seed": self.seed,
            "clients": self.clients,
            "mode": self.mode,
            "on_loss": self.on_loss,
            "checkpoint_every": self.kept_every,
            "checkpoint_keep": self.checkpoint_keep,
            "round_steps": self.round_steps,
            "trainables": self.trainables,
            "adapters": self.adapters,
            "lora": self.lora.to_plain(),
            "limits": dataclasses.asdict(self.limits),
            "optimizer": dataclasses.asdict(self.optimizer),
            "dtype": self.dtype,
            "client_tokens": self.client_tokens,
            "codec": "raw",
        }
