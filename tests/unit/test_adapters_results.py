"""From trained parts to a result: what is saved, exported and merged computes what ends and trunk compute."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from splitfl import attach_trunk, load_ends, load_trunk
from splitfl.adapters import (
    LoraSettings,
    attach_lora,
    describe_part,
    export_part,
    load_trainables,
    merge,
    named_trainables,
    read_part,
    save_part,
    set_trainable,
)
from splitfl.checkpoint import checkpoint_directory, save_checkpoint
from splitfl.errors import CheckpointError, ConfigError, ModelError
from tests.unit.adapter_models import CONFIGS, save_bases

CUT = (1, 1)
IDENTITY = {"config": "c" * 64, "index": None, "shards": {"model.safetensors": "5" * 64}, "revision": None}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(2))


def disturb(model, seed):
    """As if trained: every trainable moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in named_trainables(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def prepare(model, how, seed=0):
    """``how``: LoraSettings, "full" or "none"."""
    if isinstance(how, LoraSettings):
        model = attach_lora(model, how, seed=7)
    else:
        set_trainable(model, how)
    disturb(model, seed)
    return model.eval()


def save(directory, model, part, base, how, **changes):
    lora = how if isinstance(how, LoraSettings) else None
    about = {
        "base": str(base), "identity": IDENTITY, "cut": CUT, "trainables": "lora" if lora else how, "lora": lora,
        "task": "causal-lm", "step": 5, "run": "r",
    }  # fmt: skip
    save_part(directory, model, describe_part(model, part=part, **(about | changes)))
    return directory


def split_run(tmp_path, base, ids, ends_how, trunk_how, *, task="causal-lm", cut=CUT, **options):
    """Two parts, disturbed, saved, and the logits they compute together."""
    ends = prepare(load_ends(base, cut, task=task, seed=3, **options), ends_how, seed=11)
    trunk = prepare(load_trunk(base, cut), trunk_how, seed=12)
    attach_trunk(ends, trunk)
    with torch.no_grad():
        logits = ends(input_ids=ids).logits
    save(tmp_path / "ends", ends, "ends", base, ends_how, task=task, cut=cut)
    save(tmp_path / "trunk", trunk, "trunk", base, trunk_how, cut=cut)
    return logits


A, B = LoraSettings(rank=4, alpha=8.0), LoraSettings(rank=2, alpha=7.5)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_merged_adapter_computes_what_the_parts_do(tmp_path, bases, ids, family):
    base = bases / family
    logits = split_run(tmp_path, base, ids, A, A)
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        merged = PeftModel.from_pretrained(model, tmp_path / "out").eval()(input_ids=ids).logits
    assert (logits - plain).abs().max() > 1e-2  # training changed something
    assert torch.equal(merged, logits)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_full_weights_compute_what_the_parts_do(tmp_path, bases, ids, family):
    logits = split_run(tmp_path, bases / family, ids, A, B)
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out", full_weights=True)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    assert (merged - logits).abs().max() < 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"]) == 4


def test_different_ranks_and_alphas_on_the_two_sides(tmp_path, bases, ids):
    ends_how = LoraSettings(rank=3, alpha=7.5, targets=["q_proj", "down_proj"])
    logits = split_run(tmp_path, bases / "llama", ids, ends_how, B)
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, logits)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 7.5)
    assert set(config["rank_pattern"]) == {
        f"model.layers.{i}.{name}" for i in (0, 3) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert config["alpha_pattern"] == {}


@pytest.mark.parametrize(
    ("ends_how", "trunk_how"), [("none", A), (A, "none"), ("none", "full"), ("full", "none"), ("full", A), (A, "full"),
                                ("full", "full")],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_one_side_untrained_or_trained_in_full(tmp_path, bases, ids, family, ends_how, trunk_how):
    base = bases / family
    logits = split_run(tmp_path, base, ids, ends_how, trunk_how)
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out", full_weights=True)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    assert (merged - logits).abs().max() < 1e-5
    if "full" in (ends_how, trunk_how):
        with pytest.raises(ConfigError, match=r"trained full weights.*merge to full weights"):
            merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
    else:
        merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "adapter")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=ids).logits, logits)


