"""Which mode for which box: serial, client-batching and hierarchical, by the number of clients and of replicas.

``serial`` is FL-GLM's baseline, one client after the other; ``client-batching`` runs whatever clients have sent together;
``hierarchical-N`` divides the same threads among N replicas. For each mode, number of clients and batch shape: tokens/s over
all clients, seconds of a step, the share of the time in which the trunk computed (of replicas the mean), peak memory (of
replicas together), and bytes of all-reduces. All train alike, with the same clients.

By default clients are light: they speak the real, sealed protocol, but replay what a real client with this model sent once, so
that what is measured is the trunk; ``--real`` gives each a process with real ends on the same cores.

What batching saves is what a batch costs whatever its size; where one client's batch already fills the cores (``--hidden 512``,
or 4 x 128), there is little to save. What replicas bring that have cores or GPUs of their own is ``replica_speedup``
(:mod:`benchmarks.replica_speedup`): on two cores, two replicas of one thread against one of one thread.

FedSEA-LLaMA (arXiv 2505.15683) publishes 1.41 for its client-batching against its serial mode at 8 clients, and 7.98 for 8
replicas that average rarely.

    splitfl bench [--clients 1 2 4 8 16] [--replicas 2] [--sync step 8] [--device cuda] [--real] [--quick] [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.light import light_clients, record
from benchmarks.modes_report import advice, gains, plot
from benchmarks.replica_speedup import hierarchical, measure_speedup, name_of, steps_between_meetings
from benchmarks.report import emit
from benchmarks.stage import Stage, Workers, build_model, quiet, train
from splitfl.config import RunConfig, build_config
from splitfl.errors import ConfigError

__all__ = ["MODES", "add_arguments", "run"]

#: One row a mode without replicas: its name, and the settings of the run that make it.
MODES: dict[str, dict[str, Any]] = {
    "serial": {"policy": "serial"},
    "client-batching": {"policy": "client-batching"},
}
SHAPES: tuple[tuple[int, int], ...] = ((1, 64), (4, 128))  # rows and tokens of each client's batch
#: Of the question what replicas bring: work enough for each, little for the clients. What every replica does alike, whatever the
#: batch, is to add up the gradients and to update all weights; the more tokens a step has, the less that is of it.
SPEEDUP = {"clients": 4, "rows": 8, "length": 128, "hidden": 512, "blocks": 6}
FEDSEA = {"clients": 8, "gain": 1.41, "replicas": 8, "replica_speedup": 7.98}


class Model:
    """A model made for the benchmark, and what a client with it sends, by the shape of its batch."""

    def __init__(self, work: Path, hidden: int, blocks: int, dtype: str) -> None:
        self._work, self._dtype, self.directory = work / f"{hidden}x{blocks}", dtype, str(work / f"{hidden}x{blocks}" / "model")
        build_model(Path(self.directory), hidden=hidden, blocks=blocks)

    @functools.cached_property
    def trunk_parameters(self) -> int:
        """Numbers that train in the trunk: all that it holds."""
        from splitfl.parts.plan import plan

        return plan(self.directory, RunConfig(model="").cut).trunk.parameters

    def reduced_bytes(self, settings: dict[str, Any]) -> int:
        """What each replica gives to all-reduces a step: gradients at every step, or a K-th of weights, at least in float32."""
        if settings.get("mode") != "hierarchical":
            return 0
        every = steps_between_meetings(settings["sync"])
        size = 2 if self._dtype == "bfloat16" and every == 1 else 4
        return self.trunk_parameters * size // every

    def recording(self, shape: tuple[int, int]) -> str:
        """The file with what one client sends."""
        file = self._work / f"{shape[0]}x{shape[1]}.safetensors"
        if not file.exists():
            work = self._work / f"recording-{file.stem}"
            work.mkdir()
            workers = Workers()
            try:
                settings = {"trainables": "full", "dtype": self._dtype}
                workers.start("recorder", record, self.directory, str(work), settings, *shape, str(file)).recv()
            finally:
                workers.stop()
        return str(file)


def _make_steps(stage: Stage, shape: tuple[int, int], steps: int, recording: str) -> list[list[float]]:
    """All clients make so many steps: the clock at the end of each step of each. Without a recording they have real ends."""
    if recording:
        pipe = stage.start(light_clients, stage.joins, stage.keys, *shape, recording)
        pipe.recv()
        pipe.send(steps)
        return pipe.recv()
    pipes = [
        stage.start(train, stage.model_dir, join, key, shape, seed)
        for seed, (join, key) in enumerate(zip(stage.joins, stage.keys, strict=True))
    ]
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send((1, steps))
    return [pipe.recv() for pipe in pipes]


def step_seconds(spans: Sequence[Sequence[float]], warm_up: int, every: int) -> float:
    """Median seconds of a step over clients and rounds of ``every`` steps, from the clock at the end of each step."""
    rounds = [(ends[last] - ends[last - every]) / every for ends in spans for last in range(warm_up + every, len(ends), every)]
    return float(statistics.median(rounds))


def measure(name: str, settings: dict[str, Any], clients: int, shape: tuple[int, int], args: Any, model: Model) -> dict[str, Any]:
    """One mode with so many clients, by a server of its own."""
    rows, length = shape
    every = steps_between_meetings(settings.get("sync", "step"))
    steps = max(args.least_steps, round(args.tokens / (clients * rows * length)))
    steps = -(-steps // every) * every
    common = {"clients": clients, "status_every": 0.0, "step_deadline": 0.0, "device": args.device, "dtype": args.dtype}
    with Stage(common | settings, clients=clients, hidden=0, blocks=0, model_dir=model.directory) as stage:
        spans = _make_steps(stage, shape, steps + args.warm_up + 1, "" if args.real else model.recording(shape))
        peak = stage.peak_memory()
        logs = [[json.loads(line) for line in log.read_text().splitlines()] for log in stage.logs]
    seconds = step_seconds(spans, args.warm_up, every)
    made = [[event for event in events if event["event"] == "step"][args.warm_up :] for events in logs]
    result = {
        "tokens_per_second": round(clients * rows * length / seconds, 1),
        "step_s": round(seconds, 4),
        "busy_share": round(statistics.mean(statistics.median(event["busy"] for event in of) for of in made if of), 3),
        "peak_memory_mb": round(peak / 1e6, 1),
        "all_reduce_bytes_a_step": model.reduced_bytes(settings),
        "replicas": settings.get("replicas", 1),
        "steps": steps,
    }
    print(
        f"{rows} x {length:<4} {name:<22}{clients:>3} client(s): {result['tokens_per_second']:>8.0f} tokens/s  step "
        f"{1000 * seconds:>7.1f} ms  trunk busy {result['busy_share']:>4.0%}  peak {result['peak_memory_mb']:>6.0f} MB",
        flush=True,
    )
    return result


def modes_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each mode's settings; all have the same threads together."""
    modes = {name: settings | {"threads": args.threads} for name, settings in MODES.items()}
    for replicas in args.replicas:
        for sync in args.sync:
            modes[name_of(replicas, sync)] = hierarchical(replicas, sync) | {"threads": max(1, args.threads // replicas)}
    return modes


def measure_grid(args: argparse.Namespace, model: Model) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Every mode, number of clients and shape of batch."""
    results = {}
    modes = modes_of(args)
    for shape in args.shapes:
        table: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in modes}
        for clients in args.clients:
            # Neighbours in time, so that drift of the machine hits all modes alike.
            for mode, settings in modes.items():
                if clients >= settings.get("replicas", 1):
                    table[mode][str(clients)] = measure(mode, settings, clients, shape, args, model)
        results[f"{shape[0]}x{shape[1]}"] = {mode: rows for mode, rows in table.items() if rows}
    return results


def measure_speedups(args: argparse.Namespace, work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What replicas bring that share nothing: by ``sync``, then by their number."""
    sizes = args.speedup
    model = Model(work, sizes["hidden"], sizes["blocks"], args.dtype)
    recording = model.recording((sizes["rows"], sizes["length"]))
    common = {"threads": 1, "device": args.device, "dtype": args.dtype}
    found: dict[str, dict[str, dict[str, Any]]] = {sync: {} for sync in args.sync}
    for sync, by_count in found.items():
        for replicas in args.replicas:
            settings = hierarchical(replicas, sync)
            row = measure_speedup(settings, common, recording, model.directory, sizes, pairs=args.pairs, steps=args.block)
            by_count[str(replicas)] = row | {"all_reduce_bytes_a_step": model.reduced_bytes(settings)}
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument(
        "--replicas", type=int, nargs="*", default=[2], metavar="N", help="numbers of replicas (2); none: leave out"
    )
    parser.add_argument(
        "--sync", nargs="+", default=["step", "8"], metavar="WHEN", help="when replicas meet: step, or every N steps"
    )
    parser.add_argument("--real", action="store_true", help="clients with real ends, a process each")
    parser.add_argument("--hidden", type=int, default=128, metavar="N")
    parser.add_argument("--blocks", type=int, default=6, metavar="N")
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="the trunk's CPU threads, of all its replicas together (2)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps; of several GPUs each replica takes its own")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="over all clients and steps of one cell, about (8192)"
    )
    parser.add_argument("--pairs", type=int, default=6, metavar="N", help="of blocks with one replica and with several (6)")
    parser.add_argument("--quick", action="store_true", help="few cells, small model: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--plot", metavar="FILE", help="write tokens/s by clients to this file (SVG)")


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError before anything is measured."""
    if min([1, *args.replicas]) < 1:
        raise ConfigError(f"--replicas {min(args.replicas)}: it must be at least 1")
    for settings in modes_of(args).values():
        for clients in args.clients:
            build_config(settings | {"model": "made for it", "clients": clients, "dtype": args.dtype})
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'splitfl[bench]', or leave --plot out")
    if args.replicas and importlib.util.find_spec("psutil") is None:
        raise ConfigError("replicas are measured with psutil: pip install 'splitfl[bench]', or give --replicas without a number")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run(args: argparse.Namespace) -> int:
    _check(args)
    args.shapes, args.least_steps, args.warm_up, args.speedup, args.block = SHAPES, 6, 2, SPEEDUP, 4
    if args.quick:
        args.shapes, args.clients, args.hidden, args.blocks, args.tokens, args.least_steps = SHAPES[:1], [1, 2], 64, 4, 512, 2
        args.speedup = {"clients": 2, "rows": 2, "length": 64, "hidden": 64, "blocks": 4}
        args.pairs, args.block, args.sync = 2, 2, [when if when == "step" else "2" for when in args.sync]
    quiet()
    with tempfile.TemporaryDirectory() as work:
        results = measure_grid(args, Model(Path(work) / "grid", args.hidden, args.blocks, args.dtype))
        speedups = measure_speedups(args, Path(work) / "speedup") if args.replicas else {}
    gpus = _gpus() if args.device.startswith("cuda") else 0
    text = advice(results, speedups, f"{gpus} GPU(s)" if gpus else f"{args.threads} CPU thread(s)", gpus)
    print("\n" + "\n".join(text))
    if args.plot:
        plot(results, args.plot)
    emit(
        {
            "clients_are": "real" if args.real else "light",
            "model": {name: getattr(args, name) for name in ("hidden", "blocks", "threads", "device", "dtype")},
            "gain": {shape: gains(table) for shape, table in results.items()},
            "replica_speedup": {count: row["speedup"] for count, row in speedups.get("step", {}).items()},
            "replica_speedups": {"sizes": args.speedup, "by_sync": speedups},
            "fedsea": FEDSEA,
            "advice": text,
            "results": results,
        },
        as_json=args.json,
    )
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
