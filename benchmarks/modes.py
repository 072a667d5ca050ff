"""What does it bring to run several clients' work together? Serial against client-batching, by the number of clients.

For each policy, number of clients and batch shape: tokens/s over all clients, seconds of a step, the share of the time in which
the trunk computed, and the server's peak memory. ``serial`` is FL-GLM's baseline, one client after the other; all train alike.
By default clients are light: they speak the real, sealed protocol, but send random hidden states and gradients instead of
computing ends, so that what is measured is the trunk; ``--real`` gives each a process with real ends on the same cores.

What batching saves is what a batch costs whatever its size; where one client's batch already fills the cores (``--hidden 512``,
or 4 x 128), there is little to save.

FedSEA-LLaMA (arXiv 2505.15683) publishes 1.41 for its client-batching against its serial mode at 8 clients.

    python -m benchmarks.modes [--clients 1 2 4 8 16] [--real] [--quick] [--json] [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.light import light_clients
from benchmarks.report import emit
from benchmarks.stage import Stage, quiet, train

#: One row a mode: its name, and the settings of the run that make it.
MODES: dict[str, dict[str, Any]] = {
    "serial": {"policy": "serial"},
    "client-batching": {"policy": "client-batching"},
}
BASELINE = "serial"
SHAPES: tuple[tuple[int, int], ...] = ((1, 64), (4, 128))  # rows and tokens of each client's batch
FEDSEA = {"clients": 8, "gain": 1.41}


def _make_steps(stage: Stage, shape: tuple[int, int], steps: int, *, real: bool) -> None:
    """All clients make so many steps; the server's log says how long each took."""
    if not real:
        pipe = stage.start(light_clients, stage.joins, stage.keys, *shape)
        pipe.recv()
        pipe.send(steps)
        pipe.recv()
        return
    pipes = [
        stage.start(train, stage.model_dir, join, key, shape, seed)
        for seed, (join, key) in enumerate(zip(stage.joins, stage.keys, strict=True))
    ]
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send((1, steps))
    for pipe in pipes:
        pipe.recv()


def measure(mode: str, clients: int, shape: tuple[int, int], args: argparse.Namespace, model_dir: str | None) -> dict[str, Any]:
    """One mode with so many clients, by a server process of its own."""
    rows, length = shape
    settings = MODES[mode] | {"clients": clients, "threads": args.threads, "status_every": 0.0}
    steps = max(args.least_steps, round(args.tokens / (clients * rows * length)))
    sizes = {"clients": clients, "hidden": args.hidden, "blocks": args.blocks}
    with Stage(settings, **sizes, model_dir=model_dir) as stage:
        _make_steps(stage, shape, steps + args.warm_up, real=args.real)
        peak = stage.peak_memory()
        events = [event for event in map(json.loads, stage.log.read_text().splitlines()) if event["event"] == "step"]
    # Only steps with everybody: where clients have trained apart, at the end, fewer take part.
    whole = [event for event in events[args.warm_up :] if event["tokens"] == clients * rows * length]
    seconds = statistics.median(event["seconds"] for event in whole)
    result = {
        "tokens_per_second": round(clients * rows * length / seconds, 1),
        "step_s": round(seconds, 4),
        "busy_share": round(statistics.median(event["busy"] for event in whole), 3),
        "peak_memory_mb": round(peak / 1e6, 1),
        "steps": len(whole),
    }
    print(
        f"{rows} x {length:<4} {mode:<16}{clients:>3} client(s): {result['tokens_per_second']:>8.0f} tokens/s  step "
        f"{1000 * seconds:>7.1f} ms  trunk busy {result['busy_share']:>4.0%}  peak {result['peak_memory_mb']:>6.0f} MB",
        flush=True,
    )
    return result


def gains(table: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Tokens/s of each mode over the baseline's, by the number of clients."""
    return {
        mode: {
            count: round(row["tokens_per_second"] / table[BASELINE][count]["tokens_per_second"], 3) for count, row in rows.items()
        }
        for mode, rows in table.items()
        if mode != BASELINE
    }


def plot(results: dict[str, dict[str, dict[str, dict[str, Any]]]], path: str) -> None:
    """Tokens/s by the number of clients, one panel a batch shape, one line a mode."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "modes"  # the same figures give the same file
    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3.6), squeeze=False)
    for panel, (shape, table) in zip(panels[0], results.items(), strict=True):
        for mode, rows in table.items():
            counts = [int(count) for count in rows]
            panel.plot(counts, [row["tokens_per_second"] for row in rows.values()], marker="o", label=mode)
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_ylim(bottom=0)
        panel.set_title(f"batch {shape.replace('x', ' × ')} a client")
        panel.set_xlabel("clients")
        panel.set_ylabel("tokens/s")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--real", action="store_true", help="clients with real ends, a process each")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2, help="the trunk's CPU threads")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens over all clients and steps of one cell, about")
    parser.add_argument("--quick", action="store_true", help="few cells, small model: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", help="write tokens/s by clients to this file (SVG)")
    args = parser.parse_args()
    shapes, args.least_steps, args.warm_up = SHAPES, 6, 2
    if args.quick:
        shapes, args.clients, args.hidden, args.blocks, args.tokens, args.least_steps = SHAPES[:1], [1, 2], 64, 4, 512, 2
    quiet()
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for shape in shapes:
        table: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in MODES}
        for clients in args.clients:
            # Neighbours in time, so that drift of the machine hits all modes alike.
            for mode in MODES:
                table[mode][str(clients)] = measure(mode, clients, shape, args, None)
        results[f"{shape[0]}x{shape[1]}"] = table
    gained = {shape: gains(table) for shape, table in results.items()}
    for name, modes in gained.items():
        for mode, by_clients in modes.items():
            best = max(by_clients, key=lambda count: by_clients[count])
            nothing = [count for count, gain in by_clients.items() if gain < 1.03]
            print(
                f"batch {name}: {mode} over {BASELINE} at best {by_clients[best]:.2f} (with {best}); FedSEA's at "
                f"{FEDSEA['clients']}: {FEDSEA['gain']}; gains nothing (< 3 %) with {', '.join(nothing) or 'none'}"
            )
    if args.plot:
        plot(results, args.plot)
    emit(
        {
            "clients_are": "real" if args.real else "light",
            "model": {"hidden": args.hidden, "blocks": args.blocks, "threads": args.threads},
            "gain": gained,
            "fedsea_gain": FEDSEA,
            "results": results,
        },
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
