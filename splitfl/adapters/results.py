"""What a run leaves behind: the trained half of a model as a portable directory.

Where LoRA trained, the directory is a standard PEFT adapter (``adapter_model.safetensors``, ``adapter_config.json``)
whose names are those of the full model: plain PEFT loads it. Otherwise ``weights.safetensors`` holds the trained
weights by their full names. ``splitfl.json`` says what the directory is: part, base model and its identity, cut,
task, run and step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from splitfl.adapters.lora import plain_alpha
from splitfl.adapters.names import PEFT_PREFIX, lora_module
from splitfl.adapters.trainables import Trainables, classification_head, named_trainables
from splitfl.checkpoint import (
    checkpoint_directory,
    checkpoint_steps,
    client_directory,
    clients_of,
    load_checkpoint,
    load_tensors,
    newest_checkpoint,
    save_tensors,
)
from splitfl.config import LoraSettings
from splitfl.directories import write_directory_atomically
from splitfl.errors import CheckpointError, ConfigError
from splitfl.parts.cut import Cut

FORMAT = 1
DESCRIPTION = "splitfl.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "weights.safetensors"

# What a checkpoint has to say of itself to become a result, and what it may say: the rest is found in its tensors.
_NEEDED = ("part", "base", "identity", "cut", "trainables", "lora", "task", "step")
_MORE = ("revision", "run", "mode", "client", "head", "num_labels", "label_names", "fan_in_fan_out", "dtype", "versions")


def describe_part(
    model: Any,
    *,
    part: Literal["ends", "trunk"],
    base: str,
    identity: Mapping[str, Any],
    cut: Cut | str | tuple[int, int],
    trainables: Trainables,
    lora: LoraSettings | None,
    task: str,
    step: int,
    run: str | None = None,
) -> dict[str, Any]:
    """All that a result says of itself, as plain values: the ``meta`` of a checkpoint that is to be exported.

    ``base``: directory or hub id of the model; ``identity``: a ``ModelIdentity`` in plain form. A checkpoint may say
    less: ``part``, ``base``, ``identity``, ``cut``, ``trainables``, ``lora``, ``task`` and ``step`` are needed.
    """
    head = classification_head(model)
    config = model.config
    peft_config = getattr(model, "peft_config", {}).get("default")
    return {
        "part": part,
        "base": base,
        "identity": dict(identity),
        "cut": str(Cut.of(cut)),
        "trainables": trainables,
        "lora": None if lora is None else lora.to_plain(),
        "task": task,
        "step": step,
        "revision": identity.get("revision"),
        "run": run,
        "head": head,
        "num_labels": int(config.num_labels) if head else None,
        "label_names": [config.id2label[index] for index in range(config.num_labels)] if head else None,
        "fan_in_fan_out": bool(peft_config is not None and peft_config.fan_in_fan_out),
        "dtype": _base_dtype(model),
        "versions": _versions(),
    }


def save_part(out_dir: str | os.PathLike[str], model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write what trained in ``model``; ``about``: as :func:`describe_part` has it.

    Raises ``CheckpointError`` where ``out_dir`` holds something already.
    """
    _write(out_dir, dict(named_trainables(model)), dict(about))


def export_part(
    run_dir_or_checkpoint: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    step: int | None = None,
    client: str | None = None,
) -> dict[str, Any]:
    """Write the result of a checkpoint: of the one named, or of a run's newest, or of a run at ``step``.

    ``client``: whose adapter, in a run in which each client has its own. Returns the description. Raises
    ``CheckpointError`` where there is none, it is damaged, or describes no part.
    """
    source = Path(run_dir_or_checkpoint)
    if client is not None:
        source = _client_source(source, client)
    if not (source / "checkpoint.json").is_file():
        steps = checkpoint_steps(source)
        if step is not None and step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{source} has no checkpoint of step {step}: it has {kept}.")
        newest = newest_checkpoint(source) if step is None else checkpoint_directory(source, step)
        if newest is None:
            raise CheckpointError(f"{source} holds no checkpoint: name a run's directory or one of its checkpoints.")
        source = newest
    tensors, meta, _ = load_checkpoint(source)
    if "clients" in meta:
        names = ", ".join(sorted(meta["clients"])) or "none has trained yet"
        raise CheckpointError(f"{source} is of a run in which each client has its own adapter: name one with --client ({names}).")
    about = _complete(meta, tensors, source)
    _write(out_dir, tensors, about)
    return about


def _client_source(run_dir: Path, client: str) -> Path:
    """Where a run keeps one client's adapter."""
    folder = client_directory(run_dir, client)
    if not checkpoint_steps(folder):
        names = ", ".join(clients_of(run_dir))
        known = f"it has {names}" if names else "its clients share one adapter, or none has trained: leave --client out"
        raise CheckpointError(f"{run_dir} holds no adapter of a client {client!r}: {known}.")
    return folder


@dataclass(frozen=True)
class Part:
    """A result read back: its directory, its description, its tensors by their full names."""

    directory: Path
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def lora(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.tensors.items() if lora_module(name)}

    @property
    def whole(self) -> dict[str, Tensor]:
        """Tensors that trained as they are: full weights, a classification head."""
        return {name: value for name, value in self.tensors.items() if not lora_module(name)}