@pytest.mark.parametrize("missing", ["ends", "trunk"])
def test_a_missing_side_is_the_base_models(tmp_path, bases, ids, missing):
    split_run(tmp_path, bases / "llama", ids, A, A)
    given = {"ends": tmp_path / "ends", "trunk": tmp_path / "trunk", missing: None}
    merge(given["ends"], given["trunk"], tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), tmp_path / "out")
    blocks = {name.split("layers.")[1][0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert blocks == ({"1", "2"} if missing == "ends" else {"0", "3"})


@pytest.mark.parametrize("cut", [(1, 1), (0, 0)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_classifier_merges_with_its_head(tmp_path, bases, ids, family, cut):
    base = bases / family
    logits = split_run(tmp_path, base, ids, A, B, task="sequence-classification", num_labels=3, cut=cut)
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "whole", full_weights=True)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert whole.config.num_labels == 3
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert (whole(input_ids=ids).logits - logits).abs().max() < 1e-5


def test_a_lone_head_needs_full_weights(tmp_path, bases, ids):
    options = {"task": "sequence-classification", "num_labels": 3, "cut": (0, 0)}
    logits = split_run(tmp_path, bases / "llama", ids, A, "none", **options)
    with pytest.raises(ConfigError, match="only a classification head"):
        merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out")
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out", full_weights=True)
    with torch.no_grad():
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    assert (merged - logits).abs().max() < 1e-5


def test_a_saved_part_is_what_peft_itself_saves(tmp_path, bases):
    model = prepare(load_ends(bases / "llama", CUT, task="sequence-classification", num_labels=2, seed=0), A)
    save(tmp_path / "mine", model, "ends", bases / "llama", A, task="sequence-classification")
    model.save_pretrained(tmp_path / "pefts")
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "pefts" / "adapter_model.safetensors"
    ).read_bytes()
    mine, pefts = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("mine", "pefts"))
    for config in (mine, pefts):
        config["target_modules"] = sorted(config["target_modules"])
        config["modules_to_save"] = set(config["modules_to_save"]) - {"classifier"}  # PEFT adds every name it knows
    assert mine == pefts


def test_a_lone_part_loads_over_the_full_model_without_extra_modules(tmp_path, bases):
    save(tmp_path / "t", prepare(load_trunk(bases / "llama", CUT), A), "trunk", bases / "llama", A)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), tmp_path / "t")
    held = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(held) == 2 * 7 * 2
    about = json.loads((tmp_path / "t" / "splitfl.json").read_text())
    assert (about["part"], about["cut"], about["step"], about["dtype"]) == ("trunk", "1:1", 5, "float32")
    assert about["versions"].keys() == {"splitfl", "torch", "transformers", "peft"}


