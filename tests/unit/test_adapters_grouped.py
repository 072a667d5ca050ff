"""An adapter a client in one mixed batch computes, forward and backward, what PEFT computes for each client alone."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from splitfl.adapters import LoraSettings, attach_lora, named_trainables
from splitfl.adapters import grouped as module
from splitfl.adapters.grouped import AdapterPair, ClientLoras, GroupedLinear, add_in_blocks, add_in_runs
from splitfl.errors import ModelError
from splitfl.parts.dropout import dropout_key, install_keyed_dropout
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import run_segments, why_not_packed
from splitfl.parts.rows import Rows, running_on
from tests.unit.adapter_models import save_bases

OWNERS = {"ada": (4, 8.0), "ben": (2, 16.0), "cleo": (7, 7.0)}
#: By segment: whose it is, and its length and start.
SEGMENTS = (("ada", (5, 0)), ("ben", (9, 2)), ("ben", (3, 0)), ("", (4, 0)), ("cleo", (9, 1)), ("ada", (2, 0)))
WIRE = tuple(wire for _, wire in SEGMENTS)
WHOSE = tuple(owner for owner, _ in SEGMENTS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return save_bases(tmp_path_factory.mktemp("bases"))


def difference(mine, theirs):
    return float((mine - theirs).norm() / theirs.norm())


def disturb(parameters):
    """Adapters as they are after some training: B is not zero, and no two are alike."""
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(parameters.items())):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1


def alone(path, owner, flat, rows, dy, dropout=0.0):
    """PEFT's own layers, for the segments of one client: y, dh and the gradients by full name."""
    trunk = load_trunk(path, "1:1")
    if owner:
        rank, alpha = OWNERS[owner]
        model = attach_lora(trunk, LoraSettings(rank, alpha, dropout), seed=3)
        disturb(named_trainables(model))
    else:
        model = trunk.requires_grad_(False)
    install_keyed_dropout(model)
    model.train()
    flat = flat.clone().requires_grad_()
    y = run_segments(model, flat, rows)
    named = named_trainables(model)
    dh, *gradients = torch.autograd.grad(y, [flat, *named.values()], dy)
    return y.detach(), dh, dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize(
    ("family", "packed", "way", "dropout"),
    [
        ("llama", False, "runs", 0.0),
        ("llama", True, "runs", 0.3),
        ("llama", True, "blocks", 0.0),
        ("llama", False, "blocks", 0.3),
        ("gpt2", False, "runs", 0.3),
        ("gpt2", True, "blocks", 0.0),
    ],
)
def test_one_mixed_batch_equals_each_client_alone(bases, monkeypatch, family, packed, way, dropout):
    if way == "blocks":
        monkeypatch.setattr(module, "add_in_runs", lambda *arguments: add_in_blocks(*arguments, block=4))
    path = str(bases / family)
    trunk = load_trunk(path, "1:1")
    assert why_not_packed(trunk) is None
    loras = ClientLoras(trunk, LoraSettings(dropout=dropout), seed=3)
    named = {owner: loras.add(owner, rank=rank, alpha=alpha) for owner, (rank, alpha) in OWNERS.items()}
    for parameters in named.values():
        disturb(parameters)
    install_keyed_dropout(trunk)
    trunk.train()
    draw = torch.Generator().manual_seed(0)
    tokens = sum(length for length, _ in WIRE)
    flat, dy = (torch.randn(tokens, 16, generator=draw) for _ in "hd")
    keys = tuple(dropout_key(0, 1, owner, 0, index) for index, owner in enumerate(WHOSE))
    flat.requires_grad_()
    y = run_segments(trunk, flat, Rows(WIRE, packed, WHOSE, keys))
    everything = [parameter for parameters in named.values() for parameter in parameters.values()]
    dh, *gradients = torch.autograd.grad(y, [flat, *everything], dy)
    left = dict(zip(map(id, everything), gradients, strict=True))

    ends = torch.tensor([0, *(length for length, _ in WIRE)]).cumsum(0).tolist()
    places = [slice(begin, end) for begin, end in pairwise(ends)]
    for owner in ("", *OWNERS):
        own = [index for index, whose in enumerate(WHOSE) if whose == owner]
        rows = Rows(tuple(WIRE[index] for index in own), False, keys=tuple(keys[index] for index in own))

        def pick(tensor, own=own):
            return torch.cat([tensor[places[index]] for index in own])

        reference_y, reference_dh, reference = alone(path, owner, pick(flat.detach()), rows, pick(dy), dropout)
        assert difference(pick(y.detach()), reference_y) < 2e-6
        assert difference(pick(dh), reference_dh) < 2e-6
        for name, gradient in reference.items():
            assert difference(left[id(named[owner][name])], gradient) < 5e-6, name
        assert not owner or reference.keys() == named[owner].keys()


