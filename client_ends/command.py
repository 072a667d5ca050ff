"""``splitfl train``: flags to settings, and one client's run. Imports torch only once it must."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_ends.settings import check_model
from splitfl.errors import ConfigError

if TYPE_CHECKING:
    from splitfl.protocol.join import JoinString

__all__ = [
    "add_adapter_arguments",
    "add_arguments",
    "add_data_arguments",
    "add_ends_arguments",
    "add_joining_arguments",
    "add_machine_arguments",
    "add_using_arguments",
    "check",
    "check_joining",
    "run",
    "split_columns",
]


def add_data_arguments(data: argparse._ArgumentGroup, *, evaluate: bool = True) -> None:
    """How a client's file is read; ``evaluate``: and what of it is held out."""
    data.add_argument("--columns", metavar="A=B,...", help="which columns to use, as in prompt=question,completion=answer")
    data.add_argument("--data-format", choices=["txt", "jsonl", "csv", "tsv"], help="where the suffix does not say")
    data.add_argument("--task", default="causal-lm", choices=["causal-lm", "sequence-classification"])
    data.add_argument("--num-labels", type=int, metavar="N", help="classes of the whole task (default: those in the file)")
    data.add_argument("--label-names", metavar="A,B,...", help="names of the classes, in their order")
    data.add_argument("--max-length", type=int, default=512, metavar="N", help="longest row, in tokens (512)")
    if evaluate:
        data.add_argument("--evaluate", type=float, default=0.05, metavar="X", help="held-out share, or rows if 1 or more (0.05)")


def add_ends_arguments(training: argparse._ArgumentGroup) -> None:
    """How a client trains, beside what the run says too."""
    training.add_argument("--ends", default="lora", choices=["lora", "full", "frozen"], help="what of the ends is trained")
    training.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows a batch (8)")
    training.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches an optimizer step (1)")
    training.add_argument("--epochs", type=float, default=1.0, metavar="X", help="passes over the data (1)")
    training.add_argument(
        "--evaluate-every", type=int, default=0, metavar="N", help="steps between evaluations (0: none between)"
    )
    training.add_argument("--micro-batches", type=int, default=1, metavar="N", help="pieces a batch is cut into for slow links")


def add_adapter_arguments(adapter: argparse._ArgumentGroup) -> None:
    """What a client asks for its own adapter in the trunk."""
    adapter.add_argument("--adapter-rank", type=int, metavar="N", help="LoRA rank, of the ends' adapter too")
    adapter.add_argument("--adapter-alpha", type=float, metavar="X", help="LoRA alpha, of the ends' adapter too")
    adapter.add_argument("--adapter-lr", type=float, dest="adapter_learning_rate", metavar="X", help="its learning rate")
    adapter.add_argument("--adapter-weight-decay", type=float, metavar="X", help="its weight decay")


def add_joining_arguments(joining: argparse._ArgumentGroup) -> None:
    """How a client finds the run, and its model."""
    joining.add_argument("--trunk", required=True, metavar="JOIN", help="the join string, splitfl://KEY@host:port/RUN")
    joining.add_argument("--identity", required=True, metavar="FILE", help="this client's secret key (splitfl keygen)")
    joining.add_argument("--model", metavar="MODEL", help="directory or hub id (default: the hub model the run names)")
    joining.add_argument("--revision", metavar="REV", help="hub revision")
    joining.add_argument("--cut", metavar="A:B", help="insist on a cut (default: the run's)")
    joining.add_argument(
        "--reconnect",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds for which a lost link, or a server that starts again, is waited for (600; 0: not at all)",
    )
    joining.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="seconds that any one answer of the server may take (10)"
    )


def check_joining(args: argparse.Namespace) -> JoinString:
    """What of the flags for joining can be judged before torch is imported, a model hashed or data read; returns the join string.

    Raises:
        ConfigError, KeyFileError: one sentence with the mend.
    """
    from splitfl.protocol.join import JoinString
    from splitfl.protocol.keys import read_identity

    check_model(args)
    join = JoinString.parse(args.trunk)
    read_identity(args.identity)
    return join


def add_using_arguments(parser: argparse.ArgumentParser) -> None:
    """How a run is joined to use its model, and with whose ends."""
    joining = parser.add_argument_group("joining")
    add_joining_arguments(joining)
    joining.add_argument("--ends", metavar="DIR", help="what splitfl train kept: its --out, or a checkpoint in it")


