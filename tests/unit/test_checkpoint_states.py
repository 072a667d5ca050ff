"""Nested state, such as an optimizer's, on its way into a checkpoint and out of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes

from splitfl.checkpoint import load_checkpoint, save_checkpoint
from splitfl.errors import CheckpointError
from splitfl.packed_state import pack_state, unpack_state

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_any_plain_state_survives_packing(state):
    loaded = unpack_state(pack_state(state))
    assert loaded == state
    assert repr(loaded) == repr(state)  # True is not 1, a tuple no list, and -0.0 keeps its sign


def test_optimizer_state_survives_packing():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1 / 3, betas=(0.9, 0.95))
    weight.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    loaded = unpack_state(pack_state(state))
    assert loaded["param_groups"] == state["param_groups"]
    assert type(loaded["param_groups"][0]["betas"]) is tuple
    assert loaded["state"].keys() == state["state"].keys() == {0}
    for name, value in state["state"][0].items():
        assert torch.equal(loaded["state"][0][name], value)
        assert loaded["state"][0][name].dtype == value.dtype


def test_state_handed_over_as_it_is_equals_packed_state(tmp_path):
    whole = torch.arange(6, dtype=torch.float32)
    state = {
        "param_groups": [{"lr": 0.1, "params": [0]}],
        "a": whole,
        "b": whole.view(2, 3),
        "c": whole[::2],
        "d": whole[:2],
    }
    save_checkpoint(tmp_path / "c", {}, {}, {"optimizer": state})
    loaded = unpack_state(load_checkpoint(tmp_path / "c")[2]["optimizer"])
    assert loaded["param_groups"] == state["param_groups"]
    for name in "abcd":
        assert torch.equal(loaded[name], state[name])
        assert torch.equal(unpack_state(pack_state(state))[name], state[name])


def test_shared_memory_and_plain_values_survive_packing():
    shared = torch.arange(4)
    state = {"a": shared, "b": shared[1:3], "rng": [1, (2, "x", None, True)], 3: 0.1, "empty": {}}
    loaded = unpack_state(pack_state(state))
    assert torch.equal(loaded.pop("a"), state.pop("a"))
    assert torch.equal(loaded.pop("b"), state.pop("b"))
    assert loaded == state


def test_states_refuse_what_they_cannot_carry():
    with pytest.raises(TypeError, match="cannot be part"):
        pack_state({"a": object()})
    with pytest.raises(TypeError, match="keys"):
        pack_state({(1, 2): 1})
    with pytest.raises(CheckpointError, match="damaged"):
        unpack_state(b"not a state at all")


def test_a_state_is_unpacked_one_tensor_at_a_time(monkeypatch):
    """What safetensors copies at once holds up every thread, signs of life to other processes too."""
    state = {str(index): torch.full((1000,), float(index)) for index in range(5)} | {"none": torch.empty(0, 3)}
    packed = pack_state(state)
    sizes = []

    def load(content: bytes) -> dict[str, torch.Tensor]:
        sizes.append(len(content))
        return load_bytes(content)

    monkeypatch.setattr("splitfl.packed_state.load_safetensors_bytes", load)
    loaded = unpack_state(packed)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert len(sizes) == 6
    assert max(sizes) < 5000 < len(packed)


@pytest.mark.parametrize(("was", "becomes"), [(b"[16,24]", b"[12,20]"), (b"[16,24]", b"[16,16]"), (b"[0,16]", b"[4,16]")])
def test_a_state_whose_tensors_lie_elsewhere_is_refused(was, becomes):
    packed = pack_state([torch.ones(4), torch.ones(2)])
    assert was in packed
    with pytest.raises(CheckpointError, match="damaged"):
        unpack_state(packed.replace(was, becomes))
