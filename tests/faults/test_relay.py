"""The relay knows where frames begin, whatever pieces they come in; and one cell of the matrix, for the fast suite."""

from __future__ import annotations

import random

from splitfl.protocol.messages import Heartbeat, StepDone, encode
from tests.faults.relay import Passing
from tests.faults.zmtp import Frame, Splitter

GREETING = bytes(range(64))


def frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body


def test_a_stream_falls_into_its_greeting_and_its_frames_however_it_comes():
    bodies = [b"", b"x" * 255, b"y" * 256, b"z" * 70_000]
    stream = GREETING + b"".join(map(frame, bodies))
    for seed in range(20):
        draw, splitter, rest, pieces = random.Random(seed), Splitter(), stream, []
        while rest:
            size = draw.choice([1, 2, 9, 64, 5000])
            pieces += splitter.take(rest[:size])
            rest = rest[size:]
        assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == GREETING
        assert [piece.body for piece in pieces if isinstance(piece, Frame)] == bodies


def passing(message: Heartbeat | StepDone) -> Passing:
    (piece,) = Splitter().take(GREETING + frame(bytes(33) + encode(message)))[1:]
    assert isinstance(piece, Frame)
    return Passing(piece, False, "up", 0)


def test_heartbeats_are_known_by_their_size():
    assert passing(Heartbeat(1e9)).is_heartbeat
    assert passing(Heartbeat(1e9, 60_000, 60_000)).is_heartbeat
    assert not passing(StepDone(2, 1, 1, "continue")).is_heartbeat
    assert not passing(StepDone(4, 1, 1, "leave")).is_heartbeat
