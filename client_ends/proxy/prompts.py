"""A request in tokens: texts by the tokenizer, chats by its template, held against what the model has room for."""

from __future__ import annotations

from typing import Any

from client_ends.data.chat import asked_ids
from client_ends.proxy.drawing import with_defaults
from client_ends.proxy.problems import ApiError
from client_ends.proxy.requests import Request
from client_ends.proxy.writing import Order
from splitfl.errors import ConfigError

__all__ = ["Prompts"]

#: The longest answer where neither the request nor the model's config says how long it may be.
_UNBOUNDED = 4096


class Prompts:
    """``longest``: tokens of a prompt with its answer; ``room``: of all of a request's in the trunk. None: any number."""

    def __init__(self, tokenizer: Any, config: Any, generation_config: Any, *, longest: int | None, room: int | None) -> None:
        self._tokenizer, self._generation_config = tokenizer, generation_config
        self._vocabulary: int = config.get_text_config().vocab_size
        self._longest, self._room = longest, room

    def order(self, request: Request) -> Order:
        """Raises ApiError."""
        param = "messages" if request.is_chat else "prompt"
        if request.is_chat:
            prompts: tuple[tuple[int, ...], ...] = (self._chat(request),)
        else:
            prompts = tuple(self._ids(prompt) for prompt in request.prompts)
        if not all(prompts):
            raise ApiError(400, f"{param} has no token: there is nothing to go on from", param=param)
        for token in request.sampling.logit_bias:
            if token >= self._vocabulary:
                raise ApiError(400, f"logit_bias: the model has {self._vocabulary} tokens, none {token}", param="logit_bias")
        max_tokens = self._max_tokens(request, prompts, param)
        return Order(request, prompts, max_tokens, with_defaults(request.sampling, self._generation_config))

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer(prompt).input_ids)
        for token in prompt:
            if not 0 <= token < self._vocabulary:
                raise ApiError(400, f"prompt: the model has {self._vocabulary} tokens, none {token}", param="prompt")
        return prompt

    def _chat(self, request: Request) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                "this model's tokenizer has no chat template: ask /v1/completions, or start the proxy with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        try:
            return tuple(asked_ids(self._tokenizer, request.messages))
        except ConfigError as error:
            raise ApiError(400, str(error), param="messages") from None

    def _max_tokens(self, request: Request, prompts: tuple[tuple[int, ...], ...], param: str) -> int:
        """How long each answer may become. Raises ApiError where prompt and answer are too long."""
        longest, rows = max(map(len, prompts)), len(prompts) * request.n
        wanted, least = request.max_tokens, request.n * sum(map(len, prompts))
        if wanted is None:
            left = [_UNBOUNDED]
            if self._longest is not None:
                left = [self._longest - longest]
            if self._room is not None:
                left.append((self._room - least) // rows)
            wanted = max(1, min(left))
        if self._longest is not None and longest + wanted > self._longest:
            raise ApiError(
                400,
                f"this model's context is {self._longest} tokens, but the prompt has {longest} and the answer may have {wanted}: "
                "shorten either",
                param=param,
                code="context_length_exceeded",
            )
        if self._room is not None and least + rows * wanted > self._room:
            raise ApiError(
                400,
                f"the trunk has room for {self._room} tokens of this client, not for {least + rows * wanted}: "
                "ask for fewer or shorter ones, or have the operator raise client_cache_tokens",
                param=param,
                code="context_length_exceeded",
            )
        return wanted
