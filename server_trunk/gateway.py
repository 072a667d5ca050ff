"""Admission and the way in: what the I/O thread does with a client's messages before the trunk's thread sees them.

Decides who may open a session and why not, checks every data message against the run before memory is allocated for it, and hands
complete messages to the trunk's inbox. It never blocks and never computes.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

import torch

from server_trunk.adapter_book import AdapterBook
from server_trunk.ends_book import EndsBook
from server_trunk.meter import Meter
from server_trunk.trunkloop import Event
from splitfl import __version__
from splitfl.adapters.layout import part_bytes_for
from splitfl.config import RunConfig
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.libraries import differences, library_versions
from splitfl.parts.cut import Cut
from splitfl.parts.identity import ModelIdentity, compare
from splitfl.protocol.messages import (
    PROTOCOL_VERSION,
    AskNorm,
    Ends,
    EndsPart,
    Enrol,
    Forward,
    Hello,
    Open,
    Redirect,
    RefusalCode,
    Release,
    StepDone,
    Welcome,
)
from splitfl.runlog import RunLog
from splitfl.tensors import DTYPES, receive_buffer

__all__ = ["Gateway"]


class Gateway:
    """The server's side of every session. All methods run on the channel's I/O thread."""

    def __init__(
        self,
        config: RunConfig,
        identity: ModelIdentity,
        hidden_size: int,
        inbox: queue.Queue[Event | None],
        log: RunLog,
        *,
        book: AdapterBook | None = None,
        ends: EndsBook | None = None,
        meter: Meter | None = None,
        pin: bool = False,
        longest: int | None = None,
        cache_tokens: int = 0,
        stands: Callable[[], int] = lambda: 0,
        elsewhere: Callable[[str], Redirect | None] = lambda client: None,
    ) -> None:
        """``stands``: the run's open step, or the next to open. ``book``: what each client's own adapter is like. ``ends``: what
        the clients train of theirs, where it is averaged. ``longest``: the position before which every token must lie, where
        the model's rotary table grows with what it sees. ``cache_tokens``: tokens whose keys and values a client may have kept,
        to decode with; 0: none.
        """
        self._config, self._identity, self._hidden = config, identity, hidden_size
        self._inbox, self._log, self._pin, self._longest = inbox, log, pin, longest
        self._meter, self._book = meter or Meter(), book or AdapterBook(config)
        self._stands, self._elsewhere = stands, elsewhere
        self._ends = ends or EndsBook(averaged=False, part_bytes=part_bytes_for(config.window))
        self._cut = Cut.parse(config.cut)
        self._names: dict[str, str] = {}  # by open session
        self._joint = config.optimizer.clipping == "joint"
        self._trains: dict[str, str] = {}  # of these, those that have taken part in steps
        self._libraries = library_versions()
        self._terms = config.terms() | {
            "identity": identity.to_plain(),
            "hidden_size": hidden_size,
            "part_bytes": self._ends.part_bytes,
            "cache_tokens": cache_tokens,
        }
        self._caches = cache_tokens > 0

    # --- admission --------------------------------------------------------------------------------------------------------------

    def welcome(self, peer: Any, hello: Hello) -> Welcome:
        if hello.protocol != PROTOCOL_VERSION:
            raise Refused(
                RefusalCode.PROTOCOL_VERSION,
                f"this server speaks protocol {PROTOCOL_VERSION} (splitfl {__version__}), your client protocol "
                f"{hello.protocol}; install the same splitfl on both sides",
            )
        if hello.run != self._config.run:
            raise Refused(
                RefusalCode.UNKNOWN_RUN,
                f"this server runs {self._config.run!r}, not {hello.run!r}; ask the operator for the present join string",
            )
        for library, (theirs, mine) in differences(hello.libraries, self._libraries).items():
            self._log.write("version-differs", client=peer.name, library=library, client_has=theirs, server_has=mine)
        return Welcome(PROTOCOL_VERSION, self._config.run, self._terms, self._libraries, time.time())

    def admit(self, peer: Any, message: Open) -> int:
        if tuple(message.cut) != (self._cut.input_blocks, self._cut.output_blocks):
            theirs = f"{message.cut[0]}:{message.cut[1]}"
            raise Refused(
                RefusalCode.CUT_MISMATCH,
                f"the run is cut at {self._config.cut}, your client at {theirs}; use --cut {self._config.cut}",
            )
        difference = compare(ModelIdentity.from_plain(message.model), self._identity)
        if difference:
            raise Refused(RefusalCode.MODEL_MISMATCH, f"your model is not the one this run trains: {difference}")
        self._book.agree(peer.name, message.adapter, max_rank=peer.limits.get("max_rank"))
        return self._stands()

    def elsewhere(self, peer: Any) -> Redirect | None:
        return self._elsewhere(peer.name)

    def on_opened(self, session: Any) -> None:
        self._book.settle(session.session, session.peer.name, session.open.adapter)
        self._names[session.session] = session.peer.name
        self._log.write("joined", client=session.peer.name, address=session.peer.address, session=session.session[:8])
        self._meter.joined(session.session, session.peer.name)
        self._inbox.put(Event(session.session, opened=True, name=session.peer.name, replaces=session.open.replaces))

    def on_refused(self, who: str, code: str, text: str) -> None:
        self._log.write("refused", who=who, code=code, why=text)

    def on_closed(self, session: str, reason: str, *, lost: bool) -> None:
        self._book.left(session)
        self._ends.left(session)
        self._trains.pop(session, None)
        self._log.write("left", client=self._names.pop(session, None), session=session[:8], why=reason, lost=lost)
        self._meter.left(session)
        # The trunk's thread never waits for this one, so a full inbox empties; this event must not be lost.
        self._inbox.put(Event(session, lost=lost))

    # --- messages ---------------------------------------------------------------------------------------------------------------

    def allocate(self, session: str, message: Any) -> tuple[torch.Tensor, memoryview]:
        """Host memory for a payload ``(rows, hidden)``, after everything the message claims was held against the run; for a
        part of a client's ends ``(1, size)`` bytes.
        """
        if isinstance(message, EndsPart):
            self._ends.begin(session, message)
            return receive_buffer(1, message.size, torch.uint8)
        if message.hidden != self._hidden:
            raise RemoteProtocolError(f"hidden size {message.hidden}, where the model has {self._hidden}")
        if message.dtype != self._config.dtype:
            raise RemoteProtocolError(f"dtype {message.dtype}, where the run uses {self._config.dtype}")
        if message.codec != "raw":
            raise RemoteProtocolError(f"codec {message.codec!r}, where the run uses raw")
        if isinstance(message, Forward) and message.grad and not message.train:
            raise RemoteProtocolError("a graph to keep for an evaluation forward")
        if isinstance(message, Forward) and message.sequences and not self._caches:
            raise RemoteProtocolError("sequences to keep, where the run keeps none")
        if isinstance(message, Forward) and self._longest is not None:
            reached = max(start + length for length, start in message.segments)
            if reached > self._longest:
                # The table would change for all who share the trunk.
                raise RemoteProtocolError(f"a token at position {reached - 1}, where this model takes {self._longest}")
        return receive_buffer(message.rows, message.hidden, DTYPES[message.dtype], pin=self._pin)

    def on_data(self, session: str, message: Any, payload: torch.Tensor | None) -> None:
        if isinstance(message, Release) and not self._caches:
            raise RemoteProtocolError("sequences to release, where the run keeps none")
        self._put(Event(session, message, payload))

    def on_control(self, session: str, message: Any) -> None:
        if isinstance(message, Ends):
            self._ends.declare(session, message)
            return
        if isinstance(message, Enrol):
            self._ends.check_enrol(session)
            if self._joint:
                self._check_alone(session)
        elif not self._joint and (
            isinstance(message, AskNorm) or (isinstance(message, StepDone) and message.ends_norm is not None)
        ):
            raise RemoteProtocolError("a norm for clipping together, in a run where each side clips its own")
        self._put(Event(session, message))

    def _check_alone(self, session: str) -> None:
        """Raises Refused where another client trains in a run whose gradient is clipped together with one client's ends'."""
        self._trains[session] = name = self._names[session]
        if any(other != name for other in self._trains.values()):
            del self._trains[session]
            raise Refused(
                RefusalCode.ENDS,
                "this run clips the gradients of both sides together (clipping = joint), which is for one client, and another "
                "trains already: ask the operator for clipping = separate",
            )

    def _put(self, event: Event) -> None:
        try:
            self._inbox.put_nowait(event)
        except queue.Full:
            raise RemoteProtocolError("more messages than the trunk can take in") from None
