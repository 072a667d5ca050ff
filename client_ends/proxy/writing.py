"""One request's answers, written by the split model: all its choices in one batch, in a thread of its own.

Several requests are written side by side, each by its own ``generate()`` over its own key-value cache: the trunk puts what waits
of all of them into one batch, so their round trips overlap.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from client_ends.data import pad_token
from client_ends.proxy.drawing import Drawing, is_greedy
from client_ends.proxy.pieces import Piece, TokenScore
from client_ends.proxy.requests import Request, Sampling
from client_ends.proxy.rows import Rows, Scorer
from client_ends.proxy.texts import spell
from splitfl.parts.ends import find_ends

__all__ = ["Order", "Writer"]

#: Logits of a prompt that are in memory at once, numbers: of 128 thousand tokens, 1024 positions.
_MOST_LOGITS = 2**27


@dataclass(frozen=True, slots=True)
class Order:
    """A request in tokens. ``max_tokens``: of each choice; ``sampling``: with its defaults in."""

    request: Request
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: Sampling

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.request.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def tokens(self) -> int:
        """What all choices begin with: room for it is had before anything is written."""
        return self.request.n * self.prompt_tokens


class Writer:
    """What all requests share: the model, which ``generate()`` leaves as it is, so that many threads may use it."""

    def __init__(self, model: Any, tokenizer: Any, *, keeps_caches: bool, lookup: int = 0) -> None:
        """``keeps_caches``: whether the trunk does. ``lookup``: greedy answers propose so many tokens of the text before."""
        # Inside PEFT, whose own generate() changes the model while it runs; the layers of its adapters are inside too.
        ends: Any = find_ends(model)
        self._model = ends
        self._tokenizer, self._keeps_caches, self._lookup = tokenizer, keeps_caches, lookup
        self._positions = "position_ids" in inspect.signature(type(self._model).forward).parameters
        own = self._model.generation_config.eos_token_id
        known = own if isinstance(own, list) else [own]
        self._ends = frozenset(end for end in (*known, tokenizer.eos_token_id) if end is not None)
        self._pad = pad_token(tokenizer)

    @torch.no_grad()
    def write(
        self,
        order: Order,
        *,
        tell: Callable[[Piece], None],
        on_step: Callable[[int], bool],
    ) -> None:
        """Write all choices; ``tell`` hears of each piece, ``on_step`` as :class:`Rows` has it.

        Raises:
            UserError: the trunk has no room for it. SessionLost, CacheLost.
        """
        request, repeated = order.request, order.request.n
        scorer = None if request.logprobs is None else Scorer(self._tokenizer, request.logprobs)
        ids, mask = self._padded(order.prompts)
        cache = None
        if scorer is not None and request.echo:
            cache = self._model.make_cache() if self._keeps_caches else None
            found = self._score_prompts(order, ids, mask, cache, scorer, on_step)
            if found is None:
                return
            self._echo(order, tell, found)
        elif request.echo:
            self._echo(order, tell, [[] for _ in order.prompts])
        if cache is None and repeated > 1 and self._keeps_caches and order.max_tokens and ids.shape[1] > 1:
            # The prompt travels once, whatever n is.
            cache = self._model.make_cache()
            keep: dict[str, Any] = {"logits_to_keep": 1} if self._model._supports_logits_to_keep() else {}
            self._forward(ids[:, :-1], mask[:, :-1], cache, **keep)
        if not order.max_tokens:
            for choice in range(order.choices):
                tell(Piece(choice, "", (), "length"))
            return
        if repeated > 1:
            if cache is not None and cache.get_seq_length():
                cache.batch_repeat_interleave(repeated)
            ids, mask = ids.repeat_interleave(repeated, 0), mask.repeat_interleave(repeated, 0)
        self._generate(order, ids, mask, cache, scorer, tell, on_step)

    def _generate(
        self, order: Order, ids: torch.Tensor, mask: torch.Tensor, cache: Any, scorer: Scorer | None, tell: Any, on_step: Any
    ) -> None:
        request = order.request
        prompts = [prompt for prompt in order.prompts for _ in range(request.n)]
        pads = [ids.shape[1] - len(prompt) for prompt in prompts]
        choices = list(range(request.n)) * len(order.prompts)
        drawing = Drawing(order.sampling, ids.shape[1], pads, choices, keep=scorer is not None)
        rows = Rows(
            self._tokenizer,
            prompts,
            stops=request.stop,
            ends=self._ends,
            most=order.max_tokens,
            tell=tell,
            on_step=on_step,
            drawing=drawing,
            scorer=scorer,
        )
        options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if self._lookup and len(prompts) == 1 and self._keeps_caches and is_greedy(order.sampling):
            options["prompt_lookup_num_tokens"] = self._lookup
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=order.max_tokens,
            logits_processor=[drawing],
            stopping_criteria=[rows],
            use_cache=self._keeps_caches,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._ends) or None,
            # What draws is ours, whatever the model's own generation_config says.
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            **options,
        )

    # --- prompts ----------------------------------------------------------------------------------------------------------------

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask ``(prompts, T)``, padded on the left."""
        width, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        return ids, mask

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
        """Logits ``(B, t, V)`` of the last ``t`` columns, ``ids``, of those that ``mask`` tells of."""
        if self._positions:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options |= {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask, **options).logits
        return logits

    def _score_prompts(
        self,
        order: Order,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Any,
        scorer: Scorer,
        on_step: Callable[[int], bool],
    ) -> list[list[TokenScore]] | None:
        """What the model makes of the prompts' own tokens; all but the last of each are then in the cache. None: broken off."""
        width = ids.shape[1]
        found = [[TokenScore(spell(self._tokenizer, prompt[0]), None)] for prompt in order.prompts]
        step = max(1, _MOST_LOGITS // (len(ids) * self._model.config.get_text_config().vocab_size))
        # Without a cache there is but one forward; what it costs is the user's to weigh.
        step = step if cache is not None else width
        for begin in range(0, width - 1, step):
            end = min(begin + step, width - 1)
            logits = self._forward(ids[:, begin:end], mask[:, :end], cache)
            for row, prompt in enumerate(order.prompts):
                pads = width - len(prompt)
                first = max(begin, pads)
                if first < end:
                    tokens = prompt[first - pads : end - pads + 1]
                    found[row] += scorer.scores(tokens[:-1], tokens[1:], logits[row, first - begin :])
            if not on_step(order.tokens):
                return None
        return found

    def _echo(self, order: Order, tell: Callable[[Piece], None], scores: Sequence[Sequence[TokenScore]]) -> None:
        """Each choice begins with its prompt."""
        for index, (given, ids) in enumerate(zip(order.request.prompts, order.prompts, strict=True)):
            text = given if isinstance(given, str) else self._tokenizer.decode(list(ids), skip_special_tokens=True)
            for choice in range(order.request.n):
                tell(Piece(index * order.request.n + choice, text, tuple(scores[index])))
