"""From a run's config to what computes: the loaded trunk, what is trained in it, the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server_trunk.adapter_book import AdapterBook
from server_trunk.async_training import AsyncTraining
from server_trunk.beforehand import layer_devices
from server_trunk.client_adapters import ClientTraining
from server_trunk.engine import Engine
from server_trunk.sharding.engines import LeadingEngine, RankLanes, follow
from server_trunk.sharding.group import ShardGroup
from server_trunk.sharding.training import ShardedTraining
from server_trunk.training import SharedTraining, Training
from splitfl.adapters import attach_lora, set_trainable
from splitfl.config import RunConfig
from splitfl.errors import ConfigError
from splitfl.parts.cache_trial import why_not_cached
from splitfl.parts.cut import Cut
from splitfl.parts.dropout import install_keyed_dropout
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import drops, why_not_keyed, why_not_packed
from splitfl.parts.packing_rule import layout_rule
from splitfl.parts.quantized import check_quantized, keep_layout, quantization_options
from splitfl.parts.weight_layout import lay_out_for_decoding
from splitfl.tensors import DTYPES

__all__ = ["Trunk", "follow_leader", "load_run_trunk"]


class Trunk:
    """A loaded trunk ready to run. On several ranks each makes its own at the same time: loading and trying it are collective.

    ``training_of``: makes its training, where that is not one server's. ``packing_obstacle``: why it only runs padded;
    ``cache_obstacle``: why it keeps no caches for decoding.
    ``log(event, **fields)``: where something is worth a line.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        book: AdapterBook,
        shards: ShardGroup | None = None,
        *,
        training_of: Callable[[Any], Training] | None = None,
        log: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self.model = load_run_trunk(config, device, shards)
        self.training = training_of(self.model) if training_of else _training_of(config, self.model, book, shards)
        install_keyed_dropout(self.model)
        # It is tried out, and so has to come before anything else runs it.
        obstacle, padded = None, config.layout == "padded"
        if config.caches[0] or not padded:
            obstacle = why_not_packed(self.model)
        self.packing_obstacle = "layout = padded" if padded else obstacle
        self.cache_obstacle: str | None = "the config asks for none"
        if config.caches[0]:
            self.cache_obstacle = obstacle or why_not_cached(self.model)
            if self.cache_obstacle is not None:
                log("no-caches", why=self.cache_obstacle)
            elif shards is None:
                lay_out_for_decoding(self.model)
        self.engine = self._engine(config, device, shards, log)

    def _engine(self, config: RunConfig, device: torch.device, shards: ShardGroup | None, log: Callable[..., None]) -> Engine:
        asynchronous = config.mode == "async"
        options: dict[str, Any] = {
            "seed": config.seed,
            "drops": self._key_dropout(config, log),
            "choose_packed": layout_rule(config.layout, device, self.packing_obstacle),
            "may_recompute": not asynchronous,
            "report": lambda tokens: log("out-of-memory", most_tokens=tokens),
        }
        if shards is None:
            options["lanes"] = config.lanes or min(4, torch.get_num_threads())
            # One more copy of all gradients is only worth it where the device can run out of memory and go on.
            options["in_place"] = asynchronous or (config.trainables == "full" and device.type == "cpu")
            return Engine(self.model, self.training, device, **options)
        fsdp = config.shard == "fsdp"
        # FSDP finds gradients as they are accumulated, and nowhere else.
        options |= {"lanes": RankLanes(shards) if fsdp else 1, "in_place": fsdp, "may_shrink": False}
        if shards.leads:
            return LeadingEngine(self.model, self.training, device, group=shards, **options)
        return Engine(self.model, self.training, device, **options)

    def _key_dropout(self, config: RunConfig, log: Callable[..., None]) -> bool:
        """Whether anything in the trunk is dropped out; says so where that depends on how clients are batched."""
        if not drops(self.model):
            return False
        if config.shard == "tensor":
            raise ConfigError(
                f"{self.model.config.model_type} drops out inside its blocks, where ranks would differ with shard = tensor: set "
                "its dropout to 0 in the model's config, or use --shard fsdp or layers"
            )
        obstacle = why_not_keyed(self.model)
        if obstacle is not None:
            log("dropout-not-keyed", why=obstacle)
        return True


def follow_leader(config: RunConfig, shards: ShardGroup, *, training_of: Callable[[Any], Training] | None = None) -> None:
    """The work of a rank that clients do not talk to: returns when the leader stops. ``training_of``: as of :class:`Trunk`.

    Raises:
        GroupLost: another rank is gone. ModelError, ConfigError: as the leader.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trunk = Trunk(config, shards.device, AdapterBook(config), shards, training_of=training_of)
    follow(trunk.engine, trunk.model, shards)


def load_run_trunk(config: RunConfig, device: torch.device, shards: ShardGroup | None = None) -> Any:
    """The trunk of a run with its trainables attached, in evaluation mode."""
    dtype = DTYPES[config.dtype]
    model = load_trunk(
        config.model,
        Cut.parse(config.cut),
        revision=config.revision,
        dtype=dtype,
        device=str(device),
        attn=config.attn or None,
        trust_remote_code=config.trust_remote_code,
        sharding=None if shards is None else shards.sharding,
        devices=layer_devices(config),
        **quantization_options(config.quantize, dtype),
    )
    if config.quantize != "none":
        check_quantized(model)
        keep_layout(model)
    if config.adapters == "per-client":
        return model  # what its training puts into it is each client's
    if config.trainables == "lora":
        return attach_lora(model, config.lora, seed=config.seed)
    set_trainable(model, config.trainables)  # type: ignore[arg-type]
    return model


def _training_of(config: RunConfig, model: Any, book: AdapterBook, shards: ShardGroup | None) -> Training:
    if shards is not None:
        return ShardedTraining(model, config.optimizer, shards)
    if config.adapters == "per-client":
        return ClientTraining(model, config, book)
    return (AsyncTraining if config.mode == "async" else SharedTraining)(model, config.optimizer)
