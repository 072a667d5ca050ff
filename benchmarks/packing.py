"""Which layout of a trunk's rows is fastest: padded, padded in groups of like length, packed, or one by one?

    python -m benchmarks.packing [--quick] [--json] [--data DIR]

Real tokens a second through forward and backward of a trunk (Llama, hidden 512), with LoRA on a frozen base and with all weights
trained, on batches with the lengths of real rows (gsm8k's questions with answers, tinyshakespeare's speeches) and of equal
ones. Then a series of batches that pad more and more, from nothing to half: where packed overtakes padded is the constant of
``splitfl.parts.packing_rule``. Layouts alternate; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.report import emit
from splitfl.libraries import quiet_libraries
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import run_segments, why_not_packed
from splitfl.parts.packing_rule import ELSEWHERE, LEAST_WASTE, split_balanced, waste
from splitfl.parts.rows import Rows
from splitfl.tensors import resolve_device

Wire = tuple[tuple[int, int], ...]

#: Groups of like length of the second layout: as many as cores that could each run one.
GROUPS = 4
#: Shares of padding of the series.
SERIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)


def layouts(wire: Wire) -> dict[str, list[tuple[list[int], bool]]]:
    """For each layout the runs that make it up: the numbers of the segments, and whether they are packed."""
    every = list(range(len(wire)))
    groups = split_balanced([length for length, _ in wire], GROUPS, padded=True)
    return {
        "padded": [(every, False)],
        "grouped": [(group, False) for group in groups],
        "packed": [(every, True)],
        "one by one": [([index], False) for index in every],
    }


def trunk_of(hidden: int, blocks: int, device: torch.device, *, lora: bool) -> Any:
    """A Llama's trunk with random weights, in training mode, ready to run packed."""
    with tempfile.TemporaryDirectory(prefix="splitfl-packing-") as name:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=blocks + 2,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            max_position_embeddings=8192,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(name)
        trunk: Any = load_trunk(name, (1, 1), device=device, dtype="bfloat16" if device.type == "cuda" else "float32")
    obstacle = why_not_packed(trunk)
    assert obstacle is None, obstacle
    return (get_peft_model(trunk, LoraConfig(r=8, target_modules="all-linear")) if lora else trunk).train()


