"""What leads to a client's open session: hello, the terms, and perhaps another of the server's addresses."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from splitfl.errors import ConnectError, Refused, SplitflError
from splitfl.protocol.ciphers import pick_ciphers
from splitfl.protocol.join import JoinString
from splitfl.protocol.messages import PROTOCOL_VERSION, ControlMessage, Hello, Open, Opened, Redirect, Welcome
from splitfl.protocol.messages import Refused as RefusedMessage
from splitfl.protocol.session import ClientSession
from splitfl.transport import wording

Channel = TypeVar("Channel")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class OpenTerms:
    """What the client says of itself after it has checked the run's configuration; see
    :class:`splitfl.protocol.messages.Open`.
    """

    model: dict[str, Any]
    cut: tuple[int, int]
    adapter: dict[str, Any] = field(default_factory=dict)
    replaces: str = ""


class Elsewhere(ConnectError):
    """The server has answered Open with another address."""

    def __init__(self, redirect: Redirect) -> None:
        super().__init__("the server sends this client to another address")
        self.host, self.port = redirect.host, redirect.port


class Opening:
    """One attempt at one address: the I/O thread hands in what comes, the caller's thread waits for it."""

    def __init__(self, join: JoinString, name: str, libraries: dict[str, str], timeout: float) -> None:
        self._join, self.name, self._libraries, self._timeout = join, name, libraries, timeout
        self._welcomed: Future[Welcome] = Future()
        self._attached: Future[Opened] = Future()

    # --- the caller's thread ----------------------------------------------------------------------------------------

    def welcome(self) -> Welcome:
        """Waits for the answer to Hello. Raises ConnectError when none comes, and what :meth:`failed` was told."""
        # The connection may take one timeout, the answer another.
        return self._wait(self._welcomed, 2 * self._timeout)

    def opened(self) -> Opened:
        """Waits until both connections stand. Raises Elsewhere, and as :meth:`welcome`."""
        return self._wait(self._attached, 3 * self._timeout)

    def _wait(self, future: Future[Answer], timeout: float) -> Answer:
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            raise wording.silent(self._join.host, self._join.port, self._timeout) from None

    # --- what is said -----------------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, self._join.run, self._libraries, platform.platform()[:200])

    def open(self, session: ClientSession, terms: OpenTerms) -> Open:
        """The wish for a session on these terms, with fresh secrets that ``session`` keeps."""
        return session.make_open(
            ciphers=pick_ciphers(),
            model=terms.model,
            cut=terms.cut,
            name=self.name,
            adapter=terms.adapter,
            replaces=terms.replaces,
        )

    # --- the I/O thread ---------------------------------------------------------------------------------------------

    @property
    def is_welcomed(self) -> bool:
        return self._welcomed.done()

    @property
    def is_over(self) -> bool:
        """Whether the session is open, or never will be."""
        return self._attached.done()

    def take(self, message: ControlMessage) -> bool:
        """Whether this message is part of the opening. Raises Refused, Elsewhere."""
        if isinstance(message, Welcome):
            self._welcomed.set_result(message)
        elif isinstance(message, RefusedMessage):
            raise Refused(message.code, message.text)
        elif isinstance(message, Redirect):
            raise Elsewhere(message)
        else:
            return False
        return True

    def attached(self, opened: Opened) -> None:
        """Both connections stand, and both sides have proven their keys."""
        self._attached.set_result(opened)

    def failed(self, error: SplitflError) -> None:
        """Whoever still waits, or is going to, gets this error."""
        for future in (self._welcomed, self._attached):
            if not future.done():
                future.set_exception(error)


def follow(
    open_at: Callable[[JoinString, Callable[[Welcome], OpenTerms]], Channel],
    join: JoinString,
    answer: Callable[[Welcome], OpenTerms],
    *,
    may_move: bool,
) -> Channel:
    """Opens at ``join``, or at the address the server there names instead; ``may_move``: whether a new connection can be made.

    ``answer`` is asked once: what it agreed to holds at the other address too, if the configuration there is the same.
    Raises ConnectError where it is not, where the other address names a third one, and what ``open_at`` raises.
    """
    asked: dict[str, Any] = {}
    terms: OpenTerms | None = None

    def agree(welcome: Welcome) -> OpenTerms:
        nonlocal asked, terms
        if terms is None:
            asked, terms = welcome.config, answer(welcome)
        elif welcome.config != asked:
            raise ConnectError("the server's endpoints have different configurations: ask the operator to start all alike")
        return terms

    try:
        return open_at(join, agree)
    except Elsewhere as there:
        if not may_move:
            raise ConnectError("the server named another address, which this connection cannot reach") from None
        join = replace(join, host=there.host or join.host, port=there.port)
    try:
        return open_at(join, agree)
    except Elsewhere:
        raise ConnectError(f"{join.host}:{join.port} sends clients on once more: ask the operator to look at its log") from None
