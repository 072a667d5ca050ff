"""OpenAI's response objects, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from client_ends.proxy.pieces import Piece, TokenScore

__all__ = ["Answer", "ChatAnswer", "TextAnswer", "Usage", "model_object"]

#: JSON has no infinity: what OpenAI says of what cannot come.
_IMPOSSIBLE = -9999.0


class Usage:
    """Tokens of a request, counted as they come."""

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt
        self._written: dict[int, int] = {}

    def heard(self, piece: Piece) -> None:
        self._written[piece.choice] = piece.tokens

    @property
    def body(self) -> dict[str, int]:
        written = sum(self._written.values())
        return {"prompt_tokens": self._prompt, "completion_tokens": written, "total_tokens": self._prompt + written}


class Answer:
    """What both kinds have in common. Of a stream :meth:`begin`, then :meth:`chunk` of each piece; else :meth:`whole` of all."""

    _prefix = _whole_object = _chunk_object = ""

    def __init__(self, model: str, *, with_scores: bool) -> None:
        self._head = {"id": f"{self._prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._with_scores = with_scores

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """``choices``: of each the pieces."""
        made = [self._choice(index, pieces) for index, pieces in enumerate(choices)]
        return {**self._head, "object": self._whole_object, "choices": made, "usage": usage.body}

    def begin(self, choices: int) -> list[dict[str, Any]]:
        """Chunks ahead of all pieces."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk([self._part(piece)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage.body}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_object, "choices": choices}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class TextAnswer(Answer):
    """Of ``/v1/completions``."""

    _prefix, _whole_object, _chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, *, with_scores: bool) -> None:
        super().__init__(model, with_scores=with_scores)
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self._part(_joined(index, pieces))

    def _part(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._scores(piece.choice, piece.scores) if self._with_scores else None,
            "finish_reason": piece.finish,
        }

    def _scores(self, choice: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        offset, offsets = self._offsets.get(choice, 0), []
        for score in scores:
            offsets.append(offset)
            offset += len(score.text)
        self._offsets[choice] = offset
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [None if score.logprob is None else _finite(score.logprob) for score in scores],
            "top_logprobs": [_by_text(score) for score in scores],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    _prefix, _whole_object, _chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, choices: int) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": first, "logprobs": None, "finish_reason": None}]) for index in range(choices)
        ]

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        whole = _joined(index, pieces)
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._scores(whole), "finish_reason": whole.finish}

    def _part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        return {"index": piece.choice, "delta": delta, "logprobs": self._scores(piece), "finish_reason": piece.finish}

    def _scores(self, piece: Piece) -> dict[str, Any] | None:
        if not self._with_scores:
            return None
        told = [
            {**_of_token(score.text, score.logprob), "top_logprobs": [_of_token(*other) for other in score.top]}
            for score in piece.scores
        ]
        return {"content": told, "refusal": None}


def model_object(name: str, created: int) -> dict[str, Any]:
    """What ``/v1/models`` lists."""
    return {"id": name, "object": "model", "created": created, "owned_by": "splitfl"}


def _joined(choice: int, pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    scores = tuple(score for piece in pieces for score in piece.scores)
    return Piece(choice, "".join(piece.text for piece in pieces), scores, pieces[-1].finish, pieces[-1].tokens)


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)


def _by_text(score: TokenScore) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; of two that read the same, the likelier."""
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*score.top, (score.text, score.logprob)):
        found.setdefault(text, _finite(logprob))
    return found


def _of_token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob or 0.0), "bytes": list(text.encode(errors="replace"))}
