"""Ends and trunk from a checkpoint, by Hugging Face's ``from_pretrained``: same class, same names, fewer tensors."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, ParamSpec, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from splitfl.errors import ModelError, in_one_line
from splitfl.parts.blocks import Layout
from splitfl.parts.cut import Cut
from splitfl.parts.ends import attach_trunk, ends_class
from splitfl.parts.hub import Checkpoint, open_checkpoint, read_json
from splitfl.parts.layers import layer_map
from splitfl.parts.probe import probe, skeleton
from splitfl.parts.sharded import Sharding, finish_sharded, loading_options, shard_class
from splitfl.parts.trunk import TrunkCallable, trunk_class, trunk_forward

__all__ = [
    "TrunkCallable",
    "attach_trunk",
    "block_of_tensors",
    "find_model",
    "load_ends",
    "load_trunk",
    "trunk_forward",
]

_P = ParamSpec("_P")
Task = Literal["causal-lm", "sequence-classification"]
CutLike = Cut | str | tuple[int, int] | list[int]

_FACTORIES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}

_lock = threading.RLock()


def _one_at_a_time(load: Callable[_P, PreTrainedModel]) -> Callable[_P, PreTrainedModel]:
    """While it builds a model, Hugging Face patches what all threads share (initialisers, the default device)."""

    @functools.wraps(load)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> PreTrainedModel:
        with _lock:
            return load(*args, **kwargs)

    return locked


@_one_at_a_time
def load_ends(
    path: str | os.PathLike[str],
    cut: CutLike = (1, 1),
    *,
    task: Task = "causal-lm",
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    seed: int | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The client's part: embedding, the first and last blocks, final norm and head, with a slot where the trunk goes.

    ``path``: model directory or hub id. ``dtype``: a torch dtype or its name, default the checkpoint's. ``attn``:
    Hugging Face's ``attn_implementation``. ``seed``: for weights the checkpoint lacks, as a new classification head.
    The result is an ordinary Hugging Face model; give it a trunk with ``attach_trunk`` before calling it. Raises
    ModelError for a model that cannot be split, before any weight is read or downloaded.
    """
    cut = Cut.of(cut)
    changes = {} if num_labels is None else {"num_labels": num_labels}
    checkpoint, config, full = find_model(path, task, revision=revision, trust_remote_code=trust_remote_code, **changes)
    layout = probe(full, config, cut)
    part = ends_class(full, layout, cut)
    trunk_blocks = set(cut.trunk_range(layout.count))
    owners = block_of_tensors(full, config, layout, checkpoint.weight_map)
    keep = {name for name, block in owners.items() if block not in trunk_blocks}
    ends = _load(part, checkpoint, config, keep, dtype, device, attn, seed, from_pretrained_kwargs)
    if ends.can_generate() and ends.generation_config is not None:
        ends.generation_config.use_cache = False  # whoever has a trunk that keeps caches says so
    return ends


