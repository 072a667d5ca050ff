"""When a run is packed, and how segments are dealt out to groups of about equal cost."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from splitfl.errors import ConfigError
from splitfl.parts.packing_rule import ELSEWHERE, LEAST_WASTE, choose_layout, layout_rule, split_balanced, waste

CPU = torch.device("cpu")


def test_waste_is_the_share_of_pads() -> None:
    assert waste([(5, 0), (5, 3)]) == 0
    assert waste([(1, 0), (3, 0)]) == pytest.approx(1 / 3)
    assert waste([(7, 0)]) == 0
    assert waste([]) == 0


@pytest.mark.parametrize(("device", "least"), [("cpu", LEAST_WASTE["cpu"]), ("cuda", ELSEWHERE), ("mps", ELSEWHERE)])
def test_packed_where_padding_wastes_more_than_the_constant(device: str, least: float) -> None:
    below = [(1000, 0), (min(1000, int(1000 * (1 - 2 * least)) + 5), 0)]
    above = [(1000, 0), (int(1000 * (1 - 2 * least)) - 20, 0)]
    assert waste(below) <= least < waste(above)
    assert not choose_layout(below, torch.device(device), True)
    assert choose_layout(above, torch.device(device), True)
    assert not choose_layout(above, torch.device(device), False)


def test_the_setting_has_the_last_word() -> None:
    mixed, equal = [(1, 0), (90, 0)], [(9, 0), (9, 0)]
    assert [layout_rule("auto", CPU, None)(wire) for wire in (mixed, equal)] == [True, False]
    assert [layout_rule("padded", CPU, None)(wire) for wire in (mixed, equal)] == [False, False]
    assert [layout_rule("packed", CPU, None)(wire) for wire in (mixed, equal)] == [True, True]
    assert not layout_rule("auto", CPU, "its attention is strange")(mixed)
    with pytest.raises(ConfigError, match="its attention is strange; use layout = auto"):
        layout_rule("packed", CPU, "its attention is strange")


def cost(lengths: list[int], group: list[int], padded: bool) -> int:
    own = [lengths[index] for index in group]
    return max(own) * len(own) if padded else sum(own)


@pytest.mark.parametrize("padded", [False, True])
def test_no_other_cut_of_the_sorted_segments_is_better_balanced(padded: bool) -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.choice([1, 2, 3, 17, 40]) for _ in range(draw.randint(1, 8))]
        groups = draw.randint(1, 4)
        found = split_balanced(lengths, groups, padded=padded)
        assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
        assert len(found) <= groups
        assert all(group == sorted(group) and group for group in found)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        best = min(
            max(cost(lengths, order[a:b], padded) for a, b in itertools.pairwise([0, *cuts, len(lengths)]) if a < b)
            for cuts in itertools.combinations_with_replacement(range(len(lengths) + 1), groups - 1)
        )
        assert max(cost(lengths, group, padded) for group in found) == best


def test_nothing_to_split() -> None:
    assert split_balanced([], 3) == []
    assert split_balanced([4], 3) == [[0]]
