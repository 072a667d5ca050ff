import json
from pathlib import Path

import pytest

from client_ends.data import load_examples, tokenize
from splitfl.errors import ConfigError, DataError
from splitfl.sample.model import byte_tokenizer

BOS, EOS = 1, 2
IGNORE = -100


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def said(tokenizer, row):
    """What the targets of a row say."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORE])


def examples_of(tmp_path, *rows, columns=None):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(path, columns=columns)


def test_running_text_is_cut_into_blocks_that_make_it_up(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n" * 5)
    dataset = tokenize(load_examples(path), tokenizer, max_length=16, task="causal-lm")
    assert [len(row["input_ids"]) for row in dataset] == [16, 16, 16, 8]
    joined = [token for row in dataset for token in row["input_ids"]]
    assert joined == [BOS, *ids(tokenizer, "0123456789\n" * 5)]
    assert all(row["labels"] == row["input_ids"] for row in dataset)
    assert dataset.truncated == 0


def test_blocks_run_on_across_pieces(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n" * 5)
    whole = tokenize(load_examples(path), tokenizer, max_length=16, task="causal-lm")
    monkeypatch.setattr("client_ends.data.readers._PIECE", 12)
    pieces = tokenize(load_examples(path), tokenizer, max_length=16, task="causal-lm")
    assert pieces.rows == whole.rows


def test_a_document_ends_with_eos_and_is_cut_when_too_long(tmp_path, tokenizer):
    dataset = tokenize(examples_of(tmp_path, {"text": "abc"}, {"text": "d" * 20}), tokenizer, max_length=10, task="causal-lm")
    assert dataset[0]["input_ids"] == [BOS, *ids(tokenizer, "abc"), EOS]
    assert dataset[1]["input_ids"] == [BOS, *ids(tokenizer, "d" * 9)]
    assert (dataset.truncated, dataset.dropped) == (1, 0)
    assert dataset.report() == "2 rows, 1 truncated"


def test_the_loss_counts_completion_and_eos_only(tmp_path, tokenizer):
    examples = examples_of(
        tmp_path, {"prompt": "2+2=", "completion": "four"}, {"prompt": "x" * 30, "completion": "y"},
        {"prompt": "x" * 16, "completion": "yyyyy"},
    )  # fmt: skip
    dataset = tokenize(examples, tokenizer, max_length=20, task="causal-lm")
    assert dataset[0]["input_ids"] == [BOS, *ids(tokenizer, "2+2=four"), EOS]
    assert dataset[0]["labels"] == [IGNORE] * 5 + [*ids(tokenizer, "four"), EOS]
    assert said(tokenizer, dataset[1]) == "yyy"  # cut behind 20 tokens
    assert (len(dataset), dataset.truncated, dataset.dropped) == (2, 2, 1)
    assert dataset.report() == "2 rows, 2 truncated, 1 dropped for want of a target"


def test_a_separator_belongs_to_the_prompt(tmp_path, tokenizer):
    examples = examples_of(tmp_path, {"prompt": "q", "completion": "a"})
    row = tokenize(examples, tokenizer, max_length=20, task="causal-lm", separator="\n")[0]
    assert row["input_ids"] == [BOS, *ids(tokenizer, "q\na"), EOS]
    assert row["labels"] == [IGNORE] * 3 + [*ids(tokenizer, "a"), EOS]


def test_a_token_across_the_border_is_split_there(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")])), eos_token="</s>"
    )
    assert tokenizer("abc")["input_ids"] == [1, 4]
    examples = examples_of(tmp_path, {"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"})
    dataset = tokenize(examples, tokenizer, max_length=9, task="causal-lm")
    assert dataset[0] == {"input_ids": [1, 2, 3, 0], "labels": [IGNORE, IGNORE, 3, 0]}
    assert dataset[1] == {"input_ids": [1, 4, 0], "labels": [IGNORE, 4, 0]}


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }};{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Qwen3's: what an earlier turn of the assistant looks like depends on whether one follows.
REWRITING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}(thought){% endif %}"
    "{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hé?"},
    {"role": "assistant", "content": "yés"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "no"},
]


def chat_tokenizer(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_the_loss_counts_the_assistants_turns_only(tmp_path, template):
    tokenizer = chat_tokenizer(template)
    silent = TALK[:2]
    dataset = tokenize(
        examples_of(tmp_path, {"messages": TALK}, {"messages": silent}), tokenizer, max_length=200, task="causal-lm"
    )
    whole = "[system]be brief;[user]hé?;[assistant]yés;[user]sure?;[assistant]no;"
    assert dataset[0]["input_ids"] == [BOS, *ids(tokenizer, whole)]
    assert said(tokenizer, dataset[0]) == "yés;no;"
    assert (len(dataset), dataset.dropped) == (1, 1)


def test_a_template_that_rewrites_turns_serves_single_answers_and_refuses_more(tmp_path):
    tokenizer = chat_tokenizer(REWRITING)
    dataset = tokenize(examples_of(tmp_path, {"messages": TALK[:3]}), tokenizer, max_length=200, task="causal-lm")
    assert said(tokenizer, dataset[0]) == "(thought)yés;"
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: the chat template rewrites earlier turns"):
        tokenize(examples_of(tmp_path, {"messages": TALK}), tokenizer, max_length=200, task="causal-lm")


def test_templates_that_are_missing_or_refuse(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        tokenize(examples_of(tmp_path, {"messages": TALK}), tokenizer, max_length=200, task="causal-lm")
    picky = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"line 1: .*roles must alternate"):
        tokenize(examples_of(tmp_path, {"messages": TALK}), picky, max_length=200, task="causal-lm")


@pytest.mark.parametrize(
    ("labels", "given", "numbers", "count", "names"),
    [
        ([0, 2, 1], {}, [0, 2, 1], 3, None),
        (["0", "1", "1"], {}, [0, 1, 1], 2, None),
        (["no", "yes", "no"], {}, [0, 1, 0], 2, ["no", "yes"]),
        (["no", "yes", "no"], {"label_names": ["yes", "no"]}, [1, 0, 1], 2, ["yes", "no"]),
        (["5", "1", "5"], {"label_names": ["1", "5"]}, [1, 0, 1], 2, ["1", "5"]),
        ([1, 0, 1], {"label_names": ["no", "yes"]}, [1, 0, 1], 2, ["no", "yes"]),
        ([0, 0, 0], {}, [0, 0, 0], 2, None),
        ([0, 1, 0], {"num_labels": 4}, [0, 1, 0], 4, None),
    ],
)
def test_labels_are_numbered(tmp_path, tokenizer, labels, given, numbers, count, names):
    examples = examples_of(tmp_path, *({"text": "some text", "label": label} for label in labels))
    dataset = tokenize(examples, tokenizer, max_length=6, task="sequence-classification", **given)
    assert [row["labels"] for row in dataset] == numbers
    assert (dataset.num_labels, dataset.label_names) == (count, names)
    assert dataset[0]["input_ids"] == [BOS, *ids(tokenizer, "some ")]
    assert dataset.truncated == 3


def test_bad_labels_are_named(tmp_path, tokenizer):
    def numbered(*labels, **given):
        examples = examples_of(tmp_path, *({"text": "x", "label": label} for label in labels))
        return tokenize(examples, tokenizer, max_length=6, task="sequence-classification", **given)

    with pytest.raises(DataError, match="line 2: the label 'maybe' is none of no, yes"):
        numbered("no", "maybe", label_names=["no", "yes"])
    with pytest.raises(DataError, match="line 2: the label 3 is not below the number of labels, 2"):
        numbered(0, 3, num_labels=2)
    with pytest.raises(DataError, match="line 2: the label -1"):
        numbered(0, -1)
    with pytest.raises(DataError, match="line 2: the label is a number where others are names"):
        numbered("no", 1)


def test_pairs_are_read_together(tmp_path, tokenizer):
    examples = examples_of(tmp_path, {"text": "ab", "text_pair": "cd", "label": 0})
    dataset = tokenize(examples, tokenizer, max_length=20, task="sequence-classification")
    assert dataset[0]["input_ids"] == [BOS, *ids(tokenizer, "abcd")]


def test_kind_and_task_have_to_fit(tmp_path, tokenizer):
    labelled = examples_of(tmp_path, {"text": "a", "label": 0})
    with pytest.raises(ConfigError, match="sequence-classification"):
        tokenize(labelled, tokenizer, max_length=9, task="causal-lm")
    plain = examples_of(tmp_path, {"text": "a"})
    with pytest.raises(ConfigError, match="needs text and label"):
        tokenize(plain, tokenizer, max_length=9, task="sequence-classification")
    with pytest.raises(ConfigError, match="task is"):
        tokenize(plain, tokenizer, max_length=9, task="regression")
    with pytest.raises(ConfigError, match="at least 2"):
        tokenize(plain, tokenizer, max_length=1, task="causal-lm")
    with pytest.raises(DataError, match="No row"):
        tokenize(examples_of(tmp_path, {"prompt": "p" * 9, "completion": "c"}), tokenizer, max_length=5, task="causal-lm")


# --- Real data. -------------------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the test data is not there: {DATA}")


@pytest.fixture(scope="module")
def stories():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "models" / "stories260K")


@real
def test_gsm8k(stories):
    path = DATA / "text" / "gsm8k" / "test.jsonl"
    examples = load_examples(path, columns={"prompt": "question", "completion": "answer"})
    assert len(examples) == 1319
    dataset = tokenize(examples, stories, max_length=512, task="causal-lm")
    assert len(dataset) + dataset.dropped == 1319
    assert dataset.truncated < 400
    for index in (0, 1, 2, 700):
        row = dataset[index]
        assert len(row["labels"]) == len(row["input_ids"]) <= 512
    first = dataset[0]
    learnt = [label for label in first["labels"] if label != IGNORE]
    assert stories.decode(learnt[:-1]).strip() == examples.rows[0]["completion"]
    assert learnt[-1] == stories.eos_token_id
    prompt = stories(examples.rows[0]["prompt"])["input_ids"]
    assert first["input_ids"][: len(prompt)] == prompt


@real
def test_sst2(stories):
    examples = load_examples(DATA / "text" / "sst2" / "dev.tsv", columns={"text": "sentence", "label": "label"})
    assert len(examples) == 872
    dataset = tokenize(examples, stories, max_length=64, task="sequence-classification")
    assert (len(dataset), dataset.num_labels) == (872, 2)
    assert sum(row["labels"] for row in dataset) == 444
    train = load_examples(DATA / "text" / "sst2" / "train.tsv", columns={"text": "sentence", "label": "label"})
    assert len(train) == 67349


@real
def test_cb(stories):
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    examples = load_examples(DATA / "text" / "cb" / "train.jsonl", columns=columns)
    dataset = tokenize(examples, stories, max_length=512, task="sequence-classification")
    assert len(dataset) == 250
    assert dataset.label_names == ["contradiction", "entailment", "neutral"]


@real
def test_tinyshakespeare(stories):
    path = DATA / "text" / "tinyshakespeare" / "input.txt"
    dataset = tokenize(load_examples(path), stories, max_length=512, task="causal-lm")
    assert {len(row["input_ids"]) for row in dataset.rows[:-1]} == {512}
    assert dataset[0]["input_ids"][0] == stories.bos_token_id
    text = stories.decode([token for row in dataset for token in row["input_ids"]], skip_special_tokens=True)
    assert text.strip() == path.read_text().strip()
