"""Each client has its own adapter in the trunk, in batches shared with others: as if each had a server of its own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from client_ends.train import TrainSettings, prepare_ends
from client_ends.train import train as train_run
from splitfl.adapters import export_part, merge, named_trainables
from splitfl.adapters.results import describe_part, save_part
from splitfl.checkpoint import clients_of
from splitfl.cli import main
from splitfl.config import LoraSettings, OptimizerSettings
from splitfl.errors import CheckpointError, ConfigError, Refused
from splitfl.optimizer import build_optimizer
from tests.integration.test_equality import EPS, LOSS, WEIGHTS, fraction_of, story_batches
from tests.unit.channel_world import wait_until
from tests.world import World, running, side_by_side, tiny_llama

#: What each client asks for.
ASKED = (
    {"rank": 4, "learning_rate": 1e-3},
    {"rank": 7, "alpha": 7.0, "learning_rate": 3e-3},
    {"weight_decay": 0.1},
)
SETTINGS = {
    "adapters": "per-client",
    "optimizer.learning_rate": 2e-3,
    "optimizer.eps": EPS,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 3,
    "optimizer.steps": 40,
}


def lora_of(client):
    return LoraSettings(ASKED[client].get("rank", 8), ASKED[client].get("alpha", 16.0))


def train(world, client, batches, *, ends="lora", asked=None, keep=None, then="continue"):
    """One client's plain loop; returns its losses. ``keep``: where its ends are written at the end."""
    asked = ASKED[client] if asked is None else asked
    split = world.join_as(client, adapter=asked)
    model = prepare_ends(split, ends, lora_of(client), seed=0)
    model.train()
    parameters = list(named_trainables(model).values())
    optimizer = build_optimizer(parameters, OptimizerSettings(learning_rate=1e-3, eps=EPS)) if parameters else None
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        if optimizer is None:
            split.step()
        else:
            optimizer.step()
            optimizer.zero_grad()
    closed = split.wait_step()
    if keep is not None:
        terms = split.trunk.session.terms
        about = describe_part(
            model, part="ends", base=world.model, identity=terms["identity"], cut=terms["cut"], trainables="lora",
            lora=lora_of(client), task="causal-lm", step=closed.step, run="run",
        )  # fmt: skip
        save_part(keep, model, about)
        model.eval()
        with torch.no_grad():
            losses.append(model(**batches[-1]).logits)
    split.close()
    return losses


def weights(world, client):
    return {name: p.detach().clone() for name, p in world.server._engine.training.adapters[f"client{client}"].parameters.items()}


def worst(mine, theirs):
    return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_together_is_as_each_alone_on_a_server_of_its_own(tmp_path, data, stories, dropout):
    steps = story_batches(data, 3, steps=20)
    settings = SETTINGS | {"lora.dropout": dropout}
    own = [[step[client] for step in steps] for client in range(3)]
    (tmp_path / "all").mkdir()
    world = World(tmp_path / "all", stories, 3, **settings)
    with running(world):
        together = side_by_side(3, lambda client: train(world, client, own[client]))
    for event in world.events("step"):
        assert set(event["parts"]) == {"client0", "client1", "client2"}
        assert all(part["grad_norm"] > 0 for part in event["parts"].values())
    for client in range(3):
        (tmp_path / str(client)).mkdir()
        alone = World(tmp_path / str(client), stories, 3, needed=1, **settings)
        start = {}
        with running(alone):
            alone.join_as(client, adapter=ASKED[client]).close()
            start = weights(alone, client)
            losses = train(alone, client, own[client])
        assert worst(together[client], losses) <= LOSS
        assert fraction_of(weights(world, client), weights(alone, client), start) <= WEIGHTS
        rates = [event["parts"][f"client{client}"]["learning_rate"] for event in world.events("step")]
        peak = ASKED[client].get("learning_rate", 2e-3)
        assert rates[:2] == [0, pytest.approx(peak / 3)]
        assert rates[10] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 7 / 37)))
    if dropout:
        other = World(tmp_path, stories, 3, needed=1, **(settings | {"lora.dropout": 0.0}))
        with running(other):
            undropped = train(other, 0, own[0][:5])
        assert worst(undropped, together[0][:5]) > 1e-3, "nothing was dropped"


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_one_client_alone_is_as_with_a_shared_adapter(tmp_path, data, stories, dropout):
    batches = [step[0] for step in story_batches(data, 1, steps=12)]
    losses = []
    for adapters in ("per-client", "shared"):
        (tmp_path / adapters).mkdir()
        world = World(tmp_path / adapters, stories, 1, **(SETTINGS | {"adapters": adapters, "lora.dropout": dropout}))
        with running(world):
            losses.append(train(world, 0, batches, asked={}))
    assert worst(*losses) <= LOSS


