"""An authorised client that lies: its session ends, or it is told, and the run is what it is without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfl.adapters import set_trainable
from splitfl.channel.client import ClientChannel, OpenTerms
from splitfl.protocol import messages as m
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import read_identity
from splitfl.tensors import byte_view
from splitfl.transport.memory import MemoryClientTransport
from tests.unit.channel_world import wait_until
from tests.world import World, running, tiny_llama

HIDDEN, ROWS = 32, 4


class Liar:
    """A channel without the client that would use it as it should."""

    def __init__(self, world: World) -> None:
        self.told: list[Any] = []
        self.lost: list[Any] = []
        self.answered: list[Any] = []
        self.asked = False
        self.channel = ClientChannel.open(
            JoinString.parse(world.join),
            read_identity(world.keys[1]),
            name="",
            libraries={},
            answer=lambda welcome: OpenTerms(model=welcome.config["identity"], cut=(1, 1)),
            allocate=self._allocate,
            on_data=lambda message, payload: self.answered.append(message),
            on_control=self.told.append,
            on_lost=self.lost.append,
            transport=MemoryClientTransport(world.network),
        )
        session: Any = self.channel._session
        session.check_send = lambda message: None  # what it should not say, it says

    @staticmethod
    def _allocate(message: Any) -> tuple[Any, memoryview]:
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)

    def say(self, message: m.Message) -> None:
        """A control message, whether it is its turn or not."""
        self.channel._control_queue.append(m.encode(message))
        self.channel._transport.wake()

    def forward(
        self, step: int, micro: int = 0, *, hidden: int = HIDDEN, dtype: str = "float32", value: float = 0.1, **said: Any
    ) -> None:
        said = {"train": True, "grad": True, "ordinal": micro} | said
        message = m.Forward(step, micro, ((ROWS, 0),), hidden, dtype, "raw", said["train"], said["grad"], True, said["ordinal"])
        payload = torch.full((ROWS, hidden), value, dtype=getattr(torch, dtype))
        self.channel.send(message, byte_view(payload))
        self.asked = True

    def backward(
        self, step: int, micro: int = 0, *, rows: int = ROWS, targets: int = ROWS, divisor: float = 4.0, value: float = 1.0
    ) -> None:
        if self.asked:
            self.wait()
        message = m.Backward(step, micro, rows, HIDDEN, "float32", "raw", targets, divisor, True)
        self.channel.send(message, byte_view(torch.full((rows, HIDDEN), value)))

    def wait(self) -> None:
        """Until the trunk has answered the forward."""
        wait_until(lambda: self.answered)

    def nothing(self, step: int) -> None:
        """A part that is in order and adds nothing."""
        self.forward(step)
        self.backward(step, targets=0, value=0.0)

    def fault(self) -> m.Fault | None:
        return next((message for message in self.told if isinstance(message, m.Fault)), None)


Lie = Callable[[Liar, int], None]


def _both(*lies: Lie) -> Lie:
    def all_of_them(liar: Liar, step: int) -> None:
        for lie in lies:
            lie(liar, step)

    return all_of_them


#: Lies by what the server says as it ends the session.
ENDED: dict[str, tuple[Lie, str]] = {
    "a width that is not the model's": (lambda liar, step: liar.forward(step, hidden=2 * HIDDEN), "hidden size 64"),
    "a dtype that is not the run's": (lambda liar, step: liar.forward(step, dtype="float64"), "dtype float64"),
    "a graph for an evaluation": (lambda liar, step: liar.forward(step, train=False), "evaluation forward"),
    "a step from the future": (lambda liar, step: liar.forward(step + 7), "has not opened"),
    "a gradient from the future": (lambda liar, step: liar.backward(step + 1), "has not opened"),
    "a step from the past": (lambda liar, step: liar.forward(step - 1), "is the present one"),
    "a gradient of nothing": (lambda liar, step: liar.backward(step, 5), "graph is not kept"),
    "a gradient from the past": (_both(Liar.forward, lambda liar, step: liar.backward(step - 1)), "another size or step"),
    "a gradient of other rows": (_both(Liar.forward, lambda liar, step: liar.backward(step, rows=3, targets=3)), "another size"),
    "a gradient twice": (_both(Liar.nothing, lambda liar, step: liar.backward(step)), "graph is not kept"),
    "a number twice": (_both(Liar.forward, Liar.forward), "twice at the same time"),
    "more targets than tokens": (_both(Liar.forward, lambda liar, step: liar.backward(step, targets=5)), "5 targets"),
    "the end of a step to come": (lambda liar, step: liar.say(m.StepDone(step + 1, 0, 0, "continue")), "has not opened"),
    "an end that hides a forward": (
        _both(
            Liar.forward,
            lambda liar, step: liar.wait(),
            lambda liar, step: liar.say(m.StepDone(step, 0, 0, "continue")),
        ),
        "less than was sent",
    ),
    "an end with gradients of nothing": (lambda liar, step: liar.say(m.StepDone(step, 0, 1, "continue")), "more backwards"),
    "a norm where each side clips its own": (lambda liar, step: liar.say(m.AskNorm(step, 1)), "each side clips its own"),
    "ends whose norm nobody asked for": (
        lambda liar, step: liar.say(m.StepDone(step, 0, 0, "continue", 1.0)),
        "each side clips its own",
    ),
    "enrolling in the midst": (lambda liar, step: liar.say(m.Enrol()), "Enrol while"),
    "a second greeting": (lambda liar, step: liar.say(m.Hello(m.PROTOCOL_VERSION, "run", {}, "")), "Hello while"),
    "ends that nobody asked for": (
        lambda liar, step: liar.channel.send(m.EndsPart(0, 0, 0, 4), bytes(4)),
        "nobody asked for",
    ),
}

#: Lies that count for nothing, of which the client is told.
UNCOUNTED: dict[str, Lie] = {
    "a gradient of NaN": _both(Liar.forward, lambda liar, step: liar.backward(step, value=math.nan)),
    "an infinite gradient": _both(Liar.forward, lambda liar, step: liar.backward(step, value=-math.inf)),
    "a divisor that makes it infinite": _both(Liar.forward, lambda liar, step: liar.backward(step, divisor=1e300)),
    "hidden states whose squares are infinite": _both(lambda liar, step: liar.forward(step, value=1e30), Liar.backward),
    "a gradient beyond all measure": _both(Liar.forward, lambda liar, step: liar.backward(step, value=-1e30)),
    "hidden states of NaN": _both(lambda liar, step: liar.forward(step, value=math.nan), Liar.backward),
    "a gradient without targets": _both(Liar.forward, lambda liar, step: liar.backward(step, targets=0)),
}


class Honest:
    """One client with ends of its own, trained step by step; ``seen`` are its losses."""

    def __init__(self, world: World) -> None:
        torch.manual_seed(1)
        self.model = world.join_as(0)
        set_trainable(self.model, "full")
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2))
        self.batch = {"input_ids": ids, "labels": ids}
        self.seen: list[float] = []

    def step(self, amid: Callable[[], None] = lambda: None) -> None:
        """``amid``: what happens once the trunk has answered, and before the gradient leaves."""
        loss = self.model(**self.batch).loss
        amid()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen.append(float(loss.detach()))


def _weights(world: World) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in world.server._engine.training.trainables.items()}


def _together(world: World, honest: Honest, lie: Callable[[Liar, int], None]) -> None:
    """Two steps of the honest client: in the second the liar takes part."""
    liars: list[Liar] = []

    def join() -> None:
        liars.append(Liar(world))
        liars[0].channel.tell(m.Enrol())
        wait_until(lambda: len(world.server._loop._steps._enrolled) == 2)

    def act() -> None:
        wait_until(lambda: any(isinstance(message, m.StepOpened) for message in liars[0].told))
        lie(liars[0], honest.model.trunk.session.step)

    honest.step(join)
    honest.step(act)
    honest.model.wait_step()
    liars[0].channel.close(leave=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def _ends(says: str, lie: Lie) -> Lie:
    def act(liar: Liar, step: int) -> None:
        lie(liar, step)
        wait_until(lambda: liar.lost)
        assert says in str(liar.lost[0])

    return act


def _is_told(lie: Lie) -> Lie:
    def act(liar: Liar, step: int) -> None:
        lie(liar, step)
        wait_until(liar.fault)
        fault = liar.fault()
        assert fault is not None
        assert (fault.code, fault.fatal, fault.micro) == ("not-counted", False, 0)
        liar.channel.tell(m.StepDone(step, 1, 1, "leave"))
        assert not liar.lost

    return act


def test_no_lie_changes_what_the_others_learn(model: str, tmp_path: Path) -> None:
    cases = {name: _ends(says, lie) for name, (lie, says) in ENDED.items()}
    cases |= {name: _is_told(lie) for name, lie in UNCOUNTED.items()}
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    settings = {"optimizer.learning_rate": 1e-2}
    with running(World(tmp_path / "alone", model, 1, **settings)) as world:
        alone, expected = Honest(world), []
        for _ in cases:
            alone.step()
            alone.step()
            alone.model.wait_step()
            expected.append(_weights(world))
        alone.model.close()
    with running(World(tmp_path / "together", model, 2, needed=1, **settings)) as world:
        honest = Honest(world)
        for (name, lie), weights in zip(cases.items(), expected, strict=True):
            _together(world, honest, lie)
            for key, tensor in _weights(world).items():
                assert torch.allclose(tensor, weights[key], atol=1e-5, rtol=0), f"{name}: {key} has moved"
        honest.model.close()
        assert honest.seen == pytest.approx(alone.seen, abs=1e-5)
        steps = world.events("step")
        assert all(step["targets"] == 22 for step in steps), "a lie counted"
        counted = world.server.meter.snapshot()["clients"]["client1"]["uncounted"]
    assert counted == len(UNCOUNTED)
    assert len(world.events("gradient-not-finite")) == len(UNCOUNTED) - 1
    assert len(world.events("gradient-no-targets")) == 1
    assert expected[0].keys() == expected[-1].keys()
    assert any(not torch.equal(tensor, expected[0][key]) for key, tensor in expected[-1].items()), "nothing was learnt at all"


def test_a_client_hears_that_its_gradient_did_not_count(model: str, tmp_path: Path) -> None:
    with running(World(tmp_path, model, 1)) as world:
        honest, said = Honest(world), list[str]()
        session = honest.model.trunk.session
        session.on_uncounted = said.append
        honest.step()
        (honest.model(**honest.batch).loss * math.nan).backward()
        honest.model.trunk.session.step_done()
        honest.model.wait_step()
        wait_until(lambda: said)
        assert session.uncounted == 1
        assert "counts for nothing" in said[0]
        honest.model.close()
