"""Packed or padded, and which segments together: decided from their lengths. ``benchmarks/packing.py`` justifies it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from splitfl.errors import ConfigError

__all__ = ["choose_layout", "layout_rule", "split_balanced", "waste"]

#: The share of a padded batch that must be padding before packing pays, as ``benchmarks/packing.py`` measures it: on a CPU
#: next to none, as attention by segment costs less than the mask that one pad brings. Elsewhere it is a guess, not yet measured:
#: a device that waits for its launches pays for each small attention.
LEAST_WASTE = {"cpu": 0.02}
ELSEWHERE = 0.2


def waste(wire: Sequence[tuple[int, int]]) -> float:
    """The share of a padded batch of these segments, ``(length, start)``, that is padding: from 0 to below 1."""
    slots = len(wire) * max((length for length, _ in wire), default=0)
    return 1 - sum(length for length, _ in wire) / slots if slots else 0.0


def choose_layout(wire: Sequence[tuple[int, int]], device: torch.device, packable: bool) -> bool:
    """Whether a run of these segments is packed (True) or padded. ``packable``: ``packed.why_not_packed`` found nothing."""
    return packable and waste(wire) > LEAST_WASTE.get(device.type, ELSEWHERE)


def layout_rule(layout: str, device: torch.device, obstacle: str | None) -> Callable[[Sequence[tuple[int, int]]], bool]:
    """What chooses the layout of each run: the setting ``layout`` (auto, padded, packed), or for auto the rule.

    ``obstacle``: what ``packed.why_not_packed`` answered. Raises ConfigError where packed is asked for and cannot be had.
    """
    if layout == "packed" and obstacle is not None:
        raise ConfigError(f"layout = packed cannot be: {obstacle}; use layout = auto")
    if layout == "auto":
        return lambda wire: choose_layout(wire, device, obstacle is None)
    return lambda wire: layout == "packed"


def split_balanced(lengths: Sequence[int], groups: int, *, padded: bool = False) -> list[list[int]]:
    """Segments of these lengths in at most ``groups`` groups, of which the costliest costs as little as can be.

    Each group is a run of the segments sorted by length, so that like lengths lie together; a group costs its tokens, pads
    included if ``padded``. Returns the segments' numbers, in order within each group. No group is empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def cut(most: int) -> list[int]:
        """Where groups begin that cost at most ``most`` each."""
        begins = [0]
        cost = 0
        for place, index in enumerate(order):
            # Sorted from the longest down: a group's first segment is its longest.
            grown = (place - begins[-1] + 1) * lengths[order[begins[-1]]] if padded else cost + lengths[index]
            if grown > most and place > begins[-1]:
                begins.append(place)
                grown = lengths[index]
            cost = grown
        return begins

    low, high = max(lengths, default=0), sum(lengths) if not padded else len(lengths) * max(lengths, default=0)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= groups:
            high = middle
        else:
            low = middle + 1
    return [sorted(order[begin:end]) for begin, end in pairwise([*cut(low), len(order)]) if begin < end]
