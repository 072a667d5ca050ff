"""Keyed dropout: a token's mask depends on its key and the place in the model, not on how its batch was run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from splitfl.parts.dropout import KeyedDropout, dropout_key, install_keyed_dropout
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import drops, run_segments, why_not_keyed, why_not_packed
from splitfl.parts.rows import Rows, running_on
from tests.families import FAMILIES, HIDDEN, no_dropout, save_family

WIRE = ((6, 0), (11, 3), (6, 9), (1, 0), (4, 5), (4, 5), (11, 0), (2, 30))
TOKENS = sum(length for length, _ in WIRE)
KEYS = tuple(dropout_key(7, 3, "ann", 0, index) for index in range(len(WIRE)))

#: Families that drop out where others do not: in functions, in attention of either kind, in modules, beside a soft cap.
DROPPING = {
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.2},
    "gpt-neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gemma2": {"attention_dropout": 0.2},
    "gpt-oss": {"attention_dropout": 0.2},
    "llama": {"attention_dropout": 0.2},
    "mistral": {"attention_dropout": 0.2},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
}


def dropping_trunk(name: str, directory: Path) -> Any:
    family = next(family for family in FAMILIES if family.name == name)
    config = no_dropout(family.config())
    for field, value in DROPPING[name].items():
        assert hasattr(config, field)
        setattr(config, field, value)
    torch.manual_seed(0)
    factory: Any = transformers.AutoModelForCausalLM
    factory.from_config(config).save_pretrained(directory)
    return load_trunk(directory, (1, 1))


def keyed(name: str, directory: Path) -> tuple[Any, bool]:
    """A trunk in training mode, ready; and whether it can run packed."""
    model = dropping_trunk(name, directory)
    packs = why_not_packed(model) is None
    install_keyed_dropout(model)
    model.train()
    return model, packs


def run(model: Any, runs: list[Rows], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dh (tokens, H)."""
    generator = torch.Generator().manual_seed(seed)
    h, dy = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    h.requires_grad_()
    parts: Any = torch.split(h, [rows.tokens for rows in runs])
    y = torch.cat([run_segments(model, part, rows) for part, rows in zip(parts, runs, strict=True)])
    return y.detach(), torch.autograd.grad(y, h, dy)[0]


def layouts(packs: bool, keys: tuple[bytes, ...] | None = KEYS) -> dict[str, list[Rows]]:
    def some(first: int, last: int, layout: bool) -> Rows:
        return Rows(WIRE[first:last], layout, keys=None if keys is None else keys[first:last])

    found = {
        "padded": [some(0, 8, False)],
        "alone": [some(index, index + 1, False) for index in range(len(WIRE))],
        "padded in pieces": [some(0, 3, False), some(3, 8, False)],
    }
    packed = {"packed": [some(0, 8, True)], "packed in pieces": [some(0, 3, True), some(3, 8, True)]}
    return found | (packed if packs else {})


def same(one: Any, other: Any) -> bool:
    return all(float((a - b).norm() / b.norm()) < 2e-6 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", DROPPING)
def test_masks_do_not_depend_on_the_layout(name: str, tmp_path: Path) -> None:
    model, packs = keyed(name, tmp_path)
    assert packs == (name not in ("bloom", "falcon"))
    assert why_not_keyed(model) is None
    assert drops(model)
    expected = run(model, layouts(packs)["padded"])
    for label, runs in layouts(packs).items():
        assert same(run(model, runs), expected), label
    model.eval()
    assert not same(run(model, layouts(packs)["padded"]), expected)
    model.train()
    other = tuple(dropout_key(7, 4, "ann", 0, index) for index in range(len(WIRE)))
    assert not same(run(model, layouts(packs, other)["padded"]), expected)


def test_running_again_draws_the_same_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    model, _ = keyed("gpt2", tmp_path)
    expected = run(model, layouts(True)["packed"])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = run(model, layouts(True)["packed"])
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_draw_their_own(tmp_path: Path) -> None:
    model, _ = keyed("gpt2", tmp_path)
    sets = [tuple(dropout_key(0, step, "bob", 0, index) for index in range(len(WIRE))) for step in range(4)]
    expected = [run(model, layouts(True, keys)["alone"]) for keys in sets]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(keys, layout) for keys in sets for layout in ("packed", "padded")]
        found = list(pool.map(lambda job: run(model, layouts(True, job[0])[job[1]]), jobs))
    for (keys, layout), own in zip(jobs, found, strict=True):
        assert same(own, expected[sets.index(keys)]), layout


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lora_dropout_is_keyed(name: str, tmp_path: Path) -> None:
    model = dropping_trunk(name, tmp_path)
    assert why_not_packed(model) is None
    torch.manual_seed(1)
    lora: Any = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=False)
    )
    install_keyed_dropout(lora)
    lora.train()
    assert drops(lora)
    places = {module.path for module in lora.modules() if isinstance(module, KeyedDropout)}
    assert sum("lora_dropout" in place for place in places) >= 12
    assert why_not_keyed(lora) is None
    expected = run(lora, layouts(True)["alone"])
    for label, runs in layouts(True).items():
        assert same(run(lora, runs), expected), label


