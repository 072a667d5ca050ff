"""Ends and trunk put together again: one PEFT adapter over the full model, or the full model itself."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitfl.adapters.names import lora_module
from splitfl.adapters.results import Part, read_part, write_adapter
from splitfl.directories import write_directory_atomically
from splitfl.errors import CheckpointError, ConfigError, ModelError, RemoteProtocolError, first_line
from splitfl.parts.identity import ModelIdentity, compare


def merge(
    ends_dir: str | os.PathLike[str] | None,
    trunk_dir: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str],
    *,
    full_weights: bool = False,
    base: str | None = None,
) -> None:
    """Join the exported parts of one run in ``out_dir``; either side may be missing (None) or untrained.

    The result is a standard PEFT adapter: ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base),
    out)`` computes what ends and trunk compute. Ranks and alphas may differ between the sides. With ``full_weights``
    it is a whole checkpoint with the tokenizer; only that is possible where full weights trained. ``base``: where the
    base model lies, when not where the parts say.

    Raises ``CheckpointError`` for parts that do not belong together, ``ConfigError`` for a result that cannot be.
    """
    ends = _read(ends_dir, "ends")
    trunk = _read(trunk_dir, "trunk")
    parts = [part for part in (trunk, ends) if part is not None]
    if not parts:
        raise ConfigError("There is nothing to merge: name the exported ends, the exported trunk, or both.")
    if ends is not None and trunk is not None:
        _check_fit(ends, trunk)
    if not any(part.tensors for part in parts):
        raise CheckpointError("Nothing trained in these parts, so the base model is the result: there is nothing to merge.")
    base = base or parts[-1].about["base"]
    assert base is not None
    if full_weights:
        _write_model(parts, out_dir, base)
    else:
        _write_joint_adapter(parts, out_dir, base)


def _read(directory: str | os.PathLike[str] | None, side: str) -> Part | None:
    if directory is None:
        return None
    part = read_part(directory)
    if part.about["part"] != side:
        raise CheckpointError(f"{directory} holds the {part.about['part']}, not the {side}: swap the two directories.")
    return part


def _check_fit(ends: Part, trunk: Part) -> None:
    mine, theirs = ends.about, trunk.about
    difference = compare(_identity(ends), _identity(trunk))
    if difference:
        raise CheckpointError(f"Ends and trunk do not belong together, {difference}: merge parts of one run.")
    if mine["cut"] != theirs["cut"]:
        raise CheckpointError(f"The ends were cut at {mine['cut']}, the trunk at {theirs['cut']}: merge parts with the same cut.")
    if mine["run"] and theirs["run"] and mine["run"] != theirs["run"]:
        raise CheckpointError(
            f"The ends come from run {mine['run']}, the trunk from run {theirs['run']}: merge parts of one run."
        )
    # In an asynchronous run each client counts steps of its own.
    in_step = theirs["mode"] != "async"
    if ends.tensors and trunk.tensors and in_step and mine["step"] != theirs["step"]:
        raise CheckpointError(
            f"The ends are of step {mine['step']}, the trunk of step {theirs['step']}: export both at the same step."
        )
    shared = ends.tensors.keys() & trunk.tensors.keys()
    if shared:
        raise CheckpointError(f"Both parts hold {min(shared)}, so they are no two sides of a cut: export them again.")


def _identity(part: Part) -> ModelIdentity:
    try:
        return ModelIdentity.from_plain(part.about["identity"])
    except RemoteProtocolError as error:
        raise CheckpointError(f"{part.directory} does not say which model it belongs to: export it again.") from error


def _task(parts: list[Part]) -> dict[str, Any]:
    """The description that decides task and head: the ends', where there are any."""
    return next((part.about for part in parts if part.about["part"] == "ends"), parts[0].about)


def _write_joint_adapter(parts: list[Part], out_dir: str | os.PathLike[str], base: str) -> None:
    about = _task(parts)
    head = about["head"]
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for part in parts:
        whole = [name for name in part.whole if head is None or not name.startswith(f"{head}.")]
        if whole:
            raise ConfigError(
                f"The {part.about['part']} trained full weights, which no adapter holds: merge to full weights instead."
            )
        tensors |= part.tensors
        modules = {lora_module(name) for name in part.lora}
        alphas |= {module: part.about["lora"]["alpha"] for module in modules if module}
    if not alphas:
        raise ConfigError("No LoRA trained in these parts, only a classification head: merge to full weights instead.")
    with write_directory_atomically(out_dir) as directory:
        write_adapter(
            directory,
            tensors,
            alphas=alphas,
            base=base,
            revision=about["revision"],
            dropout=max(part.about["lora"]["dropout"] for part in parts if part.lora),
            fan_in_fan_out=any(bool(part.about["fan_in_fan_out"]) for part in parts if part.lora),
            head=head if any(part.whole for part in parts) else None,
            task=about["task"],
        )


def _write_model(parts: list[Part], out_dir: str | os.PathLike[str], base: str) -> None:
    from transformers.pytorch_utils import Conv1D

    # Entered first: an occupied directory is refused before a large model is read for nothing.
    with write_directory_atomically(out_dir) as directory, torch.no_grad():
        model = _load_base(parts, base)
        parameters = dict(model.named_parameters())
        for part in parts:
            for name, value in part.whole.items():
                _parameter(parameters, name, base).copy_(value)
            for name, a in part.lora.items():
                module = lora_module(name)
                if module is None or not name.endswith(".lora_A.weight"):
                    continue
                b = part.tensors[f"{module}.lora_B.weight"]
                scaling = part.about["lora"]["alpha"] / a.shape[0]
                delta = scaling * (b.float() @ a.float())
                weight = _parameter(parameters, f"{module}.weight", base)
                # GPT-2's Conv1D holds its weight as (in, out).
                delta = delta.T if isinstance(model.get_submodule(module), Conv1D) else delta
                weight.copy_(weight.float() + delta)
        model.save_pretrained(directory)
        _copy_tokenizer(base, directory, **_revision(parts, base))


def _revision(parts: list[Part], base: str) -> dict[str, str]:
    """For ``from_pretrained``: of a hub model, the revision that was trained on."""
    revision = _task(parts)["revision"]
    return {"revision": revision} if revision and not Path(base).exists() else {}


def _load_base(parts: list[Part], base: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    about = _task(parts)
    # The widest dtype that trained: a model that ran in fp32 over a bf16 checkpoint is not rounded back.
    dtypes = [getattr(torch, part.about["dtype"]) for part in parts if part.about["dtype"]]
    options: dict[str, Any] = {"dtype": functools.reduce(torch.promote_types, dtypes) if dtypes else "auto"}
    options |= _revision(parts, base)
    factory: Any = AutoModelForCausalLM
    if about["task"] == "sequence-classification":
        factory = AutoModelForSequenceClassification
        if about["label_names"]:
            options["id2label"] = dict(enumerate(about["label_names"]))
            options["label2id"] = {name: number for number, name in enumerate(about["label_names"])}
        elif about["num_labels"]:
            options["num_labels"] = about["num_labels"]
    try:
        return factory.from_pretrained(base, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise ModelError(f"The base model {base} cannot be loaded ({reason}): say where it lies with --base.") from error


def _parameter(parameters: dict[str, Any], name: str, base: str) -> Any:
    if name not in parameters:
        raise CheckpointError(f"{base} has no parameter {name}: it is not the model these parts were trained on.")
    return parameters[name]


def _copy_tokenizer(base: str, directory: Path, **options: str) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
    except (OSError, ValueError, KeyError):  # a model need not have one
        return
    tokenizer.save_pretrained(directory)
