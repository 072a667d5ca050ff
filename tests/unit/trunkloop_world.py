"""A trunk's loop over a real engine that runs only when told to, and what clients send it."""

from __future__ import annotations

import json
import weakref

import torch

from server_trunk.engine import Engine
from server_trunk.scheduler import Scheduler
from server_trunk.steps import Steps
from server_trunk.training import SharedTraining
from server_trunk.trunkloop import Event, TrunkLoop
from splitfl.adapters import set_trainable
from splitfl.config import OptimizerSettings
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import why_not_packed
from splitfl.protocol.messages import Backward, Enrol, Fault, Forward, StepClosed, StepDone
from splitfl.runlog import RunLog

HIDDEN = 32


class Outlet:
    """Keeps what leaves."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, object, object]] = []
        self.told: list[tuple[str, object]] = []
        self.ended: dict[str, Fault] = {}

    def send(self, session, message, payload):
        self.sent.append((session, message, payload))

    def tell(self, session, message):
        self.told.append((session, message))

    def credit(self, session, n):
        assert n > 0

    def end(self, session, fault):
        self.ended[session] = fault

    def closed(self) -> list[StepClosed]:
        return list({message.step: message for _, message in self.told if isinstance(message, StepClosed)}.values())


class Desk:
    """A loop that runs only when told to."""

    def __init__(
        self,
        model,
        work,
        *,
        clients=1,
        last=0,
        first=0,
        on_loss="drop",
        deadline=0.0,
        client_tokens=4096,
        lanes=1,
        caches=None,
        **settings,
    ):
        self.trunk = load_trunk(model, (1, 1))
        if caches is not None:
            assert why_not_packed(self.trunk) is None
        set_trainable(self.trunk, "full")
        training = SharedTraining(self.trunk, OptimizerSettings(learning_rate=1e-2, **settings))
        self.engine = Engine(self.trunk, training, torch.device("cpu"), in_place=True, lanes=lanes)
        self.outlet, self.log = Outlet(), work / "log.jsonl"
        self.presence: list[tuple[int, bool]] = []
        self.loop = TrunkLoop(
            self.engine,
            Steps(clients=clients, last=last, first=first, on_loss=on_loss, deadline=deadline),
            Scheduler(1024),
            self.outlet,
            RunLog(self.log, echo=None),
            client_tokens=client_tokens,
            payload_of=lambda tensor: tensor,
            caches=caches,
            on_presence=lambda here, awaited, trained: self.presence.append((len(here) + len(awaited), trained)),
        )

    def take(self, *events: tuple[str, object]) -> None:
        """Put ``(session, message)`` in; a forward or backward gets its tensor; "open" and None open and end a session,
        "lost" loses it."""
        for session, message in events:
            if message is None or message in ("open", "lost"):
                self.loop.inbox.put(Event(session, opened=message == "open", name=session, lost=message == "lost"))
            elif isinstance(message, str):  # a new session of the same client in place of ``message``
                self.loop.inbox.put(Event(session, opened=True, name=message, replaces=message))
            else:
                rows = getattr(message, "rows", 0)
                payload = torch.ones(rows, HIDDEN) if rows else None
                self.loop.inbox.put(Event(session, message, payload))

    def run(self, *events: tuple[str, object]) -> None:
        self.take(*events)
        while not self.loop.inbox.empty() or self.loop._batches.may_go_on or self.loop._batches.are_underway:
            self.loop._turn()

    def join(self, *sessions: str) -> None:
        for session in sessions:
            self.run((session, "open"), (session, Enrol()))

    def events(self, kind: str) -> list[dict]:
        return [event for event in map(json.loads, self.log.read_text().splitlines()) if event["event"] == kind]


class FullOnce:
    """``work``, which the first time has computed something when it finds no memory. ``was_free``: whether that was gone by each
    time after it.
    """

    def __init__(self, work) -> None:
        self._work, self._computed = work, None
        self.was_free: list[bool] = []

    def __call__(self, *args, **options):
        if self._computed is None:
            computed = torch.ones(1000)
            self._computed = weakref.ref(computed)
            raise torch.OutOfMemoryError("no memory (injected)")
        self.was_free.append(self._computed() is None)
        return self._work(*args, **options)


def forward(micro: int, *segments: tuple[int, int], step: int = 0, grad: bool = True) -> Forward:
    return Forward(step, micro, segments or ((4, 0),), HIDDEN, "float32", "raw", grad, grad, True)


def backward(micro: int, rows: int = 4, *, step: int = 0, targets: int = 4, divisor: float = 4.0, want=True) -> Backward:
    return Backward(step, micro, rows, HIDDEN, "float32", "raw", targets, divisor, want)


def honest(session: str, step: int = 0, micro: int = 0):
    return (session, backward(micro, step=step)), (session, StepDone(step, 1, 1, "continue"))
