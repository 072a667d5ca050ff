"""What do strangers cost those who may be here? A flood at the doors of a server that serves.

Four honest clients train while connections that nobody asked for come in at a steady rate, on both endpoints, from half-open
handshakes to handshakes with keys that are on no list, each with its share of junk. The attacker's own CPU is not the server's
fault, so the same flood at the same rate first hits a process that accepts and closes: what the clients get then is what the
other figure is held against. Rounds alternate.

    python -m benchmarks.flood [--connections 10000] [--junk 1000] [--seconds 60] [--pairs 3] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import struct
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.crowd import Site, run_clients, summary
from benchmarks.report import emit
from benchmarks.stage import quiet

CLIENTS = 4
#: Connections of the flood that stay open at a time; the oldest is closed first.
OPEN = 400
#: One connection in so many is a whole CURVE handshake, by libzmq, with a key of its own.
STRANGERS = 10


# --- the flood ------------------------------------------------------------------------------------------------------------------


def _greeting(mechanism: bytes) -> bytes:
    """ZMTP 3.1 (RFC 37)."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def _command(body: bytes) -> bytes:
    return struct.pack(">BB", 4, len(body)) + body


def _curve_hello() -> bytes:
    """A HELLO (RFC 26) whose box does not open: the server has to try."""
    return _command(b"\x05HELLO\x01\x00" + bytes(72) + os.urandom(32 + 8 + 80))


def _plain_hello() -> bytes:
    """A ticket that nobody was given: the server has to look."""
    ticket = os.urandom(32).hex().encode()
    return _command(b"\x05HELLO\x07splitfl" + bytes([len(ticket)]) + ticket)


#: What a connection begins with, before its junk.
_OPENINGS: tuple[Callable[[], bytes], ...] = (
    lambda: b"",
    lambda: os.urandom(64),
    lambda: _greeting(b"CURVE"),
    lambda: _greeting(b"CURVE") + _curve_hello(),
    lambda: _greeting(b"PLAIN") + _plain_hello(),
    lambda: _greeting(b"PLAIN") + _plain_hello() + b"\x01\x00" * 512,  # frames of a message without an end
)


def flood(pipe: Connection, ports: Sequence[int], connections: int, junk: int, begin: float, seconds: float, key: bytes) -> None:
    """Worker: ``connections`` to ``ports``, evenly over ``seconds``, with ``junk`` bytes in all; sends what came of it."""
    import resource

    import zmq

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * OPEN)
    share = os.urandom(junk // max(1, connections - -(-connections // STRANGERS)))
    held: deque[Any] = deque()
    made = refused = sent = 0
    for number in range(connections):
        due = begin + seconds * number / connections
        if (rest := due - time.monotonic()) > 0:
            time.sleep(rest)
        port = ports[number % len(ports)]
        if number % STRANGERS == 0:
            held.append(_stranger(context, ports[0], key))
            made += 1
        else:
            try:
                # No longer: who is shut out by the kernel is not answered, and the flood keeps its rate.
                sock = socket.create_connection(("127.0.0.1", port), timeout=0.003)
            except OSError:
                refused += 1
                continue
            made += 1
            held.append(sock)
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # hung up on, or full
                sent += sock.send(_OPENINGS[number // len(ports) % len(_OPENINGS)]() + share)
        while len(held) > OPEN:
            held.popleft().close()
    took = time.monotonic() - begin
    for one in held:
        one.close()
    context.destroy(0)
    pipe.send({"connections": made, "refused": refused, "junk_bytes": sent, "seconds": round(took, 2)})


def _stranger(context: Any, port: int, key: bytes) -> Any:
    """A CURVE client with a key of its own, on no list."""
    import zmq

    sock = context.socket(zmq.DEALER)
    public, secret = zmq.curve_keypair()
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.RECONNECT_IVL, -1),
        (zmq.CURVE_SERVERKEY, key),
        (zmq.CURVE_PUBLICKEY, public),
        (zmq.CURVE_SECRETKEY, secret),
    ):
        sock.setsockopt(option, value)
    sock.connect(f"tcp://127.0.0.1:{port}")
    return sock


def dummy(pipe: Connection) -> None:
    """Worker: accepts and closes, on two ports; sends them."""
    import selectors

    listeners = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2)]
    pipe.send([listener.getsockname()[1] for listener in listeners])
    ready = selectors.DefaultSelector()
    for one in (*listeners, pipe):
        ready.register(one, selectors.EVENT_READ)
    while True:
        for selected, _ in ready.select():
            if selected.fileobj is pipe:
                return
            listener: Any = selected.fileobj
            with contextlib.suppress(OSError):
                listener.accept()[0].close()


