"""What becomes of the leader's sequences becomes of the followers', in the same order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from server_trunk.sharding.kept import FollowedSequences, LedSequence, Notes
from splitfl.parts.cached_attention import KeptSequence

DOES = st.sampled_from(["new", "write", "copy", "crop", "drop", "say"])
ACTIONS = st.lists(st.tuples(DOES, st.integers(0, 9), st.integers(0, 9)))


def write(sequence: KeptSequence, values: torch.Tensor) -> None:
    """As a run of the trunk does, in one layer."""
    rows = values[None, None, :, None].expand(1, 2, -1, 3)
    sequence.append(0, rows, -rows)


def held(sequence: KeptSequence) -> list[float]:
    """What counts of it."""
    keys, _ = sequence.append(0, torch.empty(1, 2, 0, 3), torch.empty(1, 2, 0, 3))
    return list(keys[0, 0, :, 0])


@given(ACTIONS)
def test_followers_hold_what_the_leader_holds(actions: list[tuple[str, int, int]]) -> None:
    notes, follower = Notes(), FollowedSequences()
    mine: list[LedSequence] = []
    drawn = 0.0
    for what, which, number in actions:
        if what == "new" or not mine:
            mine.append(LedSequence(notes))
        one = mine[which % len(mine)]
        if what == "write":
            # What it writes a rank is told with the command; it counts once the leader says so, with the next one.
            values = torch.arange(drawn, drawn + number + 1)
            drawn += number + 1
            follower.follow(notes.take())
            for sequence in (one, follower[one.number]):
                write(sequence, values)
            one.commit(len(values))
        elif what == "copy":
            mine.append(one.copy(min(number, one.length)))
        elif what == "crop":
            one.truncate(min(number, one.length))
        elif what == "drop":
            mine.remove(one)
        else:
            follower.follow(notes.take())
        del one
    follower.follow(notes.take())
    for sequence in mine:
        assert held(follower[sequence.number]) == held(sequence)
    assert len(follower) == len(mine)
