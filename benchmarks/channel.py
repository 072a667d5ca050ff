"""What does the seal cost? Our channel against bare AES-256-GCM, plain ZeroMQ, CURVE and TLS 1.3 over TCP, on loopback.

One process sends, another takes, as fast as each way allows; the five alternate in every round, so that drift hits all alike,
and the figures are medians of the rounds' own ratios. The *bound* is what bare AES-256-GCM (one pass over the same buffer, as
each side makes one) and plain ZeroMQ allow one after the other: 1 / (1/a + 1/b). Then round trips: of 256 bytes, idle; of
a control message and of a tensor of 256 bytes in our channel while messages of 64 MiB flow in the same session. A small tensor
overtakes what is not sealed yet, not what the sockets have taken already; control has a connection of its own.

    python -m benchmarks.channel [--rounds 9] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.channel_peers import HEAD, MIB, run_peers
from benchmarks.report import emit, median_interval
from splitfl.channel.client import ClientChannel, OpenTerms
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity, PublicKey
from splitfl.protocol.messages import Enrol, Forward, Pause

SIZES = (64 * 1024, MIB, 16 * MIB, 64 * MIB)
_SMALL = 256

Burst = Callable[[memoryview, int], float]


class Bare:
    """AES-256-GCM on the buffer, nothing sent."""

    def __init__(self) -> None:
        self._aead, self._frame = AESGCM(os.urandom(32)), memoryview(bytearray(SIZES[-1] + 16))

    def burst(self, payload: memoryview, count: int) -> float:
        frame = self._frame[: len(payload) + 16]
        began = time.perf_counter()
        for number in range(count):
            self._aead.encrypt_into(number.to_bytes(12, "big"), payload, None, frame)
        return time.perf_counter() - began


class Zmq:
    """Whole frames, not copied on the way in."""

    def __init__(self, port: int, server_key: bytes | None = None) -> None:
        self._sock = zmq.Context.instance().socket(zmq.DEALER)
        if server_key is not None:
            pair = Identity.generate()
            self._sock.setsockopt(zmq.CURVE_SERVERKEY, server_key)
            self._sock.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.raw)
            self._sock.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
        self._sock.setsockopt(zmq.SNDHWM, 16)
        self._sock.connect(f"tcp://127.0.0.1:{port}")

    def burst(self, payload: memoryview, count: int) -> float:
        began = time.perf_counter()
        self._sock.send(HEAD.pack(count, len(payload)))
        for _ in range(count):
            self._sock.send(payload, copy=False)
        self._sock.recv()
        return time.perf_counter() - began

    def echo(self) -> float:
        began = time.perf_counter()
        self._sock.send(bytes(_SMALL))
        self._sock.recv()
        return time.perf_counter() - began


class Tls:
    """TLS 1.3 over one TCP connection."""

    def __init__(self, port: int, certificate: str) -> None:
        context = ssl.create_default_context(cadata=certificate)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        raw = socket.create_connection(("127.0.0.1", port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = context.wrap_socket(raw, server_hostname="localhost")
        cipher = self._sock.cipher()
        self.cipher = cipher[0] if cipher else ""

    def burst(self, payload: memoryview, count: int) -> float:
        began = time.perf_counter()
        self._sock.sendall(HEAD.pack(count, len(payload)))
        for _ in range(count):
            self._sock.sendall(payload)
        self._sock.recv(4)
        return time.perf_counter() - began

    def echo(self) -> float:
        began = time.perf_counter()
        self._sock.sendall(HEAD.pack(1, _SMALL) + bytes(_SMALL))
        self._sock.recv(4)
        return time.perf_counter() - began


class Ours:
    """A session of the channel. Answers are told apart by the number of what they answer."""

    def __init__(self, port: int, key: str, identity: Identity) -> None:
        self._events: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._opened = threading.Event()
        self._channel = ClientChannel.open(
            JoinString(PublicKey.parse(key), "127.0.0.1", port),
            identity,
            name="bench",
            libraries={},
            answer=lambda welcome: OpenTerms({}, (1, 1)),
            allocate=lambda message: (None, memoryview(bytearray(message.payload_bytes))),
            on_data=lambda message, payload: self._events.pop(message.micro)(),
            on_control=lambda message: self._opened.set(),
            on_lost=lambda error: None,
        )
        self.cipher = self._channel.opened.cipher

    def send(self, payload: memoryview, then: Callable[[], None] | None) -> None:
        """``then`` is called on the I/O thread when the answer is there; None wants none."""
        number, rows = next(self._numbers), len(payload) // 2
        if then is not None:
            self._events[number] = then
        message = Forward(-1, number, ((rows, 0),), 1, "bfloat16", "raw", False, False, True, ordinal=int(then is not None))
        self._channel.send(message, payload)

    def burst(self, payload: memoryview, count: int) -> float:
        done = threading.Event()
        began = time.perf_counter()
        for left in reversed(range(count)):
            self.send(payload, None if left else done.set)
        done.wait()
        return time.perf_counter() - began

    def echo(self) -> float:
        done = threading.Event()
        began = time.perf_counter()
        self.send(memoryview(bytes(_SMALL)), done.set)
        done.wait()
        return time.perf_counter() - began

    def barrier(self) -> float:
        """A control message and its answer: enrolled, and told that a step has opened."""
        self._opened.clear()
        began = time.perf_counter()
        self._channel.tell(Enrol())
        self._opened.wait()
        took = time.perf_counter() - began
        self._channel.tell(Pause())
        return took

    def close(self) -> None:
        self._channel.close()


def amid_flow(ours: Ours, payload: memoryview, trip: Callable[[], float], count: int) -> list[float]:
    """Round trips, seconds, while two large messages are always under way."""
    ended = threading.Event()
    flowing = threading.Semaphore(2)

    def flow() -> None:
        while not ended.is_set():
            flowing.acquire()
            ours.send(payload, flowing.release)

    thread = threading.Thread(target=flow, daemon=True)
    thread.start()
    trips = []
    for _ in range(count):
        time.sleep(0.005)
        trips.append(trip())
    ended.set()
    thread.join()
    for _ in range(2):
        flowing.acquire()
    return trips


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_ms": 1e3 * statistics.median(ordered), "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    identity = Identity.generate()
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    peers = context.Process(target=run_peers, args=(far,), daemon=True)
    peers.start()
    pipe.send(str(identity.public))
    where = pipe.recv()
    ours = Ours(*where["ours"], identity)
    tls = Tls(*where["tls"])
    plain, curve = Zmq(where["plain"]), Zmq(*where["curve"])
    kinds: dict[str, Burst] = {
        "aes_256_gcm": Bare().burst,
        "zeromq": plain.burst,
        "curve": curve.burst,
        "tls": tls.burst,
        "ours": ours.burst,
    }
    payload = memoryview(bytearray(os.urandom(MIB) * 64))
    names = list(kinds)
    rates: dict[int, dict[str, list[float]]] = {size: {name: [] for name in names} for size in SIZES}
    for number in range(args.rounds + 1):
        for size in SIZES:
            count = max(2, args.total * MIB // size)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds = kinds[name](payload[:size], count)
                if number:  # the first round warms up
                    rates[size][name].append(count * size / seconds / 1e9)
    echoes = {
        "zeromq": plain.echo,
        "curve": curve.echo,
        "tls": tls.echo,
        "ours, control": ours.barrier,
        "ours, a tensor": ours.echo,
    }
    trips: dict[str, list[float]] = {name: [] for name in echoes}
    for _ in range(args.echoes):
        for name, echo in echoes.items():
            trips[name].append(echo())
    amid = {
        "ours, control, amid 64 MiB messages": amid_flow(ours, payload, ours.barrier, args.echoes),
        "ours, a tensor, amid 64 MiB messages": amid_flow(ours, payload, ours.echo, args.echoes),
    }
    ours.close()
    pipe.send(None)
    peers.join(20)
    return {"rates": rates, "trips": trips | amid, "tls_cipher": tls.cipher, "cipher": ours.cipher}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--total", type=int, default=256, help="MiB of one measurement")
    parser.add_argument("--echoes", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.total, args.echoes = 1, 32, 20
    found = measure(args)
    rows: dict[str, Any] = {}
    print(f"{'GB/s':>10}{'AES-GCM':>10}{'ZeroMQ':>10}{'CURVE':>10}{'TLS 1.3':>10}{'ours':>10}{'of bound':>10}{'x CURVE':>10}")
    for size, by_name in found["rates"].items():
        rounds = list(zip(*by_name.values(), strict=True))
        shares = [e * (1 / a + 1 / b) for a, b, _, _, e in rounds]
        times = [e / c for _, _, c, _, e in rounds]
        row = {name: statistics.median(values) for name, values in by_name.items()}
        rows[f"{size // 1024}_kib"] = row | {
            "share_of_bound": median_interval(shares),
            "times_curve": median_interval(times),
        }
        cells = [*row.values(), statistics.median(shares), statistics.median(times)]
        print(f"{size // 1024:>6} KiB" + "".join(f"{cell:>10.2f}" for cell in cells))
    latency = {name: quantiles(trips) for name, trips in found["trips"].items()}
    for name, trip in latency.items():
        print(f"round trip of {_SMALL} bytes, {name}: p50 {trip['p50_ms']:.3f} ms, p99 {trip['p99_ms']:.3f} ms")
    large = rows[f"{16 * 1024}_kib"]
    result = {
        "share_of_bound_16mib": large["share_of_bound"][0],
        "times_curve_16mib": large["times_curve"][0],
        "share_of_bound_1mib": rows["1024_kib"]["share_of_bound"][0],
        "share_of_bound_64mib": rows[f"{64 * 1024}_kib"]["share_of_bound"][0],
        "small_amid_64mib_p50_ms": latency["ours, control, amid 64 MiB messages"]["p50_ms"],
        "gb_per_s": rows,
        "latency": latency,
        "cipher": found["cipher"],
        "tls_cipher": found["tls_cipher"],
    }
    emit(result, as_json=args.json)


if __name__ == "__main__":
    main()
