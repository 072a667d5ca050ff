"""``splitfl proxy`` as OpenAI's own client sees it, held against the whole model."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from tests.proxy_world import PROMPT, Served, expected, proxying, splitting, whole, written
from tests.world import World

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tokenizer(stories: str) -> Any:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def joined(stories: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with splitting(stories, tmp_path_factory.mktemp("run")) as found:
        yield found


@pytest.fixture(scope="module")
def world(joined: tuple[World, Any]) -> World:
    return joined[0]


@pytest.fixture(scope="module")
def split(joined: tuple[World, Any]) -> Any:
    return joined[1]


@pytest.fixture(scope="module")
def served(split: Any, tokenizer: Any) -> Any:
    with proxying(split, tokenizer) as served:
        yield served


def test_a_greedy_completion_is_the_whole_model_s(served: Served, stories: str, tokenizer: Any) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").owned_by == "splitfl"
    answer = client.completions.create(model="stories", prompt=PROMPT, max_tokens=60, temperature=0)
    text = expected(stories, PROMPT, 60)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    prompt = len(tokenizer(PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, 60, prompt + 60)
    chunks = list(
        client.completions.create(
            model="stories", prompt=PROMPT, max_tokens=60, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert len(chunks) > 30
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:] if chunk.choices] == ["length"]
    assert chunks[-1].usage == answer.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_of_unequal_length_and_several_choices_are_one_batch(
    served: Served, world: World, stories: str, tokenizer: Any
) -> None:
    prompts = ["The", "One day, Lily and Tom went to the big park with their mom and", PROMPT]
    before = world.server.meter.snapshot()["forwards"]
    answer = served.client().completions.create(model="stories", prompt=prompts, max_tokens=20, temperature=0, n=2)
    assert world.server.meter.snapshot()["forwards"] - before == 21  # the prompts, but for their last tokens, went ahead, once
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [expected(stories, prompt, 20) for prompt in prompts for _ in range(2)]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    by_ids = served.client().completions.create(model="stories", prompt=ids, max_tokens=20, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in answer.choices[::2]]


def test_the_end_of_a_story_is_an_end(served: Served, stories: str, tokenizer: Any) -> None:
    """At the token that ends a text, which is no part of it; the others of its batch go on."""
    ids = torch.tensor([tokenizer("The").input_ids])
    story = whole(stories).generate(ids, max_new_tokens=300, do_sample=False)[0].tolist()
    assert story[-1] in whole(stories).generation_config.eos_token_id
    prompts = [story[:-12], story[:-40]]
    answer = served.client().completions.create(model="stories", prompt=prompts, max_tokens=30, temperature=0, logprobs=0)
    assert answer.usage.completion_tokens == 12 + 30
    ended, other = answer.choices
    assert (ended.finish_reason, other.finish_reason) == ("stop", "length")
    begun = tokenizer.decode(story[:-12], skip_special_tokens=True)
    assert begun + ended.text == tokenizer.decode(story, skip_special_tokens=True)
    assert len(ended.logprobs.tokens) == 12
    assert other.text.startswith(tokenizer.decode(story[-40:-12], skip_special_tokens=True).strip())


@pytest.mark.parametrize("stop", [" little girl", "girl", ["nothing at all", "re was a", "girl"], "l", "."])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_is_found_across_tokens_and_not_given_out(
    served: Served, stories: str, tokenizer: Any, stop: Any, stream: bool
) -> None:
    text = expected(stories, PROMPT, 60)
    stops = [stop] if isinstance(stop, str) else stop
    first = min(text.find(each) for each in stops if each in text)
    answer = served.client().completions.create(
        model="stories", prompt=PROMPT, max_tokens=60, temperature=0, stop=stop, stream=stream
    )
    pieces = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(piece.text for piece in pieces) == text[:first]
    assert pieces[-1].finish_reason == "stop"


def test_a_seed_draws_the_same_whatever_else_is_drawn(served: Served) -> None:
    def draw(seed: int | None, **more: Any) -> list[str]:
        options = {"model": "stories", "prompt": PROMPT, "max_tokens": 8, "seed": seed} | more
        return [choice.text for choice in served.client().completions.create(**options).choices]

    alone = draw(5, n=3)
    assert len(set(alone)) > 1
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(draw, seed, n=3) for seed in (5, 6, None)]
        beside = [future.result() for future in waiting]
    assert beside[0] == alone
    assert beside[1] != alone
    assert beside[2] != alone
    assert draw(5, n=1) == alone[:1]
    assert draw(5, prompt=["Lily", PROMPT]) == draw(5, prompt="Lily") + alone[:1]
    assert draw(7, top_p=1e-6) == draw(8, extra_body={"top_k": 1}) == draw(9, temperature=0)


def test_log_probabilities_are_the_whole_model_s(served: Served, stories: str, tokenizer: Any) -> None:
    prompts = ["The", "One day, Lily and Tom went to the park"]
    answer = served.client().completions.create(
        model="stories", prompt=prompts, max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        found = whole(stories).generate(ids, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            logprobs = whole(stories)(found).logits[0, :-1].log_softmax(-1)
        mine, told = choice.logprobs, logprobs.gather(1, found[0, 1:, None])[:, 0].tolist()
        assert mine.token_logprobs[0] is None
        assert mine.top_logprobs[0] is None
        assert mine.token_logprobs[1:] == pytest.approx(told, abs=1e-5)
        for own, best in zip(mine.top_logprobs[1:], logprobs.topk(3).values.tolist(), strict=True):
            assert max(own.values()) == pytest.approx(best[0], abs=1e-5)
            assert len(own) <= 4
        assert choice.text == prompt + expected(stories, prompt, 4)
        assert "".join(mine.tokens).removeprefix("<s>").strip() == choice.text
        assert all(
            here + len(token) == after
            for here, token, after in zip(mine.text_offset, mine.tokens, mine.text_offset[1:], strict=False)
        )
    scored = served.client().completions.create(model="stories", prompt=prompts[1], max_tokens=0, logprobs=0, echo=True)
    length = len(tokenizer(prompts[1]).input_ids)
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(answer.choices[1].logprobs.token_logprobs[1:length])
    assert scored.choices[0].text == prompts[1]
    assert scored.usage.completion_tokens == 0


def test_penalties_and_biases_are_honoured(served: Served, stories: str, tokenizer: Any) -> None:
    client, options = served.client(), {"model": "stories", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    plain = client.completions.create(**options).choices[0].text
    comma = tokenizer(",", add_special_tokens=False).input_ids[-1]
    assert "," in plain
    assert "," not in client.completions.create(**options, logit_bias={str(comma): -100}).choices[0].text
    for name in ("presence_penalty", "frequency_penalty"):
        assert client.completions.create(**options, **{name: 2}).choices[0].text != plain
    repeated = client.completions.create(**options, extra_body={"repetition_penalty": 1.3}).choices[0].text
    assert repeated == expected(stories, PROMPT, 40, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def chatting(split: Any, stories: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    with proxying(split, tokenizer, lookup=4) as served:
        yield served, tokenizer


def test_a_chat_goes_by_the_template(chatting: Any, stories: str) -> None:
    served, tokenizer = chatting
    client = served.client()
    messages = [
        {"role": "developer", "content": "Tell stories."},
        {"role": "user", "content": [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]},
    ]
    text = "system: Tell stories.\nuser: Once upon a time\nassistant:"
    options = {"model": "stories", "messages": messages, "max_completion_tokens": 30, "temperature": 0}
    wanted = expected(stories, text, 30, special=False)
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", wanted, "length")
    assert "".join(token.token for token in choice.logprobs.content) == wanted
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in choice.logprobs.content)
    assert answer.usage.prompt_tokens == len(tokenizer(text, add_special_tokens=False).input_ids)
    chunks = list(client.chat.completions.create(**options, stream=True, n=2))
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == wanted
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
    stop = wanted[len(wanted) // 2 :][:3]
    until = client.chat.completions.create(**options, stop=[stop]).choices[0]
    assert (until.message.content, until.finish_reason) == (wanted[: wanted.index(stop)], "stop")


def test_what_the_template_refuses_is_a_sentence_of_its_own(split: Any, stories: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate\nor not') }}"
    with proxying(split, tokenizer) as served:
        status, answer = served.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert answer["error"]["message"] == "the chat template refuses these messages (Roles must alternate)"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": PROMPT, "model": "gpt-4"}, 404, "no model 'gpt-4'"),
        ({"model": "stories"}, 400, "prompt must be"),
        ({"prompt": []}, 400, "prompt must be"),
        ({"prompt": [1, 100000]}, 400, "none 100000"),
        ({"prompt": PROMPT, "max_tokens": -1}, 400, "max_tokens must be"),
        ({"prompt": PROMPT, "max_tokens": 5000}, 400, "context is"),
        ({"prompt": PROMPT, "temperature": "hot"}, 400, "temperature must be"),
        ({"prompt": PROMPT, "best_of": 3}, 400, "best_of"),
        ({"prompt": PROMPT, "suffix": "end"}, 400, "suffix"),
        ({"prompt": PROMPT, "guided_json": {}}, 400, "guided_json is not supported"),
        ({"prompt": PROMPT, "stop": ""}, 400, "stop must be"),
        ({"prompt": PROMPT, "stream_options": {"include_usage": True}}, 400, "goes with stream"),
        ({"prompt": "half \ud83d"}, 400, "surrogate"),
        ({"prompt": PROMPT, "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, body: dict[str, Any], status: int, says: str) -> None:
    found, answer = served.ask("POST", "/v1/completions", body)
    assert found == status
    assert says in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_the_door(served: Served, split: Any, tokenizer: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    assert served.ask("POST", "/v1/embeddings", body)[0] == 404
    assert served.ask("GET", "/v1/completions")[0] == 405
    # A browser asks whether a page of another site may: nobody says so.
    asked = requests.options(f"{served.url}/completions", headers={"Origin": "http://evil.example"}, timeout=60)
    assert asked.status_code == 405
    assert not any(name.lower().startswith("access-control") for name in asked.headers)
    assert served.ask("GET", "/health") == (200, {"status": "ok"})
    assert served.ask("POST", "/v1/completions", b"{")[1]["error"]["code"] == "invalid_json"
    assert served.ask("POST", "/v1/completions", b"[" * 100_000)[0] == 400
    assert served.ask("POST", "/v1/completions", b'{"prompt": NaN}')[0] == 400
    assert served.ask("POST", "/v1/completions", b" " * (17 << 20))[0] == 413
    assert served.ask("POST", "/v1/completions", body, Content_Type="text/plain")[0] == 415
    for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "[::1", ""):
        assert served.ask("POST", "/v1/completions", body, Host=host)[0] == 403
        assert served.ask("GET", "/health", Host=host)[0] == 403
    for host in ("localhost:8080", "127.0.0.1", "[::1]:80"):
        assert served.ask("POST", "/v1/completions", body, Host=host)[0] == 200
    status, answer = served.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert (status, answer["error"]["code"]) == (400, "no_chat_template")
    assert "--chat-template" in answer["error"]["message"]
    with proxying(split, tokenizer, key="sesame") as keyed:
        assert keyed.ask("GET", "/health")[0] == 200
        assert keyed.ask("GET", "/v1/models")[0] == 401
        assert keyed.ask("GET", "/v1/models", Authorization="Bearer sesam")[0] == 401
        assert keyed.ask("POST", "/v1/completions", body, Authorization="sesame")[0] == 401
        with pytest.raises(openai.AuthenticationError):
            keyed.client("open").models.list()
        assert keyed.client("sesame").completions.create(model="stories", prompt=PROMPT, max_tokens=1).choices


def test_a_trunk_that_keeps_no_caches(stories: str, tokenizer: Any, tmp_path: Path) -> None:
    with splitting(stories, tmp_path, cache_tokens=0) as (_, split), proxying(split, tokenizer, lookup=4) as served:
        answer = served.client().completions.create(
            model="stories", prompt=["The", PROMPT], max_tokens=5, temperature=0, echo=True, logprobs=1, n=2
        )
        assert [choice.text for choice in answer.choices] == [
            prompt + expected(stories, prompt, 5) for prompt in ("The", "The", PROMPT, PROMPT)
        ]


def test_ends_with_an_adapter(stories: str, tokenizer: Any, tmp_path: Path) -> None:
    """As ``--ends`` puts it there. Its values are drawn, so that it changes what is written."""
    with splitting(stories, tmp_path) as (_, split):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        adapted = get_peft_model(split, config).eval()
        text = written(adapted, tokenizer, PROMPT, 12)
        assert text != expected(stories, PROMPT, 12)
        with proxying(adapted, tokenizer) as served:
            answer = served.client().completions.create(model="stories", prompt=PROMPT, max_tokens=12, temperature=0)
            assert answer.choices[0].text == text
