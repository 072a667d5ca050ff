"""Packed, padded and one by one: a trunk gives the same numbers, whatever the layout of its rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface

from splitfl.parts import packed as packed_module
from splitfl.parts import segment_attention as attention_module
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import run_segments, why_not_packed
from splitfl.parts.rows import Rows, current_rows
from splitfl.parts.trunk import find_trunk
from tests.families import FAMILIES, HIDDEN, Family, _modern, save_family

#: Lengths mixed and repeated, apart and side by side; positions from 0 and from elsewhere.
WIRE = ((6, 0), (11, 3), (6, 9), (1, 0), (4, 5), (4, 5), (11, 0), (2, 30))
TOKENS = sum(length for length, _ in WIRE)
CANNOT = {"falcon", "bloom"}
TOLERANCE = 2e-6


def trunk_of(family: Family, directory: Path) -> Any:
    trunk: Any = load_trunk(save_family(family, directory), (1, 1))
    return trunk.eval()


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def arrays(seed: int = 0, wire: tuple[tuple[int, int], ...] = WIRE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(length for length, _ in wire)
    return torch.randn(tokens, HIDDEN, generator=generator), torch.randn(tokens, HIDDEN, generator=generator)


def run(model: torch.nn.Module, runs: list[Rows], h: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dh and the gradient of everything trained, after ``runs``, whose rows together are ``h``."""
    h = h.clone().requires_grad_()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts: Any = torch.split(h, [rows.tokens for rows in runs])
    y = torch.cat([run_segments(model, part, rows) for part, rows in zip(parts, runs, strict=True)])
    gradients = torch.autograd.grad(y, [h, *trained.values()], dy, allow_unused=True)
    found = dict(zip(["dh", *trained], gradients, strict=True))
    return {"y": y.detach()} | {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.norm()) for name, value in expected.items() if name not in ("y", "dh"))
    for name, value in expected.items():
        # A gradient that is zero but for rounding (a bias before a softmax) is measured against the others.
        size = max(float(value.norm()), 1e-2 * scale if name not in ("y", "dh") else 0.0)
        assert float((found[name] - value).norm()) / size <= TOLERANCE, name


def alone(wire: tuple[tuple[int, int], ...] = WIRE) -> list[Rows]:
    return [Rows((segment,), False) for segment in wire]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in CANNOT], ids=lambda family: family.name)
def test_layouts_agree(family: Family, tmp_path: Path) -> None:
    model = trunk_of(family, tmp_path)
    before = run(model, alone(), *arrays())  # with the attention the model came with
    assert why_not_packed(model) is None
    assert_same(run(model, alone(), *arrays()), before)
    assert_same(run(model, [Rows(WIRE, False)], *arrays()), before)
    assert_same(run(model, [Rows(WIRE, True)], *arrays()), before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_layouts_agree_with_lora(name: str, tmp_path: Path) -> None:
    model = trunk_of(named(name), tmp_path)
    assert why_not_packed(model) is None
    torch.manual_seed(1)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = run(lora, alone(), *arrays())
    assert sum("lora" in key for key in before) >= 6
    assert_same(run(lora, [Rows(WIRE, False)], *arrays()), before)
    assert_same(run(lora, [Rows(WIRE, True)], *arrays()), before)


def test_packed_costs_no_padding(tmp_path: Path) -> None:
    model = trunk_of(named("llama"), tmp_path)
    assert why_not_packed(model) is None
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[:-1])))
    run_segments(model, arrays()[0], Rows(WIRE, True))
    assert set(seen) == {(1, TOKENS)}


def test_threads_run_one_trunk_on_rows_of_their_own(tmp_path: Path) -> None:
    model = trunk_of(named("mistral"), tmp_path)
    assert why_not_packed(model) is None
    wires = [WIRE, WIRE[::-1], WIRE[2:], ((9, 0),) * 3]
    jobs = [(layout, wire, arrays(index, wire)) for index, wire in enumerate(wires) for layout in (True, False)] * 4

    def work(job: tuple[bool, Any, Any]) -> dict[str, torch.Tensor]:
        layout, wire, tensors = job
        return run(model, [Rows(wire, layout)], *tensors)

    expected = [run(model, alone(wire), *tensors) for _, wire, tensors in jobs]
    with ThreadPoolExecutor(4) as pool:
        for found, own in zip(pool.map(work, jobs), expected, strict=True):
            assert_same(found, own)
    assert current_rows() is None


