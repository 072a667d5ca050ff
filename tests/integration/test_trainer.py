"""transformers' Trainer on a split model, against the same Trainer on the whole model."""

from __future__ import annotations

import logging
import shutil
import threading
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from client_ends import SplitModelForSequenceClassification, bind_trainer
from client_ends.train import prepare_ends
from splitfl.adapters import attach_lora
from splitfl.config import LoraSettings
from splitfl.errors import CheckpointError, ConfigError, StepMissed
from tests.integration.test_resume import again
from tests.integration.test_take_up import QUICK, crash_after, kill, start_again, transport_of
from tests.trainer import EPS
from tests.world import World, running, tiny_llama

STEPS = 8
#: What both sides are told: by the run's config, and by TrainingArguments.
RUN = {
    "trainables": "full",
    "optimizer.learning_rate": 5e-3,
    "optimizer.weight_decay": 0.02,
    "optimizer.eps": EPS,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 2,
    "optimizer.steps": STEPS,
    "optimizer.clip": 0.5,
    "optimizer.clipping": "joint",
}
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "weight_decay": 0.02,
    "adam_epsilon": EPS,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_steps": STEPS,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "seed": 3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows of which each has another number of targets."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 64, (16,), generator=draw)
        labels = ids.clone()
        labels[: int(torch.randint(0, 8, (1,), generator=draw))] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def trainer_of(model: Any, out: Any, callbacks: Any = None, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    arguments = TrainingArguments(output_dir=str(out), **(ARGUMENTS | changes))
    return kind(model=model, args=arguments, train_dataset=rows(40, 0), eval_dataset=rows(6, 1), callbacks=callbacks)


def history(trainer: Trainer) -> list[tuple[float, str, float]]:
    """What was logged, as (step, name, value), without what is about time."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate")
    return [(entry["step"], name, entry[name]) for entry in trainer.state.log_history for name in names if name in entry]


def assert_same(mine: Trainer, theirs: Trainer, tolerance: float = 1e-5) -> None:
    ours, reference = history(mine), history(theirs)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in reference]
    for (step, name, own), (_, _, other) in zip(ours, reference, strict=True):
        assert own == pytest.approx(other, rel=tolerance, abs=1e-12), f"{name} at step {step}"


def train_whole(model: str, out: Any, lora: bool = False, **changes: Any) -> Trainer:
    whole = AutoModelForCausalLM.from_pretrained(model)
    trainer = trainer_of(attach_lora(whole, LoraSettings(), seed=0) if lora else whole, out, **changes)
    trainer.train()
    return trainer


def test_every_logged_value_equals_the_whole_models(tmp_path, model):
    reference = train_whole(model, tmp_path / "whole")
    norms = [value for _, name, value in history(reference) if name == "grad_norm"]
    assert min(norms) > 0.5, "nothing was clipped"
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        trainer = trainer_of(split, tmp_path / "split")
        trainer.train()
        assert "trunk_gradient" not in " ".join(split.state_dict())
        split.close()
    assert_same(trainer, reference)
    assert len(world.events("step")) == STEPS


@pytest.mark.slow
def test_adapters_on_both_sides_equal_adapters_on_the_whole_model(tmp_path, model):
    reference = train_whole(model, tmp_path / "whole", lora=True)
    with running(World(tmp_path, model, 1, **(RUN | {"trainables": "lora"}))) as world:
        split = world.join_as(0, micro_batches=2)
        trainer = trainer_of(prepare_ends(split, "lora", LoraSettings(), seed=0), tmp_path / "split")
        trainer.train()
        split.close()
    assert_same(trainer, reference)


@pytest.mark.slow
def test_without_clipping_together_the_losses_come_apart(tmp_path, model):
    """The test of the tests above."""
    reference = train_whole(model, tmp_path / "whole")
    with running(World(tmp_path, model, 1, **(RUN | {"optimizer.clipping": "separate"}))) as world:
        split = world.join_as(0)
        trainer = trainer_of(split, tmp_path / "split")
        trainer.train()
        split.close()
    with pytest.raises(AssertionError, match=r"grad_norm at step 1"):
        assert_same(trainer, reference)


class StopAfter(TrainerCallback):
    """What ends a process amid its training, from where a test stands."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_resumed_on_both_sides_is_as_undisturbed(tmp_path, model):
    reference = train_whole(model, tmp_path / "whole")
    world = World(tmp_path, model, 1, checkpoint_every=2, **RUN)
    saving = {"save_strategy": "steps", "save_steps": 500}
    with running(world):
        split = world.join_as(0)
        stopped = bind_trainer(trainer_of(split, tmp_path / "split", [StopAfter(5)], **saving))
        stopped.train()
        split.close()
    # The client saved when the run did; the server has kept its end too.
    # Neither has as many checkpoints as the server keeps: the run may yet begin anew.
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == ["_trunk-start", "checkpoint-2", "checkpoint-4"]
    with running(again(world)):
        assert world.events("resumed")[-1]["step"] == 4
        split = world.join_as(0)
        trainer = bind_trainer(trainer_of(split, tmp_path / "split", **saving))
        trainer.train(resume_from_checkpoint=True)
        split.close()
        assert world.events("went-back")[-1]["step"] == 3
    assert_same(trainer, reference)


@pytest.mark.parametrize(
    ("every", "stop"),
    [
        pytest.param(4, STEPS, id="training ended"),
        pytest.param(1, 3, id="the run can no longer go back to before its checkpoints"),
    ],
)
def test_the_start_is_kept_for_as_long_as_the_run_may_begin_anew(tmp_path, model, every, stop):
    saving = {"save_strategy": "steps", "save_steps": 500}
    with running(World(tmp_path, model, 1, checkpoint_every=every, checkpoint_keep=2, **RUN)) as world:
        split = world.join_as(0)
        trainer = bind_trainer(trainer_of(split, tmp_path / "split", [StopAfter(stop)], **saving))
        there = []

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                there.append((tmp_path / "split" / "_trunk-start").is_dir())

        trainer.add_callback(Look())
        trainer.train()
        split.close()
    assert all(there), "a step ends before it is saved"
    kept = sorted(path.name for path in (tmp_path / "split").iterdir())
    assert kept == [f"checkpoint-{step}" for step in range(every, stop + 1, every)]


@pytest.mark.slow
def test_the_newest_checkpoint_that_both_hold_is_gone_on_from(tmp_path, model):
    """The server's newest are lost, as after a crash, and one of the trainer's is half written."""
    reference = train_whole(model, tmp_path / "whole")
    world = World(tmp_path, model, 1, checkpoint_every=2, **RUN)
    saving = {"save_strategy": "steps", "save_steps": 3}
    with running(world):
        split = world.join_as(0)
        bind_trainer(trainer_of(split, tmp_path / "split", [StopAfter(5)], **saving)).train()
        split.close()
    (tmp_path / "split" / "checkpoint-5").mkdir()
    held = {int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "split").glob("checkpoint-*")}
    assert held == {2, 3, 4, 5}
    newest = [path for path in (tmp_path / "server" / "checkpoints").iterdir() if int(path.name.rpartition("-")[2]) > 2]
    assert newest
    for path in newest:
        shutil.rmtree(path)
    with running(again(world)):
        split = world.join_as(0)
        trainer = bind_trainer(trainer_of(split, tmp_path / "split", **saving))
        trainer.train(resume_from_checkpoint=True)
        split.close()
        assert [event["step"] for event in world.events("step")] == [*range(5), *range(2, STEPS)]
    assert_same(trainer, reference)


