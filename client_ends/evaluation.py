"""How good a model is on held-out rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from client_ends.data import Batches

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: Any, batches: Batches, device: torch.device) -> dict[str, float]:
    """Mean loss over targets, with perplexity (language models) or accuracy (classifiers). No graph is kept anywhere."""
    was_training = model.training
    model.eval()
    total = counted = right = 0.0
    by_row = isinstance(batches.dataset[0]["labels"], int)
    for batch in batches:
        held = {name: tensor.to(device) for name, tensor in batch.items()}
        out = model(**held)
        targets = Batches.targets(batch)
        total += float(out.loss) * targets
        counted += targets
        if by_row:
            right += float((out.logits.argmax(-1) == held["labels"]).sum())
    model.train(was_training)
    mean = total / max(1.0, counted)
    report = {"loss": mean, "targets": counted}
    if by_row:
        return report | {"accuracy": right / max(1.0, counted)}
    return report | {"perplexity": math.exp(min(mean, 700.0))}