def test_exporting_the_checkpoint_is_saving_the_part(tmp_path, bases):
    model = prepare(load_ends(bases / "llama", CUT), A)
    about = {
        "part": "ends", "base": str(bases / "llama"), "identity": IDENTITY, "cut": CUT, "trainables": "lora", "lora": A,
        "task": "causal-lm", "run": "r",
    }  # fmt: skip
    for step in (3, 5):
        save_checkpoint(
            checkpoint_directory(tmp_path / "run", step),
            named_trainables(model),
            describe_part(model, step=step, **about),
        )
        disturb(model, step)
        save_part(tmp_path / f"after-{step}", model, describe_part(model, step=step, **about))
    newest = export_part(tmp_path / "run", tmp_path / "newest")
    assert newest["step"] == 5
    export_part(tmp_path / "run", tmp_path / "older", step=3)
    export_part(checkpoint_directory(tmp_path / "run", 3), tmp_path / "named")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "newest" / name).read_bytes() == (tmp_path / "after-3" / name).read_bytes()
        assert (tmp_path / "older" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()
    assert (tmp_path / "older" / "adapter_model.safetensors").read_bytes() != (
        tmp_path / "newest" / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint of step 4: it has 3, 5"):
        export_part(tmp_path / "run", tmp_path / "x", step=4)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_part(tmp_path / "newest", tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        export_part(tmp_path / "run", tmp_path / "newest")
    with pytest.raises(CheckpointError, match="splitfl export"):
        read_part(tmp_path / "run")
    save_checkpoint(tmp_path / "other", {}, {"step": 1})
    with pytest.raises(CheckpointError, match="does not describe a part"):
        export_part(tmp_path / "other", tmp_path / "x")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_that_says_only_what_is_needed(tmp_path, bases, ids, family):
    base = bases / family
    ends = prepare(load_ends(base, CUT, task="sequence-classification", num_labels=3, seed=3), A, seed=11)
    trunk = prepare(load_trunk(base, CUT), A, seed=12)
    attach_trunk(ends, trunk)
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
    for part, model, task in (("ends", ends, "sequence-classification"), ("trunk", trunk, None)):
        meta = {
            "part": part, "base": str(base), "identity": IDENTITY, "cut": "1:1", "trainables": "lora", "lora": settings,
            "task": task, "step": 5, "libraries": {},
        }  # fmt: skip
        save_checkpoint(checkpoint_directory(tmp_path / part, 5), named_trainables(model), meta)
        export_part(tmp_path / part, tmp_path / f"{part}-out")
    merge(tmp_path / "ends-out", tmp_path / "trunk-out", tmp_path / "adapter")
    merge(tmp_path / "ends-out", tmp_path / "trunk-out", tmp_path / "whole", full_weights=True)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        logits = ends(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert (whole(input_ids=ids).logits - logits).abs().max() < 1e-5


def test_an_untrained_part_is_exported_as_such(tmp_path, bases):
    save(tmp_path / "e", prepare(load_ends(bases / "llama", CUT), "none"), "ends", bases / "llama", "none")
    assert [file.name for file in (tmp_path / "e").iterdir()] == ["splitfl.json"]
    assert read_part(tmp_path / "e").tensors == {}
    with pytest.raises(CheckpointError, match="Nothing trained"):
        merge(tmp_path / "e", None, tmp_path / "out")


def test_parts_that_do_not_belong_together_are_refused(tmp_path, bases):
    base = bases / "llama"
    ends = prepare(load_ends(base, CUT), A)
    trunk = prepare(load_trunk(base, CUT), A)
    save(tmp_path / "ends", ends, "ends", base, A)
    other_config = IDENTITY | {"config": "d" * 64}
    other_shard = IDENTITY | {"shards": {"model.safetensors": "6" * 64}}
    cases = {
        "config.json differ.*merge parts of one run": {"identity": other_config},
        "model.safetensors differ": {"identity": other_shard},
        "does not say which model": {"identity": {}},
        "cut at 1:1, the trunk at 2:1": {"cut": (2, 1)},
        "from run r, the trunk from run s": {"run": "s"},
        "of step 5, the trunk of step 6": {"step": 6},
    }
    for index, (words, changes) in enumerate(cases.items()):
        save(tmp_path / f"trunk-{index}", trunk, "trunk", base, A, **changes)
        with pytest.raises(CheckpointError, match=words):
            merge(tmp_path / "ends", tmp_path / f"trunk-{index}", tmp_path / "out")
    for words, pair in {
        "swap": (tmp_path / "trunk-0", None), "holds the ends": (None, tmp_path / "ends"),
        "no exported part": (tmp_path, None),
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            merge(*pair, tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(None, None, tmp_path / "out")
    save(tmp_path / "same", ends, "trunk", base, A)
    with pytest.raises(CheckpointError, match="Both parts hold"):
        merge(tmp_path / "ends", tmp_path / "same", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_an_asynchronous_run_need_not_be_of_one_step(tmp_path, bases):
    base = bases / "llama"
    for part, load, step, more in (("ends", load_ends, 7, {}), ("trunk", load_trunk, 3, {"mode": "async"})):
        model = prepare(load(base, CUT), A)
        meta = describe_part(
            model, part=part, base=str(base), identity=IDENTITY, cut=CUT, trainables="lora", lora=A, task="causal-lm", step=step
        )
        save_checkpoint(checkpoint_directory(tmp_path / part, step), named_trainables(model), meta | more)
        export_part(tmp_path / part, tmp_path / f"{part}-out")
    merge(tmp_path / "ends-out", tmp_path / "trunk-out", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_sides_that_know_different_shards_belong_together(tmp_path, bases):
    base = bases / "llama"
    mine = IDENTITY | {"shards": {"1.safetensors": "a" * 64, "2.safetensors": "b" * 64}}
    theirs = IDENTITY | {"shards": {"2.safetensors": "b" * 64, "3.safetensors": "c" * 64}, "revision": "x"}
    save(tmp_path / "ends", prepare(load_ends(base, CUT), A), "ends", base, A, identity=mine)
    save(tmp_path / "trunk", prepare(load_trunk(base, CUT), A), "trunk", base, A, identity=theirs, run=None)
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_base_may_lie_elsewhere(tmp_path, bases, ids):
    ends = prepare(load_ends(bases / "llama", CUT), A)
    save(tmp_path / "ends", ends, "ends", tmp_path / "gone", A)
    with pytest.raises(ModelError, match=r"cannot be loaded .*--base"):
        merge(tmp_path / "ends", None, tmp_path / "out", full_weights=True)
    merge(tmp_path / "ends", None, tmp_path / "out", full_weights=True, base=str(bases / "llama"))
    with pytest.raises(CheckpointError, match="not the model these parts"):
        merge(tmp_path / "ends", None, tmp_path / "other", full_weights=True, base=str(bases / "gpt2"))
    assert not (tmp_path / "other").exists()


def test_of_a_hub_model_the_revision_that_was_trained_on_is_taken(tmp_path, bases, monkeypatch):
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def model_of(base, *, revision=None, **options):
        asked.append((base, revision))
        return load(bases / "llama", **options)

    def tokenizer_of(base, *, revision=None):
        asked.append((base, revision))
        raise OSError("it has none")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_of)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenizer_of)
    ends = prepare(load_ends(bases / "llama", CUT), A)
    save(tmp_path / "ends", ends, "ends", "owner/name", A, identity=IDENTITY | {"revision": "v1"})
    merge(tmp_path / "ends", None, tmp_path / "out", full_weights=True)
    assert asked == [("owner/name", "v1")] * 2


def test_trainables_are_taken_up_again(bases):
    model = prepare(load_trunk(bases / "llama", CUT), A)
    saved = {name: value.detach().clone() for name, value in named_trainables(model).items()}
    again = attach_lora(load_trunk(bases / "llama", CUT), A, seed=1)
    load_trainables(again, saved)
    for name, value in named_trainables(again).items():
        assert torch.equal(value, saved[name])
    with pytest.raises(CheckpointError, match="same model and rank"):
        load_trainables(attach_lora(load_trunk(bases / "llama", CUT), B, seed=1), saved)
    with pytest.raises(CheckpointError, match="same cut and trainables"):
        load_trainables(attach_lora(load_trunk(bases / "llama", (2, 1)), A, seed=1), saved)


def test_bf16_runs_merge_in_bf16(tmp_path, bases, ids):
    base = bases / "llama"
    ends = prepare(load_ends(base, CUT, dtype=torch.bfloat16), "none")
    trunk = prepare(load_trunk(base, CUT, dtype=torch.bfloat16), "full")
    save(tmp_path / "ends", ends, "ends", base, "none")
    save(tmp_path / "trunk", trunk, "trunk", base, "full")
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "out", full_weights=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    attach_trunk(ends, trunk)
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, ends(input_ids=ids).logits)