@pytest.mark.slow
def test_adapters_on_both_sides_are_gone_on_with(tmp_path, model):
    reference = train_whole(model, tmp_path / "whole", lora=True)
    world = World(tmp_path, model, 1, checkpoint_every=2, **(RUN | {"trainables": "lora"}))
    saving = {"save_strategy": "steps", "save_steps": 500}
    for resume, callbacks in ((None, [StopAfter(5)]), (True, [])):
        with running(again(world) if resume else world):
            split = world.join_as(0)
            ends = prepare_ends(split, "lora", LoraSettings(), seed=0)
            trainer = bind_trainer(trainer_of(ends, tmp_path / "split", callbacks, **saving))
            trainer.train(resume_from_checkpoint=resume)
            split.close()
    assert_same(trainer, reference)


@pytest.mark.slow
def test_an_unbound_trainer_that_goes_back_to_its_best_model_is_warned(tmp_path, model):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        trainer = trainer_of(split, tmp_path / "split", greater_is_better=True, **best)  # the worst, which is the first
        with pytest.warns(UserWarning, match="the trunk stays as its last step left it"):
            trainer.train()
        split.close()
        split = world.join_as(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split.load_state_dict(split.state_dict())  # before it trains
        split.close()


@pytest.mark.slow
def test_a_checkpoint_at_another_step_than_the_trunks_is_refused(tmp_path, model):
    with running(World(tmp_path, model, 1, checkpoint_every=2, **RUN)) as world:
        saving = {"save_strategy": "steps", "save_steps": 500}
        split = world.join_as(0)
        bind_trainer(trainer_of(split, tmp_path / "split", [StopAfter(3)], **saving)).train()
        split.close()
        split = world.join_as(0)
        trainer = bind_trainer(trainer_of(split, tmp_path / "split", **saving))
        with pytest.raises(CheckpointError, match=r"before step 3, and .*checkpoint-2 after step 1"):
            trainer.train(resume_from_checkpoint=True)
        split.close()


@pytest.mark.slow
@pytest.mark.parametrize(("every", "lost", "first"), [(4, False, 4), (100, False, 0), (2, True, 0)])
def test_the_trainer_goes_back_with_the_run(tmp_path, model, every, lost, first):
    """The server comes back from an older checkpoint than the client can send again from, or without one, while it trains; or
    has lost all that it kept.
    """
    reference = train_whole(model, tmp_path / "whole")
    world = World(tmp_path, model, 1, checkpoint_every=every, timing=QUICK, **RUN)
    with running(world):
        crash_after(world, 6)

        def die() -> None:
            kill(world)
            if lost:
                shutil.rmtree(tmp_path / "server" / "checkpoints")
            start_again(world)

        other = threading.Thread(target=die)
        other.start()
        split = world.join_as(0, channel_options=transport_of(world))
        trainer = bind_trainer(trainer_of(split, tmp_path / "split", save_strategy="steps", save_steps=500))
        trainer.train()
        other.join(60)
        split.close()
    assert_same(trainer, reference)
    assert [event["step"] for event in world.events("step")] == [*range(7), *range(first, STEPS)]


@pytest.mark.slow
def test_one_warning_says_what_differs(tmp_path, model, caplog):
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        with caplog.at_level(logging.WARNING, "client_ends.trainer"):
            bind_trainer(trainer_of(split, tmp_path / "same", [StopAfter(1)])).train()
            assert not caplog.records
            other = bind_trainer(trainer_of(split, tmp_path / "split", [StopAfter(1)], learning_rate=1e-4, max_grad_norm=1.0))
            other.train()
            other.train()
        split.close()
    (record,) = caplog.records
    assert "learning_rate 0.0001 (the run's: 0.005), max_grad_norm 1.0 (the run's: 0.5)" in record.getMessage()


def test_what_the_trunk_cannot_follow_is_refused(tmp_path, model):
    """Scaled losses, and going back to the best step."""
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        for name, says in (("fp16", "use bf16"), ("load_best_model_at_end", "no trunk with them")):
            trainer = trainer_of(split, tmp_path / "split")
            setattr(trainer.args, name, True)
            with pytest.raises(ConfigError, match=says):
                bind_trainer(trainer)
        split.close()


@pytest.mark.slow
@pytest.mark.parametrize(("accumulated", "micro_batches"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_a_classifier_is_trained_and_judged_alike(tmp_path, model, accumulated, micro_batches):
    """Hugging Face adds up the means of the batches that make a step."""
    changes = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 4}
    with running(World(tmp_path, model, 1, **RUN)) as world:
        options = {"num_labels": 3, "seed": 5, "micro_batches": micro_batches}
        split = world.join_as(0, SplitModelForSequenceClassification, **options)
        whole = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
        whole.score.load_state_dict(split.score.state_dict())
        trainers = []
        for each, name in ((whole, "whole"), (split, "split")):
            each.config.pad_token_id = 0
            arguments = TrainingArguments(output_dir=str(tmp_path / name), **(ARGUMENTS | changes))
            labelled = [[{**row, "labels": index % 3} for index, row in enumerate(rows(40, seed))] for seed in (0, 1)]
            trainers.append(
                Trainer(each, arguments, train_dataset=labelled[0], eval_dataset=labelled[1], compute_metrics=accuracy)
            )
            trainers[-1].train()
        split.close()
    assert_same(trainers[1], trainers[0])
    judged = [[entry["eval_accuracy"] for entry in one.state.log_history if "eval_accuracy" in entry] for one in trainers]
    assert judged[0] == judged[1]


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


@pytest.mark.slow
def test_mixed_precision_stays_within_its_own_rounding(tmp_path, model):
    """The ends run under autocast; the trunk in the run's own precision, where one process would cast it too."""
    reference = train_whole(model, tmp_path / "whole", bf16=True)
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        trainer = trainer_of(split, tmp_path / "split", bf16=True)
        trainer.train()
        split.close()
    losses = [[value for _, name, value in history(one) if name.endswith("loss")] for one in (trainer, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["forward", "end"])
def test_a_step_that_goes_on_without_this_client_is_passed_over(tmp_path, model, caplog, monkeypatch, when):
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        session, calls = split.trunk.session, []
        name = {"forward": "send_forward", "end": "step_done"}[when]
        original = getattr(session, name)

        def late(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs.get("grad", True))
            if sum(calls) == {"forward": 10, "end": 3}[when]:
                if when == "end":
                    original(*args, **kwargs)
                raise StepMissed("step 2 went on without this client, which was late: go on with the next batch")
            return original(*args, **kwargs)

        monkeypatch.setattr(session, name, late)
        trainer = bind_trainer(trainer_of(split, tmp_path / "split"))
        trainer.train()
        split.close()
    assert "went on without this client" in caplog.text
    losses = [value for _, name, value in history(trainer) if name == "loss"]
    assert len(losses) == STEPS
    assert all(3 < loss < 5 for loss in losses)
