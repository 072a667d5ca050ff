import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client_ends.data import Batches, TokenizedDataset, collate, pad_token, split_holdout, target_count
from splitfl.errors import CheckpointError, ConfigError

IGNORE = -100


def dataset(count=10):
    rows = [{"input_ids": list(range(1, 2 + i)), "labels": [IGNORE] + [7] * i} for i in range(1, count + 1)]
    return TokenizedDataset(rows, "causal-lm")


def lengths(batches):
    return [batch["attention_mask"].sum(1).tolist() for batch in batches]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [8, 4], "labels": [8, 4]}],
        pad_token_id=9,
        padding_side=side,
    )
    short, mask, label = [8, 4, 9], [1, 1, 0], [IGNORE, 4, IGNORE]
    if side == "left":
        # A pad in front must not be asked to predict the row's first token.
        short, mask, label = [9, 8, 4], [0, 1, 1], [IGNORE, IGNORE, 4]
    assert batch["input_ids"].tolist() == [[5, 6, 7], short]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], mask]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], label]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_one_label_a_row():
    batch = collate([{"input_ids": [5], "labels": 2}, {"input_ids": [6, 7], "labels": 0}], pad_token_id=0)
    assert batch["labels"].tolist() == [2, 0]
    assert target_count(batch) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_are_what_the_loss_divides_by(side):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    rows = dataset(5).rows
    rows[2] = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}  # a target in the first position is never predicted
    batch = collate(rows, pad_token_id=0, padding_side=side)
    total = model(**batch, num_items_in_batch=1).loss
    assert torch.allclose(model(**batch).loss * target_count(batch), total, rtol=1e-6)


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    batches = Batches(dataset(), 3, seed=1, pad_token_id=0)
    first, second = lengths(batches), lengths(batches)
    assert len(first) == len(second) == len(batches) == 4
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(2, 12))
    assert first != second
    again = Batches(dataset(), 3, seed=1, pad_token_id=0)
    assert [lengths(again), lengths(again)] == [first, second]
    assert lengths(Batches(dataset(), 3, seed=2, pad_token_id=0)) != first
    again.set_epoch(0)
    assert lengths(again) == first


def test_the_datas_own_order_by_choice():
    batches = Batches(dataset(5), 2, seed=1, pad_token_id=0, shuffle=False)
    assert len(batches) == 3
    assert lengths(batches) == [[2, 3], [4, 5], [6]]


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 9])
def test_a_saved_position_is_taken_up_again(done):
    def stream(batches):
        while True:
            yield from batches

    batches = Batches(dataset(), 3, seed=1, pad_token_id=0)
    running = stream(batches)
    for _ in range(done):
        next(running)
    state = batches.state_dict()
    expected = [next(running) for _ in range(6)]
    resumed = Batches(dataset(), 3, seed=1, pad_token_id=0)
    resumed.load_state_dict(state)
    for mine, theirs in zip(stream(resumed), expected, strict=False):
        assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert resumed.state_dict()["epoch"] == batches.state_dict()["epoch"]


def test_a_position_of_other_data_is_refused():
    state = Batches(dataset(), 3, seed=1, pad_token_id=0).state_dict()
    for other in (
        Batches(dataset(9), 3, seed=1, pad_token_id=0),
        Batches(dataset(), 2, seed=1, pad_token_id=0),
        Batches(dataset(), 3, seed=2, pad_token_id=0),
    ):
        with pytest.raises(CheckpointError, match="other data"):
            other.load_state_dict(state)


def test_holding_out():
    whole = dataset(20)
    whole.truncated = 4
    train, held_out = split_holdout(whole, 0.2, seed=3)
    assert len(held_out) == 4
    assert sorted(map(str, train.rows + held_out.rows)) == sorted(map(str, whole.rows))
    assert [row for row in whole.rows if row in train.rows] == train.rows
    assert split_holdout(whole, 0.2, seed=3)[1].rows == held_out.rows
    assert split_holdout(whole, 0.2, seed=4)[1].rows != held_out.rows
    assert len(split_holdout(whole, 3, seed=3)[1]) == 3
    assert len(split_holdout(whole, 0.001, seed=3)[1]) == 1
    assert len(split_holdout(whole, 0, seed=3)[1]) == len(split_holdout(whole, 0.0, seed=3)[1]) == 0
    for wrong in (1.0, 20, -1, -0.5):
        with pytest.raises(ConfigError, match="held"):
            split_holdout(whole, wrong, seed=3)


def test_what_cannot_be_batched():
    with pytest.raises(ConfigError, match="at least 1"):
        Batches(dataset(), 0, seed=1, pad_token_id=0)


def test_rows_and_collate_serve_hugging_faces_trainer(tmp_path):
    from functools import partial

    from transformers import Trainer, TrainingArguments

    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collator = partial(collate, pad_token_id=0)
    trainer = Trainer(LlamaForCausalLM(config), arguments, data_collator=collator, train_dataset=dataset())
    assert trainer.train().global_step == 2


def test_the_pad_token():
    class Plain:
        pad_token_id = None
        eos_token_id = 4

    assert pad_token(Plain()) == 4
    Plain.pad_token_id = 3
    assert pad_token(Plain()) == 3
    assert pad_token(object()) == 0
