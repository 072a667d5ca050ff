"""Where replicas stand, which ports they take, and where clients go."""

from __future__ import annotations

import pytest

from server_trunk.replicas.assignment import COMING, REST, Assignment
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.place import Place
from server_trunk.replicas.words import Move
from splitfl.config import build_config
from splitfl.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}


def test_torchrun_says_where_a_process_stands():
    assert Place.from_environment({}) is None
    place = Place.from_environment(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert place == Place(5, 8, 1, 4, 1, 2)
    assert (place.log_name, Place().log_name) == ("log-5.jsonl", "log.jsonl")
    with pytest.raises(ConfigError, match="not to numbers"):
        Place.from_environment({"RANK": "a", "WORLD_SIZE": "2"})


def test_fixed_ports_lie_two_apart_and_free_ones_stay_free():
    values = {"model": "m", "bind": "[::1]:7100", "data_port": 7101, "advertise": "trunk.example.org:7101", "metrics": "9100"}
    settled = Place(5, 8, 1, 4).settle(build_config(values))
    assert (settled.bind, settled.data_port) == ("[::1]:7102", 7103)
    assert (settled.advertise, settled.metrics) == ("trunk.example.org:7103", "9101")
    settled = Place(5, 8, 1, 4).settle(build_config({"model": "m", "metrics": "0.0.0.0:9100"}))
    assert (settled.bind, settled.data_port, settled.metrics) == ("127.0.0.1:0", 0, "0.0.0.0:9101")
    with pytest.raises(ConfigError, match="leaves no ports"):
        Place(5, 8, 1, 4).settle(build_config({"model": "m", "bind": "127.0.0.1:65535"}))


def test_a_client_goes_where_the_least_load_is_and_comes_back_there():
    assignment = Assignment(2)
    assert [assignment.place(name) for name in "abc"] == [0, 1, 0]
    assignment.hear(0, {"a": 0.0, "c": 0.0})
    assignment.hear(1, {"b": 0.0})
    assert assignment.place("d") == 1
    assignment.hear(1, {"b": 900.0, "d": 100.0})
    assignment.hear(0, {"a": 50.0, "c": 50.0})
    assert assignment.place("e") == 0  # 100 tokens a step against 1000
    assignment.hear(0, {})
    assert assignment.place("a") == 0
    assert assignment.place("b") == 1
    assignment.hear(1, {"b": 900.0, "f": 3.0})  # it dialled that replica by itself
    assert assignment.place("f") == 1


def test_a_client_moves_where_that_spreads_the_load_and_rests_then():
    assignment = Assignment(2)
    for client in "abcd":
        assignment.places[client] = 0
    assignment.hear(0, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0})
    assert assignment.rebalance(0, ["abcd", ""]) is None  # nobody knows yet what they bring
    assignment.hear(0, {"a": 100.0, "b": 100.0, "c": 100.0, "d": 90.0})
    assert assignment.rebalance(REST - 1, ["abcd", ""]) is None  # a few steps say little
    assert assignment.rebalance(REST, ["abc", ""]) == Move("a", 0, 1, 1)
    assert assignment.place("a") == 1
    assignment.hear(0, {"a": 100.0, "b": 100.0, "c": 100.0, "d": 90.0})  # said before it went
    assert assignment.rebalance(REST + 1, ["bcd", ""]) == Move("b", 0, 1, 2)
    assert assignment.rebalance(REST + 2, ["cd", "ab"]) is None
    assignment.hear(1, {"a": 0.0, "b": 0.0})  # there, and not trained yet
    assert assignment.rebalance(REST + 3, ["cd", "ab"]) is None
    assignment.hear(1, {"a": 100.0, "b": 100.0})
    assignment.hear(0, {"c": 10.0, "d": 10.0})
    assert assignment.rebalance(2 * REST - 1, ["cd", "ab"]) is None
    assert assignment.rebalance(2 * REST, ["cd", "ab"]) == Move("a", 1, 0, 3)
    assignment.hear(0, {"c": 10.0, "d": 10.0, "a": 100.0})
    assignment.hear(1, {"b": 100.0})
    assert assignment.rebalance(5 * REST, ["acd", "b"]) is None  # not worth it


