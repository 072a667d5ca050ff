"""The run config: the operator's word on everything that concerns the trunk, from a TOML file, from flags, or both.

:mod:`splitfl.settings` names every setting once; here are their defaults and what they may not be together. Nothing here imports
torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitfl.errors import ConfigError
from splitfl.settings import MIB, MOST_INTEGER, SETTINGS_BY_KEY, Setting

__all__ = [
    "LimitSettings",
    "LoraSettings",
    "OptimizerSettings",
    "RunConfig",
    "build_config",
    "read_toml",
    "to_toml",
]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): ``W + alpha / rank * B A`` in each target.

    ``targets`` is ``"all-linear"`` (every linear layer inside a block) or the last names of the modules, as PEFT takes them.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


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
        """Tokens whose keys and values are kept: of all clients, and of one. None where a trunk's ranks run in step."""
        if self.ranks > 1 or not self.cache_tokens:
            return 0, 0
        return self.cache_tokens, min(self.cache_tokens, self.client_cache_tokens)

    @property
    def out_dir(self) -> Path:
        return Path(self.out or Path("runs") / self.run)

    def terms(self) -> dict[str, Any]:
        """What a client that joins is told: the part of the config that binds both sides. Plain values only."""
        local = Path(self.model).exists()
        lora = dataclasses.asdict(self.lora)
        lora["targets"] = self.lora.targets if isinstance(self.lora.targets, str) else list(self.lora.targets)
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
            "lora": lora,
            "limits": dataclasses.asdict(self.limits),
            "optimizer": dataclasses.asdict(self.optimizer),
            "dtype": self.dtype,
            "client_tokens": self.client_tokens,
            "codec": "raw",
        }


_SECTIONS: dict[str, Any] = {"lora": LoraSettings, "limits": LimitSettings, "optimizer": OptimizerSettings}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML file, flat: ``{"optimizer.learning_rate": 1e-4, ...}``.

    Raises:
        ConfigError: the file is missing, is not TOML, or names a setting that does not exist.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give an existing TOML file") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is one, too
        raise ConfigError(f"{path} is not TOML: {error}") from None
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            flat[key] = value
    return flat


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Check ``values`` (dotted keys, later sources already laid over earlier ones) and make the config of them.

    Raises:
        ConfigError: an unknown setting, a wrong type, a value out of range, or two settings that contradict each other.
    """
    if not values.get("model"):
        raise ConfigError("no model: name a directory or a hub id, as in `splitfl serve MODEL`")
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, value in values.items():
        setting = SETTINGS_BY_KEY.get(key)
        if setting is None:
            raise ConfigError(f"unknown setting {key!r}{_nearest(key, SETTINGS_BY_KEY)}")
        if value is None:
            continue
        section, _, leaf = key.rpartition(".")
        (sections[section] if section else top)[leaf] = _typed(setting, value)
    config = RunConfig(**top, **{name: kind(**sections[name]) for name, kind in _SECTIONS.items()})
    if config.optimizer.schedule != "constant" and config.optimizer.steps == 0:
        raise ConfigError(f"the {config.optimizer.schedule} schedule needs its length: give --steps")
    if config.optimizer.steps and config.optimizer.warmup_steps > config.optimizer.steps:
        raise ConfigError("warmup_steps is larger than steps: warm up for fewer steps or train for more")
    if config.graphs != "auto" and config.graph_tokens:
        raise ConfigError(f"graph_tokens has no say where graphs = {config.graphs}: leave graphs at auto, or graph_tokens at 0")
    if config.optimizer.clipping == "joint":
        _check_joint(config)
    if config.mode == "async":
        _check_async(config)
    _check_replicas(config)
    _check_idle(config)
    if config.adapters == "per-client":
        _check_client_adapters(config)
    _check_shard(config)
    _check_quantize(config)
    _check_caches(config)
    return config


def _check_caches(config: RunConfig) -> None:
    """Raises ConfigError where what is said of caches has no effect."""
    defaults = RunConfig(model="")
    own = config.client_cache_tokens != defaults.client_cache_tokens
    if config.ranks > 1 and (own or config.cache_tokens != defaults.cache_tokens):
        raise ConfigError(
            f"cache_tokens and client_cache_tokens have no say with shard = {config.shard}, whose trunk keeps no caches: "
            "leave them out, or use --shard layers"
        )
    if own and config.client_cache_tokens > config.cache_tokens:
        raise ConfigError(
            f"client_cache_tokens = {config.client_cache_tokens} is more than all clients have together: raise --cache-tokens"
        )


def _check_shard(config: RunConfig) -> None:
    """Raises ConfigError where the trunk cannot be spread as it says."""
    if config.shard == "none":
        if config.shard_size != 1:
            raise ConfigError(f"shard_size = {config.shard_size} with shard = none: say how, with --shard tensor, fsdp or layers")
        return
    if config.shard_size < 2:
        raise ConfigError(f"shard = {config.shard} needs two or more to spread the trunk over: give --shard-size")
    if config.shard == "layers":
        return
    contradictions = {
        "mode": (config.mode == "async", "every rank takes each step with the others: use --mode sync, or --shard layers"),
        "adapters": (config.adapters != "shared", "all clients train one adapter: use --adapters shared, or --shard layers"),
        "lanes": (config.lanes > 1, "each rank is a lane: leave lanes at 0"),
    }
    for key, (contradicts, mend) in contradictions.items():
        if contradicts:
            raise ConfigError(f"{key} = {getattr(config, key)!r} with shard = {config.shard}, where {mend}")
    if config.shard == "tensor" and config.lora.dropout and config.trainables == "lora":
        raise ConfigError(
            "dropout before LoRA would differ by rank with shard = tensor: set --lora-dropout 0, or use --shard fsdp"
        )


def _check_quantize(config: RunConfig) -> None:
    """Raises ConfigError where the trunk's weights cannot be held in fewer bits."""
    if config.quantize == "none":
        return
    if config.trainables == "full":
        raise ConfigError(
            f"quantize = {config.quantize} is for a frozen trunk, and this run trains it whole: use --trainables lora"
        )
    if config.shard in ("tensor", "fsdp"):
        raise ConfigError(
            f"quantize = {config.quantize} and shard = {config.shard} do not go together: use --shard layers or none"
        )
    if config.dtype == "float64":
        raise ConfigError(f"quantize = {config.quantize} computes in float32 or bfloat16: choose one of them with --dtype")


