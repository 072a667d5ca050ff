"""What a client keeps of its ends, and how it goes on from it: checkpoints under the run's step numbers."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from client_ends.preparing import TRAINED, model_of
from client_ends.settings import TrainSettings
from splitfl.adapters.results import describe_part
from splitfl.adapters.trainables import copy_into
from splitfl.checkpoint import (
    checkpoint_directory,
    checkpoint_steps,
    load_checkpoint,
    prune_checkpoints,
    put_aside,
    save_checkpoint,
)
from splitfl.config import LoraSettings
from splitfl.errors import CheckpointError, NotReadable
from splitfl.packed_state import unpack_state
from splitfl.parts.cut import Cut
from splitfl.parts.identity import model_identity

__all__ = ["EndsKeeper", "Place", "about_ends", "last_session"]

#: The step after which the ends stand that have made none.
_BEFORE_ALL = -1

#: Other than at the run's checkpoints: of the client's own choice, or where a run broke off.
_OTHERS = 3

_SESSION = "session"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client stands beside its weights. ``plain``: its place in the data and its own counters; ``generator`` and
    ``random``: torch's random state on the CPU; Python's, and that of CUDA devices.
    """

    plain: dict[str, Any]
    generator: torch.Tensor
    random: dict[str, Any]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Place:
        """As it is now."""
        return cls(plain, torch.get_rng_state(), _random_state())

    def restore(self) -> None:
        """The random state is as it was."""
        torch.set_rng_state(self.generator)
        _set_random_state(self.random)


class EndsKeeper:
    """Saves and loads the ends in ``out``. ``describe``: what :func:`~splitfl.adapters.results.describe_part` is told beside the
    step. ``keep``: how many of the run's checkpoints are kept, which are those of steps that are ``due``.
    ``on_damage`` hears of one that cannot be read.
    """

    def __init__(
        self,
        out: Path,
        model: Any,
        trainables: Mapping[str, Parameter],
        optimizer: torch.optim.Optimizer | None,
        describe: Mapping[str, Any],
        *,
        keep: int,
        due: Callable[[int], bool],
        on_damage: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.out = out
        self._model, self._trainables, self._optimizer, self._describe = model, trainables, optimizer, describe
        self._keep, self._due, self._on_damage = keep, due, on_damage
        self.newest: Path | None = None  # written last, or loaded since

    def held(self) -> list[int]:
        """The steps there are checkpoints of, ascending."""
        return checkpoint_steps(self.out)

    def save_start(self, place: Place) -> None:
        """Keep the ends as they are before their first step. Until there are checkpoints enough, a run whose server dies may go
        back to before all of them.
        """
        self._write(self._start, _BEFORE_ALL, place)

    def save(self, step: int, place: Place) -> Path:
        """Keep weights and optimizer as they are after the run's step ``step``, and ``place``, atomically."""
        directory = checkpoint_directory(self.out, step)
        self._write(directory, step, place)
        # The server may stand one checkpoint behind this one until it has written its own.
        prune_checkpoints(self.out, self._keep + 1, among=self._due)
        prune_checkpoints(self.out, _OTHERS, among=lambda each: not self._due(each))
        if sum(map(self._due, self.held())) > self._keep:
            shutil.rmtree(self._start, ignore_errors=True)
        self.newest = directory
        return directory

    def _write(self, directory: Path, step: int, place: Place) -> None:
        meta = describe_part(self._model, step=step, **self._describe)
        extra: dict[str, Any] = {"generator": place.generator, "random": place.random, "data": place.plain}
        if self._optimizer is not None:
            extra["optimizer"] = self._optimizer.state_dict()
        save_checkpoint(directory, {name: p.detach() for name, p in self._trainables.items()}, meta, extra)

    @property
    def _start(self) -> Path:
        return self.out / "checkpoints" / "start"

    def go_back(self, step: int) -> tuple[int, dict[str, Any]]:
        """As :meth:`load_newest` before ``step``, where the run has undone what came later: those checkpoints are renamed, so
        that nobody takes them for states of the run as it goes on.
        """
        stood, place = self.load_newest(before=step)
        for newer in [each for each in self.held() if each > stood]:
            put_aside(checkpoint_directory(self.out, newer), "undone")
        return stood, place

    def load_newest(self, before: float = math.inf) -> tuple[int, dict[str, Any]]:
        """The ends are as they were after the newest step (``before`` another) kept whole; returns it and their place. Before
        another they may also be as they were before their first step: that is -1. A newer one that is damaged is renamed, so that
        it is in nobody's way.

        Raises:
            CheckpointError: there is none, or it is of other ends.
            NotReadable: the newest cannot be read, and is not damaged.
        """
        places = {step: checkpoint_directory(self.out, step) for step in self.held() if step < before}
        if not math.isinf(before) and self._start.is_dir():
            places[_BEFORE_ALL] = self._start
        for step, directory in sorted(places.items(), reverse=True):
            try:
                tensors, meta, files = load_checkpoint(directory)
                state = {name: unpack_state(content) for name, content in files.items()}
            except NotReadable:
                raise
            except CheckpointError as error:
                self._on_damage(f"{error} It is kept as {put_aside(directory, 'damaged')}, and the one before it used.")
                continue
            return step, self._load(directory, tensors, meta, state)
        if math.isinf(before):
            raise CheckpointError(f"every checkpoint of {self.out} is damaged: begin anew, with another --out")
        raise CheckpointError(
            f"the run goes on from step {before:g}, before which nothing of these ends was kept: begin anew, with another --out"
        )

    def _load(self, directory: Path, tensors: Mapping[str, torch.Tensor], meta: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        mine = describe_part(self._model, step=meta.get("step"), **self._describe)
        for name in ("identity", "cut", "trainables", "lora", "task", "run"):
            if meta.get(name) != mine.get(name):
                raise CheckpointError(
                    f"{directory} was written with {name} = {meta.get(name)}, not {mine.get(name)}: resume with the same"
                )
        if not {"generator", "random", "data"} <= set(state):
            raise CheckpointError(f"{directory} does not say where the ends stood: it was written by an earlier splitfl")
        copy_into(self._trainables, tensors)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        place = Place(state["data"], state["generator"], state["random"])
        place.restore()
        self.newest = directory
        return place.plain

    # --- the session, for a process that comes after this one -------------------------------------------------------------------

    def note_session(self, session: str) -> None:
        """The session that this process has open. Where that cannot be written, a process that comes after this one has only to
        wait until the server has noticed the loss by itself.
        """
        with contextlib.suppress(OSError):
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / _SESSION).write_text(session, encoding="utf-8")


def about_ends(settings: TrainSettings, terms: Mapping[str, Any], run: str, lora: LoraSettings) -> dict[str, Any]:
    """What a checkpoint of a client's ends says of them, as :func:`~splitfl.adapters.results.describe_part` is told it."""
    cut = Cut.parse(terms["cut"])
    path, revision = model_of(settings, terms)
    return {
        "part": "ends",
        "base": path,
        "identity": model_identity(path, revision=revision).to_plain(),
        "cut": (cut.input_blocks, cut.output_blocks),
        "trainables": TRAINED[settings.ends],
        "lora": lora if settings.ends == "lora" else None,
        "task": settings.task,
        "run": run,
    }


def last_session(out: Path) -> str:
    """The session of the process that had ``out`` before; empty where none is known."""
    try:
        return (out / _SESSION).read_text(encoding="utf-8")[:64].strip()
    except (OSError, ValueError):
        return ""


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, torch.tensor(numbers, dtype=torch.int64), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
