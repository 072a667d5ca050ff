"""Ends that a training run has kept, put into a model that is there to be used, not trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_ends.preparing import TRAINED, prepare_ends
from splitfl.adapters import named_trainables
from splitfl.adapters.trainables import copy_into
from splitfl.checkpoint import checkpoint_directory, checkpoint_steps, load_checkpoint, load_meta
from splitfl.config import LoraSettings
from splitfl.errors import CheckpointError
from splitfl.parts.cut import Cut
from splitfl.parts.identity import ModelIdentity, compare

__all__ = ["kept_directory", "kept_meta", "put_into"]


def kept_directory(path: str | Path) -> Path:
    """The newest checkpoint in ``path``, the ``--out`` of a training run, or ``path`` itself where it is one. Raises
    CheckpointError.
    """
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    steps = checkpoint_steps(path)
    if not steps:
        raise CheckpointError(f"{path} holds no ends: name the --out of splitfl train, or one checkpoint in it")
    return checkpoint_directory(path, max(steps))


def kept_meta(directory: Path) -> dict[str, Any]:
    """What the checkpoint says of itself; no tensor is read. Raises CheckpointError where that is damaged, or of no ends."""
    meta = load_meta(directory)
    _check_part(directory, meta)
    return meta


def put_into(model: Any, directory: Path, terms: Mapping[str, Any]) -> Any:
    """The model with the weights that are kept in ``directory``; wrapped by PEFT where they are an adapter's.

    Raises:
        CheckpointError: it is damaged, no client's ends, or of those of another model, cut or run.
    """
    tensors, meta, _ = load_checkpoint(directory)
    _check_part(directory, meta)
    difference = compare(ModelIdentity.from_plain(meta["identity"]), ModelIdentity.from_plain(terms["identity"]))
    if difference:
        raise CheckpointError(f"{directory} was written for another model than the run's ({difference}): choose ends of this run")
    if meta["cut"] != str(Cut.parse(terms["cut"])):
        raise CheckpointError(
            f"{directory} was written for the cut {meta['cut']}, the run's is {terms['cut']}: choose ends of this run"
        )
    lora = LoraSettings() if meta["lora"] is None else LoraSettings.from_plain(meta["lora"])
    ends = next(ends for ends, trained in TRAINED.items() if trained == meta["trainables"])
    model = prepare_ends(model, ends, lora, seed=0)
    copy_into(named_trainables(model), tensors)
    return model


def _check_part(directory: Path, meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError where it is not of a client's ends."""
    if meta.get("part") != "ends":
        raise CheckpointError(f"{directory} holds the {meta.get('part')}, not a client's ends: name the --out of splitfl train")
