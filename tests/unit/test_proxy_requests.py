"""What a body may say: it is taken as it is meant, or refused by name; nothing else comes out, whatever stands in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_ends.proxy.fields import read_body
from client_ends.proxy.problems import ApiError
from client_ends.proxy.requests import MOST_CHOICES, chat_request, completion_request

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text("a1é \ud83d", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("type", "text", "1", "include_usage")), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = (
    *("prompt", "messages", "model", "max_tokens", "max_completion_tokens", "n", "best_of", "stop", "stream", "stream_options"),
    *("echo", "logprobs", "top_logprobs", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "suffix", "tools"),
    *(
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "user",
        "store",
        "response_format",
        "modalities",
        "anything",
    ),
)
_MESSAGE = st.dictionaries(st.sampled_from(("role", "content", "name", "tool_calls", "x")), _VALUES | st.just("user"), max_size=4)


@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=6), st.booleans(), st.lists(_MESSAGE, max_size=2))
def test_whatever_stands_in_a_field_it_is_taken_or_refused(body: dict[str, Any], plain: bool, messages: list[Any]) -> None:
    for read, least in ((completion_request, {"prompt": "x"}), (chat_request, {"messages": messages})):
        whole = json.loads(json.dumps({**body, **least} if plain else body))
        refused: ApiError | None = None
        try:
            request = read(read_body(json.dumps(whole).encode()))
        except ApiError as error:
            refused = error
        if refused is not None:
            assert refused.status == 400
            json.dumps(refused.body).encode()
            continue
        assert "anything" not in {name for name, value in whole.items() if value is not None}
        assert 1 <= request.n <= 128
        assert all(isinstance(prompt, str | tuple) for prompt in request.prompts)
        assert all(message["content"].encode() is not None for message in request.messages)


def test_what_is_said_is_what_is_meant() -> None:
    body = {
        "model": "m",
        "prompt": [[1, 2], [3]],
        "max_tokens": 0,
        "n": 2,
        "stop": "end",
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
        "echo": True,
        "logprobs": 0,
        "seed": -1,
        "logit_bias": {"5": -100},
        "user": "somebody",
        "suffix": None,
        "best_of": 2,
    }
    found = completion_request(body)
    assert (found.model, found.prompts, found.max_tokens, found.n) == ("m", ((1, 2), (3,)), 0, 2)
    assert (found.stop, found.stream, found.include_usage, found.echo, found.logprobs) == (("end",), True, True, True, 0)
    assert (found.sampling.seed, found.sampling.logit_bias, found.sampling.temperature) == (-1, {5: -100.0}, None)
    assert completion_request({"prompt": "x"}).max_tokens == 16
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "c"}]
    chat = chat_request(
        {"messages": messages, "logprobs": True, "top_logprobs": 3, "tools": [], "response_format": {"type": "text"}}
    )
    assert chat.messages == ({"role": "system", "content": "a"}, {"role": "user", "content": "b", "name": "c"})
    assert (chat.logprobs, chat.max_tokens) == (3, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ],
)
def test_a_chat_that_cannot_be_answered_names_the_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_request(body)
    assert caught.value.body["error"]["param"] == param
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_more_choices_than_one_batch_may_have() -> None:
    with pytest.raises(ApiError, match="choices"):
        completion_request({"prompt": ["x"] * 3, "n": MOST_CHOICES // 2})
