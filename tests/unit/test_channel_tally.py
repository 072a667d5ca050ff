"""What a heartbeat says should have come, against what has."""

from __future__ import annotations

import random

import pytest

from client_ends.retrying import _BASE, _MOST, pause_before
from splitfl.channel.tally import Tally
from splitfl.errors import SealError
from splitfl.protocol.messages import Heartbeat


def heard(tally: Tally, control: int, records: int, come: int, now: float) -> None:
    tally.heard += 1
    tally.check(Heartbeat(0.0, control, records), come, now)


def test_a_control_message_that_is_missing_is_noticed_at_the_next_heartbeat():
    tally = Tally(overdue=60.0)
    tally.heard = 3
    heard(tally, 3, 0, 0, 0.0)
    heard(tally, 4, 0, 0, 5.0)
    with pytest.raises(SealError, match="6 control messages were sent, 5 have come"):
        heard(tally, 6, 0, 0, 10.0)


def test_who_does_not_say_is_not_held_to_it():
    tally = Tally(overdue=60.0)
    tally.heard = 3
    heard(tally, 0, 0, 0, 0.0)


def test_records_may_be_under_way_as_long_as_some_come():
    tally = Tally(overdue=60.0)
    for number in range(100):
        heard(tally, 0, 50 + number, number, 5.0 * number)
    for now in (500.0, 530.0, 554.0):
        heard(tally, 0, 150, 99, now)
    with pytest.raises(SealError, match="150 records were sent, 99 have come, and no more for 60 s"):
        heard(tally, 0, 150, 99, 556.0)


def test_a_long_silence_is_none_where_nothing_is_owed():
    tally = Tally(overdue=60.0)
    heard(tally, 0, 7, 7, 0.0)
    heard(tally, 0, 7, 7, 1000.0)
    heard(tally, 0, 8, 7, 1005.0)
    heard(tally, 0, 8, 7, 1059.0)
    with pytest.raises(SealError):
        heard(tally, 0, 8, 7, 1061.0)


def test_attempts_to_connect_back_off_with_full_jitter():
    random.seed(0)
    for attempt in (0, 1, 3, 6, 100):
        most = min(_MOST, _BASE * 2**attempt)
        pauses = [pause_before(attempt) for _ in range(400)]
        assert 0 <= min(pauses) < 0.05 * most
        assert 0.95 * most < max(pauses) <= most
        assert sum(pauses) / len(pauses) == pytest.approx(most / 2, rel=0.15)
