"""Is sentiment classified as well through the split as in one process? SST-2, three clients with unlike shares of the labels.

From a pretrained model (stories260K) each client fine-tunes its ends and a fresh classification head on its own sentences, whose
labels are shared out by a Dirichlet distribution (Hsu et al., arXiv 1909.06335); the trunk trains on all of them, and the ends
are averaged after each round, weighted by what each has trained on (FedAvg, arXiv 1602.05629). A client's batch is the larger the
more sentences it has, so that none is read more often than another's: else a client with few of one label alone would decide as
much as all others. The reference is the same algorithm in one process: one trunk, N sets of ends, averaged as plainly as it can
be written. Both see the same batches. Accuracy (percent) and loss are of the averaged model on the official development set.

    python -m benchmarks.sst2 [--clients 3] [--seeds 3] [--steps 600] [--data DIR] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from benchmarks.central import Central
from benchmarks.report import emit
from client_ends import SplitModelForSequenceClassification
from client_ends.data import Batches, load_examples, pad_token, tokenize
from client_ends.evaluation import evaluate
from client_ends.preparing import prepare_ends
from server_trunk.server import TrunkServer, load_run_trunk
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings, OptimizerSettings, RunConfig, build_config
from splitfl.errors import DataError
from splitfl.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from splitfl.parts.loading import attach_trunk, load_ends
from splitfl.protocol.keys import write_identity
from splitfl.transport.memory import MemoryClientTransport, MemoryNetwork, MemoryServerTransport

__all__ = ["Task", "deal_batch", "deal_by_label", "one_process", "split"]

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_DEVICE = torch.device("cpu")

Batch = dict[str, torch.Tensor]


def deal_by_label(labels: Sequence[int], clients: int, concentration: float, seed: int) -> list[list[int]]:
    """Row numbers a client: of each label, a Dirichlet-distributed share; nobody is left with fewer than 32 rows."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        dealt: list[list[int]] = [[] for _ in range(clients)]
        for label in sorted(set(labels)):
            rows = [row for row, one in enumerate(labels) if one == label]
            rows = [rows[place] for place in torch.randperm(len(rows), generator=draw).tolist()]
            weights = torch._standard_gamma(torch.full((clients,), concentration), generator=draw)
            ends = (len(rows) * (weights / weights.sum()).cumsum(0)).round().int().tolist()
            for client, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                dealt[client] += rows[begin:end]
        if min(map(len, dealt)) >= 32:
            return dealt


def deal_batch(rows: Sequence[int], batch: int) -> list[int]:
    """Of ``batch`` rows a step, how many each client has: in proportion to its rows, one at least."""
    return [max(1, round(batch * own / sum(rows))) for own in rows]


class Score(NamedTuple):
    """Of the development set: percent that are right; loss a sentence."""

    accuracy: float
    loss: float


@dataclasses.dataclass
class Task:
    """One seed's data and settings. ``shares``: rows a client, ``batch_sizes`` a step. ``held_out``: the development set."""

    config: RunConfig
    shares: list[list[Any]]
    batch_sizes: list[int]
    held_out: Any
    pad: int

    @property
    def ends_settings(self) -> OptimizerSettings:
        return self.config.optimizer

    def stream(self, client: int) -> Iterator[Batch]:
        """The client's batches, without end."""
        batches = Batches(self.shares[client], self.batch_sizes[client], seed=self.config.seed + client, pad_token_id=self.pad)
        while True:
            yield from batches

    def score(self, model: Any) -> Score:
        """On the development set."""
        model.config.pad_token_id = self.pad
        batches = Batches(self.held_out, 64, seed=0, pad_token_id=self.pad, shuffle=False)
        found = evaluate(model, batches, _DEVICE)
        return Score(100 * found["accuracy"], found["loss"])


def split(task: Task, work: Path) -> Score:
    """The score of a run with a server and its clients, their messages sealed."""
    config = task.config
    keys = [work / f"client-{client}.key" for client in range(config.clients)]
    (work / "authorized_clients").write_text("".join(f"{write_identity(key).public} {key.stem}\n" for key in keys))
    network = MemoryNetwork()
    server = TrunkServer(config, transport=MemoryServerTransport(network, write_identity(work / "server.key")))
    found: dict[int, Score] = {}
    failures: list[BaseException] = []

    def train(client: int) -> None:
        try:
            found[client] = _client(task, client, str(server.join), keys[client], network)
        except BaseException as error:
            failures.append(error)

    server.start()
    threads = [threading.Thread(target=train, args=(client,), daemon=True) for client in range(config.clients)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) and not failures:
            server.wait(0.2)
    finally:
        server.stop()
    if failures:
        raise failures[0]
    return found[0]