@_one_at_a_time
def load_trunk(
    path: str | os.PathLike[str],
    cut: CutLike = (1, 1),
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    sharding: Sharding | None = None,
    devices: Sequence[torch.device] = (),
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The server's part: the blocks between the cuts, under the full model's names, and nothing else.

    It is called as a ``TrunkCallable``: ``trunk(hidden_states, attention_mask, position_ids)``; wrapped by PEFT, with
    ``trunk_forward(trunk, ...)``. One trunk serves causal-lm and sequence-classification clients. ``sharding``: how it lies on
    several ranks, each of which calls this and reads its shard alone. ``devices``: of this process, to spread its blocks over.
    Other arguments and errors as in ``load_ends``.
    """
    cut = Cut.of(cut)
    checkpoint, config, full = find_model(path, "causal-lm", revision=revision, trust_remote_code=trust_remote_code)
    layout = probe(full, config, cut)
    part = trunk_class(full, layout, cut)
    trunk_blocks = set(cut.trunk_range(layout.count))
    owners = block_of_tensors(full, config, layout, checkpoint.weight_map)
    keep = {name for name, block in owners.items() if block in trunk_blocks}
    if devices:
        whole, _ = skeleton(full, config, layout.count)
        held = cut.trunk_range(layout.count)
        from_pretrained_kwargs["device_map"] = layer_map(whole, layout.blocks, held, devices)
        device = None
    if sharding is None:
        return _load(part, checkpoint, config, keep, dtype, device, attn, None, from_pretrained_kwargs)
    part = shard_class(part, config, layout, sharding)
    options = from_pretrained_kwargs | loading_options(sharding)
    trunk = _load(part, checkpoint, config, keep, dtype, None, attn, None, options)
    finish_sharded(trunk, sharding)
    return trunk


def find_model(
    path: str | os.PathLike[str],
    task: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> tuple[Checkpoint, Any, type[PreTrainedModel]]:
    """The files, the config (with ``changes``) and the full model's class. Fetches no weights. Raises ModelError."""
    if task not in _FACTORIES:
        raise ModelError(f"no task is called {task!r}: choose {' or '.join(_FACTORIES)}")
    checkpoint = open_checkpoint(path, revision)
    checkpoint.require("config.json")
    source = checkpoint.path if checkpoint.directory is None else os.fspath(checkpoint.directory)
    try:
        config = AutoConfig.from_pretrained(source, revision=checkpoint.commit, trust_remote_code=trust_remote_code, **changes)
    except (ValueError, OSError, KeyError) as error:
        if not trust_remote_code and "auto_map" in read_json(checkpoint.require("config.json")):
            raise ModelError(
                f"{path} comes with code of its own, which is not run unasked: read it, then say --trust-remote-code "
                "(trust_remote_code=True)"
            ) from error
        raise ModelError(f"the config of {path} cannot be read: {in_one_line(error)}") from error
    return checkpoint, config, _class_of(config, task, source, checkpoint.commit, trust_remote_code)


def _class_of(config: Any, task: str, source: str, commit: str | None, trust: bool) -> type[PreTrainedModel]:
    factory = _FACTORIES[task]
    reference = (getattr(config, "auto_map", None) or {}).get(factory.__name__)
    if reference is not None and trust:
        custom: type[PreTrainedModel] = get_class_from_dynamic_module(reference, source, code_revision=commit)
        return custom
    mapped = factory._model_mapping.get(type(config), None)
    if mapped is None:
        what = "a language model head" if task == "causal-lm" else "a sequence classification head"
        raise ModelError(f"{config.model_type} models have no class with {what} in transformers")
    choices = mapped if isinstance(mapped, (list, tuple)) else (mapped,)
    named = {choice.__name__: choice for choice in choices}
    chosen: type[PreTrainedModel] = next((named[n] for n in config.architectures or () if n in named), choices[0])
    return chosen


def block_of_tensors(full: type[PreTrainedModel], config: Any, layout: Layout, names: Iterable[str]) -> dict[str, int | None]:
    """For each tensor of a checkpoint the block it belongs to; None for one outside the blocks.

    Names are translated by the renamings Hugging Face's loader will apply.
    """
    model, _ = skeleton(full, config, layout.count)
    expected: dict[str, Any] = dict(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    pattern = re.compile(rf"^{re.escape(layout.blocks)}\.(\d+)\.")
    owners: dict[str, int | None] = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if renamed not in expected and name in expected:
            renamed = name
        found = pattern.match(renamed)
        owners[name] = int(found[1]) if found else None
    return owners


def _load(
    part: type[PreTrainedModel],
    checkpoint: Checkpoint,
    config: Any,
    keep: set[str],
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    attn: str | None,
    seed: int | None,
    extra: dict[str, Any],
) -> PreTrainedModel:
    options: dict[str, Any] = {"config": config, "use_safetensors": True, **extra}
    if dtype is not None:
        options["dtype"] = dtype
    if attn is not None:
        options["attn_implementation"] = attn
    if device is not None and torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    random_state = nullcontext() if seed is None else torch.random.fork_rng()
    with checkpoint.view(keep) as directory, random_state:
        if seed is not None:
            torch.manual_seed(seed)
        try:
            loaded: Any = part.from_pretrained(directory, output_loading_info=True, **options)
        except (ImportError, ValueError, OSError, SafetensorError) as error:
            raise ModelError(f"{checkpoint.path} cannot be loaded: {in_one_line(error)}") from error
    # The view is gone; PEFT and the model card name the model by where it came from.
    model: Any = loaded[0]
    model.name_or_path = model.config.name_or_path = checkpoint.path
    model.made_anew = frozenset(loaded[1]["missing_keys"])
    return cast(PreTrainedModel, model)