def add_machine_arguments(machine: argparse._ArgumentGroup) -> None:
    """What a client computes on."""
    machine.add_argument("--device", default="auto", help="cuda, cuda:N, mps, cpu, or auto")
    machine.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], help="insist on a precision (default: the run's)")
    machine.add_argument("--attn", metavar="NAME", help="attention implementation, as transformers names it")
    machine.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (0: torch's choice)")
    machine.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    joining = parser.add_argument_group("joining")
    add_joining_arguments(joining)
    joining.add_argument("--resume", action="store_true", help="go on with the ends kept in --out, where the run stands")

    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="FILE", help="txt, jsonl, csv or tsv; never leaves this machine")
    add_data_arguments(data)

    training = parser.add_argument_group("training the ends (what is not given is the run's own)")
    add_ends_arguments(training)
    training.add_argument("--steps", type=int, default=0, metavar="N", help="optimizer steps, in place of epochs")
    training.add_argument("--lr", type=float, dest="learning_rate", metavar="X", help="learning rate of the ends")
    training.add_argument("--weight-decay", type=float, metavar="X")
    training.add_argument("--clip", type=float, metavar="X", help="largest gradient norm of the ends (0: no clipping)")
    training.add_argument("--seed", type=int, default=0, metavar="N", help="order of the data, held-out part, fresh heads")

    adapter = parser.add_argument_group("this client's own adapter in the trunk (where the run has one for each client)")
    add_adapter_arguments(adapter)

    machine = parser.add_argument_group("this machine")
    machine.add_argument("--out", default="", metavar="DIR", help="where results and the log go (default runs/RUN-ends)")
    machine.add_argument(
        "--report-to",
        metavar="A,B,...",
        help="tensorboard, wandb, trackio, ...: where figures go too; all, or none (default: tensorboard if installed)",
    )
    machine.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps between checkpoints (0: at the end)")
    add_machine_arguments(machine)
    machine.add_argument("--dump-hidden", default="", metavar="FILE", help="keep the first hidden state sent, to audit the wire")


def split_columns(text: str | None) -> dict[str, str] | None:
    """``"prompt=question,completion=answer"`` to a dict. Raises ConfigError."""
    if not text:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not name or not sign or not column for name, sign, column in pairs):
        raise ConfigError(f"--columns {text!r}: write it as prompt=question,completion=answer")
    return {name.strip(): column.strip() for name, _, column in pairs}


def check(values: dict[str, Any]) -> None:
    """Bring the arguments of a command line into the form of TrainSettings, in place. Raises ConfigError."""
    values["columns"] = split_columns(values["columns"])
    values["label_names"] = tuple(values["label_names"].split(",")) if values["label_names"] else None
    for name, low in (("batch_size", 1), ("accumulate", 1), ("max_length", 2), ("micro_batches", 1), ("steps", 0)):
        if values[name] < low:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}")
    for name, low in (("rank", 1), ("alpha", 0), ("learning_rate", 0), ("weight_decay", 0)):
        value = values.get(f"adapter_{name}")
        if value is not None and (value < low or (name == "alpha" and value == 0)):
            flag = {"learning_rate": "lr"}.get(name, name).replace("_", "-")
            raise ConfigError(f"--adapter-{flag} {value:g}: it must be {'above' if name == 'alpha' else 'at least'} {low}")
    for name in ("epochs", "learning_rate", "weight_decay", "clip", "evaluate", "timeout", "reconnect"):
        value = values[name]
        if value is not None and (value < 0 or (value == 0 and name in ("epochs", "timeout"))):
            shown = {"learning_rate": "lr"}.get(name, name).replace("_", "-")
            raise ConfigError(f"--{shown} {value:g}: it must be {'above' if name in ('epochs', 'timeout') else 'at least'} 0")


def run(args: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(args).items() if name != "command"}
    check(values)
    if not Path(args.data).is_file():
        raise ConfigError(f"--data {args.data}: no such file")
    join = check_joining(args)

    from client_ends.progress import Progress
    from client_ends.train import TrainSettings, train
    from splitfl.checkpoint import checkpoint_steps, mend_checkpoints
    from splitfl.libraries import quiet_libraries
    from splitfl.runlog import RunLog

    quiet_libraries()
    values["out"] = args.out or str(Path("runs") / f"{join.run}-ends")
    mend_checkpoints(values["out"])
    if checkpoint_steps(values["out"]) and not args.resume:
        raise ConfigError(
            f"{values['out']} holds the ends of an earlier run: go on with them by --resume, or choose another --out"
        )
    try:
        log = RunLog(Path(values["out"]) / "log.jsonl", echo=None)
    except OSError as error:
        raise ConfigError(f"cannot write to {values['out']} ({error.strerror}): choose another directory with --out") from None
    try:
        result = train(TrainSettings(**values), log=log, progress=Progress())
    finally:
        log.close()
    if result.losses:
        print(f"{result.steps} step(s), loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}", file=sys.stderr)
    print(f"ends kept in {result.checkpoint}", file=sys.stderr)
    return 0