def test_installing_twice_changes_nothing(tmp_path: Path) -> None:
    model, _ = keyed("gpt2", tmp_path)
    expected = run(model, layouts(True)["packed"])
    install_keyed_dropout(model)
    assert torch.equal(run(model, layouts(True)["packed"])[0], expected[0])


def test_a_trunk_that_drops_nothing_needs_no_keys(tmp_path: Path) -> None:
    model = load_trunk(save_family(FAMILIES[0], tmp_path), (1, 1))
    install_keyed_dropout(model)
    assert not drops(model)
    assert not model.training


# --- One module -----------------------------------------------------------------------------------------------------------------


def test_gradient_is_that_of_the_mask() -> None:
    module = KeyedDropout(0.4, "somewhere").train()
    rows = Rows(WIRE, True, keys=KEYS)
    x = torch.randn(1, TOKENS, 16, requires_grad=True)
    with running_on(rows):
        mask = module(torch.ones(1, TOKENS, 16))
        y = module(x)
    assert torch.equal(mask.unique(), torch.tensor([0.0, 1 / 0.6]))
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, dy)
    again = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(again * mask, again, dy)
    torch.testing.assert_close(y, again * mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_keep_rate(p: float) -> None:
    module = KeyedDropout(p, "somewhere").train()
    with running_on(Rows(((1000, 0), (1000, 0)), True, keys=KEYS[:2])):
        kept = (module(torch.ones(1, 2000, 100)) != 0).double()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    # Neighbours, and the same place of another segment, are drawn independently.
    first, second = kept[0, :1000].flatten() - (1 - p), kept[0, 1000:].flatten() - (1 - p)
    bound = 5 * p * (1 - p) / first.numel() ** 0.5
    assert abs(float((first * second).mean())) < bound
    assert abs(float((first[1:] * first[:-1]).mean())) < bound


def test_masks_differ_by_place_and_by_each_part_of_the_key() -> None:
    def mask(path: str, key: bytes) -> torch.Tensor:
        with running_on(Rows(((50, 0),), True, keys=(key,))):
            return KeyedDropout(0.5, path).train()(torch.ones(1, 50, 8)).bool()  # type: ignore[no-any-return]

    keys = [
        dropout_key(1, 2, "c", 3, 4),
        dropout_key(0, 2, "c", 3, 4),
        dropout_key(1, 0, "c", 3, 4),
        dropout_key(1, 2, "d", 3, 4),
        dropout_key(1, 2, "c", 0, 4),
        dropout_key(1, 2, "c", 3, 0),
        dropout_key(1, 23, "c", 4, 4),
    ]
    assert len(set(keys)) == len(keys)
    masks = [mask("a", key) for key in keys] + [mask("b", keys[0])]
    assert torch.equal(masks[0], mask("a", keys[0]))
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert 0.3 < float((one != other).double().mean()) < 0.7


def test_without_keys_or_outside_a_run_it_is_plain_dropout() -> None:
    module = KeyedDropout(0.5, "somewhere").train()
    x = torch.ones(1, TOKENS, 8)
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x, 0.5)
    for rows in (None, Rows(WIRE, True)):
        torch.manual_seed(0)
        if rows is None:
            found = module(x)
        else:
            with running_on(rows):
                found = module(x)
        assert torch.equal(found, expected)
    with running_on(Rows(WIRE, True, keys=KEYS)):
        assert torch.equal(module.eval()(x), x)


def test_dropout_that_cannot_be_keyed_is_reported(tmp_path: Path) -> None:
    model, _ = keyed("llama", tmp_path)
    block = model.layout.block_list(model)[1]
    # Noise that no key reaches, in the place of an attention with dropout of its own.
    block.self_attn.register_forward_hook(lambda module, args, output: (output[0] * torch.rand_like(output[0]), *output[1:]))
    assert "cannot be keyed" in (why_not_keyed(model) or "")
    assert model.training
