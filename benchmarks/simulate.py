"""``splitfl simulate``: a server and N clients in one process, on one device, for research.

The same code as in a real run, down to the sealed records; only the sockets are replaced by their in-memory twin. So the numbers
are those of real processes with the same data and seeds (dropout in the ends aside, whose draws come from one generator a
process). What a simulation cannot show is how fast the processes would be side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from client_ends.command import add_adapter_arguments, add_data_arguments, add_ends_arguments, check
from server_trunk import command as serve
from splitfl.config import RunConfig
from splitfl.errors import ConfigError, DataError, RunComplete

__all__ = ["add_arguments", "deal", "run"]

#: Settings that only a network has use for.
_NETWORK = frozenset({"bind", "host", "data_port", "advertise", "bulk", "identity", "authorized_clients", "until_done", "resume"})
#: Everything shares the cores here, so an answer may take its time, seconds.
_PATIENCE = 300.0
#: Seconds between two lines that say how far the run is.
_EVERY = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serve.add_arguments(parser, without=_NETWORK)
    data = parser.add_argument_group("the clients' data")
    data.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help="txt, jsonl, csv or tsv; given once, its rows are dealt out; given N times, each client has its own",
    )
    add_data_arguments(data)
    ends = parser.add_argument_group("training the ends (what is not given is the run's own)")
    add_ends_arguments(ends)
    ends.add_argument("--ends-lr", dest="learning_rate", type=float, metavar="X", help="learning rate of the ends")
    ends.add_argument("--ends-weight-decay", dest="weight_decay", type=float, metavar="X")
    ends.add_argument("--ends-clip", dest="clip", type=float, metavar="X", help="largest gradient norm of the ends")
    add_adapter_arguments(parser.add_argument_group("each client's own adapter in the trunk (where each has one)"))
    parser.add_argument("--json", action="store_true", help="print losses and summary as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    config = serve.config_from(args)
    if config.mode == "hierarchical" or config.ranks > 1:
        raise ConfigError("a simulation is one process with one trunk: use --mode sync or async, and --shard none or layers")
    if len(args.data) not in (1, config.clients):
        raise ConfigError(
            f"{len(args.data)} data files for {config.clients} clients: give one file, or one for each (--clients says how many)"
        )
    for file in args.data:
        if not Path(file).is_file():
            raise ConfigError(f"--data {file}: no such file")
    keys = ("columns", "data_format", "task", "num_labels", "label_names", "max_length", "evaluate", "ends", "batch_size")
    keys += ("accumulate", "epochs", "evaluate_every", "micro_batches", "learning_rate", "weight_decay", "clip")
    keys += ("adapter_rank", "adapter_alpha", "adapter_learning_rate", "adapter_weight_decay")
    mine: dict[str, Any] = {key: getattr(args, key) for key in keys}
    mine |= {"steps": config.optimizer.steps, "timeout": _PATIENCE, "reconnect": 0.0}
    check(mine)
    if config.out_dir.exists() and any(config.out_dir.iterdir()):
        raise ConfigError(f"{config.out_dir} is not empty: name the run with --run, or choose another directory with --out")

    from splitfl.libraries import quiet_libraries

    quiet_libraries()
    simulation = Simulation(config, mine, [Path(file) for file in args.data])
    simulation.run()
    simulation.report(as_json=args.json)
    return 0


def deal(path: Path, clients: int, directory: Path, settings: dict[str, Any]) -> list[Path]:
    """Deal the rows of a file out, one in turn to each client; a running text is cut between lines into parts of equal length.

    Returns ``client-0`` and on, in ``directory``; ``settings`` then fit those files, and know the labels of all.

    Raises:
        DataError: there are fewer rows than clients.
    """
    from client_ends.data import load_examples

    examples = load_examples(path, columns=settings["columns"], format=settings["data_format"])
    too_few = DataError(f"{path} holds too little for {clients} clients: give a larger file, or fewer clients")
    directory.mkdir(parents=True, exist_ok=True)
    settings |= {"columns": None, "data_format": "txt" if examples.running else "jsonl"}
    files = [directory / f"client-{client}.{settings['data_format']}" for client in range(clients)]
    if examples.running:
        text = "".join(row["text"] for row in examples.rows)
        ends = [text.find("\n", len(text) * (client + 1) // clients - 1) + 1 or len(text) for client in range(clients)]
        parts = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        if not all(part.strip() for part in parts):
            raise too_few
    else:
        if len(examples) < clients:
            raise too_few
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in examples.rows]
        parts = ["".join(lines[client::clients]) for client in range(clients)]
    for file, part in zip(files, parts, strict=True):
        file.write_text(part, encoding="utf-8", newline="")
    labels = [row["label"] for row in examples.rows] if examples.kind == "classification" else []
    if labels and not settings["label_names"]:
        # A client whose rows lack a label must number the others as all do.
        if all(str(label).strip().isdecimal() for label in labels):
            settings["num_labels"] = settings["num_labels"] or max(2, 1 + max(int(label) for label in labels))
        else:
            settings["label_names"] = tuple(sorted({str(label) for label in labels}))
    return files


class Simulation:
    """One run in this process. Client ``k`` trains as ``splitfl train --seed SEED+k`` would."""

    def __init__(self, config: RunConfig, settings: dict[str, Any], data: list[Path]) -> None:
        """``settings``: those of :class:`client_ends.train.TrainSettings` that all clients share."""
        from server_trunk.server import TrunkServer
        from splitfl.protocol.keys import write_identity
        from splitfl.transport.memory import MemoryNetwork, MemoryServerTransport

        self.out = config.out_dir
        (self.out / "keys").mkdir(parents=True)
        self.clients = config.clients
        self.files = data if len(data) > 1 or self.clients == 1 else deal(data[0], self.clients, self.out / "data", settings)
        self.settings = settings
        self.keys = [self.out / "keys" / f"client-{client}.key" for client in range(self.clients)]
        lines = [f"{write_identity(key).public} {key.stem}" for key in self.keys]
        (self.out / "keys" / "authorized_clients").write_text("\n".join(lines) + "\n")
        self.config = dataclasses.replace(
            config,
            out=str(self.out / "server"),
            identity=str(self.out / "keys" / "server.key"),
            authorized_clients=str(self.out / "keys" / "authorized_clients"),
        )
        self.network = MemoryNetwork()
        transport = MemoryServerTransport(self.network, write_identity(self.out / "keys" / "server.key"))
        self.server = TrunkServer(self.config, transport=transport)
        self.results: dict[int, Any] = {}
        self.failures: dict[int, BaseException] = {}
        self.summary: dict[str, Any] = {}

    def run(self) -> None:
        """Train to the end. Raises what the first client failed with, or the trunk; KeyboardInterrupt once all have ended."""
        self.server.start()
        threads = [threading.Thread(target=self._train, args=(client,), daemon=True) for client in range(self.clients)]
        try:
            for thread in threads:
                thread.start()
            self._watch(threads)
            self.summary = self.server.meter.snapshot()
        finally:
            self.server.stop("the simulation ends")
            # Clients that still train lose their session, keep their ends as they are, and end.
            for thread in threads:
                thread.join(30)
        if self.failures:
            raise next(iter(self.failures.values()))

    def _watch(self, threads: list[threading.Thread]) -> None:
        spoke = time.monotonic()
        while any(thread.is_alive() for thread in threads) and not self.failures:
            self.server.wait(0.2)
            if time.monotonic() - spoke >= _EVERY:
                spoke = time.monotonic()
                taken = self.server.meter.snapshot()
                print(
                    f"{taken['sessions']} client(s), step {taken['steps']}, {taken['tokens_per_second']:.0f} tokens/s, "
                    f"trunk busy {taken['busy']:.0%}",
                    file=sys.stderr,
                    flush=True,
                )

    def _train(self, client: int) -> None:
        from client_ends.train import TrainSettings, train
        from splitfl.runlog import RunLog
        from splitfl.transport.memory import MemoryClientTransport

        config = self.config
        settings = TrainSettings(
            trunk=str(self.server.join),
            identity=str(self.keys[client]),
            data=str(self.files[client]),
            model=config.model,
            revision=config.revision,
            seed=config.seed + client,
            out=str(self.out / f"client-{client}"),
            report_to="none",
            checkpoint_every=config.checkpoint_every,
            device=config.device,
            attn=config.attn or None,
            trust_remote_code=config.trust_remote_code,
            **self.settings,
        )
        log = RunLog(Path(settings.out) / "log.jsonl", echo=None)
        try:
            self.results[client] = train(settings, log=log, channel_options={"transport": MemoryClientTransport(self.network)})
        except RunComplete:
            pass  # without a barrier, others may have made all steps before this one's first
        except BaseException as error:
            self.failures[client] = error
        finally:
            log.close()

    def report(self, *, as_json: bool) -> None:
        """A line a client, and what the trunk did."""
        from benchmarks.report import emit

        columns = ("steps", 6), ("first loss", 11), ("last loss", 10), ("held out before", 16), ("after", 8), ("tokens", 10)
        print(" " * 10 + "".join(f"{title:>{width + 1}}" for title, width in columns))
        clients = []
        for client in range(self.clients):
            result, name = self.results.get(client), f"client-{client}"
            if result is None:
                print(f"{name:10}  came too late for any step")
                clients.append({"name": name, "losses": []})
                continue
            held_out = (result.evaluation_before, result.evaluation_after)
            before, after = (None if each is None else each["loss"] for each in held_out)
            tokens = self.summary["clients"][name]["tokens"]
            losses = (result.losses[0], result.losses[-1], before, after)
            cells = [str(result.steps), *("" if loss is None else f"{loss:.5f}" for loss in losses), str(tokens)]
            print(f"{name:10}" + "".join(f"{cell:>{width + 1}}" for cell, (_, width) in zip(cells, columns, strict=True)))
            clients.append({"name": name, "losses": result.losses, "before": before, "after": after, "tokens": tokens})
        summary = {key: value for key, value in self.summary.items() if key != "clients"}
        print(
            f"{summary['steps']} steps, {summary['tokens']} tokens forward in {summary['seconds']:.1f} s "
            f"(joining and loading included), of which the trunk was busy {summary['busy_seconds']:.1f} s\n"
            f"The run (logs, checkpoints, keys) lies in {self.out}"
        )
        emit({"clients": clients, "run": summary}, as_json=as_json)
