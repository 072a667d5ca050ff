"""How much of the bare trunk's speed does the server keep?

The same trunk, trainables and batches twice: in a loop of one process that does nothing but forward, backward and the optimizer
step on hidden states that lie on its device; and behind the server, sealed, for N light clients in one process, which send random
hidden states and gradients instead of computing ends. Both alternate in one run; the figure is tokens/s of the server over the
loop's, the median over pairs. Where clients and server share the cores, what the clients take is missing from the server: it is
a benchmark for a GPU.

    python -m benchmarks.bare_trunk --device cuda [--clients 1 8 32] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.light import light_clients
from benchmarks.report import emit
from benchmarks.stage import Stage, quiet


def bare_loop(pipe: Connection, settings: dict[str, Any], rows: int, length: int) -> None:
    """Worker: the trunk without a server. Command: steps -> seconds a step."""
    import time

    import torch

    from server_trunk.server import load_run_trunk
    from server_trunk.training import SharedTraining
    from splitfl.config import build_config
    from splitfl.parts.trunk import trunk_forward
    from splitfl.tensors import DTYPES, resolve_device

    config = build_config(settings)
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_run_trunk(config, device).train()
    training = SharedTraining(model, config.optimizer)
    size = model.config.get_text_config().hidden_size
    hidden = torch.randn(rows, length, size, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[config.dtype])
    gradient = hidden * 1e-3
    positions = torch.arange(length, device=device).expand(rows, -1)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    pipe.send("ready")
    done = 0
    while (steps := pipe.recv()) is not None:
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            leaf = hidden.detach().requires_grad_()
            trunk_forward(model, leaf, None, positions).backward(gradient)
            training.close(done, {"all": rows * length})
            done += 1
        wait()
        pipe.send((time.perf_counter() - began) / steps)


def measure(clients: int, args: argparse.Namespace) -> dict[str, Any]:
    """The share of the bare loop's tokens/s that the server keeps with so many clients."""
    settings = {
        "clients": clients,
        "device": args.device,
        "dtype": args.dtype,
        "trainables": "lora",
        "threads": args.threads,
        "batch_tokens": clients * args.rows * args.length,
        "status_every": 0.0,
    }
    ratios, served, bare = [], [], []
    busy: list[float] = []
    with Stage(settings, clients=clients, hidden=args.hidden, blocks=args.blocks) as stage:
        # The loop is given what the server was, save a directory of its own.
        own = settings | {"model": stage.model_dir, "optimizer.learning_rate": 1e-4}
        loop = stage.start(bare_loop, own, clients * args.rows, args.length)
        crowd = stage.start(light_clients, stage.joins, stage.keys, args.rows, args.length)
        for pipe in (loop, crowd):
            pipe.recv()
        for pipe in (loop, crowd):
            pipe.send(2)
            pipe.recv()
        for _ in range(args.pairs):
            loop.send(args.steps)
            alone = loop.recv()
            crowd.send(args.steps)
            spans = crowd.recv()
            seconds = (max(ends[-1] for ends in spans) - max(ends[0] for ends in spans)) / (args.steps - 1)
            bare.append(alone)
            served.append(seconds)
            ratios.append(alone / seconds)
        for event in map(json.loads, stage.log.read_text().splitlines()):
            if event["event"] == "step" and event["tokens"] == clients * args.rows * args.length:
                busy.append(event["busy"])
    tokens = clients * args.rows * args.length
    result = {
        "share_of_bare": round(statistics.median(ratios), 4),
        "busy_share": round(statistics.median(busy), 3),
        "served_tokens_per_second": round(tokens / statistics.median(served), 1),
        "bare_tokens_per_second": round(tokens / statistics.median(bare), 1),
    }
    print(
        f"{clients:>3} client(s): {result['share_of_bare']:.3f} of the bare trunk's speed "
        f"({result['served_tokens_per_second']:.0f} of {result['bare_tokens_per_second']:.0f} tokens/s), trunk busy "
        f"{result['busy_share']:.0%}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hidden", type=int, default=2048, help="with --blocks 24: 1.3 billion parameters")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rows", type=int, default=4, help="rows of each client's batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of one block")
    parser.add_argument("--quick", action="store_true", help="small model, few steps: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.hidden, args.blocks, args.rows, args.length = [1, 2], 128, 4, 2, 64
        args.pairs, args.steps = 2, 4
    quiet()
    results = {str(clients): measure(clients, args) for clients in args.clients}
    model = {"hidden": args.hidden, "blocks": args.blocks, "dtype": args.dtype, "device": args.device}
    emit(
        {"share_of_bare": {count: row["share_of_bare"] for count, row in results.items()}, "model": model, "details": results},
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
