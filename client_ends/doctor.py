"""``splitfl doctor``: every link between this machine and a run, checked in order; what fails is named with its mend.

Opens a session as training would, takes no part in any step, and leaves.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from typing import Any

from splitfl.errors import SplitflError, UserError

__all__ = ["Doctor", "add_arguments", "run"]

#: Seconds the clocks may differ before it is worth a word: tickets live 15 s, by the server's clock alone.
CLOCK_SKEW = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("join", metavar="JOIN", help="the join string, splitfl://KEY@host:port/RUN")
    parser.add_argument("--identity", metavar="FILE", help="this client's secret key; without it only the address is checked")
    parser.add_argument("--model", metavar="MODEL", help="directory or hub id to hold against the run's model")
    parser.add_argument("--revision", metavar="REV", help="hub revision")
    parser.add_argument("--cut", metavar="A:B", help="the cut you mean to use (default: the run's)")
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="seconds that any one answer of the server may take (10)"
    )


def run(args: argparse.Namespace) -> int:
    return Doctor(print).examine(args)


class Doctor:
    """Prints one line a check: ``ok``, ``note`` or ``FAIL`` with the mend. The first failure ends the examination."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say = say

    def examine(self, args: argparse.Namespace) -> int:
        """Exit code: 0 where training could start, 2 where something has to be mended."""
        try:
            self._examine(args)
        except SplitflError as error:
            self._say(f"FAIL  {error}")
            return UserError.exit_code
        return 0

    def _ok(self, what: str, text: str) -> None:
        self._say(f"ok    {what}: {text}")

    def _note(self, what: str, text: str) -> None:
        self._say(f"note  {what}: {text}")

    def _examine(self, args: argparse.Namespace) -> None:
        from splitfl.protocol.join import JoinString
        from splitfl.protocol.keys import read_identity

        if args.revision and args.model is None:
            raise UserError("--revision is of the model that --model names: give both, or neither to check what the run names")
        join = JoinString.parse(args.join)
        self._ok("join string", f"server key {str(join.key)[:24]}..., run {join.run}")
        self._reach(join.host, join.port, args.timeout)
        if args.identity is None:
            self._note("keys", "not checked; give --identity FILE")
            return
        identity = read_identity(args.identity)
        self._ok("your key", str(identity.public))

        from client_ends.model import open_session
        from splitfl.libraries import differences, library_versions, quiet_libraries
        from splitfl.parts.cut import Cut

        quiet_libraries()
        cut = Cut.parse(args.cut) if args.cut else None
        if args.model is not None:
            session, *_ = open_session(args.model, join, identity, cut=cut, revision=args.revision, timeout=args.timeout)
            checked = f"{args.model} is the model of this run"
        else:
            session, path, _ = open_session(None, join, identity, cut=cut, timeout=args.timeout)
            checked = f"{path}, as the run names it"
        try:
            welcome, opened = session.channel.welcome, session.channel.opened
            self._ok("session", f"the server knows both keys; data is sealed with {opened.cipher}")
            self._ok("model", f"{checked}; cut {session.terms['cut']}, {session.terms['dtype']}")
            skew = welcome.time - time.time()
            if abs(skew) > CLOCK_SKEW:
                self._note("clock", f"the server's clock is {skew:+.0f} s off yours; set both by NTP")
            else:
                self._ok("clock", f"within {CLOCK_SKEW:.0f} s of the server's")
            found = differences(library_versions(), welcome.libraries)
            for name, (mine, theirs) in found.items():
                self._note("versions", f"{name} is {mine} here and {theirs} there; results may differ in the last digits")
            if not found:
                self._ok("versions", "alike on both sides")
        finally:
            session.close()

    def _reach(self, host: str, port: int, timeout: float) -> None:
        try:
            addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        except OSError:
            raise UserError(f"the name {host} has no address; check the join string, or your DNS") from None
        try:
            with socket.create_connection((host, port), timeout=timeout):
                pass
        except OSError as error:
            raise UserError(
                f"nothing answers at {host}:{port} ({error}); is the server running, and does a firewall let the port through?"
            ) from None
        self._ok("address", f"{host}:{port} ({', '.join(addresses)}) accepts connections")
