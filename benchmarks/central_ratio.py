"""How fast is training through the split, against the same training in one process on the same cores?

N client processes and a server process over loopback, sealed, against one process that trains the whole model on the batches
of all N clients; both train all weights with the same optimizer, fp32. The two alternate in one run, so that drift of the machine
hits both; the figure is the median of the ratios of neighbouring blocks. Central runs the way that is fastest for it: with one
thread or two, with the whole batch at once or the batches of the clients one by one, their gradients accumulated. The profile
says where the time goes: CPU seconds of each side a step, and the share of the cores left idle.

    python -m benchmarks.central_ratio [--clients 1 4 8] [--pairs 20] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.report import emit, median_interval
from benchmarks.stage import Stage, batch_of, optimizer_of, quiet

ROWS, LENGTH = 4, 128


def run_central(pipe: Connection, model_dir: str, clients: int) -> None:
    """Worker: one process, whole model. Commands: (threads, pieces of the batch, steps) -> seconds."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    optimizer = optimizer_of(model)
    batch = batch_of(ROWS * clients, LENGTH, 1)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        threads, pieces, steps = command
        torch.set_num_threads(threads)
        parts = [{name: part[piece::pieces] for name, part in batch.items()} for piece in range(pieces)]
        began = time.perf_counter()
        for _ in range(steps):
            for part in parts:
                (model(**part).loss / pieces).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        pipe.send(time.perf_counter() - began)


def run_client(pipe: Connection, model_dir: str, join: str, key: str, threads: int, micro_batches: int, seed: int) -> None:
    """Worker: one client. Command: steps -> (wall clock at start, at end)."""
    import torch

    from client_ends import SplitModelForCausalLM
    from splitfl.adapters import set_trainable

    torch.set_num_threads(threads)
    model = SplitModelForCausalLM.from_pretrained(model_dir, join, key, device="cpu", micro_batches=micro_batches)
    set_trainable(model, "full")
    model.train()
    optimizer = optimizer_of(model)
    batch = batch_of(ROWS, LENGTH, seed)
    pipe.send("ready")
    while (steps := pipe.recv()) is not None:
        began = time.time()
        for _ in range(steps):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.wait_step()
        pipe.send((began, time.time()))
    model.close()


def measure(clients: int, args: argparse.Namespace) -> dict[str, Any]:
    """The ratio of tokens/s, split over central, for ``clients`` clients."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    server_threads, client_threads = (int(n) for n in (args.threads or ("2:2" if clients == 1 else "2:1")).split(":"))
    settings = {"clients": clients, "threads": server_threads, "batch_tokens": args.batch_tokens}
    with Stage(settings, clients=clients, hidden=args.hidden, blocks=args.blocks) as stage:
        central = stage.start(run_central, stage.model_dir, clients, role="central")
        central.recv()
        pipes = [
            stage.start(run_client, stage.model_dir, join, key, client_threads, args.micro_batches, index)
            for index, (join, key) in enumerate(zip(stage.joins, stage.keys, strict=True))
        ]
        for pipe in pipes:
            pipe.recv()

        def split(steps: int) -> float:
            for pipe in pipes:
                pipe.send(steps)
            spans = [pipe.recv() for pipe in pipes]
            return max(end for _, end in spans) - min(begin for begin, _ in spans)

        def alone(way: tuple[int, int], steps: int) -> float:
            central.send((*way, steps))
            return float(central.recv())

        split(2)
        ways = [(threads, pieces) for threads in (1, 2) for pieces in sorted({1, clients})]
        alone(ways[-1], 1)
        trial = {way: min(alone(way, 1) for _ in range(2)) for way in ways}
        best = min(trial, key=lambda way: trial[way])
        ratios, central_seconds, split_seconds = [], [], []
        before = stage.cpu_seconds()
        for pair in range(args.pairs):
            # The order within a pair alternates too, so that neither always runs on the warmer caches.
            if pair % 2:
                b = split(args.steps)
                a = alone(best, args.steps)
            else:
                a = alone(best, args.steps)
                b = split(args.steps)
            central_seconds.append(a)
            split_seconds.append(b)
            ratios.append(a / b)
        used = {role: seconds - before[role] for role, seconds in stage.cpu_seconds().items()}
    median, low, high = median_interval(ratios)
    tokens = clients * ROWS * LENGTH * args.steps
    result = {
        "ratio": round(median, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "pairs": args.pairs,
        "central_threads": best[0],
        "central_pieces": best[1],
        "server_threads": server_threads,
        "client_threads": client_threads,
        "central_tokens_per_second": round(tokens / median_interval(central_seconds)[0], 1),
        "split_tokens_per_second": round(tokens / median_interval(split_seconds)[0], 1),
        "cpu_seconds_a_step": {role: round(seconds / args.pairs / args.steps, 3) for role, seconds in used.items()},
        "idle": {
            "central": round(1 - used["central"] / (sum(central_seconds) * cores), 3),
            "split": round(1 - (used["server"] + used["clients"]) / (sum(split_seconds) * cores), 3),
        },
    }
    print(
        f"{clients} client(s): {result['ratio']:.3f}  (95 % {low:.3f} to {high:.3f}, {args.pairs} pairs)   "
        f"central {result['central_tokens_per_second']:.0f} tokens/s with {best[0]} thread(s) "
        f"in {best[1]} piece(s), "
        f"split {result['split_tokens_per_second']:.0f} with {server_threads} (server) and {client_threads} (each client)\n"
        f"    CPU seconds a step: {result['cpu_seconds_a_step']}, idle share of the cores: {result['idle']}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--pairs", type=int, default=20)
    # At a block's start all clients begin at once, and at its end they wait for one another, as training does not within itself.
    parser.add_argument("--steps", type=int, default=4, help="steps of one block")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", help="server:client threads (default 2:2 for one client, 2:1 for more)")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few pairs, small model: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.hidden, args.blocks = 3, 128, 4
    quiet()
    results = {str(clients): measure(clients, args) for clients in args.clients}
    emit({"ratio": {key: value["ratio"] for key, value in results.items()}, "details": results}, as_json=args.json)


if __name__ == "__main__":
    main()