def test_until_a_round_is_over_who_moves_belongs_where_its_ends_are_awaited():
    assignment = Assignment(2)
    for client in "ab":
        assignment.places[client] = 0
    assignment.hear(0, {"a": 100.0, "b": 100.0})
    assert assignment.rebalance(0, ["ab", ""]) is None
    move = assignment.rebalance(REST, ["ab", ""], at_once=False)
    assert move == Move("a", 0, 1, 1)
    assert assignment.place("a") == 0
    assert assignment.hear_of(0, move) == []
    assert assignment.hear_of(0, move) == []  # said again, it changes nothing
    assert assignment.place("a") == 1
    assert assignment.rebalance(2 * REST, ["b", ""]) is None  # what it brings counts there already


def test_who_dialled_its_replica_by_itself_is_not_moved_as_it_would_come_back():
    assignment = Assignment(2)
    assignment.hear(1, {"a": 100.0, "b": 90.0})
    for step in (0, REST):
        assert assignment.rebalance(step, ["", "ab"]) is None
    assert assignment.place("b") == 1  # now it has come by rank 0
    assert assignment.rebalance(REST, ["", "ab"]) == Move("b", 1, 0, 1)


def test_who_is_moved_and_comes_back_by_itself_belongs_there_and_is_not_moved_again():
    assignment = Assignment(2)
    assignment.places |= {"a": 1, "b": 1}
    assignment.hear(1, {"a": 100.0, "b": 100.0})
    assert assignment.rebalance(0, ["", "ab"]) is None
    assert assignment.rebalance(REST, ["", "ab"]) == Move("a", 1, 0, 1)
    assert assignment.hear_of(1, Move("a", 0, 1, 1)) == [(0, Move("a", 0, 1, 1))]  # asks for it
    assert assignment.place("a") == 0
    assert assignment.hear_of(1, Move("a", 0, 1, 1)) == [(0, Move("a", 0, 1, 1))]
    assert assignment.hear_of(0, Move("a", 0, 1, 1)) == [(rank, Move("a", 0, 1, 2)) for rank in (0, 1)]  # lets go of it
    assignment.hear(1, {"a": 100.0, "b": 100.0})
    assert assignment.rebalance(2 * REST, ["", "ab"]) == Move("b", 1, 0, 3)
    assignment.hear(0, {"b": 1.0})
    assert assignment.rebalance(3 * REST, ["b", "a"]) is None
    assert assignment.place("a") == 1  # now it has come by rank 0
    assert assignment.rebalance(3 * REST, ["b", "a"]) is None  # which would spread nothing


def test_a_word_that_rests_on_an_older_decision_changes_nothing():
    assignment = Assignment(3)
    assignment.places["a"] = 0
    there, back = assignment.decide("a", 0, 1), assignment.decide("a", 1, 0)
    assert assignment.hear_of(0, there) == []  # lets go of it at last
    assert assignment.place("a") == 0
    for rank, word in ((2, Move("a", 1, 2, 1)), (1, Move("a", 1, 2, 1)), (0, Move("b", 0, 2))):
        assert assignment.hear_of(rank, word) == []
    assert assignment.place("a") == 0
    assert assignment.hear_of(1, back) == []
    assert assignment.hear_of(0, Move("a", 0, 2, 2)) == [(rank, Move("a", 0, 2, 3)) for rank in range(3)]
    assert assignment.place("a") == 2


def test_a_client_that_never_comes_weighs_nothing_after_a_while():
    assignment = Assignment(2)
    assignment.hear(0, {"a": 10.0})
    assert assignment.place("never", 0.0) == 1
    assert [assignment.place(name, COMING - 1) for name in "bc"] == [0, 1]  # it is still expected
    assignment.hear(0, {"a": 10.0, "b": 10.0})
    assignment.hear(1, {"c": 10.0})
    assert assignment.place("d", COMING) == 1
    assignment.hear(1, {"c": 10.0, "d": 10.0})
    assert assignment.place("never", 2 * COMING) == 1  # it comes after all
    assert assignment.place("e", 2 * COMING) == 0


def test_replicas_meet_after_so_many_steps_and_at_the_end():
    meetings = Meetings(every=4, last=10)
    assert [step for step in range(10) if meetings.meets_at(step)] == [3, 7, 9]
    assert [Meetings().last_of(step) for step in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": 2}, "replicas has no say"),
        ({"mode": "async", "sync": "4"}, "sync has no say"),
        ({"restarts": 1}, "restarts has no say"),
        ({"mode": "hierarchical", "sync": "often"}, "must be step, or a number"),
        ({"mode": "hierarchical", "adapters": "per-client", "sync": "2"}, "leave it at step"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(values, said):
    with pytest.raises(ConfigError, match=said):
        build_config({"model": "m"} | values)
