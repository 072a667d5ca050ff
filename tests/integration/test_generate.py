"""``generate()`` of a split model against the whole model's: the same tokens, in every way of generating."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from client_ends import SplitModelForCausalLM, SplitModelForSequenceClassification
from splitfl.errors import ModelError, UserError
from tests.divergences import parted
from tests.families import FAMILIES, VOCABULARY, Family, save_family
from tests.world import World, running, side_by_side

NAMES = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "gpt-neox", "glm", "gpt-oss")
FAST = (("llama", "greedy", 200), ("gemma3", "beam", 40), ("gemma3", "sample", 40))
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 4},
    "sample": {"do_sample": True, "top_k": 20},
}
WINDOW = 16

#: What llama2.c's own test expects of these weights without a prompt, at temperature 0.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red "
    "ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and "
    "didn't know what to do. She said, \"I want to play with your ball, but I can't find it.\"\nLily was sad and didn't know "
    "what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to help her mom, so she"
)


def long(family: Family) -> Any:
    """The family's config with room for long answers, and a window that they outgrow."""
    config = family.config()
    setattr(config, "n_positions" if family.name == "gpt2" else "max_position_embeddings", 512)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    return config


@functools.cache
def family(name: str) -> Family:
    found = next(family for family in FAMILIES if family.name == name)
    return dataclasses.replace(found, config=functools.partial(long, found))


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def path(name: str) -> str:
        if name not in made:
            made[name] = str(save_family(family(name), tmp_path_factory.mktemp(name)))
        return made[name]

    return path


