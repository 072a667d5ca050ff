"""How close does a training step over a slow, far link come to what link and computers allow?

A client and a server, processes on loopback with a link of given round trip and bandwidth between them, sealed. Of a step with
m micro-batches one expects ``max(C, X) + min(C, X) / m + 2 RTT``: the longer of computing and sending, what of the shorter cannot
be hidden before the first micro-batch has come through or after the last, a round trip for hidden states and one for gradients.

* X: bytes that one step takes in the busier direction, counted at the link, over the link's bandwidth.
* C: the same step, with the same m, through the same link process without delay and limit, measured next to each round trip's
  cells. So it holds everything but the network: ends, trunk, their optimizers, sealing, and what of them overlaps.
* Share: the bound over the measured step; medians over rounds that visit all cells in turn.

It also asks what micro-batches bring (m against 1 over 50 ms), and what several clients, in step or asynchronous, win back of the
2 RTT: with one client the trunk idles while messages travel; with several it works for another.

    python -m benchmarks.wan [--rounds 3] [--micro-batches 16] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.link import Link, round_trip
from benchmarks.report import emit
from benchmarks.stage import Stage, quiet, train

ROUND_TRIPS, BANDWIDTHS = (1, 20, 50, 100), (50, 200, 1000)  # ms, Mbit/s
FAR = (50, 200)  # where the other two questions are asked


@dataclass(frozen=True)
class Step:
    """Seconds of a step in two places: ``near`` without delay and limit (C), ``far`` over the link; and what it sent."""

    near: float
    far: float
    sent: float  # X, seconds, busier direction
    answered: float  # seconds, the other direction
    trips: float  # 2 RTT
    m: int

    @property
    def bound(self) -> float:
        return max(self.near, self.sent) + min(self.near, self.sent) / self.m + self.trips

    @property
    def expected(self) -> float:
        """As ``bound``, and the other direction counted too: what is sent in pieces also comes back in pieces, after it."""
        return self.bound + self.answered / self.m


def steps_of(pipe: Connection, m: int, steps: int) -> float:
    """Median seconds of a step; the first of a block, which enrols, is not counted."""
    pipe.send((m, steps + 1))
    ends = pipe.recv()
    return float(statistics.median(later - earlier for earlier, later in itertools.pairwise(ends)))


def carried(link: Link, client: int = 0) -> tuple[int, int]:
    return link.carried()[client]


class Line:
    """One client behind a link."""

    def __init__(self, stage: Stage, args: argparse.Namespace) -> None:
        assert stage.link is not None
        self.link, self.steps = stage.link, args.steps
        self.pipe = stage.start(train, stage.model_dir, stage.joins[0], stage.keys[0], (args.rows, args.length), 0)
        self.pipe.recv()
        self.bytes: dict[int, tuple[float, float]] = {}

    def near(self, m: int) -> float:
        """C; and on the way the bytes of a step, up and down."""
        self.link.shape()
        before = carried(self.link)
        seconds = steps_of(self.pipe, m, self.steps)
        up, down = ((after - b) / (self.steps + 1) for after, b in zip(carried(self.link), before, strict=True))
        self.bytes[m] = (max(up, down), min(up, down))
        return seconds

    def far(self, m: int, milliseconds: float, megabits: float) -> float:
        self.link.shape(**round_trip(milliseconds, megabits))
        return steps_of(self.pipe, m, self.steps)

    def step(self, near: float, far: float, m: int, milliseconds: float, megabits: float) -> Step:
        more, less = (size / (megabits * 1e6 / 8) for size in self.bytes[m])
        return Step(near, far, more, less, 2 * milliseconds / 1000, m)


def measure_cells(line: Line, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of the bound for each round trip and bandwidth."""
    m = args.micro_batches
    seen: dict[tuple[int, int], list[Step]] = {(rtt, rate): [] for rtt in args.round_trips for rate in args.bandwidths}
    for _ in range(args.rounds):
        before = line.near(m)
        for rtt in args.round_trips:
            far = {rate: line.far(m, rtt, rate) for rate in args.bandwidths}
            after = line.near(m)
            for rate, seconds in far.items():
                # The machine drifts: C is what it was around these cells.
                seen[rtt, rate].append(line.step((before + after) / 2, seconds, m, rtt, rate))
            before = after
    cells = []
    print(f"{'RTT ms':>7}{'Mbit/s':>8}{'C s':>8}{'X s':>8}{'bound s':>9}{'step s':>8}{'share':>8}")
    for (rtt, rate), steps in seen.items():
        cell = {
            "rtt_ms": rtt,
            "mbit_per_s": rate,
            "compute_s": statistics.median(step.near for step in steps),
            "transfer_s": steps[-1].sent,
            "bound_s": statistics.median(step.bound for step in steps),
            "step_s": statistics.median(step.far for step in steps),
            "share_of_bound": statistics.median(step.bound / step.far for step in steps),
        }
        cells.append({key: round(value, 4) for key, value in cell.items()})
        print(
            f"{rtt:>7}{rate:>8}{cell['compute_s']:>8.3f}{cell['transfer_s']:>8.3f}{cell['bound_s']:>9.3f}{cell['step_s']:>8.3f}"
            f"{cell['share_of_bound']:>8.3f}",
            flush=True,
        )
    return cells


