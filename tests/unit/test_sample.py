import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfl.errors import CheckpointError, ConfigError, DataError
from splitfl.sample import build_sample_model, sample_text, write_sample_shards

TEXTS = ["plain words", "  two  spaces , and ' quotes'", "line\nends\r\n\ttabs", "é ß 漢字 🦙 \u202e", "", "</b> <b>"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "model"
    build_sample_model(path, seed=3, hidden=32, blocks=2)
    return path


def test_any_text_comes_back_from_the_tokenizer(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, "".join(map(chr, range(1, 0x2000)))]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 1 + len(text.encode())  # one token a byte behind the BOS
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [2]


def test_the_model_loads_and_its_vocabulary_covers_the_tokenizer(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) <= model.config.vocab_size == 260
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    loss = model(**tokenizer(["some text"], return_tensors="pt"), labels=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])).loss
    assert 5 < loss.item() < 6.5  # about log 260: it knows nothing yet


def test_the_seed_decides_the_weights_and_nothing_else_changes(directory, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_sample_model(tmp_path / "again", seed=3, hidden=32, blocks=2)
    build_sample_model(tmp_path / "other", seed=4, hidden=32, blocks=2)
    assert torch.equal(torch.rand(3), expected)
    first = (directory / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != first


def test_refusals(directory):
    with pytest.raises(CheckpointError, match="exists already"):
        build_sample_model(directory, seed=0)
    with pytest.raises(ConfigError, match="multiple"):
        build_sample_model(directory, seed=0, hidden=30, overwrite=True)
    with pytest.raises(DataError, match="not 0"):
        write_sample_shards(directory, clients=0)
    with pytest.raises(DataError, match="too short"):
        write_sample_shards(directory, clients=50, characters=100)


def test_the_text_is_english_and_long_enough():
    text = sample_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 2000
    assert "\x00" not in text
    assert "=====" not in text


@pytest.mark.parametrize("clients", [1, 3, 8])
def test_shards_are_unequal_and_make_up_the_text(tmp_path, clients):
    files = write_sample_shards(tmp_path, clients)
    contents = [file.read_bytes().decode() for file in files]
    assert "".join(contents) == sample_text()
    sizes = [len(content) for content in contents]
    assert sizes == sorted(set(sizes))
    assert all(content.endswith("\n") for content in contents)
