"""``splitfl serve``: flags and file to a config, a server, and a clean end. Imports torch only once it must."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from splitfl.config import RunConfig, build_config, read_toml, to_toml
from splitfl.errors import ConfigError
from splitfl.settings import SETTINGS

if TYPE_CHECKING:
    from server_trunk.replicas.process import Joined

__all__ = ["add_arguments", "config_from", "run"]

#: Seconds that an open step may take to its end after SIGTERM; most supervisors kill after 30.
PATIENCE = 20.0
#: Seconds within which a second signal is the first again: who signals a whole group of processes reaches each by its agent too.
_ECHO = 2.0


def add_arguments(parser: argparse.ArgumentParser, *, without: Container[str] = ()) -> None:
    """``without``: keys of settings that get no flag; ``resume`` among them."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="directory or hub id of the model (or `model` in --config)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the settings below; flags win over it")
    if "resume" not in without:
        again = parser.add_mutually_exclusive_group()
        again.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run's directory")
        again.add_argument(
            "--resume-if-any",
            action="store_true",
            help="the same, or begin where it holds none: for a server that something starts again when it ends",
        )
    defaults = RunConfig(model="")
    for setting in SETTINGS:
        if setting.key in without:
            continue
        section, _, leaf = setting.key.rpartition(".")
        default = getattr(getattr(defaults, section) if section else defaults, leaf)
        note = f" (default {default})" if default not in (None, "", 0, False) else ""
        kind: dict[str, Any] = {"action": "store_const", "const": True} if setting.kind is bool else {"type": setting.kind}
        if setting.kind is not bool:
            kind["metavar"] = {int: "N", float: "X"}.get(setting.kind, "TEXT")
        parser.add_argument(setting.option, dest=setting.key, default=None, help=setting.help + note, **kind)


def config_from(args: argparse.Namespace) -> RunConfig:
    """The config of a command line: the file's settings with the flags laid over them."""
    values = read_toml(args.config) if args.config else {}
    given = vars(args)
    values |= {setting.key: given[setting.key] for setting in SETTINGS if given.get(setting.key) is not None}
    if args.model:
        values["model"] = args.model
    return build_config(values)


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    if config.mode != "hierarchical" and config.ranks == 1:
        _serve(config, args)
        return 0
    from server_trunk.replicas.place import Place

    place = Place.from_environment()
    if place is not None:
        from server_trunk.replicas.process import run_process

        run_process(config, place, lambda own, joined: _serve(own, args, joined) if joined.leads else _follow(own, joined))
    if config.mode == "hierarchical" and not config.replicas:
        raise ConfigError("how many replicas? --replicas N starts N of them on this machine, torchrun on several machines")
    from server_trunk.beforehand import check_before, check_new
    from server_trunk.replicas.launch import launch

    if not (args.resume or args.resume_if_any):
        check_new(config.out_dir)
    check_before(config)
    return launch(config, _arguments(args))


def _follow(config: RunConfig, joined: Joined) -> None:
    """Be a rank of a trunk that clients do not talk to."""
    from server_trunk.building import follow_leader
    from server_trunk.replicas.training import replica_training
    from splitfl.libraries import quiet_libraries

    quiet_libraries()
    # Ctrl-C and a polite end come to every rank alike: the leader says when it is over.
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    group, shards = joined.group, joined.shards
    assert shards is not None
    follow_leader(
        config, shards, training_of=None if group is None else lambda model: replica_training(config, model, group, shards)
    )


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line again, for another process."""
    words = [args.model] if args.model else []
    words += [f"--config={args.config}"] if args.config else []
    words += [flag for flag, given in (("--resume", args.resume), ("--resume-if-any", args.resume_if_any)) if given]
    for setting in SETTINGS:
        value = getattr(args, setting.key)
        if value is not None:
            words.append(setting.option if setting.kind is bool else f"{setting.option}={value}")
    return words


def _serve(config: RunConfig, args: argparse.Namespace, joined: Joined | None = None) -> None:
    from server_trunk.replicas.launch import AGENT
    from server_trunk.server import TrunkServer
    from splitfl.libraries import quiet_libraries

    quiet_libraries()
    group, shards, watch = (joined.group, joined.shards, joined.watch) if joined is not None else (None, None, None)
    first = joined is None or joined.place.is_first
    if first:
        print(f"loading the trunk of {config.model}", file=sys.stderr)
    # Under a torchrun of the operator's nobody can say whether the group has stood before: each agent counts its own restarts.
    started_again = joined is not None and (joined.place.restarts > 0 or AGENT not in os.environ)
    server = TrunkServer(
        config,
        resume=args.resume,
        resume_if_any=args.resume_if_any or started_again,
        echo=sys.stderr if first else None,
        group=group,
        shards=shards,
        watch=watch,
    )
    server.start()
    if first:
        print(f"# the resolved config, kept as {config.out_dir / 'config.toml'}\n{to_toml(config)}", file=sys.stderr)
        print(f"join string (clients need this and a line in the list of authorised clients):\n\n  {server.join}\n", flush=True)
    stopping = threading.Event()
    asked: list[tuple[int, float]] = []

    def ask_to_stop(number: int, *_: Any) -> None:
        asked.append((number, time.monotonic()))
        stopping.set()
        if asked[-1][1] - asked[0][1] >= _ECHO:
            server.hurry()

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), ask_to_stop)
    text, back = "the server is stopping", False
    try:
        while not stopping.is_set() and not server.wait(0.5):
            pass
    except BaseException:
        text, back = "the server has failed", True  # clients wait until it is started again, as for one that was killed
        raise
    finally:
        # Ctrl-C is a person who ends the run; SIGTERM comes from what starts it again.
        asked_politely = any(number == signal.SIGTERM for number, _ in asked)
        server.stop(text, back=back or asked_politely, patience=PATIENCE if asked_politely else 0.0)
