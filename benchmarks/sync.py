"""What does it cost that replicas meet only now and then? Held-out loss and bytes by ``sync``: gradients summed at every step, or
weights averaged after every K.

A small Llama with random weights is trained from scratch by clients that hold different parts of the sample text; their trunk is
two replicas, processes of their own, that serve half of the clients each. ``loss``: each client's held-out loss on its own text,
averaged over the clients, the mean over repetitions (each with another order of the rows) with ``loss_least`` and ``loss_most``.
``meetings``: how often they met. ``mb_reckoned``: what a replica sends the other for that in the whole run, were they on two
machines; reckoned, not measured. No figure depends on how fast the machine is.

    python -m benchmarks.sync [--clients 4] [--steps 64] [--repeats 3] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import emit
from benchmarks.trunks import ReplicatedTrunk
from splitfl.errors import SplitflError
from splitfl.sample import build_sample_model, write_sample_shards

SYNCS = ("step", "1", "4", "16")
_REPLICAS = 2
#: Seconds in which a client is there, and in which a run is made, on any machine.
_JOINS, _ENDS = 300.0, 3600.0
#: Between two looks at the logs, on the cores that are at work.
_LOOK = 0.5


def measure(work: Path, sync: str, repeat: int, args: argparse.Namespace) -> dict[str, float]:
    """One run: replicas in processes of their own, clients as threads of this one."""
    from client_ends.settings import TrainSettings
    from client_ends.train import train
    from splitfl.checkpoint import load_checkpoint, newest_checkpoint
    from splitfl.protocol.keys import write_identity

    own = work / f"{sync}-{repeat}"
    own.mkdir()
    keys = [own / f"{client}.key" for client in range(args.clients)]
    (own / "authorized").write_text("".join(f"{write_identity(key).public} client-{n}\n" for n, key in enumerate(keys)))
    settings = {"model": str(work / "model"), "run": "sync", "out": str(own / "server"), "mode": "hierarchical", "sync": sync}
    settings |= {"replicas": _REPLICAS, "clients": args.clients, "authorized_clients": str(own / "authorized"), "threads": 1}
    settings |= {"device": "cpu", "trainables": "full", "checkpoint_every": 0, "status_every": 0.0}
    settings |= {"optimizer.steps": args.steps, "optimizer.learning_rate": args.learning_rate}
    replicas = ReplicatedTrunk(settings, str(own))
    results: list[Future[Any]] = []
    try:
        with ThreadPoolExecutor(args.clients) as threads:
            for client, key in enumerate(keys):
                mine = TrainSettings(
                    trunk=replicas.join,
                    identity=str(key),
                    data=str(work / f"client-{client}.txt"),
                    model=settings["model"],
                    out=str(own / f"ends-{client}"),
                    ends="full",
                    steps=args.steps,
                    batch_size=4,
                    max_length=64,
                    evaluate=args.held_out,
                    seed=100 * repeat + client,
                    device="cpu",
                )
                results.append(threads.submit(train, mine))
                _await_joined(own / "server", client + 1, results)  # one after the other, so that each run spreads them alike
            made = [each.result(_ENDS) for each in results]
    finally:
        replicas.stop()
    tensors, _, _ = load_checkpoint(newest_checkpoint(own / "server"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    meetings = sum(event["event"] == "step" and event["met"] is not None for event in _events(own / "server" / "log.jsonl"))
    return {
        "loss_before": statistics.fmean(each.evaluation_before["loss"] for each in made),
        "loss": statistics.fmean(each.evaluation_after["loss"] for each in made),
        "meetings": meetings,
        # Of a sum over N each sends (N - 1)/N in either half of it.
        "mb_reckoned": meetings * size * 2 * (_REPLICAS - 1) / _REPLICAS / 1e6,
    }


def _await_joined(out: Path, count: int, results: list[Future[Any]]) -> None:
    give_up = time.monotonic() + _JOINS
    while _joined(out) < count:
        for each in results:
            if each.done():
                each.result()
        if time.monotonic() > give_up:
            raise SplitflError(f"client {count - 1} has not joined within {_JOINS:g} s")
        threading.Event().wait(_LOOK)


def _joined(out: Path) -> int:
    return sum(event["event"] == "joined" for log in out.glob("log*.jsonl") for event in _events(log))


def _events(log: Path) -> list[dict[str, Any]]:
    """What is whole of a log that is being written."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=64, help="a multiple of 16, so that each run ends with a meeting")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=32, help="rows a client")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.steps, args.held_out, args.repeats = 2, 16, 4, 1
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build_sample_model(work / "model", seed=0)
        write_sample_shards(work, args.clients)
        for sync in SYNCS:
            runs = [measure(work, sync, repeat, args) for repeat in range(args.repeats)]
            results[sync] = {name: round(statistics.fmean(run[name] for run in runs), 4) for name in runs[0]}
            losses = [run["loss"] for run in runs]
            results[sync] |= {"loss_least": round(min(losses), 4), "loss_most": round(max(losses), 4)}
            made = results[sync]
            about = f"held-out loss {made['loss']:.4f}  between replicas {made['mb_reckoned']:.1f} MB"
            print(f"sync = {sync:<4}  {about}", flush=True)
    sizes = {"clients": args.clients, "replicas": _REPLICAS, "steps": args.steps, "repeats": args.repeats}
    emit(sizes | {"results": results}, as_json=args.json)


if __name__ == "__main__":
    main()