@functools.cache
def whole_of(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def prompts() -> dict[str, torch.Tensor]:
    """Three rows of unequal length, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :19] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def check(split: Any, whole: Any, inputs: dict[str, torch.Tensor], tokens: int, **options: Any) -> None:
    options |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    outputs = []
    for model in (whole, split):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **options))
    if options.get("num_beams", 1) > 1:
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    else:
        assert parted(*outputs, what=os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]) <= 1
    assert outputs[0].sequences.shape[1] == inputs["input_ids"].shape[1] + tokens


def cases() -> list[Any]:
    found = [pytest.param(*case, id="-".join(map(str, case))) for case in FAST]
    for name in NAMES:
        found += [pytest.param(name, way, 200, id=f"{name}-{way}-200", marks=pytest.mark.slow) for way in WAYS]
    return found[: len(FAST)] + [case for case in found[len(FAST) :] if case.values not in FAST]


@pytest.mark.parametrize(("name", "way", "tokens"), cases())
def test_the_whole_models_tokens(name: str, way: str, tokens: int, path_of: Any, tmp_path: Path) -> None:
    with running(World(tmp_path, path_of(name), 1)) as world:
        assert not world.events("no-caches")
        split = world.join_as(0).eval()
        check(split, whole_of(path_of(name)), prompts(), tokens, **WAYS[way])
        split.close()


@pytest.mark.parametrize("cut", ["0:1", "2:0", "0:0"])
def test_cuts_at_the_very_ends(cut: str, path_of: Any, tmp_path: Path) -> None:
    """Where the client holds no first block, or none at all, what is cached is counted without one."""
    with running(World(tmp_path, path_of("gemma3"), 1, cut=cut)) as world:
        split = world.join_as(0).eval()
        check(split, whole_of(path_of("gemma3")), prompts(), 24, **WAYS["beam"])
        split.close()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="NOT TESTED: torch has no MKL here")
@pytest.mark.parametrize("trainables", ["none", "full"])
def test_what_is_frozen_is_laid_out_on_both_sides(trainables: str, path_of: Any, tmp_path: Path) -> None:
    def by_columns(model: Any) -> set[bool]:
        """Of the blocks; the head of this family is its embedding too."""
        blocks = model.get_submodule("model.layers").modules()
        return {module.weight.stride(0) == 1 for module in blocks if isinstance(module, torch.nn.Linear)}

    with running(World(tmp_path, path_of("llama"), 1, trainables=trainables)) as world:
        assert by_columns(world.server._model) == {trainables == "none"}
        split = world.join_as(0).eval()
        split.generate(**one_row(), max_new_tokens=2)
        assert by_columns(split) == {False}, "of what may be trained yet"
        split.requires_grad_(False)
        check(split, whole_of(path_of("llama")), prompts(), 24)
        assert by_columns(split) == {True}
        split.close()


def test_the_known_story(stories: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with running(World(tmp_path, stories, 1)) as world:
        split = world.join_as(0).eval()
        found = split.generate(torch.tensor([[1]]), max_new_tokens=210, do_sample=False)
        split.close()
    text = tokenizer.decode(found[0], skip_special_tokens=True).strip()
    assert text.startswith(STORY)


@pytest.fixture(scope="module")
def llama(path_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of a Llama, a client's model in it, and the whole model."""
    with running(World(tmp_path_factory.mktemp("llama-run"), path_of("llama"), 1)) as world:
        split = world.join_as(0).eval()
        yield world, split, whole_of(path_of("llama"))
        split.close()


def one_row() -> dict[str, torch.Tensor]:
    return {"input_ids": prompts()["input_ids"][:1]}


def test_speculation_is_taken_back_on_both_sides(llama: Any) -> None:
    """Prompt lookup proposes tokens of which some are refused: the trunk's cache is cropped with the client's."""
    world, split, whole = llama
    ids = one_row()["input_ids"].repeat(1, 3)
    options = {"max_new_tokens": 60, "do_sample": False, "prompt_lookup_num_tokens": 6}
    before = world.server.meter.snapshot()["forwards"]
    assert torch.equal(split.generate(ids, **options), whole.generate(ids, **options))
    assert world.server.meter.snapshot()["forwards"] - before < 60
    assisted = {"max_new_tokens": 30, "do_sample": False, "assistant_model": whole}
    assert torch.equal(split.generate(ids, **assisted), whole.generate(ids, max_new_tokens=30, do_sample=False))


def test_a_window_is_outgrown_by_speculation(path_of: Any, tmp_path: Path) -> None:
    with running(World(tmp_path, path_of("gemma3"), 1)) as world:
        split, whole = world.join_as(0).eval(), whole_of(path_of("gemma3"))
        ids = one_row()["input_ids"].repeat(1, 2)
        options = {"max_new_tokens": 40, "do_sample": False, "prompt_lookup_num_tokens": 4}
        assert torch.equal(split.generate(ids, **options), whole.generate(ids, **options))
        split.close()


def test_speculation_goes_on_from_a_cache(llama: Any) -> None:
    _, split, whole = llama
    ids, cache = one_row()["input_ids"].repeat(1, 2), split.make_cache()
    for _ in range(2):
        sent = split.trunk.session.bytes_sent
        ids = split.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=4)
        sent = split.trunk.session.bytes_sent - sent
        ids = torch.cat([ids, one_row()["input_ids"][:, :3]], 1)
    assert sent < 2 * 32 * 4 * ids.shape[1], "what the cache had has travelled again"
    assert torch.equal(
        split.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=4),
        whole.generate(ids, max_new_tokens=6, do_sample=False),
    )


def test_prompts_come_in_chunks(llama: Any) -> None:
    _, split, whole = llama
    check(split, whole, prompts(), 20, prefill_chunk_size=6)
    check(split, whole, {"input_ids": prompts()["input_ids"][:1]}, 20, prefill_chunk_size=6)


def test_what_cannot_generate_does_not_look_as_if_it_could() -> None:
    """Transformers warns of a class that has the hooks and no `generate()`."""
    for hook in ("prepare_inputs_for_generation", "_prepare_cache_for_generation", "make_cache"):
        assert hasattr(SplitModelForCausalLM, hook)
        assert hook not in {name for kind in SplitModelForSequenceClassification.__mro__[:-1] for name in vars(kind)}


def test_several_answers_to_one_prompt(llama: Any) -> None:
    _, split, whole = llama
    check(split, whole, one_row(), 20, do_sample=True, num_return_sequences=3)


