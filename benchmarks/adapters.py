"""What does an adapter of its own for each client cost, and which way of computing them is the fastest?

One frozen linear layer, one batch of rows of N clients with ranks 4, 8, 16 and 32 in turn and unequal shares of the rows, forward
and backward (the rows' gradient and each adapter's). The ways:

- ``base``: the frozen layer alone, what no adapter can be faster than;
- ``runs``, ``blocks``: as ``splitfl.adapters.grouped`` has them;
- ``masked``: all adapters side by side in one product, then what is not the row's own set to zero;
- ``loop``: base once, then adapter after adapter with autograd's own operations (as PEFT's mixed batches);
- ``apart``: N small forwards and backwards, base included.

    python -m benchmarks.adapters [--device cpu] [--dtype float32] [--rows 2048] [--repeats 15] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks.report import emit, median_interval

HIDDEN = (512, 1024, 2048)
ADAPTERS = (1, 4, 16, 32)
RANKS = (8, 16, 4, 32)


def measure(hidden: int, count: int, *, rows: int, repeats: int, device: str, dtype: str) -> dict[str, float]:
    """Median seconds of forward and backward, by way; the ways take turns. Asserts that all give the same gradients."""
    import torch
    from torch.nn import Parameter

    from splitfl.adapters.grouped import AdapterPair, Runs, add_in_blocks, add_in_runs

    torch.manual_seed(0)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    base = torch.nn.Linear(hidden, hidden, bias=False, device=device, dtype=kind).requires_grad_(False)
    ranks = [RANKS[index % len(RANKS)] for index in range(count)]
    pairs = [
        AdapterPair(
            Parameter(torch.randn(rank, hidden, device=device) * 0.02),
            Parameter(torch.randn(hidden, rank, device=device) * 0.02),
            16 / rank,
        )
        for rank in ranks
    ]
    weights = [weight for pair in pairs for weight in (pair.a, pair.b)]
    # Odd clients have twice the rows of even ones.
    shares = torch.tensor([1 + index % 2 for index in range(count)], dtype=torch.float64).cumsum(0)
    ends = [round(float(share / shares[-1]) * rows) for share in shares]
    runs: Runs = tuple((index, ends[index - 1] if index else 0, end) for index, end in enumerate(ends))
    x = torch.randn(rows, hidden, device=device, dtype=kind).requires_grad_()
    dy = torch.randn(rows, hidden, device=device, dtype=kind) / rows

    def alone(pair: AdapterPair, part: torch.Tensor) -> torch.Tensor:
        return (part @ pair.a.to(kind).T) @ pair.b.to(kind).T * pair.scaling

    own = torch.zeros(rows, sum(ranks), device=device, dtype=kind)
    left = 0
    for (_, begin, end), rank in zip(runs, ranks, strict=True):
        own[begin:end, left : left + rank] = 1
        left += rank

    def masked() -> torch.Tensor:
        b = torch.cat([pair.b * pair.scaling for pair in pairs], dim=1).to(kind)
        inner = x @ torch.cat([pair.a for pair in pairs]).to(kind).T * own
        return torch.add(base(x), inner @ b.T)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "base": lambda: base(x),
        "runs": lambda: add_in_runs(base(x), x, runs, pairs),
        "blocks": lambda: add_in_blocks(base(x), x, runs, pairs),
        "masked": masked,
        "loop": lambda: base(x) + torch.cat([alone(pairs[index], x[begin:end]) for index, begin, end in runs]),
        "apart": lambda: torch.cat([base(x[begin:end]) + alone(pairs[index], x[begin:end]) for index, begin, end in runs]),
    }

    def once(way: str) -> tuple[float, list[torch.Tensor]]:
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        if way == "apart":
            found: list[torch.Tensor] = [torch.empty_like(x), *(torch.empty_like(weight) for weight in weights)]
            for index, begin, end in runs:
                part = x.detach()[begin:end].requires_grad_()
                out = base(part) + alone(pairs[index], part)
                found[0][begin:end], *others = torch.autograd.grad(out, [part, pairs[index].a, pairs[index].b], dy[begin:end])
                found[1 + 2 * index : 3 + 2 * index] = others
        else:
            found = list(torch.autograd.grad(ways[way](), [x] if way == "base" else [x, *weights], dy))
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began, found

    _, reference = once("loop")
    for way in ways:
        _, found = once(way)
        if way != "base":
            for mine, theirs in zip(found, reference, strict=True):
                # bf16 keeps 8 bits.
                assert float((mine - theirs).norm() / theirs.norm()) < (2e-2 if kind == torch.bfloat16 else 1e-5), way
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            taken[way].append(once(way)[0])
    return {way: median_interval(values)[0] for way, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=2048, help="tokens of the batch, all clients together (2048)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1, as a lane of the trunk has)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="hidden 512 and 1, 4 adapters, 3 repeats")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    widths, counts, repeats = (HIDDEN[:1], ADAPTERS[:2], 3) if args.quick else (HIDDEN, ADAPTERS, args.repeats)
    print(f"{'hidden':>7}{'adapters':>10}{'base, ms':>11}   and so many times as long as base")
    results: list[dict[str, Any]] = []
    for hidden in widths:
        for count in counts:
            seconds = measure(hidden, count, rows=args.rows, repeats=repeats, device=args.device, dtype=args.dtype)
            ratios = {way: value / seconds["base"] for way, value in seconds.items() if way != "base"}
            shown = "  ".join(f"{way} {ratio:5.2f}" for way, ratio in ratios.items())
            print(f"{hidden:>7}{count:>10}{seconds['base'] * 1e3:>11.2f}   {shown}", flush=True)
            results.append({"hidden": hidden, "adapters": count, "base_seconds": seconds["base"], "ratios": ratios})
    settings = {name: getattr(args, name) for name in ("device", "dtype", "rows", "threads")} | {"repeats": repeats}
    emit({"benchmark": "adapters", "settings": settings, "results": results}, as_json=args.json)


if __name__ == "__main__":
    main()
