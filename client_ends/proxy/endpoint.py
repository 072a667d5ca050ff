"""The HTTP side: routes, error objects, streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from client_ends.proxy.answers import Answer, ChatAnswer, TextAnswer, Usage, model_object
from client_ends.proxy.desk import Desk, log_failure
from client_ends.proxy.door import Door
from client_ends.proxy.fields import read_body
from client_ends.proxy.pieces import Piece
from client_ends.proxy.problems import ApiError
from client_ends.proxy.prompts import Prompts
from client_ends.proxy.requests import Request, chat_request, completion_request
from client_ends.proxy.turns import Turns
from client_ends.proxy.writing import Writer
from splitfl.parts.ends import find_ends

__all__ = ["MOST_BYTES", "Endpoint", "build"]

#: The longest body: of token ids a few million.
MOST_BYTES = 16 * 2**20

#: Seconds after which it is worth asking again.
_RETRY = "5"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build(
    model: Any, tokenizer: Any, *, name: str, door: Door, parallel: int = 8, queue: int = 64, lookup: int = 0
) -> tuple[Endpoint, Desk]:
    """An endpoint to a joined model, in evaluation mode. ``parallel``: requests that are written at a time; ``queue``: that may
    wait; ``lookup``: see :class:`Writer`.
    """
    base: Any = find_ends(model)
    session = model.trunk.session
    room = session.terms["cache_tokens"] or None
    limits = (getattr(base.config.get_text_config(), "max_position_embeddings", None), base.layout.longest)
    # What speculation proposes may reach beyond the end of an answer.
    longest = min((limit - lookup for limit in limits if limit), default=None)
    spare = None if room is None else room - lookup
    prompts = Prompts(tokenizer, base.config, base.generation_config, longest=longest, room=spare)
    writer = Writer(model, tokenizer, keeps_caches=room is not None, lookup=lookup)
    desk = Desk(writer, Turns(parallel, room, queue), session)
    return Endpoint(name, prompts, desk, door), desk


class Endpoint:
    """What answers under ``/v1``. ``name``: the model's, as requests have it."""

    def __init__(self, name: str, prompts: Prompts, desk: Desk, door: Door) -> None:
        self._name, self._prompts, self._desk, self._door = name, prompts, desk, door
        self._created = int(time.time())

    def app(self) -> web.Application:
        @web.middleware
        async def guarded(request: web.Request, handler: _Handler) -> web.StreamResponse:
            return await self._guarded(request, handler)

        app = web.Application(middlewares=[guarded], client_max_size=MOST_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)

        async def close(app: web.Application) -> None:
            self._desk.close()

        app.on_shutdown.append(close)
        return app

    async def _guarded(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Whatever goes wrong before an answer has begun is an error object."""
        try:
            self._door.check_host(request.headers.get("Host"))
            if request.path != "/health":
                self._door.check_key(request.headers.get("Authorization"))
            return await handler(request)
        except ApiError as error:
            return _refusal(error)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(ApiError(413, f"the body is larger than {MOST_BYTES >> 20} MiB", code="request_too_large"))
        except web.HTTPException as error:
            there = "there are /v1/models, /v1/completions, /v1/chat/completions and /health"
            return _refusal(ApiError(error.status, f"{request.method} {request.path[:100]}: {error.reason.lower()}; {there}"))
        except ConnectionError:
            raise  # whoever asked has hung up
        except Exception as error:
            log_failure(error)
            return _refusal(ApiError(500, f"this request could not be answered: {type(error).__name__}", code="internal_error"))

    # --- what is asked ----------------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.StreamResponse:
        self._desk.check()
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [model_object(self._name, self._created)]})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        self._check_model(request.match_info["name"])
        return web.json_response(model_object(self._name, self._created))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        wanted = completion_request(await self._body(request))
        return await self._answer(request, wanted, TextAnswer(self._name, with_scores=wanted.logprobs is not None))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        wanted = chat_request(await self._body(request))
        return await self._answer(request, wanted, ChatAnswer(self._name, with_scores=wanted.logprobs is not None))

    async def _body(self, request: web.Request) -> dict[str, Any]:
        self._door.check_content_type(request.content_type)
        return read_body(await request.read())

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._name):
            said = f"there is no model {str(name)[:100]!r} here, but {self._name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")

    # --- what is answered -------------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.Request, wanted: Request, answer: Answer) -> web.StreamResponse:
        self._check_model(wanted.model)
        order = await asyncio.to_thread(self._prompts.order, wanted)  # a long text takes the tokenizer seconds
        usage = Usage(order.prompt_tokens)
        with self._desk.job(order) as job:
            if wanted.stream:
                return await self._stream(request, wanted, job.pieces(), answer, usage, order.choices)
            choices: list[list[Piece]] = [[] for _ in range(order.choices)]
            async for piece in job.pieces():
                usage.heard(piece)
                choices[piece.choice].append(piece)
        return web.json_response(answer.whole(choices, usage))

    async def _stream(
        self,
        request: web.Request,
        wanted: Request,
        pieces: AsyncIterator[Piece],
        answer: Answer,
        usage: Usage,
        choices: int,
    ) -> web.StreamResponse:
        """Server-sent events. What goes wrong before the first has a status of its own."""
        piece: Piece | None = await anext(pieces)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"})
        await response.prepare(request)
        more = {"usage": None} if wanted.include_usage else {}
        for chunk in answer.begin(choices):
            await _send(response, chunk | more)
        try:
            while piece is not None:
                usage.heard(piece)
                await _send(response, answer.chunk(piece) | more)
                piece = await anext(pieces, None)
        except ApiError as error:
            await _send(response, error.body)
        else:
            if wanted.include_usage:
                await _send(response, answer.usage_chunk(usage))
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


async def _send(response: web.StreamResponse, what: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(what, ensure_ascii=False).encode(errors="replace") + b"\n\n")


def _refusal(error: ApiError) -> web.Response:
    headers = {"Retry-After": _RETRY} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error.body, status=error.status, headers=headers)
