"""Sums that leave while the last backward of a step still runs, in two processes: the same training, whatever comes after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.forks import run_ranks
from tests.overlap_ranks import CASES, main
from tests.world import tiny_llama

SIZE = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank ended with, by case."""
    work: Path = tmp_path_factory.mktemp("overlap")
    model = tiny_llama(work / "model")
    run_ranks(SIZE, main, model, str(work), seconds=100)
    return [torch.load(work / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_sums_that_leave_early_are_those_of_one_server(found, case):
    for name, mine in found[0][case]["mine"].items():
        assert torch.equal(mine, found[1][case]["mine"][name]), name
        torch.testing.assert_close(mine, found[0][case]["theirs"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_they_leave_before_the_backward_has_ended(found, case):
    for own in found:
        assert own[case]["buckets"] > 1
        assert (own[case]["amid"] or [0])[0] > 0 or not own[case]["leaves_amid"]
