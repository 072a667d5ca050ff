"""The relay knows where frames begin, whatever pieces they come in; and one cell of the matrix, for the fast suite."""

from __future__ import annotations

import random
import socket
import threading

from splitfl.protocol.messages import Heartbeat, StepDone, encode
from tests.faults.relay import HOST, Passing, Relay
from tests.faults.zmtp import Frame, Splitter

GREETING = bytes(range(64))


def frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body


BODIES = [b"", b"x" * 255, b"y" * 256, b"z" * 70_000]
STREAM = GREETING + b"".join(map(frame, BODIES))


def test_a_stream_falls_into_its_greeting_and_its_frames_however_it_comes():
    for seed in range(20):
        draw, splitter, rest, pieces = random.Random(seed), Splitter(), STREAM, []
        while rest:
            size = draw.choice([1, 2, 9, 64, 5000])
            pieces += splitter.take(rest[:size])
            rest = rest[size:]
        assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == GREETING
        assert [piece.body for piece in pieces if isinstance(piece, Frame)] == BODIES


def passing(message: Heartbeat | StepDone) -> Passing:
    (piece,) = Splitter().take(GREETING + frame(bytes(33) + encode(message)))[1:]
    assert isinstance(piece, Frame)
    return Passing(piece, False, "up", 0)


def test_heartbeats_are_known_by_their_size():
    assert passing(Heartbeat(1e9)).is_heartbeat
    assert passing(Heartbeat(1e9, 60_000, 60_000)).is_heartbeat
    assert not passing(StepDone(2, 1, 1, "continue")).is_heartbeat
    assert not passing(StepDone(4, 1, 1, "leave")).is_heartbeat


def test_what_is_delayed_comes_whole_after_what_was_sent_later_on_the_other_connection():
    echoes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    control, data = (listener.getsockname()[1] for listener in echoes)
    relay = Relay(control, data)
    try:
        relay.delay(data=0.5)
        near = {port: socket.create_connection((HOST, port)) for port in (data, control)}
        far = {listener.getsockname()[1]: listener.accept()[0] for listener in echoes}
        came: list[tuple[int, bytes]] = []

        def take(port: int) -> None:
            with far[port].makefile("rb") as stream:
                came.append((port, stream.read(len(STREAM))))

        takers = [threading.Thread(target=take, args=(port,), daemon=True) for port in far]
        for one in takers:
            one.start()
        for port in (data, control):
            near[port].sendall(STREAM)
        for one in takers:
            one.join(20)
        assert came == [(control, STREAM), (data, STREAM)]
    finally:
        relay.close()
        for one in (*near.values(), *far.values(), *echoes):
            one.close()
