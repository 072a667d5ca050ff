"""What a request asks for: OpenAI's JSON, each field checked, and honoured or refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from client_ends.proxy.fields import Fields
from client_ends.proxy.problems import ApiError

__all__ = ["MOST_CHOICES", "Request", "Sampling", "chat_request", "completion_request"]

#: Choices of one request, over all its prompts: one batch. Each is a sequence of the trunk's, which keeps 8192 of a session.
MOST_CHOICES = 128

_MOST_TOKENS = 2**24
_TOP = 20  # most alternatives to a token that are told
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. None: not said, so as the model's own ``generation_config`` has it, else as OpenAI has it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request for completions of ``prompts`` (texts, or token ids), or of a chat's ``messages``.

    ``logprobs``: how many alternatives to each token are told with their log-probabilities; None: none of it.
    """

    model: str | None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


def completion_request(body: dict[str, Any]) -> Request:
    """``POST /v1/completions``. Raises ApiError."""
    fields = Fields(body)
    prompts = _prompts(fields.take("prompt"))
    max_tokens = fields.whole("max_tokens", 0, _MOST_TOKENS, 16)
    logprobs = fields.whole("logprobs", 0, _TOP)
    echo = fields.flag("echo")
    fields.only("suffix", "", why="text cannot be put in before a suffix here: leave it out")
    common = _common(fields)
    fields.only("best_of", common["n"], why="the choices are not ranked here: leave it out, or say as many as n")
    fields.end()
    if len(prompts) * common["n"] > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts of n = {common['n']} are more than {MOST_CHOICES} choices", param="prompt")
    return Request(prompts=prompts, max_tokens=max_tokens, logprobs=logprobs, echo=echo, **common)


def chat_request(body: dict[str, Any]) -> Request:
    """``POST /v1/chat/completions``. Raises ApiError."""
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    old, new = (fields.whole(name, 0, _MOST_TOKENS) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise ApiError(400, "max_tokens and max_completion_tokens say different things: leave one out", param="max_tokens")
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, _TOP)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    for name in ("tools", "functions"):
        fields.only(name, [], why="this endpoint calls no tools: leave it out")
    for name in ("tool_choice", "function_call"):
        fields.only(name, "none", "auto", why="this endpoint calls no tools: leave it out")
    fields.only("parallel_tool_calls", True, False, why="must be true or false")
    fields.only("response_format", {"type": "text"}, why="answers are plain text here: leave it out")
    fields.only("modalities", ["text"], why="answers are plain text here: leave it out")
    common = _common(fields)
    fields.end()
    return Request(
        messages=messages,
        max_tokens=old if new is None else new,
        logprobs=(top or 0) if wanted else None,
        **common,
    )


def _common(fields: Fields) -> dict[str, Any]:
    """What both kinds of request may say."""
    model = fields.take("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, "model must be a string", param="model")
    # Of these no answer depends.
    for name in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
        fields.take(name)
    fields.only("store", False, why="nothing is stored here: leave it out")
    fields.only("service_tier", "auto", "default", why="there is one tier: leave it out")
    stream = fields.flag("stream")
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1),
        top_k=fields.whole("top_k", -1, _MOST_TOKENS),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=_biases(fields.take("logit_bias", {})),
        seed=fields.whole("seed", -(2**63), 2**64 - 1),
    )
    return {
        "model": model,
        "n": fields.whole("n", 1, MOST_CHOICES, 1),
        "stop": _stops(fields.take("stop", [])),
        "stream": stream,
        "include_usage": _include_usage(fields.take("stream_options"), stream),
        "sampling": sampling,
    }


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options goes with stream: true", param="stream_options")
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    fields = Fields(options)
    wanted = fields.flag("include_usage")
    fields.flag("include_obfuscation")  # against who measures chunks on the way; here they do not leave the machine
    fields.end()
    return wanted


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, token ids, or lists of token ids."""
    listed = [given] if isinstance(given, str) or _is_ids(given) else given
    if isinstance(listed, list) and listed and all(isinstance(each, str) or _is_ids(each) for each in listed):
        return tuple(_text(each, "prompt") if isinstance(each, str) else tuple(each) for each in listed)
    raise ApiError(400, "prompt must be a text, token ids, or a list of either", param="prompt")


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(each) is int for each in given)


def _text(text: str, param: str) -> str:
    """Raises ApiError where it holds half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} holds half of a surrogate pair, which is no text", param=param) from None
    return text


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > 64 or not all(isinstance(each, str) and each for each in stops):
        raise ApiError(400, "stop must be a text, or up to 64 of them, none of them empty", param="stop")
    return tuple(_text(each, "stop") for each in stops)


def _biases(given: Any) -> dict[int, float]:
    try:
        biases = {int(token): float(bias) for token, bias in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        biases = {-1: 0.0}
    if not all(token >= 0 and -100 <= bias <= 100 for token, bias in biases.items()):
        raise ApiError(400, "logit_bias must give token ids numbers from -100 to 100", param="logit_bias")
    return biases


def _messages(given: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list that is not empty", param="messages")
    return tuple(_message(each, f"messages[{place}]") for place, each in enumerate(given))


def _message(given: Any, place: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise ApiError(400, f"{place} must be an object", param=place)
    fields = Fields(given)
    role = fields.take("role")
    role = "system" if role == "developer" else role  # as templates know it
    if role not in _ROLES:
        raise ApiError(400, f"{place}.role must be one of {', '.join(_ROLES)}, developer", param=f"{place}.role")
    found = {"role": role, "content": _content(fields.take("content"), f"{place}.content")}
    name = fields.take("name")
    if name is not None:
        if not isinstance(name, str):
            raise ApiError(400, f"{place}.name must be a string", param=f"{place}.name")
        found["name"] = _text(name, f"{place}.name")  # the template says what becomes of it
    fields.only("tool_calls", [], why="this endpoint calls no tools: leave it out")
    fields.end()
    return found


def _content(given: Any, place: str) -> str:
    """A text, or parts of one."""
    parts = [{"type": "text", "text": given}] if isinstance(given, str) else given
    if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
        if any(part.get("type") != "text" for part in parts):
            raise ApiError(400, f"{place}: only text can be answered", param=place)
        if all(isinstance(part.get("text"), str) for part in parts):
            return _text("".join(part["text"] for part in parts), place)
    raise ApiError(400, f"{place} must be a text, or a list of parts of type text", param=place)
