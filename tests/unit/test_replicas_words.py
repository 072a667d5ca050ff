"""What replicas say to one another, as bytes."""

from __future__ import annotations

import pytest

from server_trunk.replicas.words import (
    Bye,
    Close,
    Drain,
    GoBack,
    Grant,
    Move,
    Phase,
    Presence,
    State,
    Stays,
    Stop,
    StopAsked,
    WaitedFor,
    decode,
    encode,
)
from splitfl.errors import RemoteProtocolError


def test_words_survive_the_way():
    words = [
        State(3, Phase.WHOLE, 7, 1, 2, {"a": 3}, 4, None, ("a", "b")),
        Presence({"a": 1.5, "b": 0.0}, ("a", "b"), ("c",), True),
        StopAsked(),
        Grant(4),
        WaitedFor(),
        Stays("a", 2),
        Move("a", 0, 2, 5),
        Close(5, True, {"a": 9}, 3),
        Close(5, True, {"a": 9}, 3, Move("a", 0, 2)),
        GoBack(3),
        Drain(),
        Stop(True),
        Bye(),
    ]
    assert [decode(encode(word)) for word in words] == words
    assert decode(encode(words[0])).phase is Phase.WHOLE


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x91\x63", b"\x91\x00", b"\x98\x00\x00\x09\x00\x00\x00\x00\x00"])
def test_what_is_no_word_is_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode(data)
