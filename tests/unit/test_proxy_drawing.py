"""How the next token is chosen, against the formulas."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from client_ends.proxy.drawing import Drawing, is_greedy, with_defaults
from client_ends.proxy.requests import Sampling


def drawing(sampling: Sampling, rows: int = 1, width: int = 3, **more: object) -> Drawing:
    options: dict[str, object] = {"pads": [0] * rows, "choices": list(range(rows)), "keep": False} | more
    return Drawing(with_defaults(sampling, GenerationConfig()), width, **options)  # type: ignore[arg-type]


def test_penalties_count_what_was_written_and_not_the_prompt() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    ids = torch.tensor([[4, 4, 4, 1, 3, 1]])
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 7.0, 2: -1.0})
    kept = drawing(sampling, keep=True)
    found = kept(ids, scores.clone())
    assert found.tolist() == [[8.0, 2 - 0.5 - 0.5, 2.0, 4 - 0.5 - 0.25, 5.0]]
    assert torch.equal(kept.scores[6], scores)


def test_what_is_drawn_is_drawn_by_its_share() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    sampling = Sampling(temperature=0.5, top_p=0.95, seed=3)
    kept = drawing(sampling)
    counts = torch.zeros(4)
    for _ in range(4000):
        forced = kept(torch.tensor([[0, 0, 0]]), logits.clone())
        assert int((forced > -torch.inf).sum()) == 1
        counts[forced.argmax()] += 1
    shares = (logits / 0.5).softmax(-1)[0]  # 0.2 %, 1.6 %, 11.7 %, 86.5 %: the last two make 95 %
    expected = torch.tensor([0, 0, shares[2], shares[3]]) / (shares[2] + shares[3])
    assert counts[:2].sum() == 0
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_each_row_draws_its_own_and_a_seed_draws_again() -> None:
    def draw(seed: int | None, choices: list[int]) -> torch.Tensor:
        kept = drawing(Sampling(seed=seed), len(choices), choices=choices)
        steps = [kept(torch.zeros(len(choices), 3, dtype=torch.int64), torch.zeros(len(choices), 50)) for _ in range(20)]
        return torch.stack([step.argmax(-1) for step in steps], 1)

    both = draw(1, [0, 1])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(draw(1, [0])[0], both[0])
    assert torch.equal(draw(1, [1])[0], both[1])
    assert not torch.equal(draw(2, [0])[0], both[1])
    assert not torch.equal(draw(None, [0]), draw(None, [0]))
    unsaid = draw(None, [0, 0])
    assert not torch.equal(unsaid[0], unsaid[1])


@pytest.mark.parametrize(
    ("said", "config", "expected"),
    [
        ({}, {}, (1.0, 1.0, 0)),
        ({}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, (0.6, 0.9, 20)),
        ({}, {"temperature": 0.6}, (1.0, 1.0, 0)),
        ({"temperature": 0.0, "top_k": 5}, {"do_sample": True, "temperature": 0.6, "top_k": 20}, (0.0, 1.0, 5)),
    ],
)
def test_what_is_not_said_is_the_model_s_own(said: dict, config: dict, expected: tuple) -> None:
    found = with_defaults(Sampling(**said), GenerationConfig(**config))
    assert (found.temperature, found.top_p, found.top_k) == expected
    assert is_greedy(found) == (found.temperature == 0)
    assert with_defaults(Sampling(), GenerationConfig(repetition_penalty=1.1)).repetition_penalty == 1.1
