"""The ledger of a run: what it says of each step, and that it survives a checkpoint."""

import pytest

from server_trunk.ledger import Ledger, Part
from server_trunk.run_ledger import RunLedger
from splitfl.errors import CheckpointError
from splitfl.packed_state import pack_state, unpack_state


def made(step: int, **targets: int) -> Ledger:
    return Ledger(step, {name: Part(name, name, targets=count) for name, count in targets.items()})


def test_every_step_is_entered_once_and_comes_back_from_a_checkpoint():
    ledger = RunLedger()
    entered = [(4, {"a": 3, "b": 2**40}), (5, {}), (6, {"c": 0})]
    for step, targets in entered:
        ledger.enter(made(step, **targets))
    with pytest.raises(AssertionError, match="step 6 after step 6"):
        ledger.enter(made(6, a=1))
    again = RunLedger.from_state(unpack_state(pack_state(ledger.state())))
    assert again.entries() == ledger.entries() == entered
    again.enter(made(7, c=1))
    assert again.entries()[-1] == (7, {"c": 1})


@pytest.mark.parametrize("change", [{"names": []}, {"parts": None}, {"targets": "x"}, {"made": 2}, {"made": -1}, {"made": "x"}])
def test_what_is_no_ledger_is_refused(change):
    ledger = RunLedger()
    ledger.enter(made(0, a=1))
    with pytest.raises(CheckpointError, match="damaged"):
        RunLedger.from_state(ledger.state() | change)


def test_its_arrays_have_few_lengths():
    """For each length that safetensors ever wrote it keeps a few KiB for good."""
    ledger, lengths = RunLedger(), set()
    for step in range(300):
        ledger.enter(made(step, a=1, b=2, c=3))
        lengths |= {value.numel() for value in ledger.state().values() if hasattr(value, "numel")}
    assert len(lengths) < 12
    assert RunLedger.from_state(ledger.state()).entries() == ledger.entries()


def test_one_of_an_earlier_checkpoint_is_as_long_as_its_arrays():
    ledger = RunLedger()
    ledger.enter(made(3, a=1, b=2))
    state = ledger.state()
    del state["made"]
    assert RunLedger.from_state(state).entries() == [(3, {"a": 1, "b": 2})]
