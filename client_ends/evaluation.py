"""How good a model is on held-out rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from client_ends.data import Batches

__all__ = ["Pass", "evaluate", "go_through"]


@dataclass(slots=True)
class Pass:
    """One pass over rows: the summed loss over ``targets``, and, of a classifier, what it ``predicted`` of which ``labels``."""

    loss: float = 0.0
    targets: int = 0
    labels: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)

    def report(self) -> dict[str, float]:
        """Mean loss over targets, with perplexity (language models) or accuracy (classifiers)."""
        mean = self.loss / max(1, self.targets)
        report = {"loss": mean, "targets": float(self.targets)}
        if self.labels:
            right = sum(label == own for label, own in zip(self.labels, self.predicted, strict=True))
            return report | {"accuracy": right / len(self.labels)}
        return report | {"perplexity": math.exp(min(mean, 700.0))}


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def go_through(model: Any, batches: Batches, device: torch.device) -> Pass:
    """Run the model on all rows. No graph is kept anywhere."""
    made = Pass()
    by_row = isinstance(batches.dataset[0]["labels"], int)
    with _evaluating(model):
        for batch in batches:
            held = {name: tensor.to(device) for name, tensor in batch.items()}
            out = model(**held)
            targets = Batches.targets(batch)
            made.loss += float(out.loss) * targets
            made.targets += targets
            if by_row:
                made.labels += batch["labels"].tolist()
                made.predicted += out.logits.argmax(-1).tolist()
    return made


def evaluate(model: Any, batches: Batches, device: torch.device) -> dict[str, float]:
    """Mean loss over targets, with perplexity (language models) or accuracy (classifiers)."""
    return go_through(model, batches, device).report()
