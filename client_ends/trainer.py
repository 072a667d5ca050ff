"""A ``transformers.Trainer``, or one of TRL's, whose model is split: its checkpoints find the trunk's, and the other way round.

A Trainer trains a split model as it is. Bound to it, it also says where its arguments differ from the run's config, saves
whenever the run does, takes the trunk along when it resumes, and tells the trunk what a loss of its own is divided by.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from client_ends.keeping import Place
from client_ends.objective import Objective, objective_of
from splitfl.adapters.trainables import copy_into, named_trainables
from splitfl.checkpoint import load_checkpoint, save_checkpoint
from splitfl.errors import CheckpointError, ConfigError, RunWentBack, StepMissed
from splitfl.packed_state import unpack_state
from splitfl.parts.ends import find_ends

__all__ = ["bind_trainer"]

_log = logging.getLogger(__name__)

#: In each of a Trainer's checkpoints: the run, and its step after which the ends stood so.
_NOTE = "trunk.json"

#: What of a Trainer steps with it.
_STEPPED = ("optimizer", "lr_scheduler")

#: transformers' schedules and the run's.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}


def bind_trainer(trainer: Any) -> Any:
    """Bind a ``Trainer`` (``SFTTrainer``, ``DPOTrainer``, ...) to the trunk that its split model is of; returns it.

    * ``trainer.train(resume_from_checkpoint=...)`` goes on only where the trunk stands at the checkpoint's step, or goes back
      to it; with True, from the newest checkpoint that the trunk can go on from too.
    * It saves whenever the run's checkpoint is due, and goes back by itself where the run has gone back.
    * A loss computed from logits weighs each row alike in the trunk (each target where the rows have labels).
    * One warning names what of ``TrainingArguments`` is not as the run's config.
    * A step that goes on without this client is passed over, with a warning.
    * The end of training leaves the run, so nobody waits for this client.

    Raises:
        TypeError: the model is not split.
        ConfigError: it asks for fp16, whose loss scaling the trunk does not know, or for the best model at the end.
    """
    bound = _Bound(trainer, find_ends(trainer.model))
    trainer.add_callback(bound)
    trainer.train = functools.partial(bound.train, trainer.train)
    trainer.compute_loss = functools.partial(bound.compute_loss, trainer.compute_loss)
    trainer.training_step = functools.partial(bound.training_step, trainer.training_step)
    return trainer


class _Bound(TrainerCallback):
    """What a bound trainer does beside training."""

    def __init__(self, trainer: Any, ends: Any) -> None:
        if trainer.args.fp16:
            raise ConfigError("fp16 scales the loss by steps that the trunk does not know of: use bf16")
        if trainer.args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end takes these ends back to the best step, and no trunk with them: leave it out, and stop "
                "at the step you want"
            )
        self._trainer, self._ends, self._session = trainer, ends, ends.trunk.session
        self._warned = False
        self._start = Path(trainer.args.output_dir) / "_trunk-start"  # what begins so is never pushed to the hub
        self._first: int | None = None  # the run's step that was the first of this training
        ends._on_missed = self._miss
        self._session.keep_with(lambda step: None, lambda: sorted(self._checkpoints()))

    # --- going on ---------------------------------------------------------------------------------------------------------------

    def train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train``, from a step of the run.

        Raises:
            CheckpointError: the trunk does not stand where the checkpoint was written, and cannot go back to it; or the run has
                gone back to where no checkpoint is.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._stand_at(resume_from_checkpoint)
            self._first = 0
        elif self._session.terms["mode"] != "async":
            self._keep_start()
        while True:
            try:
                return train(resume_from_checkpoint or None, *args, **kwargs)
            except RunWentBack as back:
                _log.warning("%s", back)
                resume_from_checkpoint = self._before(back.step)

    def _stand_at(self, asked: Any) -> str:
        """The checkpoint to go on from: the one that is ``asked`` for, or, of all (True), the newest that the trunk can go on
        from too. This client then takes part in the step after it.
        """
        found = self._checkpoints()
        if asked is not True:
            stood = self._read(Path(asked))
            found = {} if stood is None else {stood: Path(asked)}
        if not found:
            where = f"{self._trainer.args.output_dir} holds no checkpoint that was" if asked is True else f"{asked} was not"
            raise CheckpointError(f"{where} written by a trainer bound to this run: train without resuming")
        self._session.keep_with(lambda step: None, lambda: sorted(found))
        try:
            opened = self._session.enrol()
        except RunWentBack as back:
            opened = back.step
        finally:
            self._session.keep_with(lambda step: None, lambda: sorted(self._checkpoints()))
        if opened - 1 not in found:
            stands = ", ".join(f"{found[step]} after step {step}" for step in sorted(found, reverse=True)[:4])
            raise CheckpointError(
                f"the trunk stands before step {opened}, and {stands}: "
                + (f"resume from a checkpoint of step {opened - 1}" if opened else "train without resuming")
                + ", or ask the operator to start the server again with --resume, which takes the trunk back with you"
            )
        self._undo(opened)
        return str(found[opened - 1])

    def _before(self, step: int) -> str | None:
        """The checkpoint of the step before ``step``, where the run has gone back to that; None: begin anew, as all is as it was
        before this training began.
        """
        found = self._checkpoints().get(step - 1)
        if found is None and self._start.is_dir() and (self._first is None or step <= self._first):
            self._undo(step)
            self._go_to_start()
            return None
        if found is None:
            raise CheckpointError(
                f"the run goes on from step {step}, and {self._trainer.args.output_dir} holds no checkpoint of the step before: "
                "save as often as the run does (save_steps = its checkpoint_every), and begin anew"
            )
        self._undo(step)
        return str(found)

    def _keep_start(self) -> None:
        """A run whose server dies before the first checkpoint begins anew, and so does this client."""
        place, trainer = Place.of({}), self._trainer
        extra: dict[str, Any] = {"generator": place.generator, "random": place.random}
        for name in _STEPPED:
            if getattr(trainer, name) is not None:  # the user's own, or that of a training before
                extra[name] = getattr(trainer, name).state_dict()
        self._first = None
        save_checkpoint(self._start, {name: p.detach() for name, p in named_trainables(trainer.model).items()}, {}, extra)

    def _go_to_start(self) -> None:
        tensors, _, files = load_checkpoint(self._start)
        state, trainer = {name: unpack_state(content) for name, content in files.items()}, self._trainer
        for name in _STEPPED:
            if name in state:
                getattr(trainer, name).load_state_dict(state[name])
            else:
                setattr(trainer, name, None)  # it makes another
        copy_into(named_trainables(trainer.model), tensors)
        trainer.model.zero_grad()
        Place({}, state["generator"], state["random"]).restore()

    def _undo(self, step: int) -> None:
        """The run makes ``step``, and all that follow it, once more: nobody goes on from what was kept after them."""
        for stood, checkpoint in self._checkpoints().items():
            if stood >= step:
                (checkpoint / _NOTE).unlink(missing_ok=True)

    def _checkpoints(self) -> dict[int, Path]:
        """The trainer's checkpoints, by the run's step after which they were written."""
        found = {}
        for checkpoint in Path(self._trainer.args.output_dir).glob("checkpoint-*"):
            stood = self._read(checkpoint)
            if stood is not None:
                found[stood] = checkpoint
        return found

    def _read(self, checkpoint: Path) -> int | None:
        try:
            note = json.loads((checkpoint / _NOTE).read_text(encoding="utf-8"))
            return int(note["step"]) if note["run"] == self._session.channel.welcome.run else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # --- a callback of the trainer ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        differences = _differences(args, state.max_steps, self._session.terms["optimizer"])
        if differences and not self._warned:
            _log.warning("these arguments hold for this client's ends alone, and the run's own for the trunk: %s", differences)
        self._warned = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._first is None:
            self._first = self._session.step - 1
        if self._session.is_due(self._session.step - 1) and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        note = {"run": self._session.channel.welcome.run, "step": self._session.step - 1}
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _NOTE).write_text(json.dumps(note), encoding="utf-8")
        # The server keeps so many, and may stand one behind: with fewer here the run may yet go back to before all of them.
        if sum(map(self._session.is_due, self._checkpoints())) > self._session.terms["checkpoint_keep"]:
            shutil.rmtree(self._start, ignore_errors=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._session.leave()
        if state.global_step >= state.max_steps:  # else it was stopped, and may be resumed
            shutil.rmtree(self._start, ignore_errors=True)

    # --- a step that goes on without this client --------------------------------------------------------------------------------

    def training_step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``Trainer.training_step``; where the run's step has gone on without this client, its gradient so far is dropped."""
        try:
            return training_step(*args, **kwargs)
        except StepMissed as missed:
            self._miss(missed)
            self._trainer.model.zero_grad()
            return torch.full((), torch.nan, device=self._trainer.args.device)  # which Trainer leaves out of the loss it logs

    def _miss(self, missed: StepMissed) -> None:
        _log.warning("%s", missed)

    # --- a loss of the trainer's own --------------------------------------------------------------------------------------------

    def compute_loss(self, compute_loss: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.compute_loss``; where the model is not given labels, the trunk learns from here what the loss is."""
        declared: list[Objective] = []
        items = kwargs.get("num_items_in_batch")
        labels = inputs.get("labels") if hasattr(inputs, "get") else None

        def declare(arguments: Mapping[str, Any]) -> Objective | None:
            fused = bool(arguments.get("fused_lm_head"))  # TRL's: the model gets labels, and the loss is the trainer's
            if isinstance(arguments.get("labels"), torch.Tensor) and not fused:
                return None
            found = objective_of({"labels": labels, "num_items_in_batch": items}, per_token=self._ends._per_token)
            if found is None or items is None:
                rows = _rows_of(arguments)
                found = Objective((1,) * rows, float(rows))
            found.is_stated = True
            declared.append(found)
            return found

        with self._ends.declaring(declare):
            computed = compute_loss(model, inputs, *args, **kwargs)
        loss = computed[0] if isinstance(computed, tuple) else computed
        for each in declared:
            each.watch(loss)
        return computed


def _rows_of(arguments: Mapping[str, Any]) -> int:
    tokens = arguments.get("input_ids")
    return len(arguments["inputs_embeds"] if tokens is None else tokens)


def _differences(args: Any, steps: int, run: dict[str, Any]) -> str:
    """What of ``TrainingArguments`` is not as the run's optimizer settings, in words; empty where all is."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    mine = {
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_epsilon": args.adam_epsilon,
        "lr_scheduler_type": _SCHEDULES.get(schedule, schedule),
        "warmup_steps": 0 if schedule == "constant" else args.get_warmup_steps(steps),
        "max_grad_norm": args.max_grad_norm or 0.0,
    }
    theirs = {
        "learning_rate": run["learning_rate"],
        "weight_decay": run["weight_decay"],
        "adam_beta1": run["beta1"],
        "adam_beta2": run["beta2"],
        "adam_epsilon": run["eps"],
        "lr_scheduler_type": run["schedule"],
        "warmup_steps": run["warmup_steps"],
        "max_grad_norm": run["clip"],
    }
    if run["schedule"] != "constant":
        mine["max_steps"], theirs["max_steps"] = steps, run["steps"]
    return ", ".join(f"{name} {mine[name]} (the run's: {theirs[name]})" for name in mine if mine[name] != theirs[name])
