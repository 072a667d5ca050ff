"""Settings that contradict each other, or that have no effect in a run of this kind. Nothing here imports torch."""

from __future__ import annotations

from splitfl.errors import ConfigError
from splitfl.run_config import RunConfig

__all__ = ["check_together"]


def check_together(config: RunConfig) -> None:
    """Raises ConfigError, with the mend."""
    _check_optimizer(config)
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


def _check_optimizer(config: RunConfig) -> None:
    """Raises ConfigError where the schedule does not fit the run's length."""
    if config.optimizer.schedule != "constant" and config.optimizer.steps == 0:
        raise ConfigError(f"the {config.optimizer.schedule} schedule needs its length: give --steps")
    if config.optimizer.steps and config.optimizer.warmup_steps > config.optimizer.steps:
        raise ConfigError("warmup_steps is larger than steps: warm up for fewer steps or train for more")


def _check_caches(config: RunConfig) -> None:
    """Raises ConfigError where what is said of caches has no effect."""
    defaults = RunConfig(model="")
    own = config.client_cache_tokens != defaults.client_cache_tokens
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
