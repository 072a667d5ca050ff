"""Tensors: what a data message claims, held against the run before there is memory for it; the parts of a client's ends."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable

import torch

from server_trunk.adapter_book import AdapterBook
from server_trunk.ends_book import EndsBook
from server_trunk.gateway import Gateway
from splitfl.channel.handler import Peer, SessionInfo
from splitfl.config import build_config
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.parts.identity import ModelIdentity
from splitfl.protocol import messages as m
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.keys import Identity
from splitfl.runlog import RunLog
from splitfl.tensors import byte_view
from tests.fuzz.pieces import split
from tests.fuzz.sentences import check_sentence

__all__ = ["payloads"]

HIDDEN, WINDOW, LONGEST, PART = 8, 1 << 20, 64, 64
SESSION = "s"
_PEER = Peer(Identity.from_secret(bytes(range(32))).public, "a", "here")
_IDENTITY = ModelIdentity("0" * 64, None, {"model.safetensors": "1" * 64})
_HELLO = m.Hello(m.PROTOCOL_VERSION, "run", {}, "")


@functools.cache
def _gateway(adapters: str) -> Gateway:
    """Made once, as it looks for the versions of libraries; :class:`_Run` gives it what one run changes."""
    config = build_config({"model": "m", "round_steps": 2, "window": WINDOW, "adapters": adapters})
    log = RunLog(None, echo=None)
    ends = EndsBook(averaged=True, part_bytes=PART)
    return Gateway(config, _IDENTITY, HIDDEN, queue.Queue(), log, ends=ends, longest=LONGEST)


class _Run:
    """A gateway, and a client that it has let in."""

    def __init__(self, adapters: str) -> None:
        self.gateway = _gateway(adapters)
        self.ends = self.gateway._ends = EndsBook(averaged=True, part_bytes=PART)
        self.gateway._book = AdapterBook(self.gateway._config)
        self.gateway._inbox = queue.Queue(8)
        self.wanted: list[tuple[int, int, int]] = []  # parts of the ends that were asked for, in order
        self.account = CreditAccount(WINDOW)
        self.round = 0
        own = m.Open(bytes(32), bytes(1184), (AES_256_GCM,), _IDENTITY.to_plain(), (1, 1), "a")
        self.gateway.on_opened(SessionInfo(SESSION, _PEER, own, _HELLO))

    def control(self, frame: bytes) -> None:
        message = m.decode_control(frame, from_client=True)
        if isinstance(message, m.Hello):
            m.encode(self.gateway.welcome(_PEER, message))
        elif isinstance(message, m.Open):
            self.gateway.admit(_PEER, message)
        elif isinstance(message, m.Enrol | m.StepDone | m.Pause | m.Leave | m.Ends):
            self.gateway.on_control(SESSION, message)

    def data(self, frame: bytes) -> None:
        message = m.decode_data(frame, from_client=True)
        self.account.charge(message.payload_bytes)
        if isinstance(message, m.Release):
            self.gateway.on_data(SESSION, message, None)
        if not message.payload_bytes:
            return
        tensor, view = self.gateway.allocate(SESSION, message)
        if isinstance(message, m.EndsPart):
            assert (message.tensor, message.offset, message.size) == self.wanted.pop(0), "memory for what nobody asked for"
        assert len(view) == message.payload_bytes
        assert not view.readonly
        view[-1] = 7
        rows = (message.rows, HIDDEN) if not isinstance(message, m.EndsPart) else (1, message.size)  # type: ignore[attr-defined]
        assert tuple(tensor.shape) == rows
        assert byte_view(tensor)[-1] == 7
        assert tensor.device.type == "cpu"
        assert torch.is_tensor(tensor)
        self.gateway.on_data(SESSION, message, tensor)
        self.account.give(message.payload_bytes)

    def ask(self, said: bytes) -> None:
        """The server wants this client's ends for a round."""
        if SESSION in self.ends._declared and self.ends.layout is not None:
            self.wanted.extend(self.ends.layout.parts(PART))
        self.ends.ask(SESSION, self.round)
        self.round += 1

    def leave(self, said: bytes) -> None:
        self.ends.left(SESSION)
        self.wanted.clear()


def payloads(data: bytes) -> None:
    """What one client says to the gateway of a run. The first byte says whether each client has an adapter."""
    one = _Run("per-client" if data[:1] == b"\1" else "shared")
    acts: tuple[Callable[[bytes], None], ...] = (one.control, one.data, one.ask, one.leave)
    for piece in split(data[1:]):
        if not piece:
            continue
        try:
            acts[piece[0] % len(acts)](piece[1:])
        except (RemoteProtocolError, Refused) as error:
            check_sentence(error)
            return