def _client(task: Task, client: int, join: str, key: Path, network: MemoryNetwork) -> Score:
    """One client's training, as a user writes it."""
    options = {"transport": MemoryClientTransport(network)}
    model = SplitModelForSequenceClassification.from_pretrained(
        task.config.model, join, key, num_labels=2, device="cpu", reconnect=0.0, timeout=300.0, channel_options=options
    )
    model.config.pad_token_id = task.pad
    ends = prepare_ends(model, "full", LoraSettings(), seed=0).train()
    parameters = list(named_trainables(ends).values())
    optimizer, stream = build_optimizer(parameters, task.ends_settings), task.stream(client)
    for step in range(task.config.optimizer.steps):
        ends(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, task.ends_settings.clip)
        set_learning_rate(optimizer, learning_rate_at(step, task.ends_settings))
        optimizer.step()
        optimizer.zero_grad()
    model.wait_step()
    score = task.score(model) if client == 0 else Score(0.0, 0.0)
    model.close()
    return score


def one_process(task: Task) -> Score:
    """The score of the reference."""
    config = task.config
    parts = []
    for _ in range(config.clients):
        ends = load_ends(config.model, config.cut, task="sequence-classification", num_labels=2, seed=config.seed)
        ends.config.pad_token_id = task.pad
        parts.append(prepare_ends(ends, "full", LoraSettings(), seed=0))
    trunk = load_run_trunk(config, _DEVICE)
    central = Central(trunk, parts, config.optimizer, task.ends_settings)
    streams = [task.stream(client) for client in range(config.clients)]
    counted = [0] * config.clients
    for step in range(config.optimizer.steps):
        batches = [next(stream) for stream in streams]
        central.step(batches)
        counted = [count + len(batch["labels"]) for count, batch in zip(counted, batches, strict=True)]
        if (step + 1) % config.round_steps == 0:
            _average([named_trainables(part) for part in parts], counted)
            counted = [0] * config.clients
    attach_trunk(parts[0], trunk.eval())
    return task.score(parts[0])


def _average(ends: Sequence[Mapping[str, torch.nn.Parameter]], weights: Sequence[int]) -> None:
    with torch.no_grad():
        for name in ends[0]:
            mean = sum(one[name].double() * weight for one, weight in zip(ends, weights, strict=True)) / sum(weights)
            for one in ends:
                one[name].copy_(mean)


def make_task(data: Path, model: Path, work: Path, seed: int, args: argparse.Namespace) -> Task:
    """Raises DataError where the data is not there."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    columns = {"text": "sentence", "label": "label"}

    def read(name: str) -> Any:
        examples = load_examples(data / f"{name}.tsv", columns=columns)
        return tokenize(examples, tokenizer, max_length=args.max_length, task="sequence-classification", num_labels=2)

    rows, held_out = list(read("train")), read("dev")
    dealt = deal_by_label([row["labels"] for row in rows], args.clients, args.concentration, seed)
    settings = {
        "model": str(model),
        "clients": args.clients,
        "seed": seed,
        "out": str(work / "server"),
        "identity": str(work / "server.key"),
        "authorized_clients": str(work / "authorized_clients"),
        "trainables": "full",
        "round_steps": args.round_steps,
        "checkpoint_every": 0,
        "device": "cpu",
        "status_every": 0.0,
        "optimizer.learning_rate": args.learning_rate,
        "optimizer.schedule": "linear",
        "optimizer.steps": args.steps,
    }
    shares = [[rows[row] for row in share] for share in dealt]
    batch_sizes = deal_batch(list(map(len, shares)), args.batch_size)
    return Task(build_config(settings), shares, batch_sizes, held_out, pad_token(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=_DATA, help="a directory with models/stories260K and text/sst2")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--round-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=48, help="of all clients together (48)")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--concentration", type=float, default=0.3)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.batch_size = 1, 20, 12
    data, model = args.data / "text" / "sst2", args.data / "models" / "stories260K"
    if not data.is_dir() or not model.is_dir():
        raise DataError(f"{args.data} holds no SST-2 and no stories260K: say where they are with --data")
    torch.set_num_threads(1)
    results = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as directory:
            task = make_task(data, model, Path(directory), seed, args)
            shares = [
                {"rows": len(share), "positive": round(statistics.fmean(row["labels"] for row in share), 3), "batch": batch}
                for share, batch in zip(task.shares, task.batch_sizes, strict=True)
            ]
            ours, reference = split(task, Path(directory)), one_process(task)
            row = {"seed": seed, "shares": shares, "split": ours.accuracy, "one_process": reference.accuracy}
            row["losses"] = {"split": ours.loss, "one_process": reference.loss}
        results.append(row)
        print(
            f"seed {seed}: positive shares {', '.join(format(share['positive'], '.0%') for share in shares)}; accuracy "
            f"{row['split']:.2f} % split, {row['one_process']:.2f} % in one process",
            flush=True,
        )
    difference = statistics.fmean(row["split"] - row["one_process"] for row in results)
    print(f"mean difference {difference:+.2f} points over {len(results)} seeds")
    emit({"steps": args.steps, "round_steps": args.round_steps, "results": results, "difference": difference}, as_json=args.json)


if __name__ == "__main__":
    main()
