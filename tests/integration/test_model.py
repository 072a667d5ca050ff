"""The model as a Hugging Face model: in other modes, other precisions, other orders than the plain loop's."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from splitfl.errors import UserError
from splitfl.parts.loading import attach_trunk, load_ends, load_trunk
from tests.integration.test_sessions import batch, train_step
from tests.unit.channel_world import wait_until
from tests.world import World, running, side_by_side, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def world(tmp_path, model):
    with running(World(tmp_path, model, 1)) as world:
        yield world


@pytest.fixture
def split(world):
    split = world.join_as(0)
    yield split
    split.close()


@pytest.fixture
def whole(model):
    ends = load_ends(model, "1:1")
    attach_trunk(ends, load_trunk(model, "1:1"))
    return ends


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_without_a_graph_at_any_time(split, whole, mode, training):
    """Before the first step, within one, and after a pause; in either mode of the model."""

    def loss() -> float:
        with mode():
            return float(split.train(training)(**batch()).loss)

    expected = float(whole.eval()(**batch()).loss.detach())
    assert loss() == pytest.approx(expected, rel=1e-6)
    kept = split.train()(**batch()).loss
    assert loss() == pytest.approx(expected, rel=1e-6)
    kept.backward()
    split.step("pause")
    assert loss() > 0
    train_step(split)
    assert loss() > 0
    assert split.wait_step().step == 1


def test_generation_equals_the_whole_model(split, whole):
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    assert torch.equal(split.eval().generate(ids, **options), whole.eval().generate(ids, **options))


def test_a_pause_after_a_forward_whose_loss_was_thrown_away(split):
    split.train()(**batch())
    split.trunk.session.pause()

    def go_on(_: int) -> None:
        for step in range(2):
            train_step(split)
            assert split.wait_step().step == step

    side_by_side(1, go_on)


def test_a_second_backward_is_refused_where_it_happens(split):
    loss = split.train()(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match="one backward"):
        loss.backward()
    split.step()
    assert split.wait_step().targets == 14


def test_autocast_sends_the_runs_own_dtype(split):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        split.model.embed_tokens.to(torch.bfloat16)
        loss = split.train()(**batch()).loss
    loss.backward()
    split.step()
    assert split.wait_step().targets == 14


def test_labels_by_position_are_read_like_labels_by_name(split):
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    split.eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="left padding"):
        named = split(input_ids=ids, attention_mask=mask, labels=ids).loss
    with pytest.warns(UserWarning, match="left padding"):
        placed = split(ids, mask, None, None, None, ids).loss
    assert float(placed.detach()) == float(named.detach())


def test_a_batch_without_targets_spoils_nothing(world, split):
    empty = batch() | {"labels": torch.full((2, 8), -100)}
    split.train().requires_grad_(False)
    split(**empty).loss.backward()
    split(**batch()).loss.backward()
    split.step()
    closed = split.wait_step()
    assert closed.targets == 14
    assert closed.grad_norm is not None
    assert not world.events("gradient-not-finite")


def test_more_targets_than_tokens_are_refused_on_the_spot(split):
    ids = batch()["input_ids"]
    with split.objective(targets=[9, 9], divisor=18):
        logits = split.train()(input_ids=ids).logits
    with pytest.raises(UserError, match="18 targets in 16 tokens"):
        logits.mean().backward()


@pytest.mark.parametrize("wrapped", [False, True])
def test_gradient_checkpointing_of_the_ends_changes_nothing(split, whole, wrapped):
    gradients = []
    for model in (split, whole):
        if wrapped:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"))
        if model is split or (wrapped and model.get_base_model() is split):
            model.gradient_checkpointing_enable()
        if wrapped:
            model.enable_input_require_grads()
        model.train()(**batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    split.step()
    assert split.wait_step().targets == 14


def test_a_copy_talks_to_the_same_trunk(split):
    twin = copy.deepcopy(split).eval()
    with torch.no_grad():
        assert float(twin(**batch()).loss) == float(split.eval()(**batch()).loss)


def test_answers_may_overtake_the_word_that_their_step_is_open(split):
    """Control and data travel on two connections: the answer to a forward sent ahead can be here before StepOpened is."""
    transport = split.trunk.session.channel._transport
    train_step(split)
    split.wait_step()
    take, held = transport.poll, []

    def late(timeout: float):
        frames = take(min(timeout, 0.05))
        control = [frame for frame in frames if frame.endpoint.name == "CONTROL"]
        held.extend((time.monotonic() + 0.5, frame) for frame in control)
        due = [frame for at, frame in held if at <= time.monotonic()]
        held[:] = [(at, frame) for at, frame in held if at > time.monotonic()]
        return due + [frame for frame in frames if frame not in control]

    transport.poll = late
    for _ in range(2):
        train_step(split)
    assert split.wait_step().step == 2


def test_who_waits_for_a_step_of_a_run_that_ends_is_told(tmp_path, model):
    with running(World(tmp_path, model, 2, needed=1, **{"optimizer.steps": 1})) as world:
        first, late = world.join_as(0), world.join_as(1)
        loss = first.train()(**batch()).loss

        def join_late() -> None:
            with pytest.raises(UserError, match="has made its 1 steps"):
                late.train()(**batch())

        def finish() -> None:
            while len(world.server._loop._steps._enrolled) < 2:
                time.sleep(0.01)
            loss.backward()
            first.step()

        side_by_side(2, lambda index: (join_late, finish)[index]())
        first.close()


def test_a_frozen_clients_last_part_counts_though_it_leaves_at_once(tmp_path, model):
    with running(World(tmp_path, model, 1)) as world:
        split = world.join_as(0).train().requires_grad_(False)
        for seed in range(6):
            split(**batch(seed=seed)).loss.backward()
        split.step()
        split.close()
        deadline = time.monotonic() + 10
        while not world.events("step"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (closed,) = world.events("step")
    assert closed["targets"] == 6 * 14
    assert not closed["parts"]["client0"]["dropped"]


class Slow(torch.optim.SGD):
    """Steps once ``ready`` says so."""

    def __init__(self, parameters, ready):
        super().__init__(parameters, lr=1e-2)
        self._ready = ready

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        assert self._ready()
        super().step()
        return loss


def test_the_server_steps_while_the_ends_optimizer_does(world, split):
    def stepped() -> bool:
        wait_until(lambda: world.events("step"))
        return True

    optimizer = Slow(split.parameters(), stepped)
    split.train()(**batch()).loss.backward()
    optimizer.step()
    assert split.wait_step().step == 0


def test_the_server_hears_of_a_step_with_a_closure_after_it(world, split):
    optimizer = Slow(split.parameters(), lambda: split.trunk.session.contributed)
    split.train()(**batch()).loss.backward()  # of which the closure makes more

    def closure():
        loss = split(**batch()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    split.wait_step()
    assert [event["parts"]["client0"]["micro_batches"] for event in world.events("step")] == [2]


def test_the_server_hears_of_a_checkpoint_s_step_once_the_ends_are_kept(tmp_path, model):
    with running(World(tmp_path, model, 1, checkpoint_every=1)) as world:
        split = world.join_as(0)
        kept = []
        split.on_checkpoint(lambda step: kept.append([p.detach().clone() for p in split.parameters()]))
        optimizer = Slow(split.parameters(), lambda: split.trunk.session.contributed)
        split.train()(**batch()).loss.backward()
        optimizer.step()
        split.wait_step()
        assert all(torch.equal(own, p) for own, p in zip(kept[0], split.parameters(), strict=True))
        split.close()
