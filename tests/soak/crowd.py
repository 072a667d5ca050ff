"""Clients that come and go for as long as the soak lasts: real models, in threads of one process that lives through all of it.

    python -m tests.soak.crowd ORDERS.json

What befalls them stands in a diary, a JSON object a line.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from client_ends import SplitModelForCausalLM
from splitfl.adapters import named_trainables
from splitfl.adapters.trainables import copy_into
from splitfl.config import OptimizerSettings
from splitfl.errors import ConnectError, RunWentBack, SplitflError, StepMissed
from splitfl.libraries import quiet_libraries
from splitfl.optimizer import build_optimizer
from tests.faults.heap import note_heap
from tests.faults.processes import hasten

__all__ = ["Orders"]

ROWS, LENGTH = 2, 24
#: Seconds between two steps of a client, of which a step waits for the longest; between two visits.
_THINKS, _AWAY = (0.1, 0.8), (1.0, 15.0)
#: Steps of one visit.
_STAYS = 20, 120
#: States of the ends that are kept to go back to.
_KEPT = 4
_LEARNING = OptimizerSettings(learning_rate=1e-3)


@dataclass(frozen=True)
class Orders:
    """``members``: name, join string and key file of each. ``end``: a file; once it is there, all come to an end."""

    model: str
    text: str
    held_out: str
    members: list[tuple[str, str, str]]
    diary: str
    heap: str
    end: str
    seed: int


class Diary:
    """Lines of all threads."""

    def __init__(self, file: str) -> None:
        self._file = Path(file).open("a", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()

    def note(self, **fields: Any) -> None:
        with self._lock:
            print(json.dumps({"time": time.time(), **fields}), file=self._file)


def batch(ids: torch.Tensor, draw: random.Random) -> dict[str, torch.Tensor]:
    """Rows from anywhere in the text."""
    rows = [ids[begin : begin + LENGTH] for begin in (draw.randrange(len(ids) - LENGTH) for _ in range(ROWS))]
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def held_out_rows(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return {"input_ids": rows, "labels": rows}


class Member(threading.Thread):
    """One client, over all its visits. It keeps its ends between them."""

    def __init__(self, orders: Orders, index: int, diary: Diary, text: torch.Tensor, held_out: torch.Tensor) -> None:
        super().__init__(name=orders.members[index][0])
        self._orders, self._diary, self._text = orders, diary, text
        self._held_out = held_out_rows(held_out)
        self.client, self._join, self._key = orders.members[index]
        self._draw = random.Random(f"{orders.seed} {self.client}")
        self._ends: dict[str, torch.Tensor] = {}
        self._kept: dict[int, dict[str, torch.Tensor]] = {}  # by the step that they were made in

    def note(self, what: str, **fields: Any) -> None:
        self._diary.note(client=self.client, what=what, **fields)

    @property
    def is_over(self) -> bool:
        return Path(self._orders.end).exists()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.is_over:
            time.sleep(min(0.25, max(0.0, until - time.monotonic())))

    def run(self) -> None:
        try:
            while not self.is_over:
                self._visit(self._draw.randrange(*_STAYS))
                self._wait(self._draw.uniform(*_AWAY))
            while not self._visit(0):  # the last: what has come of it all
                time.sleep(1)
        except BaseException as error:
            self.note("failed", error=f"{type(error).__name__}: {error}")
            raise

    def _visit(self, steps: int) -> bool:
        """Come, make ``steps`` steps, see how good the model is, and go; returns whether it came to the end."""
        try:
            model = SplitModelForCausalLM.from_pretrained(
                self._orders.model, self._join, self._key, device="cpu", timeout=6.0, reconnect=120.0
            )
        except SplitflError as error:
            self.note("could not join" if isinstance(error, ConnectError) else "failed", error=f"{type(error).__name__}: {error}")
            return False
        try:
            self._take_part(model, steps)
            leaves = not steps or self._draw.random() < 0.7
            if leaves:
                model.trunk.session.leave()
                model.eval()
                with torch.no_grad():
                    self.note("judged", loss=float(model(**self._held_out).loss))
            self.note("left" if leaves else "went without a word")
            if not leaves:
                model.trunk.session.close(leave=False)
            return True
        except SplitflError as error:
            self.note("lost", error=f"{type(error).__name__}: {error}")
            return False
        finally:
            model.close()

    def _take_part(self, model: Any, steps: int) -> None:
        model.train()
        named = named_trainables(model)
        if self._ends:
            copy_into(named, self._ends)
        self._ends = _copy(named)
        self._kept.clear()
        session = model.trunk.session
        optimizer = build_optimizer(named.values(), _LEARNING)
        model.on_checkpoint(lambda step: self._keep(step, named), lambda: sorted(self._kept))
        self.note("joined", session=session.channel.opened.session)
        while steps and not self.is_over:
            try:
                self._step(model, optimizer)
                steps -= 1
            except StepMissed as error:
                self.note("missed", why=str(error))
            except RunWentBack as back:
                self.note("went back", step=back.step)
                self._go_back(back.step, named)
            optimizer.zero_grad(set_to_none=True)
            self._wait(self._draw.uniform(*_THINKS))
        self._ends = _copy(named)

    def _step(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        micro_batches = self._draw.choice([1, 1, 2])
        for _ in range(micro_batches):
            loss = model(**batch(self._text, self._draw)).loss
            number = model.trunk.session.step
            self.note("sends", step=number, targets=ROWS * (LENGTH - 1))
            (loss / micro_batches).backward()
        optimizer.step()
        self.note("made", step=number)

    def _keep(self, step: int, named: dict[str, Any]) -> None:
        self._kept[step] = _copy(named)
        for old in sorted(self._kept)[:-_KEPT]:
            del self._kept[old]

    def _go_back(self, step: int, named: dict[str, Any]) -> None:
        """The ends as they were before the run's step ``step``."""
        for undone in [each for each in self._kept if each >= step]:
            del self._kept[undone]
        copy_into(named, self._kept[max(self._kept)] if self._kept else self._ends)


def _copy(named: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def main() -> None:
    orders = Orders(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    quiet_libraries()
    hasten()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(orders.model)
    text, held_out = (torch.tensor(tokenizer(Path(file).read_text())["input_ids"]) for file in (orders.text, orders.held_out))
    diary = Diary(orders.diary)
    whole = AutoModelForCausalLM.from_pretrained(orders.model)
    with torch.no_grad():
        diary.note(what="judged at first", loss=float(whole(**held_out_rows(held_out)).loss))
    del whole
    note_heap(Path(orders.heap))
    members = [Member(orders, index, diary, text, held_out) for index in range(len(orders.members))]
    for member in members:
        member.start()
    for member in members:
        member.join()


if __name__ == "__main__":
    main()
