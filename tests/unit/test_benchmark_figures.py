"""What the benchmarks make of what they measured."""

from __future__ import annotations

import pytest

from benchmarks.link import round_trip
from benchmarks.modes import MODES, gains, plot
from benchmarks.wan import Step
from splitfl.config import build_config


def test_the_bound_of_a_step_over_a_link():
    compute_bound = Step(near=0.8, far=1.25, sent=0.4, answered=0.2, trips=0.1, m=4)
    assert compute_bound.bound == pytest.approx(0.8 + 0.4 / 4 + 0.1)
    assert compute_bound.expected == pytest.approx(0.8 + 0.4 / 4 + 0.1 + 0.2 / 4)
    transfer_bound = Step(near=0.4, far=1.25, sent=0.8, answered=0.8, trips=0.1, m=1)
    assert transfer_bound.bound == pytest.approx(0.8 + 0.4 + 0.1)


def test_a_link_in_the_words_of_networks():
    assert round_trip(50, 200) == {"delay": pytest.approx(0.025), "rate": pytest.approx(25e6)}


def _rows(**tokens: float) -> dict[str, dict[str, float]]:
    return {name.strip("c"): {"tokens_per_second": value} for name, value in tokens.items()}


def test_gains_are_over_serial_with_as_many_clients():
    table = {"serial": _rows(c1=100.0, c8=200.0), "client-batching": _rows(c1=90.0, c8=500.0)}
    assert gains(table) == {"client-batching": {"1": 0.9, "8": 2.5}}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_one_that_a_run_can_have(mode):
    assert build_config({"model": "x"} | MODES[mode]).policy == MODES[mode]["policy"]


def test_the_plot_names_every_mode_and_is_the_same_file_each_time(tmp_path):
    table = {"serial": _rows(c1=100.0, c8=200.0), "client-batching": _rows(c1=90.0, c8=500.0)}
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        plot({"1x64": table, "4x128": table}, str(file))
    text = files[0].read_text()
    assert "<svg" in text
    assert text.count("client-batching") >= 2
    assert files[0].read_bytes() == files[1].read_bytes()
