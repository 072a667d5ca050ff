"""TRL's trainers on a split model, against the same trainers on the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_ends import bind_trainer
from client_ends.train import prepare_ends
from splitfl.adapters import attach_lora
from splitfl.config import LoraSettings
from splitfl.errors import UserError
from splitfl.sample import build_sample_model, sample_text
from tests.integration.test_resume import again
from tests.integration.test_trainer import ARGUMENTS, RUN, StopAfter, assert_same, history
from tests.world import World, running

trl = pytest.importorskip("trl", reason="pip install '.[trl]'")
datasets = pytest.importorskip("datasets")

#: SFTConfig and DPOConfig have other defaults than TrainingArguments.
CONFIG = ARGUMENTS | {"bf16": False, "gradient_checkpointing": False, "dataset_num_proc": None}
LORA = RUN | {"trainables": "lora"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "sample"
    build_sample_model(path, seed=0, hidden=32, blocks=4)
    return str(path)


def words(count: int, seed: int) -> list[str]:
    """Pieces of English of unequal length."""
    text, draw = sample_text(), torch.Generator().manual_seed(seed)
    begins = torch.randint(0, len(text) - 100, (count,), generator=draw).tolist()
    lengths = torch.randint(6, 30, (count,), generator=draw).tolist()
    return [text[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]


def prompts(count: int, seed: int) -> Any:
    return datasets.Dataset.from_dict({"prompt": words(count, seed), "completion": words(count, seed + 100)})


def preferences(count: int, seed: int) -> Any:
    columns = {"prompt": words(count, seed), "chosen": words(count, seed + 100), "rejected": words(count, seed + 200)}
    return datasets.Dataset.from_dict(columns)


def sft(model: Any, path: str, out: Any, **changes: Any) -> Any:
    config = trl.SFTConfig(output_dir=str(out), **({"max_length": 64} | CONFIG | changes))
    tokenizer = AutoTokenizer.from_pretrained(path)
    return trl.SFTTrainer(model, config, train_dataset=prompts(40, 0), eval_dataset=prompts(6, 1), processing_class=tokenizer)


def dpo(model: Any, path: str, out: Any, **changes: Any) -> Any:
    config = trl.DPOConfig(output_dir=str(out), **({"max_length": 64} | CONFIG | changes))
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = preferences(40, 0), preferences(6, 1)
    return trl.DPOTrainer(model, args=config, train_dataset=data[0], eval_dataset=data[1], processing_class=tokenizer)


def compare(make: Any, model: str, work: Any, *, bound: bool, lora: bool = True, **changes: Any) -> Any:
    """Train the whole model, then the split one; the trainers' logs are the same."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    reference = make(attach_lora(whole, LoraSettings(), seed=0) if lora else whole, model, work / "whole", **changes)
    reference.train()
    world = World(work, model, 1, **(LORA if lora else RUN))
    with running(world):
        split = world.join_as(0)
        trainer = make(prepare_ends(split, "lora" if lora else "full", LoraSettings(), seed=0), model, work / "split", **changes)
        if bound:
            bind_trainer(trainer)
        trainer.train()
        split.close()
    assert_same(trainer, reference)
    assert min(value for _, name, value in history(reference) if name == "grad_norm") > 0
    return reference


@pytest.mark.parametrize(
    ("lora", "bound"),
    [(True, False), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(True, True), (False, False), (False, True)])],
)
def test_supervised_fine_tuning_on_completions(tmp_path, model, bound, lora):
    compare(sft, model, tmp_path, bound=bound, lora=lora)


@pytest.mark.slow
def test_supervised_fine_tuning_is_gone_on_with(tmp_path, model):
    """Saved with the run, resumed on both sides: as the whole model's, undisturbed."""
    whole = attach_lora(AutoModelForCausalLM.from_pretrained(model), LoraSettings(), seed=0)
    reference = sft(whole, model, tmp_path / "whole")
    reference.train()
    world = World(tmp_path, model, 1, checkpoint_every=2, **LORA)
    for resume in (None, True):
        with running(again(world) if resume else world):
            split = world.join_as(0)
            ends = prepare_ends(split, "lora", LoraSettings(), seed=0)
            trainer = bind_trainer(sft(ends, model, tmp_path / "split", save_strategy="steps", save_steps=500))
            if not resume:
                trainer.add_callback(StopAfter(5))
            trainer.train(resume_from_checkpoint=resume)
            split.close()
    assert_same(trainer, reference)


@pytest.mark.slow
def test_supervised_fine_tuning_packed(tmp_path, model):
    changes = {"packing": True, "max_length": 96, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    compare(sft, model, tmp_path, bound=False, **changes)


@pytest.mark.slow
def test_a_loss_that_weighs_tokens_needs_binding(tmp_path, model):
    (tmp_path / "unbound").mkdir()
    with running(World(tmp_path / "unbound", model, 1, **LORA)) as world:
        split = world.join_as(0)
        trainer = sft(prepare_ends(split, "lora", LoraSettings(), seed=0), model, tmp_path / "split", loss_type="dft")
        with pytest.raises(UserError, match="bind_trainer"):
            trainer.train()
        split.close()
    compare(sft, model, tmp_path, bound=True, loss_type="dft")


@pytest.mark.slow
def test_preferences_refer_to_the_trunk_without_its_adapter(tmp_path, model):
    reference = compare(dpo, model, tmp_path, bound=True)
    losses = [value for _, name, value in history(reference) if name == "loss"]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.69, "nothing was learnt"


@pytest.mark.slow
def test_preferences_without_an_adapter_to_switch_off_are_refused(tmp_path, model):
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        trainer = bind_trainer(dpo(prepare_ends(split, "lora", LoraSettings(), seed=0), model, tmp_path / "split"))
        with pytest.raises(UserError, match="no adapter to switch off"):
            trainer.train()
        split.close()
