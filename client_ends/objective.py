"""How much of the shared objective a client's loss is: the number of targets, and what the loss was divided by.

The trunk minimises ``sum_i n_i L_i / sum_i n_i`` over all clients. To weigh a client's gradient it must know how many target
tokens stand behind it and what sum the client divided by; both follow from the labels and from how the loss is scaled before
``backward()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Objective", "objective_of", "without_targets_after_padding"]

IGNORED = -100  # PyTorch's and Hugging Face's label for "no target here"


@dataclass(slots=True)
class Objective:
    """``targets``: target tokens of each batch row. ``divisor``: what the loss's sum over targets is divided by.

    ``is_stated``: by whoever computes the loss, so nothing is learned of it. ``is_known``: whether the divisor is.

    ``scale`` is what the loss was multiplied by before its backward, seen by a hook on the loss itself: 1/k in a loop that
    accumulates k batches.
    """

    targets: tuple[int, ...]
    divisor: float
    scale: float = 1.0
    is_stated: bool = False
    is_known: bool = True

    def share(self, rows: range) -> tuple[int, float]:
        """``(n, d)`` of the rows: their targets, and the divisor with the loss's scale in it."""
        counted = sum(self.targets[row] for row in rows)
        divisor = self.divisor / abs(self.scale) if self.scale else self.divisor
        return counted, divisor if divisor > 0 else 1.0

    def watch(self, loss: torch.Tensor) -> None:
        """Learn the scale when ``loss`` (or a multiple of it) runs its backward."""

        def saw(gradient: torch.Tensor) -> None:
            self.scale = float(gradient)

        if loss.requires_grad and loss.ndim == 0:
            loss.register_hook(saw)

    def learn(self, log_probs: torch.Tensor) -> None:
        """Learn divisor and scale where the loss is the mean of ``-log_probs`` over targets, computed elsewhere: each of them
        then has the gradient -1 / divisor. Any other loss of them is not known.
        """

        def saw(gradient: torch.Tensor) -> None:
            found = gradient[gradient != 0].double()
            if len(found):
                mean = float(found.mean())
                self.is_known = mean < 0 and bool(((found - mean).abs() <= 1e-3 * abs(mean)).all())
                self.divisor, self.scale = (-1 / mean, 1.0) if self.is_known else (self.divisor, self.scale)

        if log_probs.requires_grad:
            log_probs.register_hook(saw)


def objective_of(arguments: Mapping[str, Any], *, per_token: bool) -> Objective | None:
    """The objective behind a Hugging Face forward's arguments, or None where it has no labels.

    ``per_token``: a causal language model, whose labels ``(B, T)`` are shifted by one inside; else one label a row, ``(B,)``.
    """
    shifted, labels = arguments.get("shift_labels"), arguments.get("labels")
    if isinstance(shifted, torch.Tensor):
        counted = (shifted != IGNORED).reshape(shifted.shape[0], -1).sum(1)
    elif not isinstance(labels, torch.Tensor):
        return None
    elif per_token:
        counted = (labels[:, 1:] != IGNORED).sum(1)
    else:
        counted = (labels != IGNORED).reshape(labels.shape[0], -1).any(1)
    targets = tuple(int(n) for n in counted.tolist())
    items = arguments.get("num_items_in_batch")
    if items is None:
        divisor = float(sum(targets))
    elif per_token:
        divisor = float(items)
    else:
        # A classifier returns the mean of each batch all the same, and who says the items adds those up as they are. With the
        # step's rows for a divisor the trunk's gradient is their sum too. Of a row with several labels each is an item.
        divisor = float(items) * sum(targets) / max(1, int((labels != IGNORED).sum()))  # type: ignore[union-attr]
    return Objective(targets, divisor)


def without_targets_after_padding(labels: torch.Tensor, attention_mask: Any) -> torch.Tensor:
    """``labels (B, T)`` without the targets that a padding position would have to predict, with one warning.

    With left padding and no care, the first real token of a row is such a target. Padding does not travel, so nothing stands
    there to predict from; the whole model would predict it from an empty context, which teaches it nothing either.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != labels.shape:
        return labels
    blind = (labels[:, 1:] != IGNORED) & (attention_mask[:, :-1] == 0)
    if not bool(blind.any()):
        return labels
    warnings.warn(
        "labels of tokens that follow padding are not counted: with left padding set the first token's label of each row to -100",
        stacklevel=4,
    )
    labels = labels.clone()
    labels[:, 1:][blind] = IGNORED
    return labels
