"""Does one server serve a crowd: without an error, in flat memory, everybody alike?

Hundreds of clients over loopback, each a session of its own that speaks the whole protocol, sealed, and has no model: it
sends random hidden states and gradients of always the same size. So all are equals, and the fair share of each is the same. Two
rounds on one server: ``steps``, where all take part in the same optimizer steps, and ``evaluate``, where everyone asks as fast
as it is answered and nobody waits for another; there the scheduler alone decides who gets how much, and each answer is compared
with the first to the same question, so that no client ever gets another's.

    python -m benchmarks.crowd [--clients 200] [--seconds 300] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.light import in_threads, open_sessions
from benchmarks.report import emit

HIDDEN, BLOCKS = 64, 4
ROWS, LENGTH = 2, 16
TOKENS = ROWS * LENGTH
#: Rounding differs with what a micro-batch shares a batch with; another client's answer differs by far more.
TOLERANCE = 1e-3
#: Share of a round's beginning that is left out of what is said of memory: the allocator's arenas and the histories of the
#: server's own numbers fill.
WARM_UP = 0.3


# --- the server -----------------------------------------------------------------------------------------------------------------


def build_model(directory: str) -> None:
    """A Llama with random weights, too small to be what limits the server."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def run_server(pipe: Connection, model: str, work: str, clients: int, batch_tokens: int) -> None:
    """Worker: the trunk server. Sends its join string, and at the end its own numbers."""
    import resource

    from server_trunk.server import TrunkServer
    from splitfl.config import build_config

    values = {
        "model": model,
        "clients": clients,
        "batch_tokens": batch_tokens,
        "threads": 1,
        "device": "cpu",
        "checkpoint_every": 0,
        "out": f"{work}/server",
        "authorized_clients": f"{work}/authorized_clients",
    }
    server = TrunkServer(build_config(values))
    server.start()
    pipe.send(str(server.join))
    while pipe.recv() is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        numbers = server.meter.snapshot()
        del numbers["clients"]
        pipe.send(numbers | {"cpu_seconds": used.ru_utime + used.ru_stime})
    server.stop()


# --- the clients ----------------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """What one client got in one round. ``tokens``: whose answers came before the round's end."""

    tokens: int = 0
    steps: int = 0
    errors: list[str] = field(default_factory=list)


def run_clients(pipe: Connection, join: str, keys: Sequence[str], first: int) -> None:
    """Worker: sessions in threads. Command: (round, begin, end), on the machine's monotonic clock -> what each was served."""
    import torch

    torch.set_num_threads(1)
    sessions = open_sessions([join] * len(keys), keys)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        name, begin, end = command
        served = [Served() for _ in sessions]
        in_threads(
            _take_part,
            [(_ROUNDS[name], session, served[index], first + index, begin, end) for index, session in enumerate(sessions)],
        )
        pipe.send(served)
    for session in sessions:
        session.close()