def test_two_sessions_of_one_client_train_its_one_adapter(tmp_path, data, stories):
    """As one session that has the batches of both: the sum over both, divided by the targets of both."""
    steps = story_batches(data, 3, steps=6)
    (tmp_path / "two").mkdir()
    world = World(tmp_path / "two", stories, 1, needed=2, **SETTINGS)
    with running(world):
        side_by_side(2, lambda own: train(world, 0, [step[1 + own] for step in steps], ends="frozen", asked={}))
    (tmp_path / "one").mkdir()
    reference = World(tmp_path / "one", stories, 1, **SETTINGS)
    with running(reference):
        split = reference.join_as(0).train()
        start = weights(reference, 0)
        for parameter in split.parameters():
            parameter.requires_grad_(False)
        for step in steps:
            for batch in step[1:]:
                split(**batch).loss.backward()
            split.step()
        split.wait_step()
        split.close()
    assert fraction_of(weights(world, 0), weights(reference, 0), start) <= WEIGHTS


def test_a_training_run_asks_for_its_adapter_and_gives_its_ends_the_same_rank(tmp_path, data, stories):
    world = World(tmp_path, stories, 1, **SETTINGS)
    text = tmp_path / "notes.txt"
    text.write_text((data / "text" / "tinyshakespeare" / "input.txt").read_text()[:6000])
    with running(world):
        settings = TrainSettings(
            world.join, str(world.keys[0]), str(text), model=stories, max_length=64, batch_size=4, steps=3, evaluate=0,
            adapter_rank=3, adapter_alpha=6.0, adapter_learning_rate=5e-4, out=str(tmp_path / "ends"), device="cpu",
        )  # fmt: skip
        result = train_run(settings, channel_options=world.channel_options())
    assert world.server._book.plain("client0") == {"rank": 3, "alpha": 6.0, "learning_rate": 5e-4, "weight_decay": 0.0}
    for run, out in (
        (["export", str(tmp_path / "ends")], "e"),
        (["export", str(tmp_path / "server"), "--client", "client0"], "t"),
    ):
        assert main([run[0], run[1], str(tmp_path / out), *run[2:]]) == 0
    assert main(["merge", str(tmp_path / "e"), str(tmp_path / "t"), str(tmp_path / "merged")]) == 0
    written = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (3, 6, {})
    assert result.steps == 3
    assert main(["export", str(tmp_path / "server"), str(tmp_path / "none")]) == 2


def test_exported_and_merged_each_is_one_standard_peft_adapter(tmp_path, data, stories):
    steps = story_batches(data, 2, steps=4)
    own = [[step[client] for step in steps] for client in range(2)]
    world = World(tmp_path, stories, 2, **SETTINGS)
    with running(world):
        found = side_by_side(2, lambda client: train(world, client, own[client], keep=tmp_path / f"ends{client}"))
    run = world.server.config.out_dir
    assert clients_of(run) == ["client0", "client1"]
    for client, (*_, logits) in enumerate(found):
        about = export_part(run, tmp_path / f"trunk{client}", client=f"client{client}")
        assert about["client"] == f"client{client}"
        merge(tmp_path / f"ends{client}", tmp_path / f"trunk{client}", tmp_path / f"merged{client}")
        written = json.loads((tmp_path / f"merged{client}" / "adapter_config.json").read_text())
        assert written["r"] == lora_of(client).rank
        assert not written["rank_pattern"]
        base = AutoModelForCausalLM.from_pretrained(stories)
        whole = PeftModel.from_pretrained(base, str(tmp_path / f"merged{client}")).eval()
        with torch.no_grad():
            real = own[client][-1]["attention_mask"] == 1
            torch.testing.assert_close(whole(**own[client][-1]).logits[real], logits[real], rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"name one with --client \(client0, client1\)"):
        export_part(run, tmp_path / "nobody")
    with pytest.raises(CheckpointError, match="no adapter of a client 'client7': it has client0, client1"):
        export_part(run, tmp_path / "nobody", client="client7")
    with pytest.raises(CheckpointError, match="no client is called"):
        export_part(run, tmp_path / "nobody", client="..")


