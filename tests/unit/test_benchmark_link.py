"""The benchmarks' link: it changes no byte, its delay and its rate are what was asked for, judged one setting against another."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.link import Link, host_of, round_trip
from benchmarks.relay import free_port


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = connection.recv(1 << 18)
        assert chunk, "the connection broke"
        data += chunk
    return data


def _echo(listener: socket.socket) -> None:
    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while chunk := connection.recv(1 << 18):
                connection.sendall(chunk)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Link, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        port = free_port()
        with Link({port: listener.getsockname()[1]}, links=2) as link:
            yield link, port


def _connect(port: int, link: int = 0) -> socket.socket:
    connection = socket.create_connection((host_of(link), port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _seconds(connection: socket.socket, payload: bytes) -> float:
    """From the first byte's sending to the last byte's return."""
    began = time.perf_counter()
    threading.Thread(target=connection.sendall, args=(payload,), daemon=True).start()
    _read(connection, len(payload))
    return time.perf_counter() - began


def test_bytes_pass_unchanged_and_are_counted_by_link_and_direction(world):
    link, port = world
    link.shape(**round_trip(2, 400))
    payload = os.urandom(3 << 20)
    before = link.carried()
    with _connect(port, 1) as connection:
        threading.Thread(target=connection.sendall, args=(payload,), daemon=True).start()
        assert _read(connection, len(payload)) == payload
    after = link.carried()
    assert [b - a for a, b in zip(before[1], after[1], strict=True)] == [len(payload)] * 2
    assert before[0] == after[0]


def test_delay_and_rate_are_those_asked_for(world):
    link, port = world
    with _connect(port) as connection:
        link.shape(**round_trip(40, 1000))
        near = min(_seconds(connection, b"x") for _ in range(5))
        link.shape(**round_trip(160, 1000))
        far = min(_seconds(connection, b"x") for _ in range(5))
        assert far / near == pytest.approx(4, rel=0.25)
        link.shape(rate=16e6)
        fast = min(_seconds(connection, bytes(1 << 21)) for _ in range(3))
        link.shape(rate=4e6)
        slow = min(_seconds(connection, bytes(1 << 21)) for _ in range(3))
        assert slow / fast == pytest.approx(4, rel=0.25)


def test_what_is_under_way_is_not_limited_by_the_delay(world):
    """No stop-and-wait: four times the bytes of one round trip take one round trip and their own time."""
    link, port = world
    with _connect(port) as connection:
        link.shape(delay=0.1, rate=20e6)
        one = min(_seconds(connection, bytes(1 << 19)) for _ in range(3))
        four = min(_seconds(connection, bytes(1 << 21)) for _ in range(3))
        assert four / one < 2


def test_connections_of_a_link_share_its_rate_in_turns(world):
    link, port = world
    link.shape(rate=8e6)
    with _connect(port) as bulk, _connect(port) as small:
        done: list[float] = []

        def send() -> None:
            _seconds(bulk, bytes(4 << 20))
            done.append(time.perf_counter())

        thread = threading.Thread(target=send)
        thread.start()
        time.sleep(0.05)
        _seconds(small, bytes(1 << 16))
        overtook = time.perf_counter()
        thread.join()
        assert overtook < done[0]


def test_a_connection_that_ends_on_one_side_ends_on_the_other(world):
    link, port = world
    link.shape(**round_trip(1, 1000))
    listener = socket.create_server(("127.0.0.1", 0))
    port = free_port()
    with listener, Link({port: listener.getsockname()[1]}):
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        behind, _ = listener.accept()
        with behind:
            behind.settimeout(10)
            connection.sendall(b"last words")
            connection.close()
            assert _read(behind, 10) == b"last words"
            assert behind.recv(1) == b""
