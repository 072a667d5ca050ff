"""Sessions of one client that are lost amid a round: each comes back to its own."""

from __future__ import annotations

import pytest

from server_trunk.ledger import Ledger, Part
from server_trunk.rounds import Rounds


def two_lost() -> Rounds:
    """Both sessions of client ``a``, of weights 3 and 5, are lost amid a round of ``b``."""
    rounds = Rounds(steps=1, deadline=5.0, on_loss="wait")
    here = {"a1": "a", "a2": "a", "b1": "b"}
    targets = {"a1": 3, "a2": 5, "b1": 2}
    rounds.count(Ledger(0, {name: Part(name, name[0], targets=count) for name, count in targets.items()}), here)
    rounds.open(0, here, stay=list(here))
    rounds.whole("b1", 1.0)
    rounds.lose("a1", 2.0)
    rounds.lose("a2", 3.0)
    return rounds


@pytest.mark.parametrize(("replaces", "weights"), [(("a2", "a1"), (5, 3)), (("", ""), (3, 5)), (("b1", "a2"), (3, 5))])
def test_two_lost_sessions_of_one_client_come_back_with_the_weight_of_each(replaces, weights):
    rounds = two_lost()
    for session, stands_for, weight in zip(("a3", "a4"), replaces, weights, strict=True):
        assert rounds.waits_for("a")
        assert not rounds.is_gathered
        assert rounds.returns(session, "a", holds=True, replaces=stands_for) == weight
    assert not rounds.waits_for("a")
    for session in ("a3", "a4"):
        rounds.whole(session, 4.0)
    assert rounds.is_gathered
    assert rounds.weights == {"b1": 2} | dict(zip(("a3", "a4"), weights, strict=True))


def test_each_is_given_up_in_its_own_time():
    rounds = two_lost()
    assert rounds.wake(4.0) == 3.0
    assert rounds.give_up(7.0) == ["a"]
    assert rounds.waits_for("a")
    assert rounds.give_up(8.0) == ["a"]
    assert not rounds.waits_for("a")
    assert rounds.is_gathered