def measure_pipelining(line: Line, args: argparse.Namespace) -> dict[str, Any]:
    """One micro-batch against several over a far link: the factor measured, and as arithmetic has it."""
    rtt, rate = FAR
    counts = (1, 4)
    seen: dict[int, list[Step]] = {m: [] for m in counts}
    for _ in range(args.rounds):
        for m in counts:
            near, far = line.near(m), line.far(m, rtt, rate)
            seen[m].append(line.step(near, far, m, rtt, rate))

    def factor(of: Any) -> float:
        return round(float(statistics.median(of(a) / of(b) for a, b in zip(seen[1], seen[4], strict=True))), 4)

    result = {
        "rtt_ms": rtt,
        "mbit_per_s": rate,
        "micro_batches": list(counts),
        "step_s": [round(statistics.median(step.far for step in seen[m]), 4) for m in counts],
        "compute_s": [round(statistics.median(step.near for step in seen[m]), 4) for m in counts],
        "factor": factor(lambda step: step.far),
        "predicted": factor(lambda step: step.bound),
        "predicted_both_directions": factor(lambda step: step.expected),
    }
    print(
        f"m = 4 against m = 1 at {rtt} ms, {rate} Mbit/s: {result['factor']:.3f} times as fast; the bound predicts "
        f"{result['predicted']:.3f}, with the answers' way counted {result['predicted_both_directions']:.3f}",
        flush=True,
    )
    return result


def measure_company(mode: str, args: argparse.Namespace, model_dir: str) -> dict[str, Any]:
    """Tokens/s of several clients, each behind a link of its own, near and far; what of a lone client's loss they win back."""
    settings = {"clients": 1, "threads": 1, "mode": mode}
    tokens = args.rows * args.length
    rates: dict[int, dict[str, float]] = {}
    with Stage(
        settings, clients=max(args.company), hidden=args.hidden, blocks=args.blocks, model_dir=model_dir, links=True
    ) as stage:
        assert stage.link is not None
        pipes = [
            stage.start(train, stage.model_dir, join, key, (args.rows, args.length), seed)
            for seed, (join, key) in enumerate(zip(stage.joins, stage.keys, strict=True))
        ]
        for pipe in pipes:
            pipe.recv()
        for count in args.company:
            seconds: dict[str, list[float]] = {"near": [], "far": []}
            for _ in range(min(2, args.rounds)):
                for place, shape in (("near", {}), ("far", round_trip(*FAR))):
                    stage.link.shape(**shape)
                    for pipe in pipes[:count]:
                        pipe.send((args.company_micro_batches, args.steps + 1))
                    spans = [pipe.recv() for pipe in pipes[:count]]
                    # From when all have made their first step to when the first has made its last: all work all the time.
                    begin, end = max(span[0] for span in spans), min(span[-1] for span in spans)
                    made = sum(sum(begin < moment <= end for moment in span) for span in spans)
                    seconds[place].append((end - begin) / max(1, made))
            rates[count] = {place: tokens / statistics.median(values) for place, values in seconds.items()}
    alone = min(args.company)

    def lost(count: int) -> float:
        """Seconds a token costs more over the far link than near."""
        return 1 / rates[count]["far"] - 1 / rates[count]["near"]

    clients = {
        str(count): {
            "tokens_per_second": round(rate["far"], 1),
            "tokens_per_second_near": round(rate["near"], 1),
            "against_one": round(rate["far"] / rates[alone]["far"], 4),
            "won_back": round(1 - lost(count) / lost(alone), 4) if lost(alone) > 0 else None,
        }
        for count, rate in rates.items()
    }
    for count, row in clients.items():
        print(
            f"{mode}, {count} client(s) at {FAR[0]} ms: {row['tokens_per_second']:.0f} tokens/s "
            f"({row['tokens_per_second_near']:.0f} near), {row['against_one']:.2f} of one client's"
            + (f", {row['won_back']:.0%} of its loss won back" if count != str(alone) and row["won_back"] is not None else ""),
            flush=True,
        )
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of one block")
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="few cells, small model: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.round_trips, args.bandwidths, args.company, args.company_micro_batches = ROUND_TRIPS, BANDWIDTHS, (1, 2, 4), 1
    if args.quick:
        args.round_trips, args.bandwidths, args.company = (20,), (50, 1000), (1, 2)
        args.rounds, args.steps, args.hidden, args.blocks, args.rows, args.length = 1, 2, 64, 4, 8, 64
        args.micro_batches = 8
    quiet()
    settings = {"clients": 1, "threads": 1}
    with Stage(settings, clients=1, hidden=args.hidden, blocks=args.blocks, links=True) as stage:
        line = Line(stage, args)
        line.near(args.micro_batches)
        cells = measure_cells(line, args)
        pipelining = measure_pipelining(line, args)
        company = {mode: measure_company(mode, args, stage.model_dir) for mode in ("sync", "async")}
    worst = min(cell["share_of_bound"] for cell in cells)
    print(f"worst share of the bound: {worst:.3f}")
    emit(
        {
            "worst_share_of_bound": worst,
            "micro_batches": args.micro_batches,
            "model": {name: getattr(args, name) for name in ("hidden", "blocks", "rows", "length")},
            "cells": cells,
            "pipelining": pipelining,
            "company": company,
        },
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
