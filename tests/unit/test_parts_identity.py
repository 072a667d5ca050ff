"""Two sides tell whether they hold the same model, each from the files it has."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from splitfl.errors import ModelError, RemoteProtocolError
from splitfl.parts.identity import ModelIdentity, cache_directory, compare, file_digest, model_identity
from splitfl.parts.plan import plan
from tests.families import FAMILIES, save_family


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(tmp_path_factory.mktemp("cache"))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, base)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_family(FAMILIES[0], tmp_path / "model", shard_size="16KB")


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_digests_are_of_the_files(model: Path) -> None:
    found = model_identity(model)
    assert found.shards == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.glob("*.safetensors")}
    assert found.revision is None
    assert found.index_digest is not None


def test_it_survives_the_wire(model: Path) -> None:
    found = model_identity(model)
    assert ModelIdentity.from_plain(json.loads(json.dumps(found.to_plain()))) == found
    assert compare(found, found) is None


def test_what_says_nothing_about_the_weights_makes_no_difference(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    edit_config(tmp_path / "other", transformers_version="4.0", dtype="bfloat16", use_cache=False, _name_or_path="x")
    assert compare(model_identity(model), model_identity(tmp_path / "other")) is None


def test_each_difference_has_its_sentence(model: Path, tmp_path: Path) -> None:
    mine = model_identity(model)
    shutil.copytree(model, tmp_path / "config")
    edit_config(tmp_path / "config", rms_norm_eps=0.5)
    assert "config.json differ" in str(compare(mine, model_identity(tmp_path / "config")))

    weights = shutil.copytree(model, tmp_path / "weights")
    shard = sorted(weights.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"the weights in {shard.name} differ" in str(compare(mine, model_identity(weights)))

    other = save_family(FAMILIES[0], tmp_path / "other", shard_size="40KB")
    assert "divided among files in different ways" in str(compare(mine, model_identity(other)))
    single = save_family(FAMILIES[0], tmp_path / "single", shard_size="1GB")
    assert "one file and the other in several" in str(compare(mine, model_identity(single)))


def test_a_side_that_lacks_shards_compares_the_rest(model: Path, tmp_path: Path) -> None:
    found = plan(model, (1, 1))
    theirs, mine = shutil.copytree(model, tmp_path / "theirs"), shutil.copytree(model, tmp_path / "mine")
    for name in set(found.files) - set(found.ends.files):
        (mine / name).unlink()
    for name in set(found.files) - set(found.trunk.files):
        (theirs / name).unlink()
    assert compare(model_identity(mine), model_identity(theirs)) is None
    shared = sorted(set(found.ends.files) & set(found.trunk.files))[0]
    (mine / shared).write_bytes((mine / shared).read_bytes() + b"x")
    assert shared in str(compare(model_identity(mine), model_identity(theirs)))


def test_revisions_are_named_where_they_differ() -> None:
    one, other = (ModelIdentity(digit * 64, None, {}, digit * 40) for digit in "ab")
    assert "here revision aaaaaaaaaaaa, there bbbbbbbbbbbb" in str(compare(one, other))
    assert compare(one, ModelIdentity("a" * 64, None, {}, "b" * 40)) is None


def test_no_weights_at_all(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        model_identity(model)


@pytest.mark.parametrize(
    "change",
    [
        {"config": "a" * 63},
        {"config": None},
        {"index": 7},
        {"index": "G" * 64},
        {"shards": []},
        {"shards": {"x": "y"}},
        {"shards": {"x" * 300: "a" * 64}},
        {"shards": {1: "a" * 64}},
        {"revision": 5},
        {"revision": "x" * 300},
        {"more": 1},
    ],
)
def test_what_a_peer_sends_is_checked(change: dict[str, object]) -> None:
    plain = {"config": "a" * 64, "index": None, "shards": {"x": "b" * 64}, "revision": None}
    assert ModelIdentity.from_plain(plain).shards == {"x": "b" * 64}
    with pytest.raises(RemoteProtocolError):
        ModelIdentity.from_plain({**plain, **change})
    with pytest.raises(RemoteProtocolError):
        ModelIdentity.from_plain([1])


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"one")
    first = file_digest(file)
    assert first == hashlib.sha256(b"one").hexdigest()
    assert (cache_directory() / "digests.json").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "sha256", lambda *_: pytest.fail("hashed again"))
        assert file_digest(file) == first
    file.write_bytes(b"other")
    assert file_digest(file) == hashlib.sha256(b"other").hexdigest()
    (cache_directory() / "digests.json").write_text("{damaged")
    assert file_digest(file) == hashlib.sha256(b"other").hexdigest()


def test_the_plan_says_what_is_sent(model: Path) -> None:
    found = plan(model, "1:2")
    assert found.ends.blocks == (0, 3, 4)
    assert found.trunk.blocks == (1, 2)
    assert found.bytes_per_token("float32") == 128
    text = found.render()
    assert "LlamaForCausalLM, 5 blocks, hidden size 32, float32" in text
    assert "0, 3-4" in text
    assert "128 B a crossing; training 256 B up, 256 B down" in text
    assert "packed" not in text
    with pytest.raises(ModelError, match="leaves no block"):
        plan(model, "3:2")


def test_the_plan_says_where_packing_is_refused(tmp_path: Path) -> None:
    bloom = next(family for family in FAMILIES if family.name == "bloom")
    assert "packed sequences are refused" in plan(save_family(bloom, tmp_path)).render()