def _check_client_adapters(config: RunConfig) -> None:
    """Raises ConfigError where the run cannot have an adapter for each client."""
    if config.trainables != "lora":
        raise ConfigError(f"an adapter for each client is LoRA, and this run trains {config.trainables}: use --trainables lora")
    if config.mode == "async":
        raise ConfigError("an adapter for each client and asynchronous steps do not go together: use --mode sync")
    if config.lora.rank > config.limits.max_rank:
        raise ConfigError(
            f"the run's own rank {config.lora.rank} is above the limit of {config.limits.max_rank}: raise --max-rank"
        )
    if config.optimizer.learning_rate > config.limits.max_learning_rate:
        raise ConfigError(
            f"the run's own learning rate {config.optimizer.learning_rate:g} is above the limit of "
            f"{config.limits.max_learning_rate:g}: raise --max-learning-rate"
        )


def _check_joint(config: RunConfig) -> None:
    """Raises ConfigError where the gradients of ends and trunk cannot be clipped together."""
    contradictions = {
        "clients": (config.clients != 1, "each client would clip the trunk by its own ends: leave clients at 1"),
        "mode": (config.mode != "sync", "no one step is both sides': use --mode sync"),
        "adapters": (config.adapters != "shared", "there is one client: leave adapters at shared"),
        "shard": (config.shard in ("tensor", "fsdp"), "the norm is taken in one process: use --shard layers or none"),
        "trainables": (config.trainables == "none", "nothing of the trunk is clipped: leave clipping out"),
    }
    for key, (contradicts, mend) in contradictions.items():
        if contradicts:
            raise ConfigError(f"{key} = {getattr(config, key)!r} with clipping = joint, where {mend}, or use --clipping separate")
    if not config.optimizer.clip:
        raise ConfigError("clipping = joint has no say where clip = 0: give --clip, or leave clipping out")


