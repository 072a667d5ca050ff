"""Each benchmark runs, small, and says in JSON what it is there to say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(name: str, *flags: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["machine"]["torch"]
    return result


def test_wan():
    result = run("wan")
    shares = [cell["share_of_bound"] for cell in result["cells"]]
    assert result["worst_share_of_bound"] == min(shares) > 0
    for cell in result["cells"]:
        compute, transfer, trips = cell["compute_s"], cell["transfer_s"], 2 * cell["rtt_ms"] / 1000
        # The time that messages are under way is in the step, whatever the machine.
        assert cell["step_s"] > max(trips, transfer)
        assert cell["bound_s"] == pytest.approx(
            max(compute, transfer) + min(compute, transfer) / result["micro_batches"] + trips, rel=0.01
        )
    slow, fast = (next(cell["transfer_s"] for cell in result["cells"] if cell["mbit_per_s"] == rate) for rate in (50, 1000))
    assert slow / fast == pytest.approx(20, rel=0.1)
    assert {"factor", "predicted", "predicted_both_directions"} <= result["pipelining"].keys()
    for mode in ("sync", "async"):
        assert result["company"][mode]["2"]["tokens_per_second"] > 0


@pytest.mark.parametrize("flags", [[], ["--real"]])
def test_modes(tmp_path, flags):
    result = run("modes", "--plot", str(tmp_path / "modes.svg"), *flags)
    assert (tmp_path / "modes.svg").read_text().count("serial") >= 1
    table = result["results"]["1x64"]
    modes = {"serial": "12", "client-batching": "12", "hierarchical-2": "2", "hierarchical-2 sync 2": "2"}
    assert table.keys() == modes.keys()
    for mode, counts in modes.items():
        assert list(table[mode]) == list(counts)
        for clients, row in table[mode].items():
            assert row["steps"] > 0
            assert row["tokens_per_second"] == pytest.approx(64 * int(clients) / row["step_s"], rel=0.02)
            assert 0 < row["busy_share"] <= 1
            assert row["peak_memory_mb"] > 50
            assert (row["all_reduce_bytes_a_step"] > 0) == mode.startswith("hierarchical")
    each_step, averaged = (table[mode]["2"]["all_reduce_bytes_a_step"] for mode in list(modes)[2:])
    assert each_step == 2 * averaged
    assert result["gain"]["1x64"]["client-batching"].keys() == {"1", "2"}
    speedups = result["replica_speedups"]["by_sync"]
    assert result["replica_speedup"] == {"2": speedups["step"]["2"]["speedup"]}
    assert speedups.keys() == {"step", "2"}
    assert all(row["2"]["speedup"] > 0 for row in speedups.values())
    assert result["advice"]


def test_linearity():
    result = run("linearity")
    (row,) = result["by_sync"].values()
    assert row["pairs"] == 2
    assert row["share"] == row["mean_share"] > 0, "of two, the median is the mean"
    low, high = row["interval_95"]
    assert low <= row["share"] <= high
    assert row["tokens_per_second"] > 0 < row["apart_tokens_per_second"]


def test_graphs():
    result = run("graphs")
    assert result["recompute_step_over_keep"] > 0
    assert result["ways"].keys() == {"keep", "recompute"}
    assert all(way["peak_memory_mb"] > way["above_rest_mb"] >= 0 for way in result["ways"].values())


def test_bare_trunk():
    result = run("bare_trunk", "--device", "cpu")
    assert result["share_of_bare"].keys() == {"1", "2"}
    for row in result["details"].values():
        assert 0 < row["busy_share"] <= 1
        assert row["share_of_bare"] == pytest.approx(row["served_tokens_per_second"] / row["bare_tokens_per_second"], rel=0.5)


def test_rounds():
    result = run("rounds")
    for runs in result["results"].values():
        assert runs["0"]["mb_sent"] < runs["16"]["mb_sent"] < runs["4"]["mb_sent"] < runs["1"]["mb_sent"]
        assert all(each["loss"] < each["loss_before"] for each in runs.values())


def test_sync():
    found = run("sync")["results"]
    assert {sync: each["meetings"] for sync, each in found.items()} == {"step": 16, "1": 16, "4": 4, "16": 1}
    assert found["1"]["mb_reckoned"] > 0
    assert all(each["loss_least"] <= each["loss"] <= each["loss_most"] < each["loss_before"] for each in found.values())


def test_overlap():
    result = run("overlap", "--megabits", "0", "10")
    late, early = (result["by_megabits"]["10"][f"{when}_step_s"] for when in ("late", "early"))
    # Neither can be faster than the link.
    assert min(late, early) >= 0.99 * result["sizes"]["bytes_summed_a_step"] * 8e-6 / 10
    assert all(row["early_over_late"] > 0 for row in result["by_megabits"].values())


def test_flood():
    result = run("flood")
    assert [each["target"] for each in result["rounds"]] == ["dummy", "server"]
    for each in result["rounds"]:
        assert each["steps"] > 0
        assert each["flood"]["connections"] + each["flood"]["refused"] == result["connections"]
        assert each["flood"]["junk_bytes"] > 0.9 * result["junk_bytes"]
    assert result["refusals_logged"]["not-authorized"], "the flood never came to the door"
    assert result["kept"] > 0
    assert result["errors"] == 0


def test_channel():
    result = run("channel")
    assert result["gb_per_s"].keys() == {"64_kib", "1024_kib", "16384_kib", "65536_kib"}
    for row in result["gb_per_s"].values():
        assert all(row[way] > 0 for way in ("aes_256_gcm", "zeromq", "curve", "tls", "ours"))
    row = result["gb_per_s"]["16384_kib"]
    # One round, so the medians of ratios are the ratios.
    assert result["times_curve_16mib"] == pytest.approx(row["ours"] / row["curve"])
    assert result["share_of_bound_16mib"] == pytest.approx(row["ours"] * (1 / row["aes_256_gcm"] + 1 / row["zeromq"]))
    assert result["small_amid_64mib_p50_ms"] > 0


def test_decode():
    result = run("decode", "--clients", "2")
    assert result["ratio_to_local"]["1"] > 0
    assert result["times_one_client"]["2"] > 0
    assert result["speculation"]["ratio"] > 1, "a round trip was saved for nothing"
    assert result["speculation"]["tokens_a_round_trip"] > 1


def test_sst2(data):
    result = run("sst2", "--data", str(data))
    (seed,) = result["results"]
    assert len(seed["shares"]) == 3
    assert sum(share["rows"] for share in seed["shares"]) == 67349
    # Of so few steps the accuracy says nothing, the loss does.
    assert seed["losses"]["split"] == pytest.approx(seed["losses"]["one_process"], rel=1e-4)
    assert result["difference"] == pytest.approx(seed["split"] - seed["one_process"])