def _take_part(round_: Any, session: Any, served: Served, seed: int, begin: float, end: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    time.sleep(max(0.0, begin - time.monotonic()))
    try:
        round_(session, served, hidden, gradient, end)
    except Exception as error:
        served.errors.append(f"{type(error).__name__}: {error}")


_SEGMENTS = [(LENGTH, 0)] * ROWS


def _steps(session: Any, served: Served, hidden: Any, gradient: Any, end: float) -> None:
    """One micro-batch forward and backward a step, until the end of the round."""
    late = False
    while not late:
        number = session.send_forward(hidden, _SEGMENTS, train=True, grad=True)
        session.await_hidden(number)
        session.send_backward(number, gradient / TOKENS, targets=TOKENS, divisor=float(TOKENS))
        session.await_grad(number)
        late = time.monotonic() >= end
        session.step_done("leave" if late else "continue")
        if not late:
            served.tokens += TOKENS
            served.steps += 1


def _evaluate(session: Any, served: Served, hidden: Any, gradient: Any, end: float) -> None:
    """Forwards without a graph, two under way, as fast as they are answered."""
    first = None
    waiting = [session.send_forward(hidden, _SEGMENTS, train=False, grad=False) for _ in range(2)]
    while waiting:
        number = waiting.pop(0)
        answer = session.await_hidden(number)
        session.forget(number)
        first = answer if first is None else first
        if not bool((answer - first).abs().max() <= TOLERANCE):
            served.errors.append("an answer that differs from the first to the same question")
            return
        if time.monotonic() < end:
            served.tokens += TOKENS
            waiting.append(session.send_forward(hidden, _SEGMENTS, train=False, grad=False))


_ROUNDS = {"steps": _steps, "evaluate": _evaluate}


# --- what is measured -----------------------------------------------------------------------------------------------------------


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 where all get the same, 1/n where one gets all (Jain, Chiu, Hawe, DEC-TR-301, 1984)."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of (x, y)."""
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


class Memory:
    """Resident memory of a process, sampled in a thread: (seconds since the start, MiB)."""

    def __init__(self, pid: int, every: float) -> None:
        import psutil

        self._process, self._every = psutil.Process(pid), every
        self.samples: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stopping.is_set():
            self.samples.append((time.monotonic() - began, self._process.memory_info().rss / 2**20))
            self._stopping.wait(self._every)

    def stop(self) -> dict[str, Any]:
        """Start and end are means over a tenth of the time, after the warm-up."""
        self._stopping.set()
        self._thread.join()
        kept = self.samples[int(len(self.samples) * WARM_UP) :]
        tenth = max(1, len(kept) // 10)
        start, end = (sum(mib for _, mib in part) / tenth for part in (kept[:tenth], kept[-tenth:]))
        return {
            "start_mib": round(start, 1),
            "end_mib": round(end, 1),
            "growth_mib": round(end - start, 1),
            "slope_mib_a_minute": round(60 * slope(kept), 3),
            "series_mib": [round(mib, 1) for _, mib in self.samples[:: max(1, len(self.samples) // 50)]],
        }


def summary(served: Sequence[Served], seconds: float) -> dict[str, Any]:
    """Fairness among equals: each client's tokens over the mean of all."""
    tokens = [each.tokens for each in served]
    mean = sum(tokens) / len(tokens)
    return {
        "jain": round(jain(tokens), 5),
        "worst_share": round(min(tokens) / mean, 4) if mean else 0.0,
        "best_share": round(max(tokens) / mean, 4) if mean else 0.0,
        "tokens_per_second": round(sum(tokens) / seconds, 1),
        "steps": min(each.steps for each in served),
        "errors": sum(len(each.errors) for each in served),
    }


class Site:
    """A server process (:func:`run_server`) that lists ``clients`` keys, and processes beside it. Leaves with :meth:`stop`."""

    def __init__(self, work: Path, clients: int, batch_tokens: int) -> None:
        from splitfl.protocol.keys import write_identity

        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        build_model(f"{work}/model")
        self.keys = [f"{work}/client{index}.key" for index in range(clients)]
        lines = [f"{write_identity(key).public} client{index}" for index, key in enumerate(self.keys)]
        (work / "authorized_clients").write_text("\n".join(lines) + "\n")
        self.log = work / "server" / "log.jsonl"
        self.server, self.desk = self.start(run_server, f"{work}/model", str(work), clients, batch_tokens)

    def start(self, target: Any, *rest: Any) -> tuple[Any, Connection]:
        """A process that runs ``target(pipe, *rest)`` until it receives None, and the other end of its pipe."""
        near, far = self._context.Pipe()
        process = self._context.Process(target=target, args=(far, *rest), daemon=True)
        process.start()
        far.close()
        self._workers.append((process, near))
        return process, near

    def stop(self) -> None:
        """End all, the last first."""
        while self._workers:
            process, pipe = self._workers.pop()
            with contextlib.suppress(BrokenPipeError):  # it has ended
                pipe.send(None)
            process.join(30)
            if process.is_alive():
                process.kill()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        site = Site(Path(work), args.clients, args.batch_tokens)
        try:
            join = site.desk.recv()
            began = time.monotonic()
            share = -(-args.clients // args.processes)
            parts = [(site.keys[first : first + share], first) for first in range(0, args.clients, share)]
            crowd = [site.start(run_clients, join, part, first)[1] for part, first in parts]
            for pipe in crowd:
                pipe.recv()
            print(f"{args.clients} sessions open after {time.monotonic() - began:.1f} s", flush=True)
            result: dict[str, Any] = {
                "clients": args.clients,
                "seconds": args.seconds,
                "joining_seconds": time.monotonic() - began,
            }
            for name in _ROUNDS:
                result[name] = _round(name, args.seconds, site.server.pid, site.desk, crowd)
        finally:
            site.stop()
        result["refused_or_lost"] = _unexpected(site.log)
    result["errors"] = sum(result[name]["errors"] for name in _ROUNDS) + sum(result["refused_or_lost"].values())
    result["jain"] = min(result[name]["jain"] for name in _ROUNDS)
    result["worst_share"] = min(result[name]["worst_share"] for name in _ROUNDS)
    result["rss_growth_mib"] = max(result[name]["memory"]["growth_mib"] for name in _ROUNDS)
    result["steps_made"] = result["steps"]["steps"]
    return result


def _round(name: str, seconds: float, pid: int, desk: Connection, crowd: Sequence[Connection]) -> dict[str, Any]:
    desk.send("numbers")
    before = desk.recv()
    memory = Memory(pid, min(1.0, seconds / 50))
    begin = time.monotonic() + 1
    for pipe in crowd:
        pipe.send((name, begin, begin + seconds))
    served = [each for pipe in crowd for each in pipe.recv()]
    took = time.monotonic() - begin
    held = memory.stop()
    desk.send("numbers")
    after = desk.recv()
    for error, count in Counter(error for each in served for error in each.errors).most_common(5):
        print(f"  {count} × {error}", flush=True)
    sums = {key: after[key] - before[key] for key in ("tokens", "busy_seconds", "cpu_seconds", "bytes_received", "bytes_sent")}
    batches = after["batches"]["forward"] - before["batches"]["forward"]
    result = summary(served, seconds) | {
        "memory": held,
        "members_of_a_batch": round((after["forwards"] - before["forwards"]) / batches, 1) if batches else None,
        "engine_busy": round(sums["busy_seconds"] / took, 3),
        "server_cpu": round(sums["cpu_seconds"] / took, 3),
        "queue": after["queue"],
        "bytes_received": sums["bytes_received"],
        "bytes_sent": sums["bytes_sent"],
    }
    print(
        f"{name:9} {result['tokens_per_second']:8.0f} tokens/s  Jain {result['jain']:.4f}  share of the mean "
        f"{result['worst_share']:.3f} to {result['best_share']:.3f}  steps {result['steps']}  errors {result['errors']}\n"
        f"          server: {held['start_mib']:.0f} to {held['end_mib']:.0f} MiB ({held['slope_mib_a_minute']:+.2f} a minute), "
        f"{result['server_cpu']:.2f} cores, engine busy {result['engine_busy']:.2f}, "
        f"{result['members_of_a_batch']} members a batch",
        flush=True,
    )
    return result


def _unexpected(log: Path) -> dict[str, int]:
    """What the server logged that should not have happened, counted by kind."""
    import json

    found: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        event = json.loads(line)
        kind = event["event"]
        if kind in ("refused", "failed", "forward-failed", "backward-failed", "gradient-not-finite", "out-of-memory"):
            found[kind] += 1
        elif kind == "left" and "goodbye" not in event["why"]:
            found[f"left: {event['why'][:60]}"] += 1
        elif kind == "step" and any(part["dropped"] for part in event["parts"].values()):
            found["dropped from a step"] += 1
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0, help="of each round")
    parser.add_argument("--processes", type=int, default=4, help="that the clients are dealt out to")
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="budget of a trunk batch: a third of what 200 clients ask at once"
    )
    parser.add_argument("--quick", action="store_true", help="20 clients, 10 s: shows that it runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.seconds, args.processes = 20, 10.0, 2
    emit(measure(args), as_json=args.json)


if __name__ == "__main__":
    main()
