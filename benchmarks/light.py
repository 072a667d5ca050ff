"""Light clients: they speak the real, sealed protocol and have no ends, so that what is measured is the trunk, not they.

They send what a real client with this model once sent, a :class:`Recording`, or, where numbers make no difference, random ones.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Recording", "in_threads", "light_clients", "open_sessions", "record"]


@dataclass(frozen=True)
class Recording:
    """One micro-batch as it travels: hidden states and their gradient, both ``(tokens, hidden)``, in the run's dtype."""

    hidden: Any
    gradient: Any
    segments: list[tuple[int, int]]
    targets: int
    divisor: float

    @classmethod
    def random(cls, rows: int, length: int, size: int, dtype: Any) -> Recording:
        """Of a batch of ``rows`` equal lengths; every token is a target."""
        import torch

        tokens = rows * length
        hidden = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        return cls(hidden, hidden * 1e-3, [(length, 0)] * rows, tokens, float(tokens))

    def save(self, file: Path) -> None:
        from safetensors.torch import save_file

        about = json.dumps({"segments": self.segments, "targets": self.targets, "divisor": self.divisor})
        save_file({"hidden": self.hidden, "gradient": self.gradient}, file, metadata={"about": about})

    @classmethod
    def load(cls, file: str | Path) -> Recording:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            about = json.loads(tensors.metadata()["about"])
            hidden, gradient = tensors.get_tensor("hidden"), tensors.get_tensor("gradient")
        return cls(hidden, gradient, [(length, start) for length, start in about["segments"]], about["targets"], about["divisor"])


def record(pipe: Connection, model_dir: str, work: str, settings: dict[str, Any], rows: int, length: int, file: str) -> None:
    """Worker: keep what a client with real ends sends in its first step, from a run with a trunk in this process."""
    import torch

    from benchmarks.stage import batch_of
    from client_ends import SplitModelForCausalLM
    from server_trunk.server import TrunkServer
    from splitfl.config import build_config
    from splitfl.protocol.keys import write_identity
    from splitfl.transport.memory import MemoryClientTransport, MemoryNetwork, MemoryServerTransport

    torch.set_num_threads(1)
    key = f"{work}/recorder.key"
    authorized, out = Path(f"{work}/recorder"), f"{work}/recorded"
    authorized.write_text(f"{write_identity(key).public} recorder\n")
    own: dict[str, Any] = {"model": model_dir, "device": "cpu", "clients": 1, "authorized_clients": str(authorized), "out": out}
    own |= {"identity": f"{work}/trunk.key", "checkpoint_every": 0}
    network = MemoryNetwork()
    transport = MemoryServerTransport(network, write_identity(f"{work}/trunk.key"))
    server = TrunkServer(build_config(settings | own), transport=transport)
    server.start()
    options = {"transport": MemoryClientTransport(network)}
    model = SplitModelForCausalLM.from_pretrained(
        model_dir, str(server.join), key, device="cpu", timeout=120.0, channel_options=options
    )
    session, sent = model.trunk.session, {}
    send_forward, send_backward = session.send_forward, session.send_backward

    def keep_forward(flat: Any, segments: Any, **how: Any) -> int:
        sent["hidden"], sent["segments"] = flat.detach().clone(), list(segments)
        return int(send_forward(flat, segments, **how))

    def keep_backward(number: int, gradient: Any, *, targets: int, divisor: float, **how: Any) -> None:
        sent.update(gradient=gradient.detach().clone(), targets=targets, divisor=divisor)
        send_backward(number, gradient, targets=targets, divisor=divisor, **how)

    session.send_forward, session.send_backward = keep_forward, keep_backward
    model.train()
    model(**batch_of(rows, length, seed=0)).loss.backward()
    Recording(**sent).save(Path(file))
    model.close()
    server.stop()
    pipe.send("recorded")
    pipe.recv()


def open_sessions(joins: Sequence[str], keys: Sequence[str], *, timeout: float = 60.0) -> list[Any]:
    """A :class:`client_ends.session.TrunkSession` for each key, of clients that say they hold the run's own model."""
    from client_ends.session import TrunkSession
    from splitfl.channel.opening import OpenTerms
    from splitfl.parts.cut import Cut
    from splitfl.protocol.join import JoinString
    from splitfl.protocol.keys import read_identity

    def answer(welcome: Any) -> OpenTerms:
        cut = Cut.parse(welcome.config["cut"])
        return OpenTerms(model=welcome.config["identity"], cut=(cut.input_blocks, cut.output_blocks))

    return [
        TrunkSession.open(JoinString.parse(join), read_identity(key), answer, timeout=timeout)
        for join, key in zip(joins, keys, strict=True)
    ]


def in_threads(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """``work(*each)`` for each of the arguments, side by side; returns when all have ended."""
    threads = [threading.Thread(target=work, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def light_clients(pipe: Connection, joins: list[str], keys: list[str], rows: int, length: int, file: str = "") -> None:
    """Worker: clients without ends, a thread each, that send the recording in ``file``, or random numbers of that shape.

    Command: steps -> the wall clock at the end of each step of each client.
    """
    import torch

    torch.set_num_threads(1)
    sessions = open_sessions(joins, keys)
    size, dtype = sessions[0].terms["hidden_size"], sessions[0].dtype
    one = Recording.load(file) if file else Recording.random(rows, length, size, dtype)

    def work(session: Any, steps: int, ends: list[float]) -> None:
        for _ in range(steps):
            number = session.send_forward(one.hidden, one.segments, train=True, grad=True)
            session.await_hidden(number)
            session.send_backward(number, one.gradient, targets=one.targets, divisor=one.divisor)
            session.await_grad(number)
            session.step_done()
            ends.append(time.time())

    pipe.send("ready")
    while (steps := pipe.recv()) is not None:
        spans: list[list[float]] = [[] for _ in sessions]
        in_threads(work, [(session, steps, ends) for session, ends in zip(sessions, spans, strict=True)])
        pipe.send(spans)
    for session in sessions:
        session.close()