def _check_async(config: RunConfig) -> None:
    contradictions = {
        "on_loss": (config.on_loss == "wait", "nobody waits for anybody: leave on_loss at drop"),
        "policy": (config.policy != "client-batching", "clients share no batch: leave the policy out"),
        "graphs": (
            config.graphs == "recompute" or config.graph_tokens > 0,
            "the weights may have moved on before a backward: leave graphs at keep, without a limit",
        ),
        "batch_wait": (config.batch_wait > 0, "no batch waits for anybody: leave batch_wait at 0"),
        "round_steps": (config.round_steps > 0, "no round of all clients ever ends: leave round_steps at 0"),
        "adapters": (config.adapters != "shared", "all clients train one trunk: leave adapters at shared"),
    }
    for key, (contradicts, mend) in contradictions.items():
        if contradicts:
            raise ConfigError(f"{key} = {getattr(config, key)!r} in an asynchronous run, where {mend}, or use --mode sync")


def _check_idle(config: RunConfig) -> None:
    """Raises ConfigError for a setting of another kind of run than this one: it would have no effect."""
    defaults = RunConfig(model="")
    if config.mode != "async":
        for key in ("async_contributions", "max_staleness"):
            if getattr(config, key) != getattr(defaults, key):
                raise ConfigError(f"{key} has no say where a step waits for its clients: use --mode async, or leave {key} out")
    if config.adapters == "shared" and config.limits != defaults.limits:
        raise ConfigError(
            "max_rank and max_learning_rate have no say where all clients share one adapter: use --adapters per-client, or leave "
            "them out"
        )


def _check_replicas(config: RunConfig) -> None:
    if config.mode != "hierarchical":
        defaults = RunConfig(model="")
        for key in ("replicas", "sync", "restarts", "silence"):
            if getattr(config, key) != getattr(defaults, key) and not (key in ("restarts", "silence") and config.ranks > 1):
                raise ConfigError(f"{key} has no say where there are no replicas: use --mode hierarchical, or leave {key} out")
    elif config.round_steps % config.local_steps:
        raise ConfigError(
            f"round_steps = {config.round_steps} is no multiple of sync = {config.sync}, and ends are averaged where replicas "
            "meet: choose a multiple"
        )
    elif config.adapters == "per-client" and config.sync != "step":
        raise ConfigError(
            f"sync = {config.sync} averages weights over replicas, and each client's adapter is on one of them: leave it at step"
        )


def _typed(setting: Setting, value: Any) -> Any:
    if setting.key == "lora.targets":
        if not isinstance(value, str | list | tuple):
            raise ConfigError(f"lora.targets must be names joined by commas, or a list of them, not {value!r}")
        names = value.split(",") if isinstance(value, str) else list(value)
        names = [str(name).strip() for name in names if str(name).strip()]
        return "all-linear" if names in ([], ["all-linear"]) else tuple(names)
    fits = isinstance(value, setting.kind) and (setting.kind is bool or not isinstance(value, bool))
    if isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise ConfigError(f"{setting.key} is too large: the largest number is {MOST_INTEGER}")
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, fits = float(value), True
    if not fits:
        raise ConfigError(f"{setting.key} must be a {setting.kind.__name__}, not {value!r}")
    if setting.kind is float and not math.isfinite(value):
        raise ConfigError(f"{setting.key} = {value!r}: it must be a finite number")
    complaint = setting.check(value)
    if complaint:
        raise ConfigError(f"{setting.key} = {value!r}: it {complaint}")
    return value


def _nearest(key: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see `splitfl serve --help` for the settings"


def to_toml(config: RunConfig) -> str:
    """The resolved config as a TOML text that :func:`read_toml` reads back to the same config."""
    lines, sections = [], []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in _SECTIONS:
            sections += ["", f"[{item.name}]"]
            sections += [f"{leaf} = {_toml_value(inner)}" for leaf, inner in dataclasses.asdict(value).items()]
        elif value is not None:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return "\n".join(lines + sections) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # JSON's escapes are TOML's too; it leaves alone the one control character that TOML does not.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
