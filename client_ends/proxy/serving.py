"""The endpoint at its address, from the first connection until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from aiohttp import web

from client_ends.proxy.door import is_loopback
from splitfl.errors import ConfigError

__all__ = ["listen", "serve", "url_of"]

#: Seconds for which answers under way may end in good order.
_GRACE = 5.0

#: Seconds between two looks at whether the session still stands.
_LOOK = 0.5


def listen(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A bound socket, which does not accept yet. Port 0: the system chooses.

    Raises:
        ConfigError: the address cannot be had; or others can reach it, and there is no key.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host}: no such address on this machine") from None
    if not is_loopback(str(address[0])) and not has_key:
        raise ConfigError(
            f"--host {host} can be reached from other machines, and whoever reaches it could use your model: set a key "
            "(--api-key, or better the environment's SPLITFL_API_KEY), or leave --host out"
        )
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Else a port whose last connections are just closing cannot be had. On Windows it would let two listen.
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen at {host}:{port}: {why}; choose another --port or --host") from None
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


async def serve(
    app: web.Application, bound: socket.socket, *, session: Any, ready: Callable[[], None], stop: asyncio.Event
) -> None:
    """Until ``stop`` is set, or a signal, or the session is lost for good.

    Raises:
        SplitflError: why it was lost.
    """
    # A client that hangs up ends its handler, and so its answer. Nothing of a request goes into a log.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE)
    await runner.setup()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
    try:
        await web.SockSite(runner, bound).start()
        ready()
        while not stop.is_set() and session.lost is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), _LOOK)
    finally:
        await runner.cleanup()
    if not stop.is_set():
        raise session.lost
