"""Whose turn it is: in order, so many at a time, within the room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from client_ends.proxy.turns import Full, Turn, Turns


class Worker:
    """A thread that has a turn until it is told to leave it."""

    def __init__(self, turns: Turns, tokens: int) -> None:
        self.turns, self.turn = turns, turns.queue(tokens)
        self.has_it, self.over, self.wanted = threading.Event(), threading.Event(), None
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self.turns.taken(self.turn) as self.wanted:
            self.has_it.set()
            assert not self.wanted or self._leave.wait(30)
        self.over.set()

    @property
    def is_next(self) -> bool:
        """Whether it has its turn as soon as its thread runs; of one that has none yet."""
        with self.turns._changed:
            return self.turns._is_next(self.turn)

    def leave(self) -> None:
        self._leave.set()
        assert self.over.wait(30)


def test_in_the_order_in_which_they_came_and_so_many_at_a_time() -> None:
    turns = Turns(2, None, 2)
    workers = [Worker(turns, 10) for _ in range(4)]
    with pytest.raises(Full):
        turns.queue(1)
    assert workers[0].has_it.wait(30)
    assert workers[1].has_it.wait(30)
    assert not workers[2].is_next
    workers[1].leave()
    assert workers[2].has_it.wait(30)
    assert not workers[3].is_next
    turns.call_off(workers[3].turn)
    assert workers[3].over.wait(30)
    assert workers[3].wanted is False
    workers[0].leave()
    workers[2].leave()
    assert turns.wait_until_idle(30)


def test_who_does_not_fit_waits_and_nobody_passes_it() -> None:
    turns = Turns(8, 100, 8)
    first, large, small = (Worker(turns, tokens) for tokens in (60, 50, 10))
    assert first.has_it.wait(30)
    assert not large.is_next
    assert not small.is_next
    first.leave()
    assert large.has_it.wait(30)
    assert small.has_it.wait(30)
    large.leave()
    small.leave()
    alone = Worker(turns, 500)  # else it would wait for ever; the trunk says what becomes of it
    assert alone.has_it.wait(30)
    alone.leave()


def aside(work: Callable[[], Any]) -> tuple[threading.Event, list[Any]]:
    done, found = threading.Event(), []

    def run() -> None:
        found.append(work())
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done, found


def test_who_outgrows_the_room_waits_for_the_oldest() -> None:
    turns = Turns(8, 100, 8)
    old, young = Worker(turns, 40), Worker(turns, 40)
    assert old.has_it.wait(30)
    assert young.has_it.wait(30)
    assert turns.grow(young.turn, 60)
    assert turns.grow(old.turn, 90)  # the oldest never waits
    done, found = aside(lambda: turns.grow(young.turn, 61))
    while not young.turn.waits:
        assert not done.is_set()
    late = Worker(turns, 1)
    assert turns.grow(old.turn, 99)
    assert not late.is_next  # not before who waits amid its answer
    old.leave()
    assert done.wait(30)
    assert found == [True]
    assert late.has_it.wait(30)
    late.leave()
    young.leave()


def test_who_is_called_off_while_it_waits_hears_it() -> None:
    turns = Turns(8, 100, 8)
    old, young = Worker(turns, 60), Worker(turns, 40)
    assert old.has_it.wait(30)
    assert young.has_it.wait(30)
    done, found = aside(lambda: turns.grow(young.turn, 41))
    while not young.turn.waits:
        assert not done.is_set()
    turns.call_off_all()
    assert done.wait(30)
    assert found == [False]
    assert turns.grow(old.turn, 61) is False
    old.leave()
    young.leave()


def test_a_turn_is_called_off_once_and_for_all() -> None:
    turns = Turns(1, None, 1)
    turn: Turn = turns.queue(1)
    turns.call_off(turn)
    with turns.taken(turn) as wanted:
        assert not wanted
    assert turns.wait_until_idle(0)
