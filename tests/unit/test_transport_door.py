"""Strangers at the door: who is shut out, whose unfinished handshakes go, and what the kernel keeps away."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from splitfl.protocol.keys import Identity
from splitfl.transport.accept_filter import MOST, program, shut_out
from splitfl.transport.connections import Connections
from splitfl.transport.door import Door, excess, network_of
from splitfl.transport.refusals import RefusalLog
from splitfl.transport.zmq_server import ZmqServerTransport
from tests.unit.channel_world import linux, wait_until


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown address", "unknown address"),
    ],
)
def test_what_counts_as_one_address(address: str, network: str) -> None:
    assert network_of(address) == network


def test_an_address_that_knocks_too_often_is_shut_out_for_a_while_and_no_other() -> None:
    clock = Clock()
    door = Door(burst=3, rate=1.0, seconds=10.0, clock=clock)
    assert [door.knock("a") for _ in range(4)] == [True, True, True, False]
    assert door.blocked() == ["a"]
    assert door.knock("b")
    clock.now = 9.0
    assert not door.knock("a")
    clock.now = 10.0
    assert door.blocked() == []
    assert [door.knock("a") for _ in range(4)] == [True, True, True, False]


def test_who_knocks_within_the_rate_stays() -> None:
    clock = Clock()
    door = Door(burst=2, rate=1.0, clock=clock)
    for _ in range(50):
        assert door.knock("a")
        clock.now += 1.0


def test_few_addresses_are_remembered() -> None:
    door = Door(burst=1, addresses=10)
    for number in range(1000):
        assert door.knock(f"address {number}")
    assert len(door._left) == 10


def test_the_oldest_of_whoever_has_most_unfinished_handshakes_go() -> None:
    half_open = {1: "honest", 2: "flood", 3: "flood", 4: "other", 5: "flood", 6: "flood"}
    assert excess(half_open, 6) == []
    assert excess(half_open, 4) == [2, 3]
    assert set(excess(half_open, 3)) == {2, 3, 5}


def test_a_refusal_that_is_said_once() -> None:
    said: list[str] = []
    clock = Clock()
    log = RefusalLog(lambda who, code, text: said.append(text), clock=clock)
    for _ in range(4):
        log.refused("a", "a", "code", "a ticket", once=True)
        log.refused("b", "b", "code", "a ticket", once=True)
        log.refused("a", "a", "code", "a key")
    assert said.count("a ticket") == 2
    assert said.count("a key") == 4
    clock.now = 61.0
    log.refused("a", "a", "code", "a ticket", once=True)
    assert said[-1] == "a ticket (3 more refusals not shown)"


def test_a_subscriber_with_many_addresses_has_no_more_lines() -> None:
    said: list[str] = []
    log = RefusalLog(lambda who, code, text: said.append(text), clock=Clock())
    for number in range(100):
        log.refused(f"2001:db8::{number:x}", "who", "code", "a key")
    log.refused("2001:db8:0:1::1", "who", "code", "a key")
    assert len(said) == 5 + 1


def test_a_flood_is_said_however_many_keys_were_refused_before() -> None:
    said: list[str] = []
    transport = ZmqServerTransport(Identity.generate())
    transport.on_refused(lambda who, code, text: said.append(text))
    for _ in range(20):
        transport._refusals.refused("192.0.2.1", "192.0.2.1", "not-authorized", "a key")
    for _ in range(20):
        transport._flood("192.0.2.1", "192.0.2.1", "shut out")
        transport._flood("192.0.2.1", "192.0.2.1, a data connection", "a message without an end")
    assert [said.count(text) for text in ("a key", "shut out", "a message without an end")] == [5, 5, 5]
    transport.close(0)


def run(code: list[tuple[int, int, int, int]], packet: bytes) -> int:
    """A classic BPF machine, as far as these programs need one."""
    accumulator, at = 0, 0
    while True:
        opcode, true, false, k = code[at]
        at += 1
        if opcode == 0x20:
            accumulator = int.from_bytes(packet[k - 0xFFF00000 : k - 0xFFF00000 + 4], "big")
        elif opcode == 0x30:
            accumulator = packet[k - 0xFFF00000]
        elif opcode == 0x74:
            accumulator >>= k
        elif opcode == 0x15:
            at += true if accumulator == k else false
        elif opcode == 0x05:
            at += k
        else:
            return k


def packet(source: str) -> bytes:
    raw = socket.inet_pton(socket.AF_INET6 if ":" in source else socket.AF_INET, source)
    return b"\x60" + bytes(7) + raw + bytes(16) if ":" in source else b"\x45" + bytes(11) + raw + bytes(4)


def test_the_program_drops_who_it_names_and_nobody_else() -> None:
    code = program(["192.0.2.7", "2001:db8:1:2::/64", "10.0.0.1"])
    for source in ("192.0.2.7", "10.0.0.1", "2001:db8:1:2::9", "2001:db8:1:2:ffff::"):
        assert run(code, packet(source)) == 0, source
    for source in ("192.0.2.8", "10.0.0.2", "2001:db8:1:3::9", "2001:db9:1:2::9", "::ffff:192.0.2.7"):
        assert run(code, packet(source)) == 0xFFFFFFFF, source
    assert run(program([]), packet("192.0.2.7")) == 0xFFFFFFFF
    assert len(program([f"2001:db8:{number:x}::/64" for number in range(2 * MOST)])) <= 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a filter of Linux")
def test_the_kernel_keeps_an_address_away_and_lets_go_what_stands() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as before:
            accepted, _ = listener.accept()
            assert shut_out(listener, ["192.0.2.1", "127.0.0.1"])
            with pytest.raises(TimeoutError):
                socket.create_connection(("127.0.0.1", port), timeout=0.3)
            before.sendall(b"still here")
            assert accepted.recv(10) == b"still here"
            accepted.close()
        assert shut_out(listener, ["192.0.2.1"])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        assert shut_out(listener, [])


@linux
def test_what_has_been_read_of_a_connection_and_its_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
        connections = Connections()
        connection = connections.accepted(accepted.fileno())
        assert (connection.address, connection.port) == client.getsockname()
        client.sendall(bytes(5000))
        wait_until(lambda: len(accepted.recv(5000, socket.MSG_PEEK)) == 5000)
        assert connections.look()
        assert connection.held == 0, "what nobody has read is not held"
        accepted.recv(3000)
        connections.look()
        assert connection.held == 3000
        connection.handed_on = 1000
        assert connection.held == 2000
        connection.handed_on = 10**6  # frames of whoever had its number before, counted since
        connections.look()
        assert connection.held == 0
        assert connection.handed_on == 3000, "and what comes from now on is held again"
        assert connections.cut(connection)
        assert client.recv(1) == b""
        accepted.close()
        assert not connections.cut(connection), "its number may be another's by now"
        assert connections.gone(connection.number) is connection
        assert len(connections) == 0
        client.close()


@linux
def test_what_arrives_amid_a_look_is_not_taken_for_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()[:2]) as client:
        accepted, _ = listener.accept()
        connections = Connections()
        connection = connections.accepted(accepted.fileno())
        arrived = 0

        def arrive() -> None:
            nonlocal arrived
            client.sendall(bytes(5000))
            arrived += 5000
            wait_until(lambda: len(accepted.recv(arrived, socket.MSG_PEEK)) == arrived)

        class Interrupted(socket.socket):
            def getsockopt(self, *arguments: Any) -> Any:
                answer = super().getsockopt(*arguments)
                if socket.TCP_INFO in arguments:
                    arrive()
                return answer

        def interrupted(*arguments: Any) -> Any:
            answer = ask(*arguments)
            arrive()
            return answer

        ask = fcntl.ioctl
        monkeypatch.setattr(fcntl, "ioctl", interrupted)
        monkeypatch.setattr("splitfl.transport.connections.socket.socket", Interrupted)
        connections.look()
        assert arrived == 10_000
        assert connection.held == 0
        accepted.close()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a socket is no file descriptor")
def test_a_connection_that_was_gone_when_it_was_looked_at_touches_nobody() -> None:
    with socket.socket() as closed:
        number = os.dup2(closed.fileno(), 900)
    os.close(number)
    connections = Connections()
    connection = connections.accepted(number)
    assert connection.address == "unknown address"
    ours, other = socket.socketpair()
    with ours, other:
        os.dup2(ours.fileno(), number)  # it is somebody else's by now
        assert not connections.cut(connection)
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.recv(1)
        os.close(number)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_a_number_that_is_a_file_by_now_costs_no_descriptor(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            assert Connections().accepted(file.fileno()).address == "unknown address"
        assert len(os.listdir("/proc/self/fd")) == before
