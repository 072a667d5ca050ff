"""``splitfl eval``: how good the run's model is, with this client's ends. It takes no part in training."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from client_ends.command import (
    add_data_arguments,
    add_machine_arguments,
    add_using_arguments,
    check_joining,
    split_columns,
)
from splitfl.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_using_arguments(parser)

    data = parser.add_argument_group("on a file of one's own")
    data.add_argument("--data", metavar="FILE", help="txt, jsonl, csv or tsv; never leaves this machine")
    add_data_arguments(data, evaluate=False)
    data.add_argument(
        "--generate", type=int, default=0, metavar="N", help="write up to N tokens after each prompt, scored by ROUGE"
    )

    harness = parser.add_argument_group("on tasks of the lm-eval harness (pip install 'splitfl[eval]')")
    harness.add_argument("--tasks", metavar="A,B,...", help="names of tasks")
    harness.add_argument("--include-path", type=Path, metavar="DIR", help="a directory with tasks of one's own, as YAML")
    harness.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")

    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows, or questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows a batch (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine_arguments(parser.add_argument_group("this machine"))


def _check(args: argparse.Namespace) -> None:
    if bool(args.data) == bool(args.tasks):
        raise ConfigError("say what to evaluate on: --data FILE or --tasks A,B,..., one of them")
    if args.data and not Path(args.data).is_file():
        raise ConfigError(f"--data {args.data}: no such file")
    if args.include_path and not args.include_path.is_dir():
        raise ConfigError(f"--include-path {args.include_path}: no such directory")
    for name in ("batch_size", "limit", "generate", "num_fewshot"):
        value, least = getattr(args, name), 0 if name in ("generate", "num_fewshot") else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
    if args.task != "causal-lm" and (args.tasks or args.generate):
        raise ConfigError("a classifier writes no text: --tasks and --generate are for language models")


def run(args: argparse.Namespace) -> int:
    _check(args)
    check_joining(args)
    from client_ends.joining import joined
    from client_ends.kept import kept_directory, kept_meta
    from client_ends.train import FACES
    from splitfl.parts.ends import find_ends

    if args.ends:
        args.ends = kept_directory(args.ends)  # one checkpoint, whatever a training writes meanwhile
    extra: dict[str, Any] = {}
    if args.task == "sequence-classification":
        args.num_labels, args.label_names = _classes(args, kept_meta(args.ends) if args.ends else None)
        extra = {"num_labels": args.num_labels, "seed": 0}
    with joined(args, FACES[args.task], **extra) as (used, tokenizer):
        made_anew = sorted(find_ends(used).made_anew)
        if args.task == "sequence-classification" and not args.ends and made_anew:
            raise ConfigError(f"the model comes without {made_anew[0]}, which nothing has trained: name trained ends with --ends")
        report = _on_tasks(args, used, tokenizer) if args.tasks else _on_data(args, used, tokenizer)
    if args.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def _classes(args: argparse.Namespace, meta: dict[str, Any] | None) -> tuple[int, tuple[str, ...] | None]:
    """How many classes there are, and their names: as the kept ends were trained, or as the flags say.

    Raises:
        ConfigError: the flags say otherwise than the ends.
    """
    from client_ends.preparing import unnamed

    asked = tuple(args.label_names.split(",")) if args.label_names else None
    if meta is None:
        return args.num_labels or (len(asked) if asked else 2), asked
    if meta["task"] != args.task:
        raise ConfigError(f"the ends in {args.ends} are trained for --task {meta['task']}: evaluate them so")
    count, names = int(meta["num_labels"]), tuple(meta["label_names"])
    if args.num_labels not in (None, count):
        raise ConfigError(f"the ends in {args.ends} know {count} classes: leave --num-labels out")
    if names == unnamed(count):  # trained on numbers
        return count, asked or names
    if asked not in (None, names):
        raise ConfigError(f"the ends in {args.ends} number the classes {','.join(names)}: leave --label-names out")
    return count, names


def _on_tasks(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    from client_ends.scoring import harness_scores

    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    shots, limit = args.num_fewshot, args.limit
    return harness_scores(
        model, tokenizer, tasks, batch_size=args.batch_size, include=args.include_path, shots=shots, limit=limit
    )


def _on_data(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    from client_ends.data import load_examples, pad_token, tokenize
    from client_ends.scoring import score_rows, score_texts

    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token(tokenizer)
    rows = tokenize(
        load_examples(args.data, columns=split_columns(args.columns), format=args.data_format),
        tokenizer,
        max_length=min(args.max_length, tokenizer.model_max_length),
        task=args.task,
        num_labels=args.num_labels,
        label_names=args.label_names,
    )
    rows.rows = rows.rows[: args.limit]
    report: dict[str, Any] = score_rows(model, rows, tokenizer, batch_size=args.batch_size)
    if args.generate:
        report |= score_texts(model, rows, tokenizer, batch_size=args.batch_size, new_tokens=args.generate)[0]
    print(rows.report(), file=sys.stderr)
    return report


def _show(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if isinstance(value, dict):
            print(name)
            for metric, score in value.items():
                print(f"  {metric:<20}{score:.6g}")
        else:
            print(f"{name:<22}{value:.6g}")