def read_part(directory: str | os.PathLike[str]) -> Part:
    """Read what :func:`save_part` or :func:`export_part` wrote. Raises ``CheckpointError`` on anything else."""
    directory = Path(directory)
    file = directory / DESCRIPTION
    if not file.is_file():
        mend = "run `splitfl export` on it first" if checkpoint_steps(directory) else "name what `splitfl export` wrote"
        raise CheckpointError(f"{directory} is no exported part, it has no {DESCRIPTION}: {mend}.")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        written = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: export the part again.") from error
    if written != FORMAT:
        raise CheckpointError(f"{directory} has format {written}, this version reads {FORMAT}: export it again.")
    tensors: dict[str, Tensor] = {}
    if (directory / ADAPTER_WEIGHTS).is_file():
        found = load_tensors(directory / ADAPTER_WEIGHTS)
        tensors = {name.removeprefix(PEFT_PREFIX): value for name, value in found.items()}
    elif (directory / WEIGHTS).is_file():
        tensors = load_tensors(directory / WEIGHTS)
    elif about.get("tensors"):
        raise CheckpointError(f"{directory} lacks its weights: export the part again.")
    return Part(directory, _complete(about, tensors, directory), tensors)


def write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    alphas: Mapping[str, float],
    base: str,
    revision: str | None,
    dropout: float,
    fan_in_fan_out: bool,
    head: str | None,
    task: str | None,
) -> None:
    """A standard PEFT adapter of LoRA ``tensors`` (and a head's), by full names. ``alphas``: alpha of each LoRA module.

    Modules that differ from the commonest rank and alpha are named in ``rank_pattern`` and ``alpha_pattern``.
    """
    from peft import LoraConfig

    ranks = {lora_module(name): value.shape[0] for name, value in tensors.items() if name.endswith(".lora_A.weight")}
    modules = sorted(name for name in ranks if name is not None)
    rank = _commonest([ranks[name] for name in modules])
    alpha = _commonest([alphas[name] for name in modules])
    config = LoraConfig(
        r=rank,
        lora_alpha=plain_alpha(alpha),  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=modules,
        rank_pattern={name: ranks[name] for name in modules if ranks[name] != rank},
        alpha_pattern={name: plain_alpha(alphas[name]) for name in modules if alphas[name] != alpha},
        modules_to_save=[head] if head else None,
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base,
        revision=revision,
        task_type={"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}.get(task or ""),
        inference_mode=True,
    )
    config.save_pretrained(os.fspath(directory))
    # PEFT keeps the targets as a set: put them in order, so that equal results are equal files.
    file = directory / ADAPTER_CONFIG
    written = json.loads(file.read_text(encoding="utf-8"))
    written["target_modules"] = modules
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(directory / ADAPTER_WEIGHTS, {PEFT_PREFIX + name: value for name, value in tensors.items()})


def _write(out_dir: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    modules = sorted({module for name in tensors if (module := lora_module(name))})
    with write_directory_atomically(out_dir) as directory:
        if modules:
            write_adapter(
                directory,
                tensors,
                alphas=dict.fromkeys(modules, about["lora"]["alpha"]),
                base=about["base"],
                dropout=about["lora"]["dropout"],
                revision=about["revision"],
                # Where it is not said, PEFT finds out at loading, with a warning.
                fan_in_fan_out=bool(about["fan_in_fan_out"]),
                head=about["head"],
                # A trunk serves language models and classifiers alike: its adapter is for neither in particular.
                task=about["task"] if about["part"] == "ends" else None,
            )
        elif tensors:
            save_tensors(directory / WEIGHTS, tensors)
        text = json.dumps({"format": FORMAT, "tensors": len(tensors), **about}, indent=1, sort_keys=True)
        (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _complete(meta: Any, tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """A description with every field, of one that has at least the needed ones. Raises ``CheckpointError``."""
    if not isinstance(meta, dict) or not set(meta) >= set(_NEEDED) or meta["part"] not in ("ends", "trunk"):
        raise CheckpointError(f"{source} does not describe a part of a model: name a checkpoint of a splitfl run.")
    about = {name: meta[name] for name in _NEEDED} | {name: meta.get(name) for name in _MORE}
    try:
        about["cut"] = str(Cut.of(meta["cut"]))
    except ConfigError as error:
        raise CheckpointError(f"{source} is damaged: {error}.") from error
    if about["head"] is None and about["trainables"] == "lora":
        # Beside an adapter only a classification head trains.
        about["head"] = next((name.rpartition(".")[0] for name in sorted(tensors) if lora_module(name) is None), None)
    weight = tensors.get(f"{about['head']}.weight")
    if about["num_labels"] is None and weight is not None:
        about["num_labels"] = weight.shape[0]
    return about


def _commonest(values: list[Any]) -> Any:
    # The smallest of equals, so that the choice does not depend on the order.
    return max(sorted(set(values)), key=values.count)


def _base_dtype(model: nn.Module) -> str:
    # PEFT keeps adapters in fp32 whatever the model's dtype: ask a tensor that is not the adapter's.
    dtypes = (value.dtype for name, value in model.named_parameters() if ".lora_" not in name)
    return str(next((dtype for dtype in dtypes if dtype.is_floating_point), "float32")).removeprefix("torch.")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("splitfl", "torch", "transformers", "peft")}
