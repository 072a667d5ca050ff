"""How the sentences of SST-2 are dealt out among clients."""

from __future__ import annotations

import pytest

from benchmarks.sst2 import deal_batch, deal_by_label


def shares(concentration: float, seed: int = 0) -> list[float]:
    """Of each client's rows, the share of label 1."""
    labels = [row % 2 for row in range(4000)]
    return [sum(labels[row] for row in dealt) / len(dealt) for dealt in deal_by_label(labels, 3, concentration, seed)]


@pytest.mark.parametrize("seed", range(5))
def test_each_row_goes_to_one_client_and_nobody_has_too_few(seed: int) -> None:
    labels = [int(row % 3 == 0) for row in range(600)]
    dealt = deal_by_label(labels, 4, 0.3, seed)
    assert sorted(row for rows in dealt for row in rows) == list(range(600))
    assert min(map(len, dealt)) >= 32


def test_the_smaller_the_concentration_the_more_unlike_the_shares() -> None:
    even, uneven = [[shares(concentration, seed) for seed in range(8)] for concentration in (1000.0, 0.3)]
    assert all(abs(share - 0.5) < 0.1 for one in even for share in one)
    spread = [max(one) - min(one) for one in uneven]
    assert sum(spread) / len(spread) > 0.4


def test_a_seed_deals_alike() -> None:
    labels = [row % 2 for row in range(1000)]
    assert deal_by_label(labels, 3, 0.3, 1) == deal_by_label(labels, 3, 0.3, 1)
    assert deal_by_label(labels, 3, 0.3, 1) != deal_by_label(labels, 3, 0.3, 2)


def test_a_batch_is_dealt_out_as_the_rows_are_and_nobody_has_none() -> None:
    assert deal_batch([300, 100, 200], 48) == [24, 8, 16]
    assert deal_batch([64000, 1800, 400], 48) == [46, 1, 1]
