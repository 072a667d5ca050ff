"""What is it worth that the replicas' sums leave while the last backward of a step still runs?

Two replicas of one thread each, without server and clients: forward, backward, the sum of all gradients over gloo, the
optimizer's step. Blocks of steps whose buckets leave amid the backward alternate with blocks in which all leave after it; the
figure is the median over pairs of the ratio of tokens/s.

Between processes of one machine the sum is work for the same cores, so there is little to hide. What a network between machines
does is therefore imitated: the sums run over loopback as ever, but each bucket counts as summed no earlier than a link of the
given bandwidth could have carried it, behind the buckets before it. That takes no CPU, and is neither delay nor loss. Between the
end of the backward and the word that a replica's part is whole lie, in a real run, the clients' own backward and optimizer; here
that time is nought, so what early sums hide behind it is not in the figure.

    python -m benchmarks.overlap [--megabits 0 1000] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.relay import free_port
from benchmarks.report import emit, median_interval
from benchmarks.stage import Workers, build_model, quiet

REPLICAS = 2


class PacedLink:
    """Holds back the end of each sum until a link of ``megabits`` a second (0: no limit) would have carried it."""

    def __init__(self, reduce: Callable[[Any, Any], Callable[[], None]]) -> None:
        self._reduce, self.megabits, self._free = reduce, 0.0, 0.0

    def __call__(self, tensor: Any, group: Any) -> Callable[[], None]:
        wait = self._reduce(tensor, group)
        # Of two replicas each sends as many bytes as the tensor has.
        seconds = tensor.numel() * tensor.element_size() * 8e-6 / self.megabits if self.megabits else 0.0
        due = self._free = max(time.perf_counter(), self._free) + seconds

        def wait_for_link() -> None:
            wait()
            time.sleep(max(0.0, due - time.perf_counter()))

        return wait_for_link


def replica(pipe: Connection, settings: dict[str, Any], rank: int, port: int, rows: int, length: int) -> None:
    """Worker: one replica. Command: (early, megabits, steps) -> seconds a step."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from server_trunk.building import load_run_trunk
    from server_trunk.engine import Engine
    from server_trunk.members import BackwardBatch, ForwardBatch, Member
    from server_trunk.replicas import sums
    from server_trunk.replicas.group import Group
    from server_trunk.replicas.place import Place
    from server_trunk.replicas.training import ReducedTraining
    from splitfl.config import build_config
    from splitfl.protocol.messages import Backward, Forward

    torch.set_num_threads(1)
    config, device = build_config(settings), torch.device("cpu")
    group = Group.join(Place(rank, REPLICAS, rank, REPLICAS, machine=rank), device)
    link = PacedLink(sums.reduce)
    sums.reduce = link
    model = load_run_trunk(config, device)
    training = ReducedTraining(model, config.optimizer, group)
    engine = Engine(model, training, device, in_place=True)
    size, tokens = model.config.get_text_config().hidden_size, rows * length
    hidden = torch.randn(tokens, size, generator=torch.Generator().manual_seed(rank))

    def step(number: int, early: bool) -> None:
        forward = Forward(number, 0, ((length, 0),) * rows, size, "float32", "raw", True, True, True)
        member = Member("a", forward, hidden)
        engine.forward(ForwardBatch(0, [member], True))
        member.backward = Backward(number, 0, tokens, size, "float32", "raw", tokens, 1.0)
        member.gradient = hidden * 1e-3
        engine.backward(BackwardBatch(0, [member], True, early))
        engine.release()
        training.begin(tokens)
        engine.close_step(number, {"a": tokens})

    pipe.send(sum(parameter.numel() * parameter.element_size() for parameter in training.trainables.values()))
    number = 0
    while (command := pipe.recv()) is not None:
        early, link.megabits, steps = command
        began = time.perf_counter()
        for _ in range(steps):
            step(number, early)
            number += 1
        pipe.send((time.perf_counter() - began) / steps)


def measure(pipes: list[Connection], megabits: float, tokens: int, *, pairs: int, steps: int) -> dict[str, Any]:
    """Early against late over a link of so many Mbit/s."""

    def seconds(early: bool) -> float:
        for pipe in pipes:
            pipe.send((early, megabits, steps))
        return max(pipe.recv() for pipe in pipes)

    seconds(True), seconds(False)
    seen: list[tuple[float, float]] = []
    for pair in range(pairs):
        # The order within a pair alternates, so that drift of the machine hits both.
        took = {early: seconds(early) for early in ((True, False) if pair % 2 else (False, True))}
        seen.append((took[False], took[True]))
    median, low, high = median_interval([late / early for late, early in seen])
    result = {
        "early_over_late": round(median, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "late_step_s": round(statistics.median(late for late, _ in seen), 4),
        "early_step_s": round(statistics.median(early for _, early in seen), 4),
        "tokens_per_second": round(REPLICAS * tokens / statistics.median(early for _, early in seen), 1),
        "pairs": pairs,
    }
    print(
        f"{f'{megabits:g} Mbit/s' if megabits else 'loopback':>12}: {median:.3f} times as fast (95 % {low:.3f} to {high:.3f}), "
        f"step {1000 * result['late_step_s']:.1f} ms -> {1000 * result['early_step_s']:.1f} ms",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="+", default=[0, 10000, 1000], help="bandwidths; 0: loopback as it is")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of each replica's batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="of one block")
    parser.add_argument("--quick", action="store_true", help="small model, few steps: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.blocks, args.rows, args.length, args.pairs, args.steps = 64, 4, 2, 32, 2, 2
    quiet()
    workers = Workers()
    with tempfile.TemporaryDirectory() as work:
        build_model(Path(work) / "model", hidden=args.hidden, blocks=args.blocks)
        settings = {"model": f"{work}/model", "trainables": "full", "optimizer.learning_rate": 1e-4}
        port = free_port()
        try:
            pipes = [workers.start("replica", replica, settings, rank, port, args.rows, args.length) for rank in range(REPLICAS)]
            size, _ = (pipe.recv() for pipe in pipes)
            found = {
                f"{megabits:g}": measure(pipes, megabits, args.rows * args.length, pairs=args.pairs, steps=args.steps)
                for megabits in args.megabits
            }
        finally:
            workers.stop()
    sizes = {name: getattr(args, name) for name in ("hidden", "blocks", "rows", "length")}
    emit({"sizes": sizes | {"bytes_summed_a_step": size, "replicas": REPLICAS}, "by_megabits": found}, as_json=args.json)


if __name__ == "__main__":
    main()
