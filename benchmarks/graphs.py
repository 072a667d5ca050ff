"""What does it cost to keep no graph? Each graph kept for its backward, against recomputed from the stored hidden state.

The same light clients as in ``benchmarks.modes``; for each way seconds of a step, and the peak memory of a server process of its
own, in all and above what it held once the model was loaded (gradients and optimizer come on top in both ways).

    python -m benchmarks.graphs [--clients 4] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.light import light_clients
from benchmarks.report import emit
from benchmarks.stage import Stage, quiet

WAYS = ("keep", "recompute")


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One way: median step and memory."""
    settings = {"clients": args.clients, "threads": args.threads, "graphs": way, "status_every": 0.0}
    with Stage(settings, clients=args.clients, hidden=args.hidden, blocks=args.blocks) as stage:
        at_rest = stage.peak_memory()
        pipe = stage.start(light_clients, stage.joins, stage.keys, args.rows, args.length)
        pipe.recv()
        pipe.send(args.steps + 2)
        pipe.recv()
        peak = stage.peak_memory()
        events = [event for event in map(json.loads, stage.log.read_text().splitlines()) if event["event"] == "step"]
    seconds = statistics.median(event["seconds"] for event in events[2:])
    result = {
        "step_s": round(seconds, 4),
        "tokens_per_second": round(args.clients * args.rows * args.length / seconds, 1),
        "peak_memory_mb": round(peak / 1e6, 1),
        "above_rest_mb": round((peak - at_rest) / 1e6, 1),
    }
    print(
        f"{way:<10} step {result['step_s']:.3f} s  {result['tokens_per_second']:>7.0f} tokens/s  peak "
        f"{result['peak_memory_mb']:.0f} MB, {result['above_rest_mb']:.0f} above the loaded server",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, small model: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.rows, args.length, args.hidden, args.blocks, args.steps, args.rounds = 1, 2, 64, 64, 4, 2, 1
    quiet()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            runs[way].append(measure(way, args))
    ways = {way: {key: round(statistics.median(run[key] for run in of), 4) for key in of[0]} for way, of in runs.items()}
    ratios = [b["step_s"] / a["step_s"] for a, b in zip(runs["keep"], runs["recompute"], strict=True)]
    slower = round(statistics.median(ratios), 4)
    saved = round(ways["keep"]["peak_memory_mb"] - ways["recompute"]["peak_memory_mb"], 1)
    print(f"recomputing makes a step {slower:.2f} times as long and saves {saved:.0f} MB at the peak")
    emit(
        {
            "recompute_step_over_keep": slower,
            "memory_saved_mb": saved,
            "model": {name: getattr(args, name) for name in ("hidden", "blocks", "clients", "rows", "length")},
            "ways": ways,
        },
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
