"""Who was lost and may come again: a run that ends with its clients is not over before."""

from __future__ import annotations

import time

import pytest

from server_trunk import absent
from server_trunk.absent import RETURN, Absent
from tests.unit.trunkloop_world import Desk, forward, honest
from tests.world import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def test_a_return_is_waited_for_so_long_and_no_longer():
    away = Absent()
    assert (away.clients(0.0), away.wake(0.0)) == (set(), None)
    away.lost("a", 10.0)
    away.lost("b", 20.0)
    away.lost("c", 30.0)
    assert (away.clients(30.0), away.wake(30.0)) == ({"a", "b", "c"}, RETURN - 20.0)
    away.back("a")
    assert (away.clients(30.0), away.wake(30.0)) == ({"b", "c"}, RETURN - 10.0)
    assert (away.clients(20.0 + RETURN), away.wake(20.0 + RETURN)) == ({"c"}, 10.0)
    away.back("c")
    assert (away.clients(20.0 + RETURN), away.wake(20.0 + RETURN)) == (set(), None)


def test_the_loop_counts_whom_it_has_lost_until_they_come_again_or_it_is_too_late(model, tmp_path, monkeypatch):
    desk = Desk(model, tmp_path)
    desk.join("a")
    desk.run(("a", forward(0)))
    desk.run(*honest("a"))
    assert desk.presence[-1] == (1, True)
    desk.run(("a", "lost"))
    assert desk.presence[-1] == (1, True)
    desk.run(("a", "open"))
    desk.run(("a", None))
    assert desk.presence[-1] == (0, True)
    monkeypatch.setattr(absent, "RETURN", 0.05)
    desk.run(("a", "open"), ("a", "lost"))
    assert desk.presence[-1] == (1, True)
    deadline = time.monotonic() + 10
    while desk.presence[-1] != (0, True):
        assert time.monotonic() < deadline
        desk.loop._turn()  # sleeps until it is due


def test_a_lost_client_whose_part_is_held_is_one_client(model, tmp_path):
    desk = Desk(model, tmp_path, clients=2, on_loss="wait")
    desk.join("a", "b")
    desk.run(("a", forward(0)), ("b", forward(0)))
    desk.run(*honest("a"))
    desk.run(("b", "lost"))
    assert desk.presence[-1] == (2, False)


def test_a_run_taken_up_at_its_end_waits_for_those_who_have_not_heard(model, tmp_path):
    desk = Desk(model, tmp_path, last=1, first=1)
    desk.run(("a", "open"), ("a", None))
    assert desk.presence[-1] == (1, True)


def test_a_run_taken_up_after_the_last_data_ends_though_no_further_step_closes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(absent, "RETURN", 0.05)
    desk = Desk(model, tmp_path, first=3)
    deadline = time.monotonic() + 10
    while desk.presence[-1:] != [(0, False)]:  # nobody has come yet, who may after all
        assert time.monotonic() < deadline
        desk.loop.wake()
        desk.loop._turn()
    desk.run(("a", "open"), ("a", forward(0, step=3, grad=False)))
    assert desk.presence[-1] == (1, True)
    desk.run(("a", None))
    assert desk.presence[-1] == (0, True)


def test_a_run_taken_up_waits_for_those_who_have_yet_to_come_until_a_step_closes(model, tmp_path):
    desk = Desk(model, tmp_path, first=3)
    desk.run(("a", "open"), ("a", None))
    assert desk.presence[-1] == (1, True)
    desk.join("a")
    desk.run(("a", forward(0, step=3)))
    desk.run(*honest("a", step=3))
    desk.run(("a", None))
    assert desk.presence[-1] == (0, True)