# --- what is measured -----------------------------------------------------------------------------------------------------------


class _Memory:
    """Resident memory of the server, from ``/proc`` of this machine or by psutil, MiB."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._process = psutil.Process(pid)

    def now(self) -> float:
        return float(self._process.memory_info().rss) / 2**20


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from splitfl.protocol.join import JoinString

    with tempfile.TemporaryDirectory() as work:
        site = Site(Path(work), CLIENTS, 2048)
        rounds: list[dict[str, Any]] = []
        try:
            join = JoinString.parse(site.desk.recv())
            _, pipe = site.start(run_clients, str(join), site.keys, 0)
            pipe.recv()
            _, door = site.start(dummy)
            targets = {"dummy": door.recv(), "server": [join.port, _data_port(site.server.pid, join.port)]}
            memory = _Memory(site.server.pid)
            for pair in range(args.pairs):
                for target in ("dummy", "server") if pair % 2 == 0 else ("server", "dummy"):
                    rounds.append(_round(target, targets[target], join.key.raw, args, memory, pipe, site))
        finally:
            site.stop()
        log = site.log.read_text().splitlines()
        refusals = Counter(event["code"] for event in map(json.loads, log) if event["event"] == "refused")
    by = {target: [each for each in rounds if each["target"] == target] for target in ("dummy", "server")}
    ratios = [
        hit["tokens_per_second"] / max(1e-9, spared["tokens_per_second"])
        for hit, spared in zip(by["server"], by["dummy"], strict=True)
    ]
    return {
        "clients": CLIENTS,
        "connections": args.connections,
        "junk_bytes": args.junk * 10**6,
        "rounds": rounds,
        "kept": round(statistics.median(ratios), 3),
        "kept_of_each_pair": [round(ratio, 3) for ratio in ratios],
        "memory_growth_mib": round(max(each["memory_growth_mib"] for each in by["server"]), 1),
        "refusals_logged": dict(refusals),
        "errors": sum(each["errors"] for each in rounds),
    }


def _data_port(pid: int, control: int) -> int:
    """The other port that the server listens at, as whoever scans it finds it."""
    import psutil

    listening = {each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    (found,) = listening - {control}
    return int(found)


def _round(
    target: str, ports: Sequence[int], key: bytes, args: argparse.Namespace, memory: _Memory, honest: Connection, site: Site
) -> dict[str, Any]:
    """The flood at one of the two, and what the honest clients get meanwhile."""
    before = most = memory.now()
    begin = time.monotonic() + 2
    process, pipe = site.start(flood, ports, args.connections, args.junk * 10**6, begin, args.seconds, key)
    honest.send(("steps", begin, begin + args.seconds))
    while not honest.poll(0.2):
        most = max(most, memory.now())
    served = honest.recv()
    came = pipe.recv()
    process.join(30)
    result = summary(served, args.seconds) | {"target": target, "flood": came, "memory_growth_mib": round(most - before, 1)}
    for each in served:
        for error in each.errors[:1]:
            print(f"  {error}", flush=True)
    print(
        f"{target:7} {result['tokens_per_second']:8.0f} tokens/s  {came['connections']} connections ({came['refused']} refused), "
        f"{came['junk_bytes'] / 1e6:.0f} MB of junk in {came['seconds']:.0f} s  server {result['memory_growth_mib']:+.1f} MiB  "
        f"errors {result['errors']}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000, help="of each round")
    parser.add_argument("--junk", type=int, default=1000, help="of each round, MB")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each round")
    parser.add_argument("--pairs", type=int, default=3, help="of rounds: one at the dummy, one at the server")
    parser.add_argument("--quick", action="store_true", help="500 connections, 20 MB, 5 s, once: shows that it runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.connections, args.junk, args.seconds, args.pairs = 500, 20, 5.0, 1
    quiet()
    result = measure(args)
    print(
        f"the honest clients keep {result['kept']:.2f} of what they have; the server grows by {result['memory_growth_mib']} MiB"
    )
    emit(result, as_json=args.json)


if __name__ == "__main__":
    main()
