"""``splitfl proxy``: OpenAI's HTTP interface to the run's model, on this machine, for programs that speak it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from client_ends.command import add_machine_arguments, add_using_arguments, check_joining
from splitfl.errors import ConfigError

__all__ = ["add_arguments", "run"]

_KEY = "SPLITFL_API_KEY"

#: With as many choices as each may have, they are half of the sequences that the trunk keeps of a session.
_MOST_PARALLEL = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_using_arguments(parser)

    endpoint = parser.add_argument_group("endpoint")
    endpoint.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="where to listen (127.0.0.1); beyond loopback, with a key"
    )
    endpoint.add_argument("--port", type=int, default=8080, metavar="N", help="(8080; 0: a free one)")
    endpoint.add_argument(
        "--api-key", metavar="KEY", help=f"what requests must show (default: the environment's {_KEY}, or nothing)"
    )
    endpoint.add_argument("--name", metavar="NAME", help="the model's name for requests (default: what --model or the run says)")
    endpoint.add_argument("--chat-template", metavar="FILE", help="a Jinja template in place of the tokenizer's own")

    writing = parser.add_argument_group("writing")
    writing.add_argument("--parallel", type=int, default=8, metavar="N", help="requests that are written at a time (8)")
    writing.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait for it (64)")
    writing.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="at temperature 0, propose up to N tokens from the text before: fewer round trips (0)",
    )
    add_machine_arguments(parser.add_argument_group("this machine"))


def _key(args: argparse.Namespace) -> str | None:
    """Raises ConfigError."""
    key: str | None = args.api_key if args.api_key is not None else os.environ.get(_KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError("a key is letters, digits and signs without a space: choose another with --api-key")
    return key


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError."""
    for name, low in (("parallel", 1), ("queue", 0), ("lookup", 0), ("port", 0)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} must be at least {low}")
    for name, high in (("parallel", _MOST_PARALLEL), ("port", 65535)):
        if getattr(args, name) > high:
            raise ConfigError(f"--{name} must be at most {high}")


def _template(path: str | None) -> str | None:
    """The chat template that is to be used in place of the tokenizer's own. Raises ConfigError."""
    if not path:
        return None
    if not Path(path).is_file():
        raise ConfigError(f"--chat-template {path}: no such file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read ({error}): give a text file in UTF-8") from None


def run(args: argparse.Namespace) -> int:
    _check(args)
    key, template = _key(args), _template(args.chat_template)
    check_joining(args)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError("splitfl proxy needs the package aiohttp: pip install 'splitfl[proxy]'") from None
    from client_ends.proxy.serving import listen

    # The address is had before the model is loaded: a port that is taken must not cost minutes.
    bound = listen(args.host, args.port, has_key=key is not None)
    try:
        _serve(args, bound, key, template)
    finally:
        bound.close()
    return 0


def _serve(args: argparse.Namespace, bound: Any, key: str | None, template: str | None) -> None:
    import asyncio

    from client_ends.joining import joined
    from client_ends.model import SplitModelForCausalLM
    from client_ends.proxy.door import Door, is_loopback
    from client_ends.proxy.endpoint import build
    from client_ends.proxy.serving import serve, url_of

    with joined(args, SplitModelForCausalLM) as (model, tokenizer):
        if template is not None:
            tokenizer.chat_template = template
        session = model.trunk.session
        name = args.name or args.model or session.terms["model"]
        door = Door(key, local=is_loopback(str(bound.getsockname()[0])))
        endpoint, desk = build(
            model, tokenizer, name=name, door=door, parallel=args.parallel, queue=args.queue, lookup=args.lookup
        )
        session.on_link = lambda text: print(f"splitfl proxy: {text}", file=sys.stderr, flush=True)

        def ready() -> None:
            print(f"{name} at {url_of(bound)}", flush=True)

        async def serving() -> None:
            await serve(endpoint.app(), bound, session=session, ready=ready, stop=asyncio.Event())

        asyncio.run(serving())
    # What still waited for the trunk has been told that the session is over.
    desk.wait_until_idle(5.0)
