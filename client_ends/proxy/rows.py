"""The answers of one batch as they grow: each row's text, its end, what is told of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from client_ends.proxy.drawing import Drawing
from client_ends.proxy.pieces import Piece, TokenScore
from client_ends.proxy.texts import GrowingText, StopFinder, spell

__all__ = ["Rows", "Scorer"]


class Scorer:
    """Log-probabilities of tokens, with ``alternatives`` to each."""

    def __init__(self, tokenizer: Any, alternatives: int) -> None:
        self._tokenizer, self._alternatives = tokenizer, alternatives

    def scores(self, before: Sequence[int], tokens: Sequence[int], logits: torch.Tensor) -> list[TokenScore]:
        """Of each token, given the one ``before`` it and the logits ``(tokens, V)`` that it was chosen by."""
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
        best = logprobs.topk(min(self._alternatives, logprobs.shape[1]), -1)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            TokenScore(
                spell(self._tokenizer, token, previous),
                logprob,
                tuple((spell(self._tokenizer, other, previous), value) for other, value in zip(*top, strict=True)),
            )
            for previous, token, logprob, top in zip(before, tokens, chosen, tops, strict=True)
        ]


class _Row:
    """One choice."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.text, self.stops = GrowingText(tokenizer, prompt), StopFinder(stops)
        self.last = prompt[-1]
        self.tokens = 0
        self.finish: str | None = None


class Rows(StoppingCriteria):
    """Sees every token of ``generate()``, says it to ``tell``, and says when a row is at its end."""

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        stops: Sequence[str],
        ends: frozenset[int],
        most: int,
        tell: Callable[[Piece], None],
        on_step: Callable[[int], bool],
        drawing: Drawing,
        scorer: Scorer | None,
    ) -> None:
        """``ends``: tokens that end an answer; ``most``: of one answer. ``on_step(tokens)`` hears how many all rows have, with
        their prompts, and says whether to go on; it may wait.
        """
        self._rows = [_Row(tokenizer, prompt, stops) for prompt in prompts]
        self._width = self._seen = max(map(len, prompts))
        self._prompts = sum(map(len, prompts))
        self._ends, self._most, self._tell, self._on_step = ends, most, tell, on_step
        self._drawing, self._scorer = drawing, scorer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for column in range(self._seen, input_ids.shape[1]):
            logits = self._drawing.scores.pop(column, None)
            for index, token in enumerate(input_ids[:, column].tolist()):
                if self._rows[index].finish is None:
                    self._add(index, token, None if logits is None else logits[index])
        self._seen = input_ids.shape[1]
        going_on = self._on_step(self._prompts + len(self._rows) * (self._seen - self._width))
        done = [row.finish is not None or not going_on for row in self._rows]
        return torch.tensor(done, device=input_ids.device)

    def _add(self, index: int, token: int, logits: torch.Tensor | None) -> None:
        row = self._rows[index]
        row.tokens += 1
        told: tuple[TokenScore, ...] = ()
        if self._scorer is not None and logits is not None:
            told = tuple(self._scorer.scores([row.last], [token], logits[None]))
        row.last = token
        text = ""
        if token in self._ends:
            row.finish = "stop"
        else:
            text = row.stops.add(row.text.add(token))
            if row.stops.found:
                row.finish = "stop"
            elif row.tokens >= self._most:
                row.finish = "length"
        if row.finish is not None and not row.stops.found:
            text += self._flush(row)
        if text or told or row.finish:
            self._tell(Piece(index, text, told, row.finish, row.tokens))

    @staticmethod
    def _flush(row: _Row) -> str:
        text = row.stops.add(row.text.rest())
        if row.stops.found:
            row.finish = "stop"
        return text + row.stops.rest()