def test_what_a_client_may_ask(tmp_path):
    model = tiny_llama(tmp_path / "model")
    limits = {"limits.max_rank": 16, "limits.max_learning_rate": 0.005}
    world = World(tmp_path, model, 2, needed=1, **(SETTINGS | limits))
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with running(world):
        for asked, words in (
            ({"rank": 17}, "ask for at most 16"),
            ({"learning_rate": 0.1}, "ask for at most 0.005"),
            ({"rank": 0}, "rank is a whole number from 1, not '0'"),
            ({"rank": True}, "rank is a whole number"),
            ({"alpha": 0}, "alpha is a number above 0"),
            ({"weight_decay": -1.0}, "weight decay is a number from 0"),
            ({"momentum": 0.9}, "no setting 'momentum': choose among rank, alpha"),
        ):
            with pytest.raises(Refused, match=words) as caught:
                world.join_as(0, adapter=asked)
            assert caught.value.code == "adapter"
        first = world.join_as(0, adapter={"rank": 16})
        # A second session of one client shares its adapter, whatever it leaves out.
        second = world.join_as(0, adapter={"learning_rate": 0.001})
        with pytest.raises(Refused, match="your adapter in this run has rank 16 and alpha 16, and keeps them"):
            world.join_as(0, adapter={"rank": 4})
        with torch.no_grad():
            assert torch.equal(first.eval()(**batch).logits, second.eval()(**batch).logits)
        assert [*world.server._engine.training.adapters] == ["client0"]
        assert world.server._book.of("client0").learning_rate == 0.001
        first.close()
        second.close()
        # Nobody has trained it, so it may yet become another.
        third = world.join_as(0, adapter={"rank": 4})
        wait_until(lambda: world.server._engine.training.adapters["client0"].asked.rank == 4)
        third.train()(**batch).loss.backward()
        third.step()
        third.wait_step()
        third.close()
        with pytest.raises(Refused, match="your adapter in this run has rank 4"):
            world.join_as(0, adapter={"rank": 16})
        world.join_as(0).close()
        assert world.server._book.of("client0").rank == 4
    (tmp_path / "shared").mkdir()
    shared = World(tmp_path / "shared", model, 1)
    with running(shared), pytest.raises(Refused, match=r"share one adapter.*leave the adapter's settings out"):
        shared.join_as(0, adapter={"rank": 4})


def test_evaluation_without_adapter_is_the_base_model(tmp_path, data, stories):
    batch = story_batches(data, 1, steps=1)[0][0]
    world = World(tmp_path, stories, 1, **SETTINGS)
    with running(world):
        split = world.join_as(0, adapter={"learning_rate": 0.01})
        for _ in range(5):
            split.train()(**batch).loss.backward()
            split.step()
        split.wait_step()
        split.eval()
        with torch.no_grad():
            trained = split(**batch).loss
            split.trunk.adapter_on = False
            plain = split(**batch).loss
        split.close()
    reference = AutoModelForCausalLM.from_pretrained(stories).eval()
    with torch.no_grad():
        base = reference(**batch).loss
    assert float(plain) == pytest.approx(float(base), rel=1e-6)
    assert float(trained) < float(base) - 0.01


@pytest.mark.parametrize(
    ("settings", "mend"),
    [
        ({"trainables": "full"}, "--trainables lora"),
        ({"lora.rank": 65}, "raise --max-rank"),
        ({"optimizer.learning_rate": 0.1}, "raise --max-learning-rate"),
        ({"mode": "async"}, "--mode sync"),
    ],
)
def test_settings_that_contradict_each_other(settings, mend):
    from splitfl.config import build_config

    with pytest.raises(ConfigError, match=mend):
        build_config({"model": "m", "adapters": "per-client"} | settings)


@pytest.mark.parametrize(("flag", "value"), [("rank", "0"), ("alpha", "0"), ("lr", "-1"), ("weight-decay", "-0.5")])
def test_flags_out_of_range_are_one_sentence(tmp_path, capsys, flag, value):
    arguments = ["train", "--trunk", "splitfl://x", "--identity", "none", "--data", str(tmp_path / "none")]
    assert main([*arguments, f"--adapter-{flag}", value]) == 2
    assert f"--adapter-{flag} {value}: it must be" in capsys.readouterr().err
