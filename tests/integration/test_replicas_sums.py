"""Sums and averages over replicas, in processes of their own: equal everywhere to the bit, whatever a replica lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.forks import run_ranks
from tests.sum_ranks import main

SIZE = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank ended with."""
    work: Path = tmp_path_factory.mktemp("sums")
    run_ranks(SIZE, main, str(work))
    return [torch.load(work / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("kind", ["reduced", "shared", "averaged"])
def test_all_replicas_end_with_the_same_bits(found, kind):
    for other in found[1:]:
        for name, mine in found[0][kind].items():
            assert torch.equal(mine, other[kind][name]), name


def test_it_makes_no_difference_where_gradients_are_summed(found):
    for name, mine in found[0]["shared"].items():
        torch.testing.assert_close(mine, found[0]["reduced"][name])


def test_where_one_has_no_room_none_shares(found):
    assert [own["without_room"] for own in found] == [True] * SIZE


def test_replicas_are_apart_between_meetings(found):
    assert not torch.equal(found[0]["apart"]["turned"], found[1]["apart"]["turned"])


def test_what_no_replica_has_a_gradient_for_is_left_alone(found):
    """AdamW would shrink it by its weight decay."""
    torch.manual_seed(0)
    for shape in [(5, 3), (4, 6)]:
        torch.randn(shape)
    torch.randn(7, dtype=torch.bfloat16)
    assert torch.equal(found[0]["reduced"]["unused"], torch.randn(3))


def test_tensors_beside_the_training_are_summed(found):
    for own in found:
        assert torch.equal(own["sums"][0], torch.full((2,), 3.0))
        assert int(own["sums"][1]) == 3
