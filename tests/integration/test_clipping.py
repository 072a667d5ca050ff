"""Clipping by the norm of both sides together: who may train, and what a broken link changes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitfl.errors import ConfigError
from tests.integration.test_lost import QUICK, cut, wait_for
from tests.integration.test_model import batch
from tests.integration.test_reconnect import join
from tests.trainer import EPS
from tests.world import World, running, tiny_llama

JOINT = {"trainables": "full", "optimizer.clipping": "joint", "optimizer.clip": 0.3, "optimizer.eps": EPS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def train(model: torch.nn.Module, steps: int) -> list[tuple[float, float]]:
    """Losses and norms of a plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPS, weight_decay=0.0)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**batch(seed=step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_plain_loop_is_as_on_the_whole_model(tmp_path, model, micro_batches):
    reference = train(AutoModelForCausalLM.from_pretrained(model), 6)
    assert min(norm for _, norm in reference) > 0.3, "nothing was clipped"
    with running(World(tmp_path, model, 1, **JOINT, **{"optimizer.learning_rate": 1e-3})) as world:
        split = world.join_as(0, micro_batches=micro_batches)
        found = train(split, 6)
        split.load_state_dict(copy.deepcopy(split).state_dict())
        split.close()
    for own, other in zip(found, reference, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_another_client_may_look_and_not_train(tmp_path, model):
    world = World(tmp_path, model, 2, needed=1, timing=QUICK, **JOINT)
    with running(world):
        split, other = world.join_as(0), world.join_as(1)
        train(split, 1)
        with torch.no_grad():
            assert other.eval()(**batch()).loss > 0
        with pytest.raises(ConfigError, match="for one client, and another trains already"):
            other.train()(**batch())
        train(split, 1)
        split.close()
        wait_for(lambda: len(world.events("left")) == 2)
        late = world.join_as(1)
        train(late, 1)
        late.close()


@pytest.mark.slow
def test_the_norm_is_asked_for_again_when_the_link_has_broken(tmp_path, model):
    world = World(tmp_path, model, 1, timing=QUICK, on_loss="wait", step_deadline=0.0, **JOINT)
    with running(world):
        split = join(world, 0)
        split.train()(**batch()).loss.backward()
        sound = split.trunk.session.trunk_norm()
        channel, found = split.trunk.session.channel, []
        channel.tell = lambda message: None  # the question is lost on its way
        asking = threading.Thread(target=lambda: found.append(split.trunk.session.trunk_norm()))
        asking.start()
        wait_for(lambda: split.trunk.session._norm is None)
        cut(split)
        asking.join(30)
        assert found == [sound]
        split.close()
