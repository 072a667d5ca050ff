"""What stands before training: the tokenizer, the rows, and what of the ends is trainable."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from client_ends.data import TokenizedDataset, load_examples, split_holdout, tokenize
from client_ends.settings import TrainSettings
from splitfl.adapters import Trainables, attach_lora, set_trainable
from splitfl.config import LoraSettings
from splitfl.errors import ConfigError, ModelError, first_line

__all__ = ["TRAINED", "load_tokenizer", "model_of", "name_classes", "prepare_ends", "read_data", "unnamed"]

#: How a client has its ends train: what their checkpoints call it.
TRAINED: dict[str, Trainables] = {"lora": "lora", "full": "full", "frozen": "none"}


def read_data(settings: TrainSettings, tokenizer: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training rows and the held-out rows (None where nothing is held out). Raises DataError, ConfigError."""
    examples = load_examples(settings.data, columns=settings.columns, format=settings.data_format)
    dataset = tokenize(
        examples,
        tokenizer,
        # A tokenizer that knows no limit says so by an astronomical number.
        max_length=min(settings.max_length, tokenizer.model_max_length),
        task=settings.task,  # type: ignore[arg-type]
        num_labels=settings.num_labels,
        label_names=settings.label_names,
    )
    if not settings.evaluate:
        return dataset, None
    share: float = settings.evaluate if settings.evaluate < 1 else int(settings.evaluate)
    return split_holdout(dataset, share, settings.seed)


def prepare_ends(model: Any, ends: str, lora: LoraSettings, *, seed: int) -> Any:
    """Make ``lora``, ``full`` or nothing (``frozen``) of the ends trainable; returns the model, wrapped where LoRA was
    attached.
    """
    if ends == "lora":
        return attach_lora(model, lora, seed=seed)
    if ends not in TRAINED:
        raise ConfigError(f"the ends can be trained as lora or full, or be frozen, not {ends!r}")
    set_trainable(model, TRAINED[ends])
    return model


def model_of(settings: TrainSettings | argparse.Namespace, terms: Mapping[str, Any]) -> tuple[str, str | None]:
    """Directory or hub id of the model that a client holds, and its revision: its own, or what the run's ``terms`` name."""
    return (terms["model"], terms["revision"]) if settings.model is None else (settings.model, settings.revision)


def load_tokenizer(path: str, revision: str | None, *, trust_remote_code: bool) -> Any:
    """Raises ModelError, with the mend."""
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ModelError(f"--model {path}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer for {path}: {first_line(error)}") from None


def unnamed(count: int) -> tuple[str, ...]:
    """What Hugging Face calls classes that nobody has named."""
    return tuple(f"LABEL_{number}" for number in range(count))


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Have a classifier's config say what its classes are called, in the order of their numbers: so its checkpoints do."""
    called = (*names, *unnamed(config.num_labels)[len(names) :])[: config.num_labels]
    config.id2label = dict(enumerate(called))
    config.label2id = {name: number for number, name in enumerate(called)}
