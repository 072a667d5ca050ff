"""How the next token is chosen: penalties, biases, temperature, and a draw of each row's own.

``generate()`` takes the likeliest token of what this leaves. So what is drawn does not hang on torch's one generator, which all
threads of the process share: the same seed gives the same answer whatever else is being written.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from client_ends.proxy.requests import Sampling

__all__ = ["Drawing", "is_greedy", "with_defaults"]

#: Below this a temperature is taken for 0, as nothing but the likeliest token would be left.
_COLDEST = 1e-4


def with_defaults(sampling: Sampling, config: Any) -> Sampling:
    """What was not said, from the model's own ``generation_config`` where that draws, else OpenAI's: everything may be drawn, at
    temperature 1.
    """
    draws = bool(config.do_sample)

    def of_model(name: str, otherwise: Any) -> Any:
        said, own = getattr(sampling, name), getattr(config, name, None)
        if said is not None:
            return said
        return own if own is not None and (draws or name == "repetition_penalty") else otherwise

    return replace(
        sampling,
        temperature=of_model("temperature", 1.0),
        top_p=of_model("top_p", 1.0),
        top_k=of_model("top_k", 0),
        min_p=of_model("min_p", 0.0),
        repetition_penalty=of_model("repetition_penalty", 1.0),
    )


def is_greedy(sampling: Sampling) -> bool:
    """Whether nothing is drawn; of a sampling whose defaults are in."""
    return sampling.temperature is not None and sampling.temperature < _COLDEST


class Drawing(LogitsProcessor):
    """For rows of one prompt length, padded on the left.

    ``choices``: by row, which answer to its prompt it is: each draws its own. ``pads``: by row, columns before the prompt.
    ``keep``: keep the scores before anything was done to them, in :attr:`scores`.
    """

    def __init__(self, sampling: Sampling, width: int, pads: Sequence[int], choices: Sequence[int], *, keep: bool) -> None:
        """``sampling``: with its defaults in. ``width``: columns of the prompts."""
        self._sampling, self._width, self._keep = sampling, width, keep
        self.scores: dict[int, torch.Tensor] = {}  # by column that they choose: (rows, V)
        self._warpers: list[LogitsProcessor] = []
        if sampling.repetition_penalty not in (None, 1.0):
            self._warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, torch.tensor(pads)))
        self._after: list[LogitsProcessor] = []
        self._seeds: list[int] = []
        if is_greedy(sampling):
            return
        if sampling.temperature not in (None, 1.0):
            self._after.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k and sampling.top_k > 0:
            self._after.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1:
            self._after.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self._after.append(MinPLogitsWarper(sampling.min_p))
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._seeds = [_seed(seed, choice) if sampling.seed is not None else seed + row for row, choice in enumerate(choices)]
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._keep:
            self.scores[input_ids.shape[1]] = scores.clone()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        scores = self._penalised(input_ids[:, self._width :], scores)
        if not self._seeds:
            return scores
        for warper in self._after:
            scores = warper(input_ids, scores)
        return self._drawn(scores)

    def _penalised(self, written: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """OpenAI's two penalties count what has been written, not the prompt."""
        sampling = self._sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            times = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
            scores = scores - sampling.frequency_penalty * times - sampling.presence_penalty * (times > 0)
        if sampling.logit_bias:
            tokens = torch.tensor(list(sampling.logit_bias), device=scores.device)
            biases = torch.tensor(list(sampling.logit_bias.values()), device=scores.device, dtype=scores.dtype)
            scores = scores.index_add(1, tokens, biases.expand(len(scores), -1))
        return scores

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        shares = scores.softmax(-1)
        drawn = torch.stack(
            [torch.multinomial(share, 1, generator=generator) for share, generator in zip(shares, self._generators, strict=True)]
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _seed(seed: int, choice: int) -> int:
    """Of one answer among several: not those of the next seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:7], "big")
