"""A trunk on two ranks, real processes over gloo: what comes out and what is trained equal one process's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES, save_family
from tests.forks import run_ranks
from tests.sharded_ranks import main

BY_NAME = {family.name: family for family in FAMILIES}
EVERYWHERE = [
    (name, trainables, layout)
    for name in ("llama", "qwen2", "qwen3")
    for trainables in ("lora", "full")
    for layout in ("padded", "packed")
]


def on_ranks(work: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (work / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, main, str(work / "cases.json"), str(work / "out.json"))
    found: list[dict[str, Any]] = json.loads((work / "out.json").read_text())
    assert len(found) == len(cases)
    return found


def cases_of(work: Path, rows: list[tuple[str, str, str, str]]) -> list[dict[str, Any]]:
    models = {name: save_family(BY_NAME[name], work / name) for name in sorted({row[1] for row in rows})}
    return [
        {"shard": kind, "shard_size": 2, "model": str(models[name]), "trainables": trainables, "layout": layout}
        for kind, name, trainables, layout in rows
    ]


def assert_equal(found: dict[str, Any]) -> None:
    assert found["numbers"] <= 1e-5
    assert found["weights"] <= 1e-5
    assert found["moments"] <= 1e-5
    assert found["moved"] > 0
    # What fails alike on all ranks fails that batch, not the group, and nothing after it.
    assert found["failed"] == "RuntimeError"
    assert found["decoded_again"] == 1
    assert found["resumed"] == 0
    assert found["kept"] == 0
    # Norms lie whole on each rank of a tensor-parallel trunk; the rest is halved.
    assert all(0.45 <= share <= 0.56 for share in found["bytes"])


def assert_trains_by_halves(row: tuple[str, str, str, str], found: dict[str, Any]) -> None:
    """Gradients and the optimizer's state lie where the weights do; a LoRA is whole on each rank of a fully sharded trunk."""
    shares = found["bytes_trained"]
    if row[2] == "full":
        assert all(0.45 <= share <= 0.56 for share in shares), shares
    else:
        assert all(0.5 < share < 1.0 if row[0] == "tensor" else share == 1.0 for share in shares), shares


def check(rows: list[tuple[str, str, str, str]], findings: list[dict[str, Any]]) -> None:
    for row, found in zip(rows, findings, strict=True):
        assert "refused" not in found, (row, found)
        assert (found["packing_obstacle"] is None) == (row[3] == "packed"), row
        assert found["cache_obstacle"] is None, row
        try:
            assert_equal(found)
            assert_trains_by_halves(row, found)
        except AssertionError as error:
            raise AssertionError(f"{row}: {found}") from error


def test_two_ranks_compute_and_train_what_one_process_does(tmp_path):
    equal = [
        ("tensor", "qwen3", "full", "packed"),
        ("tensor", "qwen2", "lora", "padded"),
        ("fsdp", "llama", "full", "packed"),
        ("fsdp", "qwen3", "lora", "padded"),
    ]
    refused = [("tensor", "gpt2", "lora", "padded"), ("tensor", "qwen3-moe", "lora", "padded")]
    *found, without, strange = on_ranks(tmp_path, cases_of(tmp_path, equal + refused))
    check(equal, found)
    # In one sentence, with what to use instead.
    assert "no tensor-parallel plan" in without["refused"]
    assert "--shard fsdp" in without["refused"]
    assert "not trained here" in strange["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "fsdp"])
def test_every_family_layout_and_kind_of_training(tmp_path, kind):
    extra = [(name, "full", "padded") for name in ("gpt-neox", "mistral", "olmo2")] + [("gpt-neox", "lora", "packed")]
    rows = [(kind, *row) for row in EVERYWHERE + extra]
    check(rows, on_ranks(tmp_path, cases_of(tmp_path, rows)))
