"""The client: a model's input and output ends, its data, its loss. Text, tokens, labels and logits never leave it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["SplitModelForCausalLM", "SplitModelForSequenceClassification", "bind_trainer"]

if TYPE_CHECKING:
    from client_ends.model import SplitModelForCausalLM, SplitModelForSequenceClassification
    from client_ends.trainer import bind_trainer


def __getattr__(name: str) -> Any:
    # On first use, so that `splitfl train --help` does not import torch.
    if name in __all__:
        return getattr(import_module("client_ends.trainer" if name == "bind_trainer" else "client_ends.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
