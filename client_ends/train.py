"""One client's training run: join, read data, train the ends while the trunk trains too, evaluate, keep the result.

The loop is plain PyTorch on one page; nothing in it knows that the trunk is elsewhere, save the lines that pause and leave.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from client_ends.data import Batches, TokenizedDataset, load_examples, pad_token, split_holdout, tokenize
from client_ends.evaluation import evaluate
from client_ends.model import SplitModelForCausalLM, SplitModelForSequenceClassification
from client_ends.progress import Progress
from splitfl.adapters import attach_lora, named_trainables, set_trainable
from splitfl.adapters.results import describe_part
from splitfl.checkpoint import checkpoint_directory, prune_checkpoints, save_checkpoint
from splitfl.config import LoraSettings, OptimizerSettings
from splitfl.errors import ConfigError, ModelError, RunComplete, StepMissed
from splitfl.libraries import differences, library_versions
from splitfl.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from splitfl.parts.cut import Cut
from splitfl.parts.identity import model_identity
from splitfl.runlog import RunLog

__all__ = ["TrainResult", "TrainSettings", "prepare_ends", "read_data", "train"]

_FACES = {
    "causal-lm": SplitModelForCausalLM,
    "sequence-classification": SplitModelForSequenceClassification,
}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What one client decides. Optimizer fields left None are the run's own. ``adapter_...``: of this client's own adapter in the
    trunk, where the run has one for each client; rank and alpha hold for the ends' adapter too.
    """

    trunk: str
    identity: str
    data: str
    model: str | None = None
    revision: str | None = None
    cut: str | None = None
    task: str = "causal-lm"
    columns: Mapping[str, str] | None = None
    data_format: str | None = None
    num_labels: int | None = None
    label_names: tuple[str, ...] | None = None
    max_length: int = 512
    batch_size: int = 8
    accumulate: int = 1
    epochs: float = 1.0
    steps: int = 0
    evaluate: float = 0.05
    evaluate_every: int = 0
    ends: str = "lora"
    learning_rate: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_learning_rate: float | None = None
    adapter_weight_decay: float | None = None
    seed: int = 0
    out: str = ""
    checkpoint_every: int = 0
    device: str = "auto"
    dtype: str | None = None
    attn: str | None = None
    threads: int = 0
    trust_remote_code: bool = False
    micro_batches: int = 1
    timeout: float = 10.0
    dump_hidden: str = ""

    @property
    def adapter(self) -> dict[str, float]:
        """What this client asks for its own adapter in the trunk."""
        names = ("rank", "alpha", "learning_rate", "weight_decay")
        asked = {name: getattr(self, f"adapter_{name}") for name in names}
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How it went. Losses are means over target tokens (or labels). ``missed``: steps that went on without this client."""

    steps: int
    losses: list[float]
    evaluation_before: dict[str, float] | None
    evaluation_after: dict[str, float] | None
    checkpoint: Path
    bytes_sent: int
    bytes_received: int
    missed: int = 0


def read_data(settings: TrainSettings, tokenizer: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training rows and the held-out rows (None where nothing is held out). Raises DataError, ConfigError."""
    examples = load_examples(settings.data, columns=settings.columns, format=settings.data_format)
    dataset = tokenize(
        examples,
        tokenizer,
        # A tokenizer that knows no limit says so by an astronomical number.
        max_length=min(settings.max_length, tokenizer.model_max_length),
        task=settings.task,  # type: ignore[arg-type]
        num_labels=settings.num_labels,
        label_names=settings.label_names,
    )
    if not settings.evaluate:
        return dataset, None
    share: float = settings.evaluate if settings.evaluate < 1 else int(settings.evaluate)
    return split_holdout(dataset, share, settings.seed)