def test_single_segment_and_one_token(tmp_path: Path) -> None:
    model = trunk_of(named("llama"), tmp_path)
    assert why_not_packed(model) is None
    for wire in (((7, 2),), ((1, 0),)):
        assert_same(run(model, [Rows(wire, True)], *arrays(0, wire)), run(model, [Rows(wire, False)], *arrays(0, wire)))


# --- What cannot be packed is found out -----------------------------------------------------------------------------------------


def wide(name: str, **extra: Any) -> Callable[[], Any]:
    return lambda: _modern(name, **extra)


@pytest.mark.parametrize(
    "config",
    [
        wide("Llama4TextConfig", attention_chunk_size=40, num_local_experts=2, intermediate_size_mlp=48),
        wide(
            "Qwen3NextConfig",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        named("falcon").config,
        named("bloom").config,
        lambda: transformers.MambaConfig(vocab_size=96, hidden_size=HIDDEN, num_hidden_layers=4),
    ],
    ids=["chunks", "recurrent", "falcon", "alibi", "mamba"],
)
def test_what_cannot_pack_says_so_and_stays_as_it_was(config: Callable[[], Any], tmp_path: Path) -> None:
    model = trunk_of(Family("other", config), tmp_path)
    own = model.config._attn_implementation
    reason = why_not_packed(model)
    assert reason is not None
    assert "\n" not in reason
    assert model.config._attn_implementation == own
    assert getattr(model.config, "attention_chunk_size", None) in (None, 40)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("MistralConfig", {"sliding_window": 40}),
        ("Gemma2Config", {"sliding_window": 40, "query_pre_attn_scalar": 8}),
        ("GptOssConfig", {"sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_windows_longer_than_the_trial_are_tried_short(
    name: str, extra: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trunk_of(Family("wide", wide(name, **extra)), tmp_path)
    assert why_not_packed(model) is None
    assert {getattr(module, "sliding_window", None) for module in model.modules()} <= {None, 40}
    assert model.config.sliding_window == 40
    # Packed attention that forgets the window must be found out, though every segment of the trial fits into the real one.
    honest = attention_module.mask_of
    monkeypatch.setattr(
        attention_module, "mask_of", lambda eager, module, length, query, kwargs: honest(eager, module, length, query, {})
    )
    assert "does not keep packed sequences apart" in (why_not_packed(model) or "")


def test_a_family_whose_attention_looks_across_segments_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trunk_of(named("llama"), tmp_path)
    # The segments of a packed row as if they were one.
    monkeypatch.setattr(attention_module, "_runs", lambda rows: [(rows.tokens, 0, 1)])
    assert "does not keep packed sequences apart" in (why_not_packed(model) or "")
    assert model.config._attn_implementation == "sdpa"


def test_a_trunk_in_half_precision_under_lora_packs(tmp_path: Path) -> None:
    model = load_trunk(save_family(named("llama"), tmp_path), (1, 1), dtype="bfloat16")
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    lora.train()
    assert why_not_packed(lora) is None
    assert lora.training
    assert model.training


def test_flash_attention_is_told_where_segments_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention itself needs a GPU: an attention in its place takes down what it is given."""
    given: list[dict[str, Any]] = []

    def recording(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        given.append({"mask": mask} | kwargs)
        return query.transpose(1, 2).contiguous(), None

    model = trunk_of(named("llama"), tmp_path)
    monkeypatch.setitem(AttentionInterface._global_mapping, "recorded_flash", recording)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "recorded_flash", lambda **kwargs: None)
    find_trunk(model).config._attn_implementation_internal = "recorded_flash"  # type: ignore[attr-defined]
    monkeypatch.setattr(packed_module, "is_flash_attention_requested", lambda config: True)
    run_segments(model, arrays()[0], Rows(WIRE, True))
    assert given
    ends = [0, 6, 17, 23, 24, 28, 32, 43, 45]
    for call in given:
        assert call["mask"] is None
        assert call["cu_seq_lens_q"].tolist() == call["cu_seq_lens_k"].tolist() == ends
        assert call["max_length_q"] == call["max_length_k"] == 11
