"""What do rounds that average the ends cost? Held-out loss and bytes, the ends averaged every R steps and left each client's own.

A small Llama with random weights is trained from scratch, trunk and ends, by clients that hold different parts of the sample
text, of unequal size. ``loss``: each client's mean held-out loss on its own text, averaged over the clients; ``mb_sent``: what a
client sends in the whole run, hidden states included. No figure depends on how fast the machine is.

    python -m benchmarks.rounds [--clients 4] [--steps 64] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import emit
from splitfl.errors import SplitflError
from splitfl.sample import build_sample_model, write_sample_shards

#: 0: each client keeps its own ends.
ROUND_STEPS = (0, 1, 4, 16)


def simulate(work: Path, ends: str, round_steps: int, args: argparse.Namespace) -> dict[str, float]:
    """One run in a process of its own."""
    out = work / f"{ends}-{round_steps}"
    command = [sys.executable, "-m", "splitfl.cli", "simulate", str(work / "model"), "--out", str(out), "--json"]
    command += ["--clients", str(args.clients), "--steps", str(args.steps), "--round-steps", str(round_steps)]
    command += ["--trainables", "full", "--ends", ends, "--lr", str(args.learning_rate), "--device", "cpu", "--status-every", "0"]
    command += ["--batch-size", "4", "--max-length", "64", "--evaluate", str(args.held_out), "--checkpoint-every", "0"]
    for client in range(args.clients):
        command += ["--data", str(work / f"client-{client}.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SplitflError(f"a simulation failed: {done.stderr.strip().splitlines()[-1]}")
    clients = json.loads(done.stdout.splitlines()[-1])["clients"]
    sent = []
    for client in range(args.clients):
        events = map(json.loads, (out / f"client-{client}" / "log.jsonl").read_text().splitlines())
        sent += [event["bytes_sent"] for event in events if event["event"] == "done"]
    return {
        "loss_before": round(statistics.fmean(client["before"] for client in clients), 4),
        "loss": round(statistics.fmean(client["after"] for client in clients), 4),
        "mb_sent": round(statistics.fmean(sent) / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=64, help="a multiple of 16, so that each run ends with a round")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=32, help="rows a client")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.steps, args.held_out = 2, 16, 4
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build_sample_model(work / "model", seed=0)
        write_sample_shards(work, args.clients)
        for ends in ("lora", "full"):
            results[ends] = {}
            for round_steps in ROUND_STEPS:
                made = results[ends][str(round_steps)] = simulate(work, ends, round_steps, args)
                what = f"averaged every {round_steps} steps" if round_steps else "of one's own"
                print(f"{ends:<5} ends {what:<24} held-out loss {made['loss']:.4f}  sent {made['mb_sent']:.2f} MB", flush=True)
    emit({"clients": args.clients, "steps": args.steps, "results": results}, as_json=args.json)


if __name__ == "__main__":
    main()