def prepare_ends(model: Any, ends: str, lora: LoraSettings, *, seed: int) -> Any:
    """Make ``lora``, ``full`` or nothing (``frozen``) of the ends trainable; returns the model, wrapped where LoRA was
    attached.
    """
    if ends == "lora":
        return attach_lora(model, lora, seed=seed)
    if ends not in ("full", "frozen"):
        raise ConfigError(f"the ends can be trained as lora or full, or be frozen, not {ends!r}")
    set_trainable(model, "full" if ends == "full" else "none")
    return model


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
        SessionLost: the session broke; the ends are kept as they were after their last step, under its number. The trunk may
            stand one step earlier: it steps once every client is done.
    """
    if settings.task not in _FACES:
        raise ConfigError(f"the task is {' or '.join(_FACES)}, not {settings.task!r}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    log = log or RunLog(None, echo=None)
    progress = progress or Progress(quiet=True)
    # Bad rows are the commonest mistake, so data is read before anybody is bothered, where the tokenizer is at hand.
    early = None if settings.model is None else _load_tokenizer(settings.model, settings)
    data = None if early is None else read_data(settings, early)

    progress.say("joining the run")
    extra: dict[str, Any] = {}
    if settings.task == "sequence-classification":
        labels = settings.num_labels or (data[0].num_labels if data else None)
        extra = {"num_labels": labels or 2, "seed": settings.seed}
    model = _FACES[settings.task].from_pretrained(
        settings.model,
        settings.trunk,
        settings.identity,
        cut=settings.cut,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        attn=settings.attn,
        trust_remote_code=settings.trust_remote_code,
        adapter=settings.adapter,
        micro_batches=settings.micro_batches,
        timeout=settings.timeout,
        channel_options=channel_options,
        **extra,
    )
    try:
        tokenizer = early or _load_tokenizer(model.config._name_or_path, settings)
        rows, held_out = data or read_data(settings, tokenizer)
        return _Run(settings, model, tokenizer, rows, held_out, log, progress).run()
    finally:
        model.close()


def _load_tokenizer(path: str, settings: TrainSettings) -> Any:
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ModelError(f"--model {path}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(path, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"no tokenizer for {path}: {first}") from None


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
    ) -> None:
        self.settings, self.log, self.progress = settings, log, progress
        self.split = model
        self.session = model.trunk.session
        self.terms = self.session.terms
        lora = self.terms["lora"]
        targets = lora["targets"]
        self.lora = LoraSettings(
            settings.adapter_rank or lora["rank"],
            settings.adapter_alpha or lora["alpha"],
            lora["dropout"],
            targets if isinstance(targets, str) else tuple(targets),
        )
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
        self.batches = Batches(rows, settings.batch_size, seed=settings.seed, pad_token_id=pad)
        self.held_out = (
            None
            if held_out is None
            else Batches(held_out, settings.batch_size, seed=settings.seed, pad_token_id=pad, shuffle=False)
        )
        self.losses: list[float] = []
        self.missed = 0
        self.last_step = -1  # the run's number of the newest step the ends have made
        self.out = Path(settings.out or Path("runs") / f"{self.session.channel.welcome.run}-ends")
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
        before = self._evaluate("before")
        total = self.total_steps
        if self.terms["clients"] > 1:
            self.progress.say(f"enrolling; the first step of the run begins when {self.terms['clients']} clients have enrolled")
        self.progress.begin(total)
        stream = self._stream()
        self.model.train()
        try:
            for step in range(total):
                try:
                    self._step(stream, step)
                except RunComplete:
                    if not self.losses:
                        raise
                    break  # joined late, or others were faster
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
            # The trunk must have made its last step before the held-out part is judged with it.
            self.split.wait_step()
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

    def _drop_step(self, step: int, missed: StepMissed) -> None:
        """The run went on without this client's part of a step: nothing of it is used here either."""
        self.missed += 1
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.log.write("step-missed", quiet=True, step=step, why=str(missed))
        self.progress.say(f"note: {missed}")

    def _step(self, stream: Iterator[dict[str, torch.Tensor]], step: int) -> None:
        """One optimizer step over ``accumulate`` batches. The trunk's step ends when the ends' optimizer steps."""
        began = time.monotonic()
        total = targets = tokens = 0.0
        for _ in range(self.settings.accumulate):
            batch = next(stream)
            loss = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).loss
            (loss / self.settings.accumulate).backward()
            counted = Batches.targets(batch)
            total, targets = total + float(loss.detach()) * counted, targets + counted
            tokens += float(batch["attention_mask"].sum())
        rate = learning_rate_at(step, self.optim_settings)
        self.last_step = self.session.step
        if self.optimizer is not None:
            if self.optim_settings.clip:
                torch.nn.utils.clip_grad_norm_(list(self.trainables.values()), self.optim_settings.clip)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.split.step()
        mean = total / max(1.0, targets)
        self.losses.append(mean)
        seconds = time.monotonic() - began
        self.log.write(
            "step",
            quiet=True,
            step=step,
            loss=mean,
            targets=int(targets),
            learning_rate=rate,
            seconds=round(seconds, 4),
            tokens_per_second=round(tokens / seconds, 1) if seconds > 0 else None,
        )
        self.progress.step(step + 1, loss=mean, tokens_per_second=tokens / seconds if seconds > 0 else 0.0)

    def _evaluate(self, when: str) -> dict[str, float] | None:
        if self.held_out is None:
            return None
        self.progress.say(f"evaluating ({when})")
        report: dict[str, Any] = evaluate(self.model, self.held_out, self.device)
        self.log.write("evaluation", when=when, **report)
        self.progress.say(f"held out, {when}: " + "  ".join(f"{name} {value:.4g}" for name, value in report.items()))
        return report

    def _dump_hidden(self, flat: torch.Tensor) -> None:
        Path(self.settings.dump_hidden).write_bytes(flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def _save(self) -> Path:
        """Keep the ends as they are after the last step: weights, optimizer, random state, data position.

        The checkpoint bears the run's own step number, so that it finds the trunk's of the same step.
        """
        step = self.last_step
        directory = checkpoint_directory(self.out, step)
        trained = {"lora": "lora", "full": "full", "frozen": "none"}[self.settings.ends]
        cut = Cut.parse(self.terms["cut"])
        path = self.settings.model or self.terms["model"]
        meta = describe_part(
            self.model,
            part="ends",
            base=path,
            identity=model_identity(path, revision=self.settings.revision).to_plain(),
            cut=(cut.input_blocks, cut.output_blocks),
            trainables=trained,  # type: ignore[arg-type]
            lora=self.lora if trained == "lora" else None,
            task=self.settings.task,
            step=step,
            run=self.session.channel.welcome.run,
        )
        extra: dict[str, Any] = {"generator": torch.get_rng_state(), "data": self.batches.state_dict()}
        if self.optimizer is not None:
            extra["optimizer"] = self.optimizer.state_dict()
        save_checkpoint(directory, {name: p.detach() for name, p in self.trainables.items()}, meta, extra)
        prune_checkpoints(self.out, 3)
        return directory
