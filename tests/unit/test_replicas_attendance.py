"""Whether anybody of a run over replicas is left: who moves is never missed, and nobody waits for who is back elsewhere."""

from __future__ import annotations

import pytest

from server_trunk.replicas.attendance import Attendance
from server_trunk.replicas.words import Presence
from tests.unit.trunkloop_world import Desk, forward, honest
from tests.world import tiny_llama

HERE, AWAITED, NOBODY = Presence(here=("a",), trained=True), Presence(awaited=("a",), trained=True), Presence(trained=True)


def over(*said: tuple[int, Presence]) -> bool:
    attendance = Attendance(2)
    for rank, presence in said:
        attendance.hear(rank, presence)
    return attendance.is_over


def test_a_run_is_over_when_a_step_has_closed_and_nobody_is_left():
    assert not over()
    assert not over((0, Presence()), (1, Presence(here=("a",))), (1, Presence()))
    assert over((0, NOBODY))
    assert not over((0, NOBODY), (1, HERE))
    assert not over((0, NOBODY), (1, AWAITED))
    assert over((0, NOBODY), (1, HERE), (1, NOBODY))


def test_who_was_sent_away_is_awaited_until_it_has_been_seen_elsewhere():
    moved = [(0, HERE), (0, AWAITED), (1, HERE), (1, NOBODY)]
    assert [over(*moved[:count]) for count in range(1, 5)] == [False, False, False, True]
    assert over(*moved, (0, AWAITED))  # said for another reason
    assert over((0, HERE), (1, HERE), (0, AWAITED), (1, NOBODY))  # it is seen there first


def test_who_is_lost_once_more_where_it_was_lost_before_is_awaited():
    lost = [(0, AWAITED), (1, HERE), (1, NOBODY), (0, HERE), (0, AWAITED)]
    assert [over(*lost[:count]) for count in range(3, 6)] == [True, False, False]
    assert not over((0, AWAITED), (1, HERE), (1, AWAITED))


def test_each_awaited_client_counts():
    both = Presence(awaited=("a", "b"), trained=True)
    assert not over((0, both), (1, HERE), (1, NOBODY))
    assert over((0, both), (1, HERE), (1, NOBODY), (1, Presence(here=("b",))), (1, NOBODY))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def test_a_replica_awaits_whom_it_has_sent_away(model, tmp_path, monkeypatch):
    """Else a run whose other clients leave just then would end before the next replica has said that it waits for that one."""
    desk = Desk(model, tmp_path)
    desk.join("a")
    desk.run(("a", forward(0)))
    leaving = [["a"]]
    monkeypatch.setattr(desk.loop._steps, "departures", lambda: leaving.pop() if leaving else [])
    desk.run(*honest("a"))
    assert desk.outlet.ended["a"].code == "moved"
    desk.run(("a", None))
    assert desk.presence[-1] == (1, True)
