"""How good the split model is, by the harness's own scoring and by ours: the same numbers as of the whole model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from client_ends.data import load_examples, tokenize
from client_ends.kept import kept_directory
from client_ends.metrics import classified, rouge
from client_ends.scoring import harness_scores, score_rows, score_texts
from client_ends.train import TrainSettings, train
from splitfl.checkpoint import load_checkpoint
from splitfl.cli import main
from splitfl.errors import ConfigError
from tests.world import World, running

TASKS = Path(__file__).parents[1] / "tasks"


@pytest.fixture
def both(tmp_path, stories):
    """The split model and the whole one, and their tokenizer."""
    with running(World(tmp_path, stories, 1, cut="1:1")) as world:
        split = world.join_as(0)
        yield split, AutoModelForCausalLM.from_pretrained(stories).eval(), AutoTokenizer.from_pretrained(stories)
        split.close()


def test_the_harness_finds_the_same_numbers_split_and_whole(both, monkeypatch):
    assert_same_scores(both, ["splitfl_copa"], 20, monkeypatch)


@pytest.mark.slow
def test_the_harness_finds_the_same_numbers_on_all_of_cb_and_copa(both, monkeypatch):
    found = assert_same_scores(both, ["splitfl_cb", "splitfl_copa"], None, monkeypatch)
    assert found["splitfl_cb"]["sample_len"] == 56
    assert found["splitfl_copa"]["sample_len"] == 100


def assert_same_scores(both, tasks, limit, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # where the tasks look for their rows from
    split, whole, tokenizer = both
    options = {"batch_size": 8, "include": TASKS, "limit": limit}
    mine = harness_scores(split, tokenizer, tasks, **options)
    assert mine == harness_scores(whole, tokenizer, tasks, **options)
    assert set(mine) == set(tasks)
    assert all(0 < scores["acc"] < 1 for scores in mine.values())
    return mine


def test_loss_and_what_is_written_are_the_whole_model_s(both, tmp_path):
    split, whole, tokenizer = both
    file = tmp_path / "rows.jsonl"
    rows = [
        ("Once upon a time, there was a", " little girl named Lily."),
        ("Tom and his dog", " went to the park. It was a sunny day."),
    ]
    file.write_text("\n".join(json.dumps({"prompt": prompt, "completion": rest}) for prompt, rest in rows))
    dataset = tokenize(load_examples(file), tokenizer, max_length=128, task="causal-lm")
    mine = score_rows(split, dataset, tokenizer, batch_size=2)
    theirs = score_rows(whole, dataset, tokenizer, batch_size=1)
    assert mine["targets"] == theirs["targets"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert mine["perplexity"] == pytest.approx(math.exp(mine["loss"]), rel=1e-6)
    options = {"batch_size": 2, "new_tokens": 12}
    scores, written = score_texts(split, dataset, tokenizer, **options)
    assert (scores, written) == score_texts(whole, dataset, tokenizer, **options)
    assert all(written)
    assert 0 < scores["rouge1"] < 1


def test_scores_of_a_classifier_and_of_texts():
    # By hand: of three classes, class 0 has P = 1/2 and R = 1, class 1 P = 1 and R = 1/2, class 2 is never predicted.
    scores = classified([0, 1, 1, 2], [0, 1, 0, 0])
    assert scores["accuracy"] == 0.5
    assert scores["f1_macro"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    # One of two words is right, in its place: P = R = 1/2, and no pair of words.
    assert rouge(["red house"], ["red garden"]) == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5}


class Recites(torch.nn.Module):
    """Writes what it is told to, whatever it is asked."""

    def __init__(self, said: list[int]) -> None:
        super().__init__()
        self.said = torch.nn.Parameter(torch.tensor(said, dtype=torch.float32))

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, self.said.long()[None].expand(len(input_ids), -1)], 1)


def test_of_a_dialogue_the_first_answer_is_what_is_written(stories, tmp_path):
    """And not all that was said after it."""
    turns = [
        ("user", "Who are you?"),
        ("assistant", "I am Lily."),
        ("user", "And who is he?"),
        ("assistant", "He is my friend Tom."),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    dataset = tokenize(load_examples(file), tokenizer, max_length=128, task="causal-lm")
    model = Recites(tokenizer(" I am Lily.\n", add_special_tokens=False).input_ids)
    scores, _ = score_texts(model, dataset, tokenizer, batch_size=1, new_tokens=8)
    assert scores["rouge1"] == 1


def test_the_command_line_on_a_file_and_with_the_ends_of_a_training_run(tmp_path, stories, data, capsys):
    text = (data / "text" / "tinyshakespeare" / "input.txt").read_text()[:4000]
    (tmp_path / "held.txt").write_text(text)
    with running(World(tmp_path, stories, 1, memory=False, bind="127.0.0.1:0", cut="1:1")) as world:
        common = ("--trunk", world.join, "--identity", world.keys[0], "--model", stories)
        trained = train(
            TrainSettings(
                world.join,
                str(world.keys[0]),
                str(tmp_path / "held.txt"),
                stories,
                steps=3,
                ends="full",
                learning_rate=1e-3,
                batch_size=2,
                max_length=64,
                out=str(tmp_path / "ends"),
                device="cpu",
                evaluate=0.0,
            )
        )
        assert trained.steps == 3
        options = (*common, "--data", tmp_path / "held.txt", "--max-length", 64, "--device", "cpu", "--json")
        losses = []
        for ends in ((), ("--ends", tmp_path / "ends")):
            assert main([str(word) for word in ("eval", *options, *ends)]) == 0
            losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    # The trunk is the trained one in both; the ends are the model's own in the first.
    assert losses[1] < losses[0] < 10


def test_a_classifier_is_judged_by_the_classes_that_its_ends_were_trained_on(tmp_path, stories, capsys):
    seen, held = tmp_path / "seen.csv", tmp_path / "held.csv"
    seen.write_text("text,label\n" + "The cat sat down.,calm\nThe dog ran home.,glad\nThe bird was lost.,sad\n" * 4)
    held.write_text("text,label\nThe girl was lost.,sad\nThe boy ran home.,glad\n")  # none is calm
    task, ends = "sequence-classification", str(tmp_path / "ends")
    with running(World(tmp_path, stories, 1, memory=False, bind="127.0.0.1:0", cut="1:1")) as world:
        key = str(world.keys[0])
        train(
            TrainSettings(
                world.join, key, str(seen), stories, task=task, ends="full", steps=2, evaluate=0, out=ends, device="cpu"
            )
        )
        common = (
            "--trunk",
            world.join,
            "--identity",
            key,
            "--model",
            stories,
            "--task",
            task,
            "--ends",
            ends,
            "--data",
            str(held),
        )

        def scores(*more: str) -> Any:
            assert main(["eval", *common, "--device", "cpu", "--json", *more]) == 0
            return json.loads(capsys.readouterr().out.splitlines()[-1])

        assert scores() == scores("--label-names", "calm,glad,sad", "--num-labels", "3")
        for flag, value, said in (
            ("--label-names", "sad,glad,calm", "number the classes calm,glad,sad: leave --label-names out"),
            ("--num-labels", "2", "know 3 classes: leave --num-labels out"),
        ):
            assert main(["eval", *common, flag, value]) == 2
            assert said in capsys.readouterr().err
        bare = [word for word in common if word not in ("--ends", ends)]
        assert main(["eval", *bare, "--device", "cpu"]) == 2  # a head of chance is not judged
        assert "without score.weight, which nothing has trained: name trained ends with --ends" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_of_a_trained_classifier_are_those_of_the_whole_model(tmp_path, stories, data, capsys):
    task, ends = "sequence-classification", tmp_path / "ends"
    rows = (data / "text" / "sst2" / "dev.tsv").read_text().splitlines()
    seen, held = tmp_path / "seen.tsv", tmp_path / "held.tsv"
    seen.write_text("\n".join(rows[:200]))
    held.write_text("\n".join([rows[0], *rows[200:260]]))
    columns = {"text": "sentence", "label": "label"}
    with running(World(tmp_path, stories, 1, memory=False, bind="127.0.0.1:0", cut="1:1", trainables="none")) as world:
        told = {"task": task, "columns": columns, "ends": "full", "steps": 20, "evaluate": 0, "device": "cpu"}
        settings = TrainSettings(world.join, str(world.keys[0]), str(seen), stories, out=str(ends), learning_rate=2e-3, **told)
        train(settings)
        words = ("--trunk", world.join, "--identity", world.keys[0], "--model", stories, "--task", task, "--ends", ends)
        words += ("--data", held, "--columns", "text=sentence,label=label", "--device", "cpu", "--json")
        assert main([str(word) for word in ("eval", *words)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole = AutoModelForSequenceClassification.from_pretrained(stories, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tensors, _, _ = load_checkpoint(kept_directory(ends))
    assert not whole.load_state_dict(tensors, strict=False).unexpected_keys
    assert "score.weight" in tensors
    right, losses = [], []
    with torch.no_grad():
        for row in load_examples(held, columns=columns).rows:
            ids = torch.tensor([tokenizer(row["text"]).input_ids])
            out = whole(ids, labels=torch.tensor([int(row["label"])]))
            right.append(int(out.logits.argmax()) == int(row["label"]))
            losses.append(float(out.loss))
    assert 0 < report["accuracy"] < 1
    assert report["accuracy"] == pytest.approx(sum(right) / len(right))
    assert report["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 0 < report["f1_macro"] < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to evaluate on"),
        (("--data", "nowhere.txt"), "no such file"),
        (("--tasks", "cb", "--task", "sequence-classification"), "a classifier writes no text"),
        (("--tasks", "cb", "--limit", "0"), "--limit must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said, capsys):
    assert main(["eval", "--trunk", "splitfl://x", "--identity", "none", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_group_of_one_s_own_may_have_the_harness_s_tasks(both, tmp_path, monkeypatch):
    """Here the harness's own are one, in a directory of its own."""
    import lm_eval.tasks.manager

    split, _, tokenizer = both
    monkeypatch.chdir(Path(__file__).parents[2])
    harness, own = tmp_path / "harness", tmp_path / "own"
    for directory in (harness, own):
        directory.mkdir()
        shutil.copy(TASKS / "scoring.py", directory)
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(harness / "manager.py"))
    (harness / "theirs.yaml").write_text((TASKS / "copa.yaml").read_text().replace("task: splitfl_copa", "task: theirs"))
    (own / "mine.yaml").write_text((TASKS / "cb.yaml").read_text().replace("task: splitfl_cb", "task: mine"))
    (own / "all.yaml").write_text("group: all_of_them\ntask:\n  - theirs\n  - mine\n")
    found = harness_scores(split, tokenizer, ["all_of_them"], batch_size=8, include=own, limit=4)
    assert {"theirs", "mine"} <= set(found)


@pytest.mark.slow  # it looks through all that comes with the harness
def test_a_task_that_nobody_knows_is_one_sentence(both):
    with pytest.raises(ConfigError, match="no task 'nothing'"):
        harness_scores(both[0], both[2], ["nothing"], batch_size=1, include=TASKS)