def seconds(model: Any, wire: Wire, runs: Sequence[tuple[list[int], bool]], hidden: int, device: torch.device) -> float:
    """Forward and backward of all runs; gathering rows into runs is not counted."""
    dtype = next(model.parameters()).dtype
    work = []
    for members, packed in runs:
        rows = Rows(tuple(wire[index] for index in members), packed)
        work.append((rows, torch.randn(rows.tokens, hidden, device=device, dtype=dtype, requires_grad=True)))
    gradients = [torch.randn_like(h) for _, h in work]
    # One thread's work is counted in CPU seconds, which whatever else the machine does disturbs less.
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _wait(device)
    begin = clock()
    for (rows, h), dy in zip(work, gradients, strict=True):
        torch.autograd.backward(run_segments(model, h, rows), dy)
    _wait(device)
    spent = clock() - begin
    model.zero_grad(set_to_none=True)
    return spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(rounds: int, work: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each; one round of warming up, then the order turns round each time."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in sorted(work, reverse=bool(number % 2)):
            value = work[name]()
            if number:
                spent[name].append(value)
    return {name: statistics.median(values) for name, values in spent.items()}


# --- Lengths --------------------------------------------------------------------------------------------------------------------


def lengths_of(data: Path | None, longest: int) -> dict[str, list[int]]:
    """Rows' lengths in tokens; without ``data`` only what needs none."""
    found = {"equal": [128] * 512}
    if data is None:
        return found
    tokenizer: Any = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    with (data / "text" / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        problems = [json.loads(line) for line, _ in zip(file, range(500), strict=False)]
    speeches = (data / "text" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")[:500]
    texts = {"gsm8k": [row["question"] + "\n" + row["answer"] for row in problems], "tinyshakespeare": speeches}
    for name, rows in texts.items():
        found[name] = [min(longest, len(tokenizer(text)["input_ids"])) for text in rows]
    return found


def batches(lengths: Sequence[int], tokens: int, count: int) -> list[Wire]:
    """Batches of up to ``tokens`` real tokens, of rows drawn at random."""
    draw = random.Random(0)
    made: list[Wire] = []
    while len(made) < count:
        batch: list[tuple[int, int]] = []
        while True:
            length = draw.choice(lengths)
            if batch and sum(own for own, _ in batch) + length > tokens:
                break
            batch.append((length, 0))
        made.append(tuple(batch))
    return made


def padding(share: float, rows: int, longest: int) -> Wire:
    """``rows`` rows, of lengths that fall evenly from ``longest``, of whose padded batch about ``share`` is padding."""
    step = 2 * share * longest / max(1, rows - 1)
    return tuple((max(1, round(longest - index * step)), 0) for index in range(rows))


# --- The two questions ----------------------------------------------------------------------------------------------------------


def compare(model: Any, wires: Sequence[Wire], rounds: int, hidden: int, device: torch.device) -> dict[str, float]:
    """Real tokens a second of each layout on the same batches."""
    spent: dict[str, float] = {}
    for wire in wires:
        work = {name: partial(seconds, model, wire, runs, hidden, device) for name, runs in layouts(wire).items()}
        for name, value in alternate(rounds, work).items():
            spent[name] = spent.get(name, 0.0) + value
    tokens = sum(length for wire in wires for length, _ in wire)
    return {"waste": round(statistics.fmean(map(waste, wires)), 3)} | {
        name: round(tokens / value, 1) for name, value in spent.items()
    }


def series(model: Any, rows: int, longest: int, rounds: int, hidden: int, device: torch.device) -> list[dict[str, float]]:
    """How much faster packed is than padded, as the share of padding grows."""
    found = []
    for share in SERIES:
        wire = padding(share, rows, longest)
        every = list(range(len(wire)))
        work = {name: partial(seconds, model, wire, [(every, name == "packed")], hidden, device) for name in ("packed", "padded")}
        spent = alternate(rounds, work)
        found.append({"waste": round(waste(wire), 3), "packed_over_padded": round(spent["padded"] / spent["packed"], 3)})
    return found


def crossing(points: Sequence[dict[str, float]]) -> float | None:
    """The least share of padding from which on packed is never over 1 % slower; None if it always is somewhere."""
    least = None
    for point in sorted(points, key=lambda point: -point["waste"]):
        if point["packed_over_padded"] < 0.99:
            break
        least = point["waste"]
    return least


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and one round: shows that it runs")
    parser.add_argument("--json", action="store_true", help="end with the result as one line of JSON")
    parser.add_argument("--data", type=Path, help="directory of models/stories260K and text/; without it, equal lengths only")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, as one of the engine's lanes has")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the trunk")
    parser.add_argument("--tokens", type=int, default=2048, help="real tokens of a batch")
    parser.add_argument("--batches", type=int, default=2, help="batches of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.quick:
        options.hidden, options.blocks, options.tokens, options.batches, options.rounds = 128, 1, 512, 1, 1
    quiet_libraries()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    kinds = {
        name: batches(rows, options.tokens, options.batches) for name, rows in lengths_of(options.data, options.tokens).items()
    }
    result: dict[str, Any] = {"device": str(device), "threads": options.threads, "tokens_per_second": {}, "series": {}}
    print(f"{'trained':8}{'rows':16}{'padding':>9}{'padded':>10}{'grouped':>10}{'packed':>10}{'one by one':>12}   real tokens/s")
    for trained in ("lora", "full"):
        model = trunk_of(options.hidden, options.blocks, device, lora=trained == "lora")
        for kind, wires in kinds.items():
            row = compare(model, wires, options.rounds, options.hidden, device)
            result["tokens_per_second"][f"{trained} {kind}"] = row
            print(
                f"{trained:8}{kind:16}{row['waste']:9.1%}{row['padded']:10.0f}{row['grouped']:10.0f}{row['packed']:10.0f}"
                f"{row['one by one']:12.0f}",
                flush=True,
            )
        longest = 128 if options.tokens >= 1024 else 32
        points = series(model, options.tokens // longest, longest, options.rounds, options.hidden, device)
        result["series"][trained] = points
        print(f"{trained:8}packed over padded, by share of padding: " + ", ".join(_point(point) for point in points), flush=True)
    result["least_waste"] = {trained: crossing(points) for trained, points in result["series"].items()}
    used = result["rule"] = LEAST_WASTE.get(device.type, ELSEWHERE)
    print(f"packed is never slower from this share of padding on: {result['least_waste']}; the rule's constant is {used}")
    emit(result, as_json=options.json)


def _point(point: dict[str, float]) -> str:
    return f"{point['waste']:.1%} {point['packed_over_padded']:.2f}"


if __name__ == "__main__":
    main()