def pairs_of(ranks, into=12, out=10):
    draw = torch.Generator().manual_seed(1)
    shape = [(rank, into) for rank in ranks], [(out, rank) for rank in ranks]
    a, b = ([Parameter(torch.randn(*size, generator=draw, dtype=torch.float64)) for size in sizes] for sizes in shape)
    return [AdapterPair(first, second, 8 / rank) for first, second, rank in zip(a, b, ranks, strict=True)]


@pytest.mark.parametrize(
    "runs",
    [
        ((0, 0, 6), (1, 6, 12), (2, 12, 18)),  # as many rows each
        ((2, 0, 1), (0, 1, 9), (2, 9, 11), (1, 11, 18)),  # unequal, and twice the same client
        ((1, 3, 5), (0, 9, 17)),  # rows without an adapter, a client without rows
    ],
)
def test_both_ways_have_autograds_gradients(runs):
    pairs = pairs_of([3, 1, 5])
    draw = torch.Generator().manual_seed(2)
    base = nn.Linear(12, 10, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(18, 12, generator=draw, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(18, 10, generator=draw, dtype=torch.float64)
    present = sorted({pair for pair, _, _ in runs})
    weights = [weight for index in present for weight in (pairs[index].a, pairs[index].b)]

    delta = torch.zeros(18, 10, dtype=torch.float64)
    for index, begin, end in runs:
        pair = pairs[index]
        delta = delta + nn.functional.pad(x[begin:end] @ pair.a.T @ pair.b.T * pair.scaling, (0, 0, begin, 18 - end))
    expected = [base(x) + delta, *torch.autograd.grad(base(x) + delta, [x, *weights], dy)]
    for add in (add_in_runs, lambda *given: add_in_blocks(*given, block=4)):
        y = add(base(x), x, runs, pairs)
        found = [y, *torch.autograd.grad(y, [x, *weights], dy)]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        # The fused AdamW goes by the memory's order, whatever the strides say.
        assert all(gradient.is_contiguous() for gradient in found[2:])


@pytest.mark.parametrize("way", ["runs", "blocks"])
def test_backward_uses_the_mask_that_forward_drew(monkeypatch, way):
    """Against autograd of an explicit mask; a backward that forgot the mask would give every A the gradient of undropped rows."""
    if way == "blocks":
        monkeypatch.setattr(module, "add_in_runs", lambda *arguments: add_in_blocks(*arguments, block=4))
    layer = GroupedLinear(nn.Linear(12, 10).double().requires_grad_(False), 0.5).train()
    pairs = pairs_of([3, 5])
    layer.of = dict(zip(("ada", "ben"), pairs, strict=True))
    rows = Rows(((4, 0), (7, 0)), True, ("ada", "ben"))
    x = torch.randn(1, 11, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 11, 10, dtype=torch.float64)
    weights = [weight for pair in pairs for weight in (pair.a, pair.b)]
    with running_on(rows):
        torch.manual_seed(7)
        y = layer(x)
    found = torch.autograd.grad(y, [x, *weights], dy)
    torch.manual_seed(7)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    dropped = x * mask
    reference = layer.base_layer(x) + torch.cat(
        [
            dropped[:, part] @ pair.a.T @ pair.b.T * pair.scaling
            for part, pair in zip((slice(4), slice(4, 11)), pairs, strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(y, reference)
    for mine, theirs in zip(found, torch.autograd.grad(reference, [x, *weights], dy), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_outside_a_run_and_without_owners_there_is_the_base_alone(bases):
    trunk = load_trunk(str(bases / "llama"), "1:1")
    x = torch.randn(1, 6, 16)
    plain = trunk(x)
    loras = ClientLoras(trunk, LoraSettings(), seed=0)
    disturb(loras.add("ada", rank=4, alpha=8.0))
    assert not [name for name, parameter in trunk.named_parameters() if parameter.requires_grad or "lora" in name]
    assert torch.equal(trunk(x), plain)
    flat = x[0]
    assert torch.equal(run_segments(trunk, flat, Rows(((6, 0),), False))[None], plain)
    assert torch.equal(run_segments(trunk, flat, Rows(((6, 0),), False, ("",)))[None], plain)
    assert not torch.allclose(run_segments(trunk, flat, Rows(((6, 0),), False, ("ada",)))[None], plain)
    loras.remove("ada")
    with pytest.raises(KeyError, match="ada"):
        run_segments(trunk, flat, Rows(((6, 0),), False, ("ada",)))


def test_threads_run_one_model_on_different_clients(bases):
    trunk = load_trunk(str(bases / "llama"), "1:1")
    loras = ClientLoras(trunk, LoraSettings(), seed=0)
    named = {owner: loras.add(owner, rank=rank, alpha=alpha) for owner, (rank, alpha) in OWNERS.items()}
    for number, parameters in enumerate(named.values()):
        for parameter in parameters.values():
            parameter.data += 0.05 * (number + 1)
    x = torch.randn(12, 16)

    def run(owner):
        y = run_segments(trunk, x, Rows(((12, 0),), False, (owner,)))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(named[owner].values()))]

    expected = {owner: run(owner) for owner in OWNERS}
    found, start = {}, threading.Barrier(len(OWNERS))

    def work(owner):
        start.wait()
        for _ in range(20):
            found[owner] = run(owner)
            if not all(map(torch.equal, found[owner], expected[owner])):
                return

    threads = [threading.Thread(target=work, args=(owner,)) for owner in OWNERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for owner in OWNERS:
        assert all(map(torch.equal, found[owner], expected[owner])), owner


def test_runs_of_one_owner_are_joined():
    rows = Rows(((3, 0), (2, 0), (4, 0)), True, ("ada", "ada", "ben"))
    assert rows.runs == (("ada", 0, 5), ("ben", 5, 9))
    assert Rows(rows.wire, False, rows.owners).runs == (("ada", 0, 8), ("ben", 8, 12))
    assert Rows(rows.wire, False).runs == ()


def test_half_precision_keeps_adapters_in_fp32(bases):
    trunk = load_trunk(str(bases / "llama"), "1:1", dtype="bfloat16")
    loras = ClientLoras(trunk, LoraSettings(), seed=0)
    named = loras.add("ada", rank=4, alpha=8.0)
    assert {parameter.dtype for parameter in named.values()} == {torch.float32}
    y = run_segments(trunk, torch.randn(6, 16, dtype=torch.bfloat16), Rows(((6, 0),), False, ("ada",)))
    gradients = torch.autograd.grad(y.float().sum(), list(named.values()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert y.dtype == torch.bfloat16


def test_layers_that_see_other_rows_are_refused_before_anybody_trains(bases):
    trunk = load_trunk(str(bases / "llama"), "1:1")
    mlp = trunk.model.layers[1].mlp
    whole = mlp.forward

    def routed(x):
        return torch.cat([whole(x[:, :1]), x[:, 1:]], dim=1)

    mlp.forward = routed
    with pytest.raises(ModelError, match=r"llama cannot have an adapter for each client in these layers.*--adapters shared"):
        ClientLoras(trunk, LoraSettings(), seed=0).try_out(trunk)
    other = load_trunk(str(bases / "llama"), "1:1")
    loras = ClientLoras(other, LoraSettings(), seed=0)
    loras.try_out(other)
    assert all(not layer.of for layer in loras.layers.values())
