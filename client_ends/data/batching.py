"""Rows to batches, in an order that seed and epoch decide, from a position that can be saved and taken up again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from client_ends.data.chat import IGNORE
from client_ends.data.tokenising import TokenizedDataset
from splitfl.errors import CheckpointError, ConfigError

Side = Literal["left", "right"]


def split_holdout(dataset: TokenizedDataset, fraction_or_count: float, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
    """``(train, held out)``: a fraction below 1 (float) or a number of rows (int), chosen by ``seed``; order is kept.

    Raises ``ConfigError`` where that would leave nothing to train on.
    """
    if isinstance(fraction_or_count, float):
        if not 0 <= fraction_or_count < 1:
            raise ConfigError(f"The held-out part is a fraction below 1 or a number of rows, not {fraction_or_count}.")
        count = round(len(dataset) * fraction_or_count)
        count = max(count, 1) if fraction_or_count > 0 else 0
    else:
        count = fraction_or_count
    if not 0 <= count < len(dataset):
        raise ConfigError(f"Of {len(dataset)} rows, {count} cannot be held out: hold out fewer, or give more data.")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:count])
    train = [row for index, row in enumerate(dataset.rows) if index not in chosen]
    held_out = [row for index, row in enumerate(dataset.rows) if index in chosen]
    return replace(dataset, rows=train), replace(dataset, rows=held_out, truncated=0, dropped=0)


def pad_token(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's pad token, else its end of sequence, else 0 (what is padded is masked)."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def collate(rows: Sequence[dict[str, Any]], *, pad_token_id: int, padding_side: Side = "right") -> dict[str, Tensor]:
    """One batch: ``input_ids``, ``attention_mask`` and ``labels`` (B, T), int64; labels are -100 without a target.

    ``labels`` is (B,) where rows carry one label. T is the longest row. Serves as ``Trainer``'s data collator too.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    per_token = isinstance(rows[0]["labels"], list)
    batch["labels"] = torch.full(shape if per_token else shape[:1], IGNORE, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        place = slice(0, length) if padding_side == "right" else slice(longest - length, longest)
        batch["input_ids"][index, place] = torch.tensor(row["input_ids"])
        batch["attention_mask"][index, place] = 1
        if per_token:
            batch["labels"][index, place] = torch.tensor(row["labels"])
            # Nothing stands before a row's first token to predict it from, on whichever side the padding is.
            batch["labels"][index, place.start] = IGNORE
        else:
            batch["labels"][index] = row["labels"]
    return batch


def target_count(batch: dict[str, Tensor]) -> int:
    """How many targets Hugging Face's loss divides by: predicted tokens (never a row's first), or labelled rows."""
    labels = batch["labels"]
    counted = labels[:, 1:] if labels.ndim == 2 else labels
    return int((counted != IGNORE).sum())


class Batches:
    """Batches of a dataset, padded on the right, epoch after epoch.

    Each iteration yields what is left of the current epoch and then moves on to the next, so ``for batch in batches``
    is one epoch. The order depends on (``seed``, epoch) alone. :meth:`state_dict` says after which batch we are; with
    it loaded, iteration goes on behind that batch.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        batch_size: int,
        *,
        seed: int,
        pad_token_id: int,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"The batch size is at least 1, not {batch_size}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.shuffle = shuffle
        self.epoch = 0
        self._done = 0  # batches of this epoch already handed out

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self._order()
        while self._done < len(self):
            begin = self._done * self.batch_size
            rows = [self.dataset[index] for index in order[begin : begin + self.batch_size]]
            # Counted before it is handed out: who saves the state while working on a batch has had that batch.
            self._done += 1
            yield collate(rows, pad_token_id=self.pad_token_id)
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self._done = epoch, 0

    targets = staticmethod(target_count)

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values."""
        return {
            "epoch": self.epoch,
            "batches_done": self._done,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self.dataset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; ``CheckpointError`` where data, batch size or seed are not those of the position."""
        for name, mine in (("seed", self.seed), ("batch_size", self.batch_size), ("rows", len(self.dataset))):
            if state.get(name) != mine:
                raise CheckpointError(
                    f"The saved data position belongs to other data ({name} {state.get(name)}, now {mine}): "
                    "resume with the same file, batch size and seed."
                )
        self.epoch, self._done = int(state["epoch"]), int(state["batches_done"])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        digest = hashlib.sha256(f"{self.seed}:{self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(len(self.dataset), generator=generator).tolist()