def test_a_cache_is_gone_on_from(llama: Any) -> None:
    """A conversation: each turn sends only what is new; and a copy of a cache goes its own way."""
    _, split, whole = llama
    ids, cache = one_row()["input_ids"], split.make_cache()
    twin: Any = None
    sent = split.trunk.session.bytes_sent
    for turn in range(3):
        ids = split.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        if turn == 1:
            twin, at = copy.deepcopy(cache), ids
        ids = torch.cat([ids, one_row()["input_ids"][:, turn : turn + 3]], 1)
    sent = split.trunk.session.bytes_sent - sent
    assert sent < 4 * 32 * 4 * ids.shape[1], "a token's hidden state has travelled more than once"
    expected = whole.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(split.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False), expected)
    other = torch.cat([at, ids[:, :5]], 1)
    found = split.generate(other, past_key_values=twin, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, whole.generate(other, max_new_tokens=8, do_sample=False))


def test_text_streams(llama: Any, stories: str) -> None:
    _, split, whole = llama
    tokenizer = AutoTokenizer.from_pretrained(stories)
    streamer = TextIteratorStreamer(tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False}

    def generate() -> Any:
        return split.generate(**one_row(), **options, streamer=streamer)

    def read() -> str:
        return "".join(streamer)

    found, text = side_by_side(2, lambda index: (generate, read)[index]())
    assert torch.equal(found, whole.generate(**one_row(), **options))
    assert text == tokenizer.decode(found[0])


def test_one_hidden_state_a_token_travels(llama: Any) -> None:
    _, split, _ = llama
    session = split.trunk.session
    split.generate(**one_row(), max_new_tokens=1, do_sample=False)
    counts = []
    for tokens in (10, 30):
        before = session.bytes_sent, session.bytes_received
        split.generate(**one_row(), max_new_tokens=tokens, do_sample=False)
        counts.append((session.bytes_sent - before[0], session.bytes_received - before[1]))
    for direction in (0, 1):
        each = (counts[1][direction] - counts[0][direction]) / 20
        assert each < 32 * 4 + 400  # the hidden state, and two records' heads and metadata


def test_without_a_cache_as_ever(llama: Any) -> None:
    _, split, whole = llama
    check(split, whole, prompts(), 5, use_cache=False)


def test_what_a_cache_cannot_hold_is_said(llama: Any) -> None:
    _, split, whole = llama
    ids = one_row()["input_ids"]
    with torch.no_grad():
        with pytest.raises(ModelError, match="padded on its right"):
            split(ids, attention_mask=torch.tensor([[1] * 19 + [0]]), past_key_values=split.make_cache(), use_cache=True)
        positions = torch.tensor([[*range(10), *range(10)]])
        with pytest.raises(ModelError, match="packed into one row"):
            split(ids, position_ids=positions, past_key_values=split.make_cache(), use_cache=True)
        broken, positions = split.make_cache(), torch.arange(20)[None]
        split(ids, position_ids=positions, past_key_values=broken, use_cache=True)
        with pytest.raises(ModelError, match="positions"):
            split(ids, position_ids=positions, past_key_values=broken, use_cache=True)
        with pytest.raises(UserError, match="begin with a new one"):
            split(ids, past_key_values=broken, use_cache=True)
        with pytest.raises(ModelError, match="no part in the trunk"):
            split(ids, past_key_values=whole(ids, use_cache=True).past_key_values, use_cache=True)
    with pytest.raises(ModelError, match="no_grad"):
        split(ids, past_key_values=split.make_cache(), use_cache=True)


def test_a_cache_of_another_kind_is_refused(llama: Any) -> None:
    _, split, _ = llama
    with pytest.raises(ModelError, match="'static' is for a model whose blocks are all here"):
        split.generate(**one_row(), max_new_tokens=2, cache_implementation="static")
    split.generate(**one_row(), max_new_tokens=2, cache_implementation="dynamic")


def test_a_run_that_keeps_none_says_so(path_of: Any, tmp_path: Path) -> None:
    with running(World(tmp_path, path_of("llama"), 1, cache_tokens=0)) as world:
        split = world.join_as(0).eval()
        with pytest.raises(ModelError, match="use_cache=False"):
            split.generate(**one_row(), max_new_tokens=2, use_cache=True)
        for speculation in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": whole_of(path_of("llama"))}):
            with pytest.raises(ModelError, match="leave prompt_lookup_num_tokens and assistant_model out"):
                split.generate(**one_row(), max_new_tokens=2, **speculation)
        check(split, whole_of(path_of("llama")), one_row(), 3)
        split.close()
