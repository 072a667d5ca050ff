"""How fast does a split model generate, against Hugging Face's ``generate()`` of the whole model on the same cores?

Greedy, with key-value caches, from a prompt of random tokens, fp32, over loopback, sealed. One client against one local process,
in turns, so that drift of the machine hits both; the local one runs the way that is fastest for it, with one thread or two. Both
run the same model: bare, or with ``--trainables lora`` with an adapter on the trunk's blocks, on either side through PEFT. Then
all clients at once against one of them alone. Then one client behind a link with a round trip, with and without speculation
(prompt lookup: what stood in the text before is proposed). How much that finds depends on the text: a model of random weights
repeats itself sooner than a real one; ``tokens_a_round_trip`` says what it found here.

    python -m benchmarks.decode [--clients 8] [--pairs 8] [--tokens 128] [--trainables none|lora] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.link import round_trip
from benchmarks.report import emit, median_interval
from benchmarks.stage import VOCABULARY, Stage, quiet

PROMPT = 32
#: Tokens that one round trip may bring.
LOOKUP = 10


def _generate(model: Any, tokens: int, lookup: int, seed: int) -> float:
    """Seconds for ``tokens`` new ones."""
    import torch

    ids = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    if lookup:
        options["prompt_lookup_num_tokens"] = lookup
    began = time.perf_counter()
    model.generate(ids, **options)
    return time.perf_counter() - began


def run_local(pipe: Connection, model_dir: str, adapted: list[int]) -> None:
    """Worker: the whole model, with a LoRA on the blocks ``adapted``. Commands: (threads, tokens) -> seconds."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from splitfl.config import LoraSettings

    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if adapted:
        parts = model.model.layers.named_modules()
        linears = {name.rpartition(".")[2] for name, part in parts if isinstance(part, torch.nn.Linear)}
        lora = LoraConfig(r=LoraSettings().rank, target_modules=sorted(linears), layers_to_transform=adapted)
        model = get_peft_model(model, lora)
    model.eval().requires_grad_(False)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        threads, tokens = command
        torch.set_num_threads(threads)
        pipe.send(_generate(model, tokens, 0, 0))


def run_client(pipe: Connection, model_dir: str, join: str, key: str, seed: int) -> None:
    """Worker: one client. Commands: (threads, tokens, lookup) -> (wall clock at the start, at the end, messages sent)."""
    import torch

    from client_ends import SplitModelForCausalLM

    model = SplitModelForCausalLM.from_pretrained(model_dir, join, key, device="cpu").eval().requires_grad_(False)
    session = model.trunk.session
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        threads, tokens, lookup = command
        torch.set_num_threads(threads)
        began, sent = time.time(), session._next_micro
        _generate(model, tokens, lookup, seed)
        pipe.send((began, time.time(), session._next_micro - sent))
    model.close()


def _clients(stage: Stage) -> list[Connection]:
    pipes = [
        stage.start(run_client, stage.model_dir, join, key, index)
        for index, (join, key) in enumerate(zip(stage.joins, stage.keys, strict=True))
    ]
    for pipe in pipes:
        pipe.recv()
    return pipes


def _together(pipes: list[Connection], threads: int, tokens: int, lookup: int = 0) -> tuple[float, int]:
    """Seconds until all have their tokens, and round trips of the first."""
    for pipe in pipes:
        pipe.send((threads, tokens, lookup))
    spans = [pipe.recv() for pipe in pipes]
    return max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans), spans[0][2]


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """One client against the whole model, and all clients against one."""
    settings = {"clients": 1, "threads": args.threads, "trainables": args.trainables}
    with Stage(settings, clients=args.clients, hidden=args.hidden, blocks=args.blocks) as stage:
        adapted = list(range(1, args.blocks - 1)) if args.trainables == "lora" else []
        local = stage.start(run_local, stage.model_dir, adapted, role="local")
        local.recv()
        pipes = _clients(stage)

        def alone(threads: int) -> float:
            local.send((threads, args.tokens))
            return float(local.recv())

        best = min((1, 2), key=lambda threads: min(alone(threads) for _ in range(3)))
        own = min((1, 2), key=lambda threads: min(_together(pipes[:1], threads, args.tokens)[0] for _ in range(3)))
        _together(pipes, 1, args.tokens)
        ratios, times, seconds = [], [], {"local": [], "one": [], "all": []}  # type: ignore[var-annotated]
        for pair in range(args.pairs):
            # The order alternates, so that neither always runs on the warmer caches.
            runs = [("local", lambda: alone(best)), ("one", lambda: _together(pipes[:1], own, args.tokens)[0])]
            for name, run in runs if pair % 2 else reversed(runs):
                seconds[name].append(run())
            seconds["all"].append(_together(pipes, 1, args.tokens)[0])
            ratios.append(seconds["local"][-1] / seconds["one"][-1])
            times.append(args.clients * seconds["one"][-1] / seconds["all"][-1])
    ratio, low, high = median_interval(ratios)
    more, more_low, more_high = median_interval(times)
    rates = {name: round(args.tokens / median_interval(values)[0], 1) for name, values in seconds.items()}
    rates["all"] = round(rates["all"] * args.clients, 1)
    print(
        f"one client: {ratio:.2f} of the whole model's speed (95 % {low:.2f} to {high:.2f}): {rates['one']} against "
        f"{rates['local']} tokens/s ({own} and {best} threads)\n"
        f"{args.clients} clients: {more:.2f} times one client's tokens (95 % {more_low:.2f} to {more_high:.2f}): {rates['all']}",
        flush=True,
    )
    return {
        "ratio_to_local": {"1": round(ratio, 3)},
        "times_one_client": {str(args.clients): round(more, 3)},
        "intervals_95": {"ratio_to_local": [low, high], "times_one_client": [more_low, more_high]},
        "tokens_per_second": rates,
        "threads": {"local": best, "client": own, "server": args.threads},
    }


def measure_speculation(args: argparse.Namespace) -> dict[str, Any]:
    """One client behind a round trip, with prompt lookup and without."""
    settings = {"clients": 1, "threads": args.threads, "trainables": args.trainables}
    with Stage(settings, clients=1, hidden=args.hidden, blocks=args.blocks, links=True) as stage:
        pipes = _clients(stage)
        assert stage.link is not None
        stage.link.shape(**round_trip(args.round_trip, 1000))
        _together(pipes, 1, 4)
        ratios, trips = [], 1
        for _ in range(max(2, args.pairs // 4)):
            plain, _ = _together(pipes, 1, args.tokens)
            ahead, trips = _together(pipes, 1, args.tokens, LOOKUP)
            ratios.append(plain / ahead)
    ratio, low, high = median_interval(ratios)
    found = args.tokens / trips
    print(
        f"with a round trip of {args.round_trip:g} ms speculation is {ratio:.2f} times as fast (95 % {low:.2f} to {high:.2f}): "
        f"{found:.1f} tokens a round trip",
        flush=True,
    )
    return {"ratio": round(ratio, 3), "interval_95": [low, high], "tokens_a_round_trip": round(found, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="threads of the server (1)")
    parser.add_argument("--trainables", choices=("none", "lora"), default="none", help="what the trunk has beside its weights")
    parser.add_argument("--round-trip", type=float, default=80.0, help="milliseconds")
    parser.add_argument("--quick", action="store_true", help="few pairs, small model: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.hidden, args.blocks = 2, 64, 8
    quiet()
    result = measure_speed(args)
    emit({"trainables": args.trainables} | result | {"speculation": measure_speculation(args)}, as_json=args.json)


if __name__ == "__main__":
    main()
