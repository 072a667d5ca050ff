"""Padding and packing as segments: round trips, refusals, and the trunk on segments against the trunk on the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import ModelError
from splitfl.parts.loading import load_trunk
from splitfl.parts.segments import Segment, check_layout, pack, pad_segments, segments_of, unpack, unpad
from tests.families import FAMILIES, HIDDEN, Family, save_family


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(mark) for mark in row] for row in rows])


def test_left_padding_keeps_its_offset_and_right_padding_starts_at_zero() -> None:
    found = segments_of(mask("0011", "1100"), None, (2, 4))
    assert found.items == (Segment(0, 2, 2, 2), Segment(1, 0, 2, 0))
    assert found.wire == [(2, 2), (2, 0)]
    assert found.tokens == 4


def test_given_positions_name_the_start() -> None:
    positions = torch.tensor([[1, 1, 0, 1], [5, 6, 7, 8]])
    assert segments_of(mask("0011", "1111"), positions, (2, 4)).wire == [(2, 0), (4, 5)]


def test_a_restart_begins_a_segment() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert segments_of(None, positions, (2, 6)).items == (
        Segment(0, 0, 3, 0),
        Segment(0, 3, 2, 0),
        Segment(0, 5, 1, 0),
        Segment(1, 0, 6, 0),
    )


def test_one_row_of_positions_serves_every_row() -> None:
    assert segments_of(None, torch.tensor([[0, 1, 0]]), (2, 3)).wire == [(2, 0), (1, 0), (2, 0), (1, 0)]


def test_a_row_of_padding_has_no_segment() -> None:
    found = segments_of(mask("000", "011"), None, (2, 3))
    assert found.items == (Segment(1, 1, 2, 1),)
    h = torch.randn(2, 3, 4)
    assert torch.equal(unpack(pack(h, found), found)[1, 1:], h[1, 1:])
    assert not unpack(pack(h, found), found)[0].any()


@pytest.mark.parametrize(
    ("attention_mask", "position_ids", "message"),
    [
        (mask("1011"), None, "row 0 has a hole"),
        (mask("1111", "0101"), None, "row 1 has a hole"),
        (torch.ones(1, 1, 4, 4), None, "2-D attention mask"),
        (mask("1111"), torch.tensor([[0, 1, 0, 1]]), "drop the mask"),
        (None, torch.zeros(3, 1, 4, dtype=torch.int64), "position_ids"),
        (mask("111"), None, "shape"),
    ],
)
def test_refusals(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        segments_of(attention_mask, position_ids, (1, 4))


def test_packing_is_refused_for_a_family_that_mixes_packed_sequences() -> None:
    check_layout(None, torch.tensor([[0, 1, 2]]), packing=False)
    with pytest.raises(ModelError, match="Bloom does not keep packed sequences apart"):
        check_layout(None, torch.tensor([[0, 1, 0]]), packing=False, family="Bloom")


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[int, int]]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        spans = [sorted((draw(st.integers(0, columns)), draw(st.integers(0, columns)))) for _ in range(rows)]
        found = torch.zeros(rows, columns, dtype=torch.int64)
        for row, (begin, end) in enumerate(spans):
            found[row, begin:end] = 1
        return found, None, (rows, columns)
    lines = []
    for _ in range(rows):
        line: list[int] = []
        while len(line) < columns:
            start = draw(st.integers(0, 3))
            line += range(start, start + draw(st.integers(1, columns)))
        lines.append(line[:columns])
    return None, torch.tensor(lines), (rows, columns)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_packing_and_padding_are_inverted_exactly(
    batch: tuple[torch.Tensor | None, torch.Tensor | None, tuple[int, int]],
) -> None:
    attention_mask, position_ids, shape = batch
    found = segments_of(attention_mask, position_ids, shape)
    h = torch.randn(*shape, 3)
    real = torch.ones(shape) if attention_mask is None else attention_mask
    flat = pack(h, found)
    assert flat.shape == (int(real.sum()), 3) == (found.tokens, 3)
    assert torch.equal(unpack(flat, found, shape), h * real[..., None])
    padded = pad_segments(flat, found.wire)
    assert torch.equal(unpad(padded.hidden_states, found.wire), flat)
    if padded.attention_mask is not None:
        assert padded.attention_mask.sum(1).tolist() == [length for length, _ in found.wire]
    if position_ids is not None and found.items:
        held = torch.ones(padded.position_ids.shape) if padded.attention_mask is None else padded.attention_mask
        assert torch.equal(padded.position_ids[held.bool()], position_ids.flatten())


def run(trunk: Any, h: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What ``forward`` makes of ``h``, and the gradient of its square with regard to ``h`` and the first weight."""
    x = h.clone().requires_grad_()
    trunk.zero_grad()
    y = forward(x)
    y.square().sum().backward()
    assert x.grad is not None
    weight = next(trunk.parameters())
    return y.detach(), torch.cat([x.grad.flatten(), weight.grad.flatten()])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_trunk_on_segments_equals_the_trunk_on_the_batch(family: Family, tmp_path: Path) -> None:
    """What a server runs (segments, right-padded) gives what the batch as laid out gives, up to float order."""
    trunk = load_trunk(save_family(family, tmp_path), (1, 1)).eval()
    h = torch.randn(3, 8, HIDDEN, generator=torch.Generator().manual_seed(0))
    layouts: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [
        (None, None),
        (mask("00111111", "11111111", "00000111"), None),
        (mask("11111000", "10000000", "11111111"), None),
    ]
    if family.packs:
        layouts.append((None, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]).expand(3, -1)))
    for attention_mask, position_ids in layouts:
        found = segments_of(attention_mask, position_ids, (3, 8))
        expected, gradient = run(trunk, h, lambda x: pack(trunk(x, attention_mask, position_ids), found))  # noqa: B023
        y, dh = run(trunk, h, lambda x: unpad(trunk(*pad_segments(pack(x, found), found.wire)), found.wire))  # noqa: B023
        assert float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert float((dh - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())
