"""``splitfl demo``: three clients and a trunk server, four processes, train one model over loopback TCP; is it the same as
centrally?

Everything is made on the spot: a small Llama with random weights and a byte-level tokenizer, trained on English that every
CPython carries; or, with ``--model DIR``, a real checkpoint fine-tuned with LoRA. A relay between clients and server records
every byte. Then the same training runs in this process, with one trunk and three sets of ends and no network, and the losses
are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.demo_display import Watched, events, follow, last_line
from splitfl.errors import ConfigError, SplitflError

__all__ = ["add_arguments", "run"]

CLIENTS = 3
#: Different by design: a split that only works for equal clients would show here.
BATCH_SIZES = (4, 8, 6)
#: Largest relative difference of any loss of any step, fp32. Sums are taken in another order; nothing else may differ.
TOLERANCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="a real causal language model to fine-tune (default: a small one, made here)"
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything is kept (emptied first)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="optimizer steps (60)")
    parser.add_argument("--cut", default="1:1", metavar="A:B", help="input and output blocks that stay with the clients")


@dataclass
class Plan:
    """What the demo trains, and how."""

    out: Path
    model: Path
    cut: str
    steps: int
    trained: str
    learning_rate: float
    length: int
    shards: list[Path] = field(default_factory=list)

    @property
    def server_out(self) -> Path:
        return self.out / "server"

    def ends_out(self, client: int) -> Path:
        return self.out / f"client-{client}"

    def key(self, client: int) -> Path:
        return self.out / "keys" / f"client-{client}.key"


def run(args: argparse.Namespace) -> int:
    # Five processes share the cores: one thread each, and idle ones sleep. Set before torch is imported here or there.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    from splitfl.libraries import quiet_libraries

    quiet_libraries()
    began = time.monotonic()
    plan = prepare(args)
    with contextlib.ExitStack() as stack:
        relays, results = train_split(plan, stack)
        split_losses = [result["losses"] for result in results]
        central = train_central(plan)
        audit = audit_wire(plan, relays)
    worst = max(
        abs(mine - theirs) / abs(theirs)
        for ours, reference in zip(split_losses, central, strict=True)
        for mine, theirs in zip(ours, reference, strict=True)
    )
    final = keep_result(plan)
    report(plan, results, central, worst, audit)
    show_text(plan, final)
    print(f"\nThe merged model lies in {final}\nThe run (logs, checkpoints, keys) lies in {plan.out}")
    print(f"Took {time.monotonic() - began:.0f} s.")
    sentence, code = verdict(worst, audit.proven)
    print(sentence)
    return code


def verdict(worst: float, sealed: bool) -> tuple[str, int]:
    """What the demo concludes, and its exit code."""
    if not worst <= TOLERANCE:  # so that a NaN fails as well
        return f"THE SPLIT RUN DIFFERS FROM CENTRAL TRAINING by {worst:.1e}.", 1
    if not sealed:
        return "THE WIRE SHOWED PLAINTEXT, or the search for it does not work.", 1
    return "The split run equals central training, and the wire showed nothing of it.", 0


# --- before ---------------------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> Plan:
    """Model, data shards and keys. Raises ConfigError for a directory that is not the demo's to empty."""
    from splitfl.protocol.keys import write_identity
    from splitfl.sample import build_sample_model, write_sample_shards

    out = Path(args.out)
    if out.exists() and any(out.iterdir()) and not (out / "server").exists():
        raise ConfigError(f"{out} holds something that is not a demo run; choose another directory with --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "keys").mkdir(parents=True)
    if args.model:
        model = Path(args.model)
        if not (model / "config.json").is_file():
            raise ConfigError(f"{model} holds no config.json; give the directory of a Hugging Face checkpoint")
        context = json.loads((model / "config.json").read_text()).get("max_position_embeddings") or 128
        plan = Plan(out, model, args.cut, args.steps, "lora", 1e-3, min(128, context))
    else:
        plan = Plan(out, out / "model", args.cut, args.steps, "full", 3e-3, 128)
        build_sample_model(plan.model, seed=0)
    plan.shards = write_sample_shards(out / "data", clients=CLIENTS)
    lines = [f"{write_identity(plan.key(client)).public} client-{client}" for client in range(CLIENTS)]
    (out / "authorized_clients").write_text("\n".join(lines) + "\n")
    kind = "a small Llama with random weights" if not args.model else str(model)
    print(f"Model: {kind}, cut {plan.cut}. Data: {', '.join(f'{s.name} {s.stat().st_size // 1000} kB' for s in plan.shards)}.")
    return plan


# --- the split run --------------------------------------------------------------------------------------------------------------


def start(command: list[str], log: Path, stack: contextlib.ExitStack) -> subprocess.Popen[str]:
    """One process of the run; killed when the demo ends, however it ends."""
    handle: IO[str] = stack.enter_context(log.open("w"))
    process = subprocess.Popen(
        [sys.executable, "-m", "splitfl.cli", *command], stdout=handle, stderr=subprocess.STDOUT, text=True
    )

    def end() -> None:
        if process.poll() is None:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


def train_split(plan: Plan, stack: contextlib.ExitStack) -> tuple[list[Any], list[dict[str, Any]]]:
    """Start server, relay and clients, show them live, and return the relays and what each client logged."""
    from benchmarks.relay import Relay, free_port

    control_port, data_port = free_port(), free_port()
    control, data = Relay(control_port), Relay(data_port)
    stack.callback(control.close)
    stack.callback(data.close)
    settings = ["--cut", plan.cut, "--trainables", plan.trained, "--lr", str(plan.learning_rate)]
    server = start(
        [
            *("serve", str(plan.model), *settings, "--run", "demo", "--clients", str(CLIENTS), "--steps", str(plan.steps)),
            *("--bind", f"127.0.0.1:{control_port}", "--data-port", str(data_port), "--advertise", f"127.0.0.1:{data.port}"),
            *("--authorized-clients", str(plan.out / "authorized_clients"), "--out", str(plan.server_out)),
            *("--device", "cpu", "--threads", "1", "--until-done"),
        ],
        plan.out / "server.txt",
        stack,
    )
    join = wait_for_join(plan, server).replace(f":{control_port}/", f":{control.port}/")
    clients = [
        start(
            ["train", "--trunk", join, "--identity", str(plan.key(client)), "--model", str(plan.model)]
            + ["--data", str(plan.shards[client]), "--max-length", str(plan.length), "--batch-size", str(BATCH_SIZES[client])]
            + ["--ends", plan.trained, "--steps", str(plan.steps), "--evaluate", "8", "--seed", str(client)]
            + ["--device", "cpu", "--threads", "1", "--out", str(plan.ends_out(client)), "--timeout", "60"]
            + (["--dump-hidden", str(plan.out / "hidden.bin")] if client == 0 else []),
            plan.out / f"client-{client}.txt",
            stack,
        )
        for client in range(CLIENTS)
    ]
    watched = {"server": Watched(server, plan.out / "server.txt", plan.server_out / "log.jsonl")}
    for index, process in enumerate(clients):
        watched[f"client-{index}"] = Watched(process, plan.out / f"client-{index}.txt", plan.ends_out(index) / "log.jsonl")
    follow(watched, plan.steps)
    return [control, data], [read_client(plan, client) for client in range(CLIENTS)]


def wait_for_join(plan: Plan, server: subprocess.Popen[str], seconds: float = 120.0) -> str:
    """The join string the server prints once it serves. Raises SplitflError with its last line if it ends instead."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        words = (plan.out / "server.txt").read_text().split()
        found = next((word for word in words if word.startswith("splitfl://")), None)
        if found:
            return found
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise SplitflError(f"the server did not start: {last_line(plan.out / 'server.txt')}")


def read_client(plan: Plan, client: int) -> dict[str, Any]:
    """What one client logged: its losses, its held-out loss before and after, its bytes."""
    log = events(plan.ends_out(client) / "log.jsonl")
    judged = [event for event in log if event["event"] == "evaluation"]
    done = next(event for event in log if event["event"] == "done")
    return {
        "losses": [event["loss"] for event in log if event["event"] == "step"],
        "before": judged[0]["loss"],
        "after": judged[-1]["loss"],
        "sent": done["bytes_sent"],
        "received": done["bytes_received"],
    }


# --- the reference --------------------------------------------------------------------------------------------------------------


def train_central(plan: Plan) -> list[list[float]]:
    """The same training in this process: same seed, same data, one trunk, three sets of ends, no network."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.central import Central
    from client_ends.data import Batches, pad_token
    from client_ends.train import TrainSettings, prepare_ends, read_data
    from server_trunk.server import load_run_trunk
    from splitfl.config import build_config
    from splitfl.parts.loading import load_ends

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    config = build_config(
        {
            "model": str(plan.model),
            "cut": plan.cut,
            "trainables": plan.trained,
            "optimizer.learning_rate": plan.learning_rate,
            "optimizer.steps": plan.steps,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    streams, ends = [], []
    for client, shard in enumerate(plan.shards):
        settings = TrainSettings(trunk="", identity="", data=str(shard), max_length=plan.length, evaluate=8, seed=client)
        rows, _ = read_data(settings, tokenizer)
        batches = Batches(rows, BATCH_SIZES[client], seed=client, pad_token_id=pad_token(tokenizer))
        streams.append(endless(batches))
        part = load_ends(plan.model, plan.cut, dtype=torch.float32)
        ends.append(prepare_ends(part, plan.trained, config.lora, seed=config.seed))
    central = Central(load_run_trunk(config, torch.device("cpu")), ends, config.optimizer, config.optimizer)
    print("Central training, for comparison:", end=" ", flush=True)
    began = time.monotonic()
    rows_of_losses = [central.step([next(stream) for stream in streams]) for _ in range(plan.steps)]
    print(f"{plan.steps} steps in {time.monotonic() - began:.0f} s.")
    return [list(losses) for losses in zip(*rows_of_losses, strict=True)]


def endless(batches: Any) -> Any:
    while True:
        yield from batches


# --- after ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """The search of the sealed recording, and of the unsealed one that shows the search works."""

    sealed: Any
    unsealed: Any

    @property
    def proven(self) -> bool:
        hidden_state_shown = self.unsealed.windows_found == self.unsealed.windows and self.unsealed.words_found > 0
        return hidden_state_shown and not self.sealed.windows_found and not self.sealed.words_found


def audit_wire(plan: Plan, relays: list[Any]) -> Audit:
    from benchmarks.wire_audit import search, send_unsealed

    hidden = (plan.out / "hidden.bin").read_bytes()
    width = json.loads((plan.model / "config.json").read_text())["hidden_size"]
    return Audit(search(relays, hidden), search(send_unsealed(hidden, width), hidden))


def keep_result(plan: Plan) -> Path:
    """Export the trunk and client 0's ends, and merge them into what plain transformers and peft load."""
    from splitfl.adapters.merging import merge
    from splitfl.adapters.results import export_part

    ends, trunk, final = plan.out / "export-ends", plan.out / "export-trunk", plan.out / "merged"
    export_part(plan.ends_out(0), ends)
    export_part(plan.server_out, trunk)
    merge(ends, trunk, final, full_weights=plan.trained == "full", base=str(plan.model))
    return final


def report(plan: Plan, results: list[dict[str, Any]], central: list[list[float]], worst: float, audit: Audit) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.steps} steps, {plan.trained} trained on both sides")
    for column in ("", "first loss", "last loss", "central, last", "held out before", "after", "MB sent", "MB received"):
        table.add_column(column, justify="right")
    for client, (result, reference) in enumerate(zip(results, central, strict=True)):
        table.add_row(
            f"client-{client}",
            f"{result['losses'][0]:.5f}",
            f"{result['losses'][-1]:.5f}",
            f"{reference[-1]:.5f}",
            f"{result['before']:.4f}",
            f"{result['after']:.4f}",
            f"{result['sent'] / 1e6:.1f}",
            f"{result['received'] / 1e6:.1f}",
        )
    Console(width=max(100, Console().width)).print(table)
    print(f"Largest relative difference of any loss at any step: {worst:.1e} (tolerance {TOLERANCE:.0e}, fp32).")
    sealed, unsealed = audit.sealed, audit.unsealed
    print(
        f"On the wire: {sealed.bytes_searched / 1e6:.1f} MB recorded; of {sealed.windows} pieces of one hidden state "
        f"{sealed.windows_found} found, of the metadata's words {sealed.words_found}. "
        f"The same search with sealing off: {unsealed.windows_found} of {unsealed.windows} pieces, {unsealed.words_found} words."
    )


def show_text(plan: Plan, final: Path) -> None:
    """A greedy sample of the base model and of the merged one, loaded by plain transformers (and peft)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    prompt = "The class statement "
    ids = torch.tensor([tokenizer(prompt).input_ids])

    def sample(model: Any) -> str:
        torch.manual_seed(0)
        out = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=True, top_k=8, pad_token_id=0
        )
        return repr(tokenizer.decode(out[0], skip_special_tokens=True))

    base = AutoModelForCausalLM.from_pretrained(plan.model)
    print(f"\nText before: {sample(base)}")
    if plan.trained == "full":
        tuned: Any = AutoModelForCausalLM.from_pretrained(final)
    else:
        from peft import PeftModel

        tuned = PeftModel.from_pretrained(base, final)
    print(f"Text after:  {sample(tuned)}")
