"""Where a model is cut. Plain numbers: this module imports neither torch nor transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from splitfl.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Cut:
    """The two cut layers of a U-shaped split, as block counts.

    The client holds the first ``input_blocks`` and the last ``output_blocks`` blocks, with everything outside the
    blocks (embedding, final norm, head); the trunk holds the blocks between. ``1:1`` of a model with 16 blocks leaves
    1..14 to the trunk; ``0:0`` leaves the client the embedding and the head alone.
    """

    input_blocks: int
    output_blocks: int

    def __post_init__(self) -> None:
        for value in (self.input_blocks, self.output_blocks):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"a cut is two whole numbers of blocks, each 0 or more, such as 1:1; got {value!r}")

    @classmethod
    def parse(cls, text: str) -> Cut:
        """``"a:b"`` as a cut. Raises ConfigError on anything else."""
        found = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
        if found is None:
            raise ConfigError(f"a cut is written INPUT:OUTPUT in blocks, such as 1:1; got {text!r}")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of(cls, value: Cut | str | tuple[int, int] | list[int]) -> Cut:
        """A cut from any of the forms the public functions take: a Cut, ``"a:b"``, or a pair."""
        if isinstance(value, Cut):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(value[0], value[1])
        raise ConfigError(f"a cut is two whole numbers of blocks, such as (1, 1) or 1:1; got {value!r}")

    def trunk_range(self, num_blocks: int) -> range:
        """The indices of the blocks the trunk holds. Raises ModelError where none is left for it."""
        if self.input_blocks + self.output_blocks >= num_blocks:
            raise ModelError(
                f"cut {self} leaves no block for the trunk: the model has {num_blocks} blocks and the two ends ask for "
                f"{self.input_blocks + self.output_blocks} of them; choose a shallower cut"
            )
        return range(self.input_blocks, num_blocks - self.output_blocks)

    def __str__(self) -> str:
        return f"{self.input_blocks}:{self.output_blocks}"
