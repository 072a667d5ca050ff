"""PEFT's methods on the ends, and accelerate's loop, against the same on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from splitfl.parts.loading import attach_trunk, load_ends, load_trunk
from tests.integration.test_model import batch
from tests.trainer import EPS
from tests.world import World, running, tiny_llama

#: The trunk is frozen: what is on the ends is looked at.
FROZEN = {"trainables": "none"}

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 3]}
METHODS: dict[str, Any] = {
    "lora": LoraConfig(**LORA, task_type="CAUSAL_LM"),
    "dora": LoraConfig(**LORA, use_dora=True, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def wrapped(model: Any, method: str) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, METHODS[method])


def train(model: PeftModel, step: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=EPS)
    losses = []
    for seed in range(4):
        loss = model.train()(**batch(seed=seed)).loss
        step(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_the_ends_is_the_same_on_the_whole_model(tmp_path, model, method):
    reference = train(wrapped(AutoModelForCausalLM.from_pretrained(model), method))
    assert reference[0] != reference[-1]
    with running(World(tmp_path, model, 1, **FROZEN)) as world:
        split = world.join_as(0)
        found = train(wrapped(split, method))
        assert split.wait_step().step == 3, "a step of the soft prompts is a step of the run"
        split.close()
    assert found == pytest.approx(reference, rel=1e-5)


def test_soft_prompts_are_clipped_together_with_a_trunk_that_trains(tmp_path, model):
    ends = load_ends(model, "1:1")
    trunk = load_trunk(model, "1:1")
    attach_trunk(ends, trunk)

    def losses_and_norms(model: PeftModel, others: list[torch.nn.Parameter], finish: Any = None) -> list[tuple[float, float]]:
        own = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([*own, *others], lr=1e-3, eps=EPS, weight_decay=0.0)
        found = []
        for seed in range(4):
            loss = model.train()(**batch(seed=seed)).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *others], 0.1)
            optimizer.step()
            optimizer.zero_grad()
            found.append((float(loss.detach()), float(norm)))
        return found

    reference = losses_and_norms(wrapped(ends, "prompt"), list(trunk.parameters()))
    settings = {"optimizer.clipping": "joint", "optimizer.clip": 0.1, "optimizer.eps": EPS, "optimizer.learning_rate": 1e-3}
    with running(World(tmp_path, model, 1, trainables="full", **settings)) as world:
        split = world.join_as(0)
        found = losses_and_norms(wrapped(split, "prompt"), [])
        split.close()
    for own, other in zip(found, reference, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_an_adapter_that_is_switched_off_is_off_in_the_trunk(tmp_path, model):
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    with running(World(tmp_path, model, 1, **{"optimizer.learning_rate": 0.1})) as world:
        split = world.join_as(0)
        peft = wrapped(split, "lora")
        train(peft)
        with torch.no_grad():
            base = float(whole(**batch()).loss)
            assert float(peft.eval()(**batch()).loss) != pytest.approx(base, rel=1e-3), "nothing was learnt"
            with peft.disable_adapter():
                assert float(peft(**batch()).loss) == pytest.approx(base, rel=1e-6)
        split.close()


def test_accelerates_loop_accumulates_alike(tmp_path, model):
    def loop(model: Any) -> list[float]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPS, weight_decay=0.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for seed in range(6):
            with accelerator.accumulate(model):
                loss = model.train()(**batch(seed=seed)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.2)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    reference = loop(AutoModelForCausalLM.from_pretrained(model))
    settings = {"optimizer.clipping": "joint", "optimizer.clip": 0.2, "optimizer.eps": EPS, "optimizer.learning_rate": 1e-3}
    with running(World(tmp_path, model, 1, trainables="full", **settings)) as world:
        split = world.join_as(0)
        found = loop(split)
        assert split.wait_step().step == 2
        split.close()
    assert found == pytest.approx(reference, rel=1e-5)
