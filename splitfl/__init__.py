"""splitfl: several parties fine-tune and use one large language model; text, tokens, labels and loss stay where they are."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "attach_trunk", "load_ends", "load_trunk"]

if TYPE_CHECKING:
    from splitfl.parts.loading import attach_trunk, load_ends, load_trunk

# Resolved on first use, so that `import splitfl` (and `splitfl --help`) does not import torch.
_LAZY = {
    "attach_trunk": "splitfl.parts.loading",
    "load_ends": "splitfl.parts.loading",
    "load_trunk": "splitfl.parts.loading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
