"""Every fault at every place, with real processes: `make faults`.

Under ``on_loss = "wait"`` the run ends with the ledger of the undisturbed one and its weights, equal up to float order (≤ 1e-5);
under ``drop`` with the weights of a reference that is trained on what the ledger says counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitfl.sample import build_sample_model, write_sample_shards
from tests.faults.disk import mount, unmount
from tests.faults.matrix import CELLS, FAULTS, NO_CELL, PLACES, assert_struck, strike
from tests.faults.reference import reference
from tests.faults.stage import STEPS, Stage

Weights = dict[str, dict[str, torch.Tensor]]
Ledger = list[tuple[int, dict[str, int]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model") / "model"
    build_sample_model(directory, seed=0, hidden=32, blocks=4, context=64)
    return str(directory)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    return write_sample_shards(tmp_path_factory.mktemp("texts"), 2, characters=8000)


@contextlib.contextmanager
def staged(stage: Stage) -> Iterator[Stage]:
    try:
        yield stage
    finally:
        stage.close()


def assert_equal(mine: Weights, theirs: Weights) -> None:
    assert mine.keys() == theirs.keys()
    for side, tensors in theirs.items():
        assert mine[side].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(mine[side][name], tensor, rtol=1e-5, atol=1e-5), (side, name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model, texts) -> tuple[Weights, Ledger]:
    """Made once; the reference must come to it too, as nothing was lost."""
    with staged(Stage(tmp_path_factory.mktemp("undisturbed") / "run", model, texts, "wait")) as stage:
        stage.begin()
        stage.see_through()
        weights, ledger = stage.weights(), stage.ledger()
    assert [step for step, _ in ledger] == list(range(STEPS))
    assert all(len(parts) == 2 for _, parts in ledger)
    assert_equal(reference(stage.work, texts, ledger), weights)
    return weights, ledger


@contextlib.contextmanager
def small_disk(fault: str, work: Path) -> Iterator[Path | None]:
    if "disk full" not in fault:
        yield None
        return
    place = work / ("server" if fault == "disk full" else "ends1")
    if not mount(place):
        pytest.skip("a disk that can be full has to be mounted, which needs root")
    try:
        yield place
    finally:
        unmount(place)


def meet(fault: str, place: str, on_loss: str, work: Path, model: str, texts: list[Path]) -> tuple[Weights, Ledger]:
    with small_disk(fault, work) as disk, staged(Stage(work, model, texts, on_loss)) as stage:
        strike(fault, place, stage, disk=disk)
        assert_struck(fault, stage)
        weights, ledger = stage.weights(), stage.ledger()
        if on_loss == "drop":
            # A client that could keep nothing of its ends, and came back when all steps were made, has none.
            assert {"server", "ends0"} <= weights.keys()
            expected = reference(work, texts, ledger)
            assert_equal(weights, {side: expected[side] for side in weights})
    assert [step for step, _ in ledger] == list(range(STEPS)), "no step is missing, none was made twice"
    return weights, ledger


def test_the_table_is_whole():
    assert {*CELLS, *NO_CELL} == {(fault, place) for fault in FAULTS for place in PLACES}


def test_one_cell_for_the_fast_suite(tmp_path, model, texts):
    meet("frame dropped", "backward", "drop", tmp_path / "run", model, texts)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "place"), CELLS)
def test_under_wait_the_run_ends_as_the_undisturbed_one(tmp_path, model, texts, undisturbed, fault, place):
    weights, ledger = meet(fault, place, "wait", tmp_path / "run", model, texts)
    assert_equal(weights, undisturbed[0])
    assert ledger == undisturbed[1]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "place"), CELLS)
def test_under_drop_the_run_is_what_its_ledger_says(tmp_path, model, texts, fault, place):
    meet(fault, place, "drop", tmp_path / "run", model, texts)
