"""The meter's arithmetic, on a clock of our own; and what of it the endpoint and the log show."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_trunk.live import Live
from server_trunk.members import Member
from server_trunk.meter import QUEUE_BOUNDS, Meter
from server_trunk.prometheus import MetricsEndpoint, expose
from splitfl.config import build_config
from splitfl.errors import ConfigError
from splitfl.protocol.messages import Forward
from splitfl.runlog import RunLog


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock) -> Meter:
    """Two clients, of whom the first has two sessions; ten seconds have passed."""
    meter = Meter(100, window=10, clock=clock)
    kept = {"a1": 3, "a2": 4, "b1": 0}
    meter.watch(waiting=lambda: 7, graphs=lambda: 11, kept=kept.__getitem__, traffic=lambda: {"ann": (5, 6)})
    for session, name in (("a1", "ann"), ("a2", "ann"), ("b1", "bob")):
        meter.joined(session, name)
    clock.now += 10
    return meter


def member(session: str, client: str, micro: int, *lengths: int) -> Member:
    segments = tuple((length, 0) for length in lengths)
    return Member(session, Forward(0, micro, segments, 4, "float32", "raw", True, True, True), None, client)


def run(meter: Meter, clock: Clock, direction: str, *members: Member, waited: float = 0.0, seconds: float = 0.0) -> None:
    for each in members:
        setattr(each, {"forward": "arrived", "backward": "returned"}[direction], clock.now)
    clock.now += waited
    began = clock.now
    clock.now += seconds
    meter.ran(direction, members, began=began, seconds=seconds)


def test_a_batch_counts_for_each_of_its_clients(meter, clock):
    run(meter, clock, "forward", member("a1", "ann", 0, 10, 20), member("b1", "bob", 0, 30), waited=0.2, seconds=1.0)
    run(meter, clock, "backward", member("a1", "ann", 0, 10, 20), waited=0.4, seconds=1.0)
    taken = meter.snapshot()
    ann, bob = taken["clients"]["ann"], taken["clients"]["bob"]
    assert (ann["tokens"], ann["backward_tokens"], ann["forwards"], ann["backwards"]) == (30, 30, 1, 1)
    assert (bob["tokens"], bob["backward_tokens"], bob["forwards"], bob["backwards"]) == (30, 0, 1, 0)
    assert (taken["tokens"], taken["forwards"], taken["backwards"]) == (60, 2, 1)
    assert taken["batches"] == {"forward": 1, "backward": 1}
    assert taken["occupancy"] == 0.6
    assert taken["members"] == 2
    assert taken["padding"] == pytest.approx(1 - 60 / 90, abs=1e-4)
    assert taken["queue"]["forward"]["median"] == pytest.approx(0.2)
    assert taken["queue"]["backward"]["p95"] == pytest.approx(0.4)
    assert taken["busy_seconds"] == 2.0
    assert (taken["waiting_tokens"], taken["graph_tokens"], ann["kept_tokens"]) == (7, 11, 7)
    assert (taken["bytes_received"], taken["bytes_sent"], bob["bytes_sent"]) == (5, 6, 0)


def test_rates_and_shares_are_of_the_window_only(meter, clock):
    clock.now = 1020.999
    run(meter, clock, "forward", member("a1", "ann", 0, 50), seconds=4.0)
    taken = meter.snapshot()
    assert taken["tokens_per_second"] == pytest.approx(5.0, rel=0.01)
    assert taken["clients"]["ann"]["tokens_per_second"] == pytest.approx(5.0, rel=0.01)
    assert taken["clients"]["bob"]["tokens_per_second"] == 0
    assert taken["busy"] == pytest.approx(0.4, rel=0.01)
    clock.now += 11
    taken = meter.snapshot()
    assert (taken["tokens_per_second"], taken["busy"], taken["tokens"]) == (0, 0, 50)
    assert (taken["occupancy"], taken["padding"], taken["members"]) == (None, None, None)


def test_a_young_run_is_not_measured_against_time_it_has_not_had(clock):
    meter = Meter(100, window=10, clock=clock)
    meter.joined("a1", "ann")
    clock.now += 1
    run(meter, clock, "forward", member("a1", "ann", 0, 50), seconds=1.0)
    assert meter.snapshot()["tokens_per_second"] == pytest.approx(25.0)


def test_a_packed_trunk_has_no_pads(clock):
    meter = Meter(100, packed=True, clock=clock)
    clock.now += 1
    run(meter, clock, "forward", member("a1", "ann", 0, 10, 40))
    assert meter.snapshot()["padding"] == 0


def test_steps_and_those_dropped_from_them(meter):
    meter.step_closed([("ann", 10, False), ("bob", 4, True)], seconds=0.5)
    meter.step_closed([("ann", 10, False)], seconds=0.5)
    taken = meter.snapshot()
    assert (taken["steps"], taken["dropped"], taken["busy_seconds"]) == (2, 1, 1.0)
    assert [(c["steps"], c["targets"], c["dropped"]) for c in taken["clients"].values()] == [(2, 20, 0), (1, 4, 1)]


def test_who_leaves_keeps_its_sums_and_leaves_nothing_that_grows(meter, clock):
    run(meter, clock, "forward", member("b1", "bob", 0, 5))
    for session in ("a1", "a2", "b1"):
        meter.left(session)
    taken = meter.snapshot()
    assert taken["sessions"] == 0
    assert {name: client["sessions"] for name, client in taken["clients"].items()} == {"ann": 0, "bob": 0}
    assert taken["clients"]["bob"]["tokens"] == 5
    assert not meter._names
    run(meter, clock, "forward", member("b1", "bob", 0, 5))  # of a session that is gone: counted
    assert meter.snapshot()["clients"]["bob"]["tokens"] == 10


def test_metrics_are_in_the_format_of_prometheus(meter, clock):
    run(meter, clock, "forward", member("a1", "ann", 0, 10), waited=0.2, seconds=1.0)
    run(meter, clock, "forward", member("a1", "ann", 1, 10), waited=60.0)
    families = {family.name: family for family in text_string_to_metric_families(expose(meter).decode())}
    tokens = {(s.labels["client"], s.labels["direction"]): s.value for s in families["splitfl_tokens"].samples}
    assert tokens == {("ann", "forward"): 20, ("ann", "backward"): 0, ("bob", "forward"): 0, ("bob", "backward"): 0}
    assert families["splitfl_tokens"].type == "counter"
    assert families["splitfl_sessions"].samples[0].value == 3
    buckets = [s for s in families["splitfl_queue_seconds"].samples if s.labels["direction"] == "forward"]
    counts = {s.labels["le"]: s.value for s in buckets if s.name.endswith("_bucket")}
    assert (counts["0.1"], counts["0.25"], counts[str(QUEUE_BOUNDS[-1])], counts["+Inf"]) == (0, 1, 1, 2)
    assert next(s.value for s in buckets if s.name.endswith("_sum")) == pytest.approx(60.2)
    assert all(family.documentation for family in families.values())


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


def test_the_endpoint_listens_on_loopback_and_answers_two_pages(meter, clock):
    run(meter, clock, "forward", member("a1", "ann", 0, 10))
    endpoint = MetricsEndpoint("0", meter)
    endpoint.start()
    try:
        assert endpoint.url.startswith("http://127.0.0.1:")
        assert b'splitfl_tokens_total{client="ann",direction="forward"} 10.0' in get(f"{endpoint.url}/metrics")
        assert json.loads(get(f"{endpoint.url}/status.json"))["clients"]["ann"]["tokens"] == 10
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{endpoint.url}/log.jsonl")
        with pytest.raises(ConfigError, match=r"cannot serve metrics at .*; choose another address"):
            MetricsEndpoint(str(endpoint.port), meter)
    finally:
        endpoint.stop()


@pytest.mark.parametrize("value", ["x", "70000", "host:70000", ":1"])
def test_an_address_that_is_none_is_refused_with_the_config(value):
    with pytest.raises(ConfigError, match="neither a port nor HOST:PORT"):
        build_config({"model": "m", "metrics": value})


def test_status_lines_come_only_while_something_happens(tmp_path, meter, clock):
    log = RunLog(tmp_path / "log.jsonl", echo=None)
    live = Live(meter, log, every=3600)
    live.start()
    live._write()
    live._write()
    run(meter, clock, "forward", member("a1", "ann", 0, 10))
    live.stop()
    live._write()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line["tokens"]) for line in lines] == [("status", 0), ("status", 10)]


def test_no_status_where_none_is_wanted(tmp_path, meter):
    log = RunLog(tmp_path / "log.jsonl", echo=None)
    live = Live(meter, log, every=0)
    live.start()
    live.stop()
    log.close()
    assert not (tmp_path / "log.jsonl").read_text()


def test_a_member_whose_gradient_never_came_has_not_waited(meter, clock):
    meter.ran("backward", [member("a1", "ann", 0, 5)], began=clock.now, seconds=0.1)
    taken = meter.snapshot()
    assert taken["backwards"] == 1
    assert taken["queue"]["backward"]["median"] is None
