"""A frozen trunk in 8 or 4 bits with LoRA on top: it takes less memory, and learns about as well."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from splitfl.config import build_config
from splitfl.errors import ConfigError
from splitfl.parts.quantized import quantization_options
from splitfl.sample import build_sample_model
from tests.world import World, running

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="NOT TESTED: bitsandbytes is not installed (splitfl[quantize])"
)
STEPS = 12


def bytes_of(model: torch.nn.Module) -> int:
    """Of the frozen weights, with what a quantised one needs beside its bits."""
    total = 0
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            total += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def learned(work, model: str, quantize: str) -> tuple[list[float], int]:
    work.mkdir()
    world = World(work, model, 1, quantize=quantize, **{"optimizer.learning_rate": 3e-3})
    draw = torch.Generator().manual_seed(0)
    rows = (torch.arange(24) * 5 + torch.randint(0, 7, (8, 1), generator=draw)) % 200 + 20
    with running(world):
        client = world.join_as(0).train()
        losses = []
        for _ in range(STEPS):
            loss = client(input_ids=rows, labels=rows).loss
            loss.backward()
            client.step()
            losses.append(float(loss.detach()))
        client.close()
    return losses, bytes_of(world.server._model)


@installed
@pytest.mark.parametrize(("quantize", "tolerance", "smaller"), [("8bit", 0.02, 3.8), ("4bit", 0.1, 6.5)])
def test_a_trunk_in_fewer_bits_learns_about_as_well_in_less_memory(tmp_path, quantize, tolerance, smaller):
    build_sample_model(tmp_path / "model", seed=0, hidden=64, blocks=4, heads=4, tied=True)
    plain, whole = learned(tmp_path / "plain", str(tmp_path / "model"), "none")
    losses, held = learned(tmp_path / quantize, str(tmp_path / "model"), quantize)
    assert plain[-1] < plain[0] - 0.05
    assert losses[-1] < losses[0] - 0.05
    assert losses == pytest.approx(plain, rel=tolerance)
    assert whole / held >= smaller


@installed
@pytest.mark.parametrize("adapters", ["shared", "per-client"])
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_evaluation_in_between_leaves_training_as_it_is(tmp_path, quantize, adapters):
    """Also where widths are no multiple of a quantised block."""
    build_sample_model(tmp_path / "model", seed=0, hidden=64, blocks=4, heads=4, tied=True)
    losses: dict[bool, list[float]] = {}
    rows = (torch.arange(24) * 5 + torch.arange(4)[:, None]) % 200 + 20
    for evaluated in (False, True):
        (tmp_path / str(evaluated)).mkdir()
        settings = {"quantize": quantize, "adapters": adapters, "optimizer.learning_rate": 3e-3}
        world = World(tmp_path / str(evaluated), str(tmp_path / "model"), 1, **settings)
        with running(world):
            client = world.join_as(0).train()
            seen = losses[evaluated] = []
            for _ in range(3):
                loss = client(input_ids=rows, labels=rows).loss
                loss.backward()
                client.step()
                seen.append(float(loss.detach()))
                client.wait_step()
                if evaluated:
                    client.eval()
                    with torch.no_grad():
                        client(input_ids=rows, labels=rows)
                    client.train()
            client.close()
    assert losses[True] == losses[False]


def test_what_cannot_be_is_refused_with_the_mend(monkeypatch):
    for values, said in (
        ({"quantize": "4bit", "trainables": "full"}, "use --trainables lora"),
        ({"quantize": "8bit", "shard": "fsdp", "shard_size": 2}, "use --shard layers or none"),
        ({"quantize": "8bit", "dtype": "float64"}, "float32 or bfloat16"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_config({"model": "m"} | values)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        quantization_options("4bit", torch.float32)
