"""What labels and the count of items say of a loss: by how much the trunk is to multiply its gradient."""

from __future__ import annotations

import pytest
import torch

from client_ends.objective import objective_of

IGNORED = -100


def test_of_tokens_the_items_are_what_the_loss_is_divided_by() -> None:
    labels = torch.tensor([[5, 6, IGNORED, 7], [IGNORED, IGNORED, 8, 9]])
    alone, among = (
        objective_of({"labels": labels}, per_token=True),
        objective_of({"labels": labels, "num_items_in_batch": 40}, per_token=True),
    )
    assert alone is not None
    assert among is not None
    assert alone.targets == among.targets == (2, 2)
    assert (alone.divisor, among.divisor) == (4.0, 40.0)


@pytest.mark.parametrize(
    ("labels", "items"),
    [
        (torch.tensor([0, 2, 1]), 12),
        (torch.tensor([0.5, 2.0, -1.0]), 12),  # regression
        (torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), torch.tensor(24)),  # several labels a row, each an item
    ],
)
def test_of_rows_the_divisor_is_the_rows_of_the_step(labels: torch.Tensor, items: int | torch.Tensor) -> None:
    """Four batches of three rows: each loss is the mean of its batch, and their gradients add up undivided. A divisor of 12,
    where 12 rows are counted, leaves each as it is.
    """
    found = objective_of({"labels": labels, "num_items_in_batch": items}, per_token=False)
    assert found is not None
    assert found.targets == (1, 1, 1)
    assert found.divisor == 12.0
    alone = objective_of({"labels": labels}, per_token=False)
    assert alone is not None
    assert alone.divisor == 3.0
