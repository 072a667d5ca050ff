"""One client's training run: join, read data, train the ends while the trunk trains too, evaluate, keep the result.

The loop is plain PyTorch on one page; nothing in it knows that the trunk is elsewhere, save the lines that pause and leave.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from client_ends.clipping import clip
from client_ends.data import Batches, TokenizedDataset, pad_token
from client_ends.evaluation import evaluate
from client_ends.joining import join
from client_ends.keeping import EndsKeeper, Place, about_ends, last_session
from client_ends.model import SplitModelForCausalLM, SplitModelForSequenceClassification
from client_ends.preparing import load_tokenizer, model_of, name_classes, prepare_ends, read_data
from client_ends.progress import Progress
from client_ends.reporting import Reporter
from client_ends.settings import TrainResult, TrainSettings, check_model
from client_ends.tracking import Tracking, settings_to_track, trackers_of
from splitfl.adapters import named_trainables
from splitfl.checkpoint import checkpoint_directory, checkpoint_steps
from splitfl.config import LoraSettings, OptimizerSettings
from splitfl.errors import ConfigError, NotWritten, RunComplete, RunWentBack, StepMissed
from splitfl.libraries import differences, library_versions
from splitfl.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from splitfl.runlog import RunLog

__all__ = ["FACES", "TrainResult", "TrainSettings", "prepare_ends", "read_data", "train"]

#: What a client joins as, by task.
FACES = {
    "causal-lm": SplitModelForCausalLM,
    "sequence-classification": SplitModelForSequenceClassification,
}


def train(
    settings: TrainSettings,
    *,
    log: RunLog | None = None,
    progress: Progress | None = None,
    channel_options: dict[str, Any] | None = None,
) -> TrainResult:
    """Run one client from joining to the saved result.

    ``channel_options``: further arguments of :meth:`ClientChannel.open`, such as another transport than sockets.

    Raises:
        UserError: bad data, settings, keys or address; one sentence with the mend.
        NotWritten: the ends cannot be kept. The server is not told that this client leaves: it waits for it as for a lost one.
        SessionLost: the session broke and no other could be had within ``reconnect`` seconds; the ends are kept as they were
            after their last step, under its number. The trunk may stand one step earlier: it steps once every client is done.
        CheckpointError: the run went back to where none of the ends' checkpoints stands.
    """
    if settings.task not in FACES:
        raise ConfigError(f"the task is {' or '.join(FACES)}, not {settings.task!r}")
    check_model(settings)
    if settings.resume and not (settings.out and checkpoint_steps(settings.out)):
        raise ConfigError(f"{settings.out or 'no directory'} holds no ends to go on from: leave --resume out")
    trackers = trackers_of(settings.report_to)
    log = log or RunLog(None, echo=None)
    progress = progress or Progress(quiet=True)
    trust = settings.trust_remote_code
    # Bad rows are the commonest mistake, so data is read before anybody is bothered, where the tokenizer is at hand.
    early = None if settings.model is None else load_tokenizer(settings.model, settings.revision, trust_remote_code=trust)
    data = None if early is None else read_data(settings, early)

    progress.say("joining the run")
    extra: dict[str, Any] = {}
    if settings.task == "sequence-classification":
        labels = settings.num_labels or (data[0].num_labels if data else len(settings.label_names or ())) or 2
        settings = dataclasses.replace(settings, num_labels=labels)
        extra = {"num_labels": labels, "seed": settings.seed}
    model = join(
        FACES[settings.task],
        settings,
        adapter=settings.adapter,
        micro_batches=settings.micro_batches,
        replaces=last_session(Path(settings.out)) if settings.resume else "",
        channel_options=channel_options,
        **extra,
    )
    try:
        tokenizer = early or load_tokenizer(*model_of(settings, model.trunk.session.terms), trust_remote_code=trust)
        rows, held_out = data or read_data(settings, tokenizer)
        if rows.label_names:
            name_classes(model.config, rows.label_names)
        run = _Run(settings, model, tokenizer, rows, held_out, log, progress, trackers)
        try:
            return run.run()
        finally:
            run.tracking.end()
    except NotWritten:
        model.trunk.session.close(leave=False)
        raise
    finally:
        model.close()


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        settings: TrainSettings,
        model: Any,
        tokenizer: Any,
        rows: TokenizedDataset,
        held_out: TokenizedDataset | None,
        log: RunLog,
        progress: Progress,
        trackers: tuple[str, ...],
    ) -> None:
        self.settings, self.log, self.progress = settings, log, progress
        self.split = model
        self.session = model.trunk.session
        self.terms = self.session.terms
        lora = LoraSettings.from_plain(self.terms["lora"])
        rank, alpha = settings.adapter_rank or lora.rank, settings.adapter_alpha or lora.alpha
        self.lora = dataclasses.replace(lora, rank=rank, alpha=alpha)
        # A fresh PEFT wrapper forwards attribute access, so `self.model` serves as both.
        self.model = prepare_ends(model, settings.ends, self.lora, seed=self.terms["seed"])
        self.device = next(iter(model.parameters())).device
        own: dict[str, Any] = {
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "clip": settings.clip,
        }
        base = OptimizerSettings(**self.terms["optimizer"])
        self.optim_settings = dataclasses.replace(base, **{key: value for key, value in own.items() if value is not None})
        self.trainables = named_trainables(self.model)
        self.optimizer = build_optimizer(self.trainables.values(), self.optim_settings) if self.trainables else None
        pad = pad_token(tokenizer)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = pad
        batches = functools.partial(Batches, batch_size=settings.batch_size, seed=settings.seed, pad_token_id=pad)
        self.batches = batches(rows)
        self.held_out = None if held_out is None else batches(held_out, shuffle=False)
        self.losses: list[float] = []
        self.missed = 0
        self.made = 0  # steps of this client, those that it missed included
        self.last_step = -1  # the run's number of the newest step the ends have made
        self.kept_average = -1  # the round whose average the newest checkpoint has
        run = self.session.channel.welcome.run
        out = Path(settings.out or Path("runs") / f"{run}-ends")
        told = settings_to_track(settings, self.terms | {"run": run}, self.optim_settings)
        note = functools.partial(self._note, "tracker-failed")
        self.tracking = Tracking(trackers, out, run, told, is_asked=settings.report_to is not None, note=note)
        self.reporter = Reporter(log, progress, self.tracking, self.session)
        self.keeper = EndsKeeper(
            out,
            self.model,
            self.trainables,
            self.optimizer,
            about_ends(settings, self.terms, run, self.lora),
            keep=self.terms["checkpoint_keep"],
            due=self.session.is_due,
            on_damage=functools.partial(self._note, "checkpoint-damaged"),
        )
        self.stood: Place | None = None  # amid a step: where the ends stood before it
        self.split.on_checkpoint(lambda step: self._save(), self.keeper.held)
        self.session.on_link = self._hear_of_link
        self.session.on_uncounted = functools.partial(self._note, "not-counted")
        self.keeper.note_session(self.session.channel.opened.session)
        theirs = self.session.channel.welcome.libraries
        for name, (mine, other) in differences(library_versions(), theirs).items():
            log.write("version-differs", library=name, here=mine, server=other)
            progress.say(f"note: {name} is {mine} here and {other} at the server; results may differ in the last digits")
        log.write("data", train=rows.report(), held_out=None if held_out is None else held_out.report())

    @property
    def total_steps(self) -> int:
        """Steps this client takes: its own limit, else its epochs; never beyond the run's."""
        per_epoch = math.ceil(len(self.batches) / self.settings.accumulate)
        mine = self.settings.steps or max(1, math.ceil(per_epoch * self.settings.epochs))
        # Without a barrier the run's steps are not this client's: the server says when they are made.
        run = self.terms["optimizer"]["steps"] if self.terms["mode"] != "async" else 0
        return min(mine, run) if run else mine

    def run(self) -> TrainResult:
        settings = self.settings
        if settings.dump_hidden:
            self.split.trunk.on_first_forward = self._dump_hidden
        if settings.resume:
            self._resume()
        else:
            self.tracking.begin(0)
        before = None if settings.resume else self._evaluate("before")
        total = self.total_steps
        if self.terms["clients"] > 1:
            self.progress.say(f"enrolling; the first step of the run begins when {self.terms['clients']} clients have enrolled")
        self.progress.begin(total)
        stream = self._stream()
        self.model.train()
        if not settings.resume and self.terms["mode"] != "async":
            self.keeper.save_start(self._place())
        try:
            while True:
                try:
                    while self.made < total:
                        self._turn(stream, total)
                    # The trunk must have made its last step before the held-out part is judged with it.
                    self.split.wait_step()
                    break
                except RunComplete:
                    if not self.losses and not settings.resume:
                        raise
                    self.session.settle_round()  # the average that the last step ended with is this client's too
                    break  # joined late, or others were faster
                except RunWentBack as back:
                    self._go_back(back.step)
                    stream = self._stream()
        except NotWritten:
            raise
        except BaseException:
            if self.last_step >= 0:
                self.progress.say(f"ends kept in {self._save()}")
            raise
        finally:
            self.progress.end()
        after = self._evaluate("after")
        checkpoint = self._save()
        sent, received = self.session.bytes_sent, self.session.bytes_received
        made = len(self.losses)
        self.log.write(
            "done", steps=made, missed=self.missed, bytes_sent=sent, bytes_received=received, checkpoint=str(checkpoint)
        )
        return TrainResult(made, self.losses, before, after, checkpoint, sent, received, self.missed)

    def _stream(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.batches

    def _turn(self, stream: Iterator[dict[str, torch.Tensor]], total: int) -> None:
        """One step, and what is due after it."""
        settings, step = self.settings, self.made
        self.stood = self._place()
        try:
            self._step(stream, step)
        except StepMissed as missed:
            self._drop_step(step, missed)
        if step + 1 == total:
            self.session.leave()
        self.session.settle_round()  # what is evaluated and kept is the average
        if settings.evaluate_every and (step + 1) % settings.evaluate_every == 0 and step + 1 < total:
            self.session.pause()
            self._evaluate(f"step {step + 1}")
        if settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0:
            self._save()

    def _drop_step(self, step: int, missed: StepMissed) -> None:
        """The run went on without this client's part of a step: nothing of it is used here either."""
        self.missed += 1
        self.made, self.stood = step + 1, None
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.log.write("step-missed", quiet=True, step=step, why=str(missed))
        self.progress.say(f"note: {missed}")

    def _step(self, stream: Iterator[dict[str, torch.Tensor]], step: int) -> None:
        """One optimizer step over ``accumulate`` batches. The trunk's step ends when the ends' optimizer steps."""
        self.reporter.begin_step()
        total = targets = tokens = 0.0
        norm = None
        for _ in range(self.settings.accumulate):
            batch = next(stream)
            loss = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).loss
            (loss / self.settings.accumulate).backward()
            counted = Batches.targets(batch)
            total, targets = total + float(loss.detach()) * counted, targets + counted
            tokens += float(batch["attention_mask"].sum())
        rate = learning_rate_at(step, self.optim_settings)
        # Where a checkpoint is due it is written as the step ends, within the optimizer's own call.
        self.last_step, self.made, self.stood = self._number(), step + 1, None
        if self.optimizer is not None:
            norm = clip(self.model, self.optim_settings.clip)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.split.step()
        mean = total / max(1.0, targets)
        self.losses.append(mean)
        self.reporter.step(step, loss=mean, targets=int(targets), tokens=tokens, learning_rate=rate, grad_norm=norm)

    def _evaluate(self, when: str) -> dict[str, float] | None:
        if self.held_out is None:
            return None
        self.progress.say(f"evaluating ({when})")
        report: dict[str, Any] = evaluate(self.model, self.held_out, self.device)
        self.reporter.evaluation(when, self.made, report)
        return report

    def _dump_hidden(self, flat: torch.Tensor) -> None:
        Path(self.settings.dump_hidden).write_bytes(flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def _hear_of_link(self, text: str) -> None:
        self._note("link", text)
        self.keeper.note_session(self.session.channel.opened.session)

    def _note(self, event: str, text: str) -> None:
        self.log.write(event, quiet=True, what=text)
        self.progress.say(f"note: {text}")

    # --- keeping the ends, and going on from what was kept ----------------------------------------------------------------------

    def _number(self) -> int:
        """The number of the step that the ends are about to make; without a barrier the run's numbers are not this client's."""
        own: int = self.session.step
        return own if self.terms["mode"] != "async" else max(own, self.last_step + 1)

    def _place(self) -> Place:
        rounds = self.session.rounds
        average = -1 if rounds is None else rounds.loaded
        return Place.of({"batches": self.batches.state_dict(), "made": self.made, "missed": self.missed, "average": average})

    def _save(self) -> Path:
        """Keep the ends as they are after their last step, under the run's own number of it, so that they find the trunk's
        checkpoint of the same step.
        """
        directory = checkpoint_directory(self.keeper.out, self.last_step)
        average = -1 if self.session.rounds is None else self.session.rounds.loaded
        if self.keeper.newest == directory and self.kept_average == average:
            return directory
        self.kept_average = average  # a round may have ended with a step that is kept already
        return self.keeper.save(self.last_step, self.stood or self._place())

    def _resume(self) -> None:
        """Go on from what an earlier process kept: enrol, hear which step that means, and stand before it."""
        self._stand_at(*self.keeper.load_newest())
        if self.made >= self.total_steps:
            raise ConfigError(
                f"the ends in {self.keeper.out} have made all their {self.made} steps: nothing is left to go on with"
            )
        step = self.session.enrol()
        if self.terms["mode"] != "async" and self.last_step >= step:
            self._go_back(step)
        self.progress.say(f"going on with step {step} of the run; the ends stand after step {self.last_step}")

    def _go_back(self, step: int) -> None:
        """Stand before the run's step ``step`` again, as far as what was kept allows.

        Raises:
            CheckpointError: all that was kept is newer.
        """
        before, place = self.keeper.go_back(step)
        self._stand_at(before, place)
        stands = f"stand after step {before} again" if before >= 0 else "are as they were before their first step"
        self.progress.say(f"note: the run goes on from step {step}; the ends {stands}")

    def _stand_at(self, step: int, place: dict[str, Any]) -> None:
        """The ends are as they were after ``step``, and so is all else."""
        gone = self.made
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.batches.load_state_dict(place["batches"])
        if self.session.rounds is not None:
            self.session.rounds.loaded = self.kept_average = place["average"]
        self.made, self.missed, self.last_step, self.stood = place["made"], place["missed"], step, None
        self.losses = self.losses[: max(0, len(self.losses) - max(0, gone - self.made))]
        self.tracking.begin(self.made)
        self.log.write("resumed", quiet=True, step=step, made=self.made)
