"""The run's ledger: every optimizer step that was made, what counted in it and of whom. Part of each checkpoint.

A step is entered once, right behind the one before it, so that a checkpoint proves that nothing was applied twice. Kept as four
arrays, a few bytes a step and participant.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import torch

from server_trunk.ledger import Ledger
from splitfl.errors import CheckpointError

__all__ = ["RunLedger"]

_COLUMNS = {"steps": "q", "parts": "i", "clients": "i", "targets": "q"}
_DTYPES = {"q": torch.int64, "i": torch.int32}


class RunLedger:
    """``steps``: numbers of the steps made, ascending by one; ``parts``: how many clients each had; ``clients`` and ``targets``:
    for each part in turn, whose it was and how many of its target tokens counted.
    """

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}

    def enter(self, ledger: Ledger) -> None:
        """A step was made."""
        steps = self._columns["steps"]
        assert not steps or ledger.step == steps[-1] + 1, f"step {ledger.step} after step {steps[-1]}"
        steps.append(ledger.step)
        given = ledger.targets_by_client if ledger.met is None else ledger.met
        self._columns["parts"].append(len(given))
        for client, targets in given.items():
            self._columns["clients"].append(self._names.setdefault(client, len(self._names)))
            self._columns["targets"].append(targets)

    def next_step(self, fallback: int) -> int:
        """The step to be entered next; ``fallback`` before the first."""
        steps = self._columns["steps"]
        return steps[-1] + 1 if steps else fallback

    def entries(self) -> list[tuple[int, dict[str, int]]]:
        """Each step's number, and the targets that counted in it by client."""
        names, place, found = list(self._names), 0, []
        for step, parts in zip(self._columns["steps"], self._columns["parts"], strict=True):
            span = slice(place, place + parts)
            clients = [names[index] for index in self._columns["clients"][span]]
            found.append((step, dict(zip(clients, self._columns["targets"][span], strict=True))))
            place += parts
        return found

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For :func:`splitfl.checkpoint.save_checkpoint`."""
        arrays = {name: _padded(column, _DTYPES[_COLUMNS[name]]) for name, column in self._columns.items()}
        return {"names": list(self._names), "made": len(self._columns["steps"]), **arrays}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunLedger:
        """Take back what :meth:`state` gave. Raises CheckpointError where it is no ledger."""
        made = cls()
        try:
            made._names = {str(name): index for index, name in enumerate(state["names"])}
            steps = int(state.get("made", len(state["steps"])))  # none in earlier ones, which are as long as they say
            parts = int(state["parts"][:steps].sum())
            lengths = {"steps": steps, "parts": steps, "clients": parts, "targets": parts}
            if any(not 0 <= length <= len(state[name]) for name, length in lengths.items()):
                raise ValueError("it is shorter than it says")
            made._columns = {name: array(code, state[name][: lengths[name]].tolist()) for name, code in _COLUMNS.items()}
            made.entries()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"the ledger of a checkpoint is damaged ({error}): use another checkpoint") from None
        return made


def _padded(column: array[int], dtype: torch.dtype) -> torch.Tensor:
    """With zeros to a power of two: for each length of a tensor that it ever wrote, safetensors keeps a type in memory (0.8, by
    numpy's ``ctypeslib.as_array``), and a ledger would have another at each checkpoint.
    """
    tensor = torch.zeros(1 << max(0, len(column) - 1).bit_length(), dtype=dtype)
    tensor[: len(column)] = torch.tensor(column, dtype=dtype)
    return tensor
