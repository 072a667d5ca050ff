"""What the benchmarks make of what they measured."""

from __future__ import annotations

import pytest

from benchmarks.link import round_trip
from benchmarks.modes import MODES, step_seconds
from benchmarks.modes_report import advice, gains, plot
from benchmarks.replica_speedup import hierarchical, measure_speedup, seconds_a_step
from benchmarks.wan import Step
from splitfl.cli import main
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
    return {name.strip("c"): {"tokens_per_second": value, "replicas": 2} for name, value in tokens.items()}


def test_gains_are_over_serial_with_as_many_clients():
    table = {"serial": _rows(c1=100.0, c8=200.0), "client-batching": _rows(c1=90.0, c8=500.0)}
    assert gains(table) == {"client-batching": {"1": 0.9, "8": 2.5}}


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--replicas", "0"], "--replicas 0: it must be at least 1"),
        (["--clients", "0"], "at least 1"),
        (["--sync", "never"], "sync = 'never'"),
        (["--dtype", "int4"], "must be one of float32"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(words, mend, capsys):
    assert main(["bench", *words]) == 2
    assert mend in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench"]) == 2
    assert "pip install 'splitfl[bench]'" in capsys.readouterr().err


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


def test_seconds_of_a_step_are_those_of_whole_rounds():
    even = [float(second) for second in range(9)]
    assert step_seconds([even, even], 2, 1) == seconds_a_step([even]) == 1.0
    # Every second step ends with an average, which takes three seconds.
    averaged = [0.0, 1.0, 5.0, 6.0, 10.0, 11.0, 15.0]
    assert step_seconds([averaged], 2, 2) == seconds_a_step([averaged]) == 2.5


@pytest.mark.parametrize(("replicas", "apart"), [(2, [2, 2]), (3, [2, 1, 1]), (6, [1] * 6)])
def test_servers_apart_have_as_many_clients_together_as_the_replicas(monkeypatch, replicas, apart):
    """Also where they do not come out even, and where there are more replicas than clients were asked for."""
    sides = []

    class Side:
        """As fast as it has clients."""

        def __init__(self, settings, recording, model_dir, sizes, clients):
            assert clients
            sides.append((settings.get("replicas", 1), clients))
            self.clients = clients

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def begin(self, steps):
            pass

        def tokens_per_second(self):
            return float(self.clients)

    monkeypatch.setattr("benchmarks.replica_speedup.Side", Side)
    sizes = {"clients": 4, "rows": 1, "length": 8}
    settings = hierarchical(replicas, "step")
    row = measure_speedup(settings, {"threads": 1}, "", "", sizes, pairs=2, steps=1)
    assert sides == [(1, sum(apart)), (replicas, sum(apart)), *((1, share) for share in apart)]
    assert row["clients"] == sum(apart)
    assert row["share_of_unrelated"] == 1.0


def _advice(speedups: dict[str, dict[str, dict[str, float]]], *, gpus: int = 0, **rates: dict[str, float]) -> str:
    table = {mode.replace("_", "-"): _rows(**by_clients) for mode, by_clients in rates.items()}
    return "\n".join(advice({"1x64": table}, speedups, "this box", gpus))


def test_advice_names_the_fastest_mode_and_the_simplest_of_equals():
    rates = {
        "serial": {"c1": 100.0, "c2": 100.0, "c8": 100.0},
        "client_batching": {"c1": 102.0, "c2": 150.0, "c8": 400.0},
        "hierarchical_2": {"c2": 153.0, "c8": 300.0},
    }
    text = _advice({}, **rates)
    assert "serial with 1 client(s)" in text
    assert "client-batching with 2 and 8 client(s), 4.00 times serial at best" in text
    assert "gains nothing: hierarchical-2 is at best 1.02 times client-batching (batch 1x64, 2 client(s))" in text
    rates["hierarchical_2"]["c2"] = 300.0
    text = _advice({}, **rates)
    assert "hierarchical-2 with 2 client(s), 3.00 times serial at best" in text
    assert "Dividing this box among replicas gains: hierarchical-2 is at best 2.00" in text
    assert "A GPU for each replica gains: hierarchical-2 is at best 2.00" in _advice({}, gpus=2, **rates)
    assert "Dividing this box" in _advice({}, gpus=1, **rates)


@pytest.mark.parametrize(("exact", "counsel"), [(1.9, "keep sync = step"), (1.5, "costs 23%: sync = step is exact")])
def test_advice_on_meeting_follows_what_it_costs(exact, counsel):
    text = _advice({"step": {"2": {"speedup": exact}}, "8": {"2": {"speedup": 1.95}}}, serial={"c1": 1.0})
    assert f"2 replicas are {exact:.2f} with sync = step, 1.95 with sync = 8 times as fast as one" in text
    assert counsel in text
    assert text.splitlines()[-1].startswith("With as many cores or GPUs again")


def test_advice_is_against_replicas_that_bring_nothing():
    assert "0.90 with sync = step times as fast as one: stay with one." in _advice(
        {"step": {"2": {"speedup": 0.9}}}, serial={"c1": 1.0}
    )


def test_advice_says_where_replicas_shared_a_gpu():
    assert "On shared GPUs, 2 replicas are 0.90" in _advice({"step": {"2": {"speedup": 0.9}}}, gpus=1, serial={"c1": 1.0})
