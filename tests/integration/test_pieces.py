"""A batch in several micro-batches: the ends run piece by piece, and everything is as in one piece."""

from __future__ import annotations

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from client_ends.model import SplitModelForSequenceClassification
from client_ends.pieces import pieces_of
from client_ends.remote import cut_rows
from splitfl.adapters import set_trainable
from splitfl.parts.loading import attach_trunk, load_ends, load_trunk
from splitfl.protocol.messages import Backward, Forward
from tests.world import World, running, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def batch(lengths: tuple[int, ...] = (9, 3, 7, 12, 5), *, silent: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of unequal length, padded to the right; row ``silent`` has no targets."""
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    if silent is not None:
        labels[silent] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole(model: str, cut: str = "1:1"):
    ends = load_ends(model, cut)
    attach_trunk(ends, load_trunk(model, cut))
    set_trainable(ends, "full")
    return ends.train()


def gradients(ends) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in ends.named_parameters() if parameter.grad is not None}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("micro_batches", [2, 3, 5, 9])
@pytest.mark.parametrize("cut", ["1:1", "2:1"])
def test_loss_logits_and_gradients_are_those_of_one_piece(tmp_path, model, micro_batches, cut):
    reference = whole(model, cut)
    expected = reference(**batch(silent=1))
    expected.loss.backward()
    with running(World(tmp_path, model, 1, cut=cut, trainables="none")) as world:
        split = world.join_as(0, micro_batches=micro_batches)
        set_trainable(split, "full")
        out = split.train()(**batch(silent=1))
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(out.logits[batch()["attention_mask"] == 1], expected.logits[batch()["attention_mask"] == 1])
        assert_same(gradients(split), gradients(reference))
        split.step()
        split.wait_step()
        split.close()
    # Once the server has stopped: it tells its clients of a step before it tells its log.
    (event,) = world.events("step")
    assert event["targets"] == int((batch(silent=1)["labels"][:, 1:] != -100).sum())


def test_input_end_and_network_overlap_and_the_backward_mirrors_the_forward(tmp_path, model):
    """All of it in the order of one thread: input ends and sendings alternate, and so do output ends and gradients."""
    order: list[str] = []
    with running(World(tmp_path, model, 1)) as world:
        split = world.join_as(0, micro_batches=3)
        set_trainable(split, "full")
        first, last = split.model.layers[0], split.model.layers[-1]
        first.register_forward_pre_hook(lambda *_: order.append("input"))
        last.register_forward_pre_hook(lambda *_: order.append("output"))
        last.register_full_backward_pre_hook(lambda *_: order.append("output back"))
        first.register_full_backward_pre_hook(lambda *_: order.append("input back"))
        send, told = split.trunk.session.channel.send, {Forward: "h", Backward: "dy"}

        def sending(message, payload):
            order.append(f"{told[type(message)]}{message.micro}")
            send(message, payload)

        split.trunk.session.channel.send = sending
        split.train()(**batch((8,) * 6)).loss.backward()
        split.close()
    forward = ["input", "h0", "input", "h1", "input", "h2", "output", "output", "output"]
    backward = ["output back", "dy2", "output back", "dy1", "output back", "dy0", "input back", "input back", "input back"]
    assert order == forward + backward


def test_accumulation_lora_and_items_given_by_the_caller(tmp_path, model):
    items = 40
    reference = whole(model)
    (reference(**batch(), num_items_in_batch=items).loss / 2).backward()
    with running(World(tmp_path, model, 1, trainables="none")) as world:
        split = world.join_as(0, micro_batches=3)
        set_trainable(split, "full")
        (split.train()(**batch(), num_items_in_batch=items).loss / 2).backward()
        assert_same(gradients(split), gradients(reference))
        split.step()
        wrapped = get_peft_model(split, LoraConfig(target_modules=["q_proj"])).train()
        one = wrapped(**batch())
        one.loss.backward()
        assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n and p.requires_grad)
        split.close()


def test_evaluation_and_losses_on_logits_go_in_pieces_too(tmp_path, model):
    reference = whole(model).eval()
    labels = batch()["labels"]
    with running(World(tmp_path, model, 1, trainables="none")) as world:
        split = world.join_as(0, micro_batches=3)
        with torch.no_grad():
            torch.testing.assert_close(split.eval()(**batch()).loss, reference(**batch()).loss, rtol=1e-5, atol=0.0)
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        with split.train().objective(targets=[4] * 5, divisor=20.0):
            logits = split(**inputs).logits
        (logits[labels != -100].sum() / 20).backward()
        split.step()
        split.wait_step()
        split.close()
    # Once the server has stopped: it tells its clients of a step before it tells its log.
    (event,) = world.events("step")
    assert event["targets"] == 20


def test_a_classifier_in_pieces(tmp_path, model):
    rows = {name: value for name, value in batch().items() if name != "labels"} | {"labels": torch.tensor([0, 1, 1, 0, 1])}
    with running(World(tmp_path, model, 1, trainables="none")) as world:
        losses = []
        for micro_batches, items in ((1, None), (3, None), (3, 5)):  # the count of items changes nothing in a mean
            split = world.join_as(0, SplitModelForSequenceClassification, micro_batches=micro_batches, num_labels=2, seed=0)
            split.config.pad_token_id = 0
            losses.append(float(split.train()(**rows, num_items_in_batch=items).loss.detach()))
            split.close()
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_a_family_with_dropout_in_its_embedding_and_tuples_for_blocks(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    expected = whole(str(tmp_path / "gpt2")).eval()(**batch())
    with running(World(tmp_path, str(tmp_path / "gpt2"), 1, trainables="none")) as world:
        split = world.join_as(0, micro_batches=2).eval()
        torch.testing.assert_close(split(**batch()).loss, expected.loss, rtol=1e-5, atol=0.0)
        assert float(split.train()(**batch()).loss.detach()) != float(expected.loss.detach())
        split.close()


def test_a_forward_that_fails_leaves_the_ends_whole(tmp_path, model):
    with running(World(tmp_path, model, 1)) as world:
        split = world.join_as(0, micro_batches=3)
        blocks = list(split.model.layers)

        def fail(*_):
            raise ValueError("a bad hook")

        hook = split.model.norm.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="a bad hook"):
            split.train()(**batch())
        assert list(split.model.layers) == blocks
        hook.remove()
        split.train()(**batch()).loss.backward()
        split.step()
        split.wait_step()
        split.close()


def test_what_cannot_be_cut_runs_in_one_piece(model):
    config = whole(model).config
    rows = batch()
    assert len(pieces_of(rows, config, 3)) > 1
    assert pieces_of(rows, config, 1) == []
    assert pieces_of({name: value[:1] for name, value in rows.items()}, config, 3) == []
    assert pieces_of(rows | {"output_hidden_states": True}, config, 3) == []
    assert pieces_of(rows | {"return_dict": False}, config, 3) == []
    assert pieces_of(rows | {"something_of_the_family": torch.ones(5)}, config, 3) == []
    assert len(pieces_of(rows | {"num_items_in_batch": torch.tensor(7)}, config, 3)) > 1


def test_rows_are_cut_into_runs_of_like_length():
    assert cut_rows([4] * 8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert cut_rows([9, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert cut_rows([4] * 4, 1, limit=8) == [range(2), range(2, 4)]
    assert cut_rows([0, 0], 3) == [range(2)]


def test_what_a_failed_forward_has_sent_never_runs_together_with_what_follows(tmp_path, model):
    """The trunk would wait for its gradients, and the client for the trunk."""
    with running(World(tmp_path, model, 1)) as world:
        split = world.join_as(0, micro_batches=3)
        engine, sizes = world.server._engine, []
        begin = engine.begin_forward

        def slowly(work, heard):
            if not sizes:
                time.sleep(0.2)  # so that what follows could overtake the rest of it
            sizes.append([member.forward.micro for member in work.members])
            return begin(work, heard)

        engine.begin_forward = slowly

        def fail(*_):
            raise KeyboardInterrupt  # as of somebody who does not wait any longer

        split.trunk.session.await_hidden, await_hidden = fail, split.trunk.session.await_hidden
        with pytest.raises(KeyboardInterrupt):
            split.train()(**batch())
        split.trunk.session.await_hidden = await_hidden
        split(**batch()).loss.backward()
        split.step()
        split.wait_step()
        split.close()
    sent = max(sizes[-1]) + 1
    assert not any(min(each) < sent // 2 <= max(each) for each in sizes)
