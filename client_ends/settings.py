"""What one client decides of its training, and what comes of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from splitfl.errors import ConfigError

__all__ = ["TrainResult", "TrainSettings", "check_model"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What one client decides. Optimizer fields left None are the run's own. ``adapter_...``: of this client's own adapter in the
    trunk, where the run has one for each client; rank and alpha hold for the ends' adapter too.
    """

    trunk: str
    identity: str
    data: str
    model: str | None = None
    revision: str | None = None
    cut: str | None = None
    task: str = "causal-lm"
    columns: Mapping[str, str] | None = None
    data_format: str | None = None
    num_labels: int | None = None
    label_names: tuple[str, ...] | None = None
    max_length: int = 512
    batch_size: int = 8
    accumulate: int = 1
    epochs: float = 1.0
    steps: int = 0
    evaluate: float = 0.05
    evaluate_every: int = 0
    ends: str = "lora"
    learning_rate: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_learning_rate: float | None = None
    adapter_weight_decay: float | None = None
    seed: int = 0
    out: str = ""
    report_to: str | None = None
    checkpoint_every: int = 0
    device: str = "auto"
    dtype: str | None = None
    attn: str | None = None
    threads: int = 0
    trust_remote_code: bool = False
    micro_batches: int = 1
    timeout: float = 10.0
    reconnect: float = 600.0
    resume: bool = False
    dump_hidden: str = ""

    @property
    def adapter(self) -> dict[str, float]:
        """What this client asks for its own adapter in the trunk."""
        names = ("rank", "alpha", "learning_rate", "weight_decay")
        asked = {name: getattr(self, f"adapter_{name}") for name in names}
        return {name: value for name, value in asked.items() if value is not None}


def check_model(settings: TrainSettings | argparse.Namespace) -> None:
    """Raises ConfigError for the revision of a model that is not named."""
    if settings.revision and settings.model is None:
        raise ConfigError("--revision is of the model that --model names: give both, or neither for what the run names")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How it went. Losses are means over target tokens (or labels), a step of this process each. ``missed``: steps that went on
    without this client.
    """

    steps: int
    losses: list[float]
    evaluation_before: dict[str, float] | None
    evaluation_after: dict[str, float] | None
    checkpoint: Path
    bytes_sent: int
    bytes_received: int
    missed: int = 0
