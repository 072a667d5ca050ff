"""Where a text parts from the whole model's, and whether that is excused; how often is counted, and shown with the results.

Two computations of one model differ by rounding. So where the two likeliest tokens are as good as equal, either may come; the
rest of that row then follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["COUNTED", "MARGIN", "Count", "parted"]

#: Logits that differ by less are as good as equal.
MARGIN = 1e-5


@dataclass
class Count:
    """Of all comparisons of this session."""

    rows: int = 0
    excused: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Lines to be shown; none where nothing was compared."""
        if not self.rows:
            return []
        return [f"generate(): {self.rows} texts compared, {len(self.excused)} excused divergence(s)", *self.excused]


COUNTED = Count()


def parted(expected: Any, found: Any, what: str = "", count: Count = COUNTED) -> int:
    """How many rows of what ``generate()`` returned (``sequences``, with ``logits``) part from what is expected; each must where
    the logits expected of both tokens are the best but for less than :data:`MARGIN`, and is counted under the name ``what``.
    """
    number = 0
    for row, (one, other) in enumerate(zip(expected.sequences, found.sequences, strict=True)):
        count.rows += 1
        if torch.equal(one, other):
            continue
        assert one.shape == other.shape, f"row {row} is {len(other)} tokens long, not {len(one)}"
        at = int((one != other).nonzero()[0])
        step = at - (len(one) - len(expected.logits))
        assert step >= 0, f"row {row} differs in its prompt"
        logits = expected.logits[step][row]
        lead = float(logits.max() - logits[torch.stack([one[at], other[at]])].min())
        assert lead < MARGIN, f"row {row} parts at token {step}, where the best logit leads by {lead:.1e}"
        count.excused.append(f"{what}, row {row}, token {step}: the logits differ by {lead:.1e}".lstrip(", "))
        number += 1
    return number
