"""One rank of ``test_sharding``: runs cases of a sharded trunk through its engine, and tells how far each is from one process. In
comes a JSON list of settings, out goes one of findings.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from server_trunk.adapter_book import AdapterBook
from server_trunk.building import Trunk
from server_trunk.decoding import Decoding, Run
from server_trunk.engine import Engine
from server_trunk.kvcache import CacheBook
from server_trunk.members import BackwardBatch, ForwardBatch, Member
from server_trunk.pieces import is_out_of_memory
from server_trunk.sharding.engines import follow
from server_trunk.sharding.group import ShardGroup, join_shards
from server_trunk.sharding.training import whole_optimizer
from splitfl.checkpoint import load_checkpoint, save_checkpoint
from splitfl.config import build_config
from splitfl.errors import SplitflError
from splitfl.packed_state import unpack_state
from splitfl.parts.cached_attention import KeptSequence
from splitfl.protocol.data import NO_PARENT
from splitfl.protocol.messages import Backward, Forward
from splitfl.shards import local_of

HIDDEN = 32
#: Batches of clients with unlike segments: the last has fewer segments than there are ranks, the one before a single pair.
BATCHES: tuple[dict[str, tuple[tuple[int, int], ...]], ...] = (
    {"a": ((7, 0), (3, 0), (12, 4)), "b": ((5, 0), (5, 0)), "c": ((9, 2),)},
    {"a": ((6, 0),), "b": ((11, 0),)},
    {"c": ((8, 3),)},
)
#: A large epsilon: AdamW's first step is otherwise the sign of each gradient, also of one that is nothing but rounding.
OPTIMIZER = {"optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.1, "optimizer.eps": 1e-3}
TARGETS = {"a": 28, "b": 21, "c": 17}
#: What is decoded, as segments and the sequences that they go on: two prompts; one of them in two beams; these change places; of
#: the other a token is taken back.
DECODED = (
    (((5, 0), (3, 0)), ((0, (NO_PARENT, 0)), (1, (NO_PARENT, 0)))),
    (((1, 5), (1, 5), (1, 3)), ((0, (0, 5)), (2, (0, 5)), (1, (1, 3)))),
    (((2, 6), (1, 6)), ((0, (2, 6)), (2, (0, 6)))),
    (((3, 3), (1, 7)), ((1, (1, 3)), (2, (2, 7)))),
)

#: The number of a forward that fails on the followers alone, at its end.
ALONE = 6


def batch_of(segments: dict[str, tuple[tuple[int, int], ...]], seed: int) -> list[Member]:
    draw = torch.Generator().manual_seed(seed)
    members = []
    for client, own in segments.items():
        forward = Forward(0, 0, own, HIDDEN, "float32", "raw", True, True, True)
        member = Member(client, forward, torch.randn(forward.rows, HIDDEN, generator=draw), client)
        member.backward = Backward(0, 0, forward.rows, HIDDEN, "float32", "raw", forward.rows, 3.0)
        member.gradient = torch.randn(forward.rows, HIDDEN, generator=draw)
        members.append(member)
    return members


def worked(engine: Engine, steps: int = 2) -> tuple[dict[str, torch.Tensor], Any]:
    """What comes out of some steps, every batch once with its graph kept and once computed again: by name, and the state."""
    found: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for number, segments in enumerate(BATCHES * 2):
            members = batch_of(segments, number)
            y, kept = engine.forward(ForwardBatch(number, members, number < len(BATCHES)))
            dh = engine.backward(BackwardBatch(number, members, kept))
            for index, tensors in enumerate(zip(y.tensors, dh.tensors, strict=True)):
                found |= {f"{step}.{number}.{index}.{what}": one for what, one in zip(("y", "dh"), tensors, strict=True)}
        report = engine.close_step(step, TARGETS)
        found[f"{step}.grad_norm"] = torch.tensor(report.grad_norm)
    evaluated = batch_of(BATCHES[0], 9)
    for member in evaluated:
        member.forward = Forward(0, 0, member.forward.segments, HIDDEN, "float32", "raw", False, False, True)
    y, _ = engine.forward(ForwardBatch(99, evaluated, False))
    return found | {f"evaluated.{index}": one for index, one in enumerate(y.tensors)}, engine.state()


def decoded(engine: Engine) -> tuple[dict[str, torch.Tensor], int]:
    """What comes out where sequences are gone on from, and how often a batch had to run again, as a rank was out of memory. When
    the second client's run the first one's are gone.
    """
    book = CacheBook(1000, 1000, getattr(engine, "new_sequence", KeptSequence))
    found: dict[str, torch.Tensor] = {}
    failed = 0
    for client in "ab":
        draw = torch.Generator().manual_seed(ord(client))
        for number, (segments, sequences) in enumerate(DECODED):
            forward = Forward(0, number, segments, HIDDEN, "float32", "raw", False, False, True, 0, sequences)
            each = Decoding(client, client, forward, torch.randn(forward.rows, HIDDEN, generator=draw), 0.0)
            book.expect(client, forward)
            follows = book.begin(client, client, forward)
            assert follows is not None
            begins = [sum(length for length, _ in segments[:index]) for index in range(len(segments))]
            runs = [Run(each, index, begins[index], *segment, follows[index]) for index, segment in enumerate(segments)]
            try:
                out = engine.decode(runs)
            except RuntimeError as error:
                failed += is_out_of_memory(error)
                out = engine.decode(runs)
            for index, y in enumerate(out.tensors):
                found[f"decoded.{client}.{number}.{index}"] = y
            for run in runs:
                run.follows.commit(run.length)
            book.done(client, forward)
        book.forget(client)
    return found, failed


def failing(engine: Engine) -> str:
    """A batch that a follower alone cannot run, and one that no rank can, while one waits for its backward; returns what is said
    of the second.
    """
    waiting = batch_of(BATCHES[0], 7)
    _, kept = engine.forward(ForwardBatch(7, waiting, True))
    (odd,) = batch_of({"a": ((6, 0),)}, 8)
    odd.hidden = odd.hidden[:, 1:].contiguous()
    try:
        engine.forward(ForwardBatch(ALONE, batch_of(BATCHES[0], ALONE), True))
        return "nothing"
    except RuntimeError:
        engine.discard(ALONE)
    try:
        engine.forward(ForwardBatch(8, [odd], True))
    except Exception as error:
        engine.discard(8)
        for member in waiting:
            assert member.backward is not None
            member.gradient.zero_()  # of which nothing is left in the step's sum
        engine.backward(BackwardBatch(7, waiting, kept))
        return type(error).__name__
    return "nothing"


def kept_in_shards(engine: Any) -> float:
    """How far what is written in shards is from what was there, read by these ranks and made whole by one process."""
    weights, extra = engine.state()
    with tempfile.TemporaryDirectory() as folder:
        assert engine.shares(Path(folder))
        save_checkpoint(Path(folder) / "kept", {}, {}, engine.outline(), write=engine.write)
        whole, _, files = load_checkpoint(Path(folder) / "kept")
        outline = unpack_state(files["optimizer"])
        optimizer = {"optimizer": whole_optimizer(Path(folder) / "kept", outline)}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        engine.training.load(zeros, {"optimizer": {"state": {}, "param_groups": outline["param_groups"]}})
        engine.read(Path(folder) / "kept", outline)
    again, extra_again = engine.state()
    assert extra_again["optimizer"]["param_groups"] == extra["optimizer"]["param_groups"]
    pairs = ((whole, weights), (moments(optimizer), moments(extra)), (again, weights), (moments(extra_again), moments(extra)))
    return sum(farthest(mine, theirs) for mine, theirs in pairs)


def bytes_of(model: torch.nn.Module) -> int:
    """Memory of all parameters on this rank, of the frozen ones alone."""
    return sum(local_of(p).untyped_storage().nbytes() for n, p in model.named_parameters() if ".lora_" not in n)


class Trained:
    """Memory of what training adds, the most at any step: gradients as the optimizer takes them, and its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.bytes = 0
        optimizer.register_step_post_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        state = [tensor for entry in optimizer.state.values() for tensor in entry.values() if tensor.numel() > 1]
        storages = [local_of(tensor).untyped_storage() for tensor in (*gradients, *state)]
        # Several gradients may be views of one buffer.
        self.bytes = max(self.bytes, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))


def farthest(mine: dict[Any, Any], theirs: dict[Any, Any]) -> float:
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)) for name in theirs)


def moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{i}.{key}": entry[key] for i, entry in state["optimizer"]["state"].items() for key in ("exp_avg", "exp_avg_sq")}


def run_case(values: dict[str, Any]) -> dict[str, Any]:
    base = {"device": "cpu", "lanes": 1, "lora.rank": 4} | OPTIMIZER | values
    config = build_config(base)
    group = join_shards(config)
    assert group is not None
    try:
        trunk = Trunk(config, group.device, AdapterBook(config), group)
    except SplitflError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    held = [0] * group.size
    held[group.rank] = bytes_of(trunk.model)
    bytes_held = group.sum(torch.tensor(held)).tolist()
    trained = Trained(trunk.engine.training.optimizer)
    if not group.leads:
        _fail_alone(trunk.engine)
        follow(trunk.engine, trunk.model, group)
        _bytes_trained(trained, group)
        return {}
    return _compare(trunk, group, trained, bytes_held, build_config(base | {"shard": "none", "shard_size": 1}))


def _bytes_trained(trained: Trained, group: ShardGroup) -> list[int]:
    """On every rank: that of each."""
    own = [0] * group.size
    own[group.rank] = trained.bytes
    return group.sum(torch.tensor(own)).tolist()


def _fail_alone(engine: Engine) -> None:
    forward, decode = engine.forward, engine.decode
    decoding = itertools.count()

    def failing_once(batch: ForwardBatch) -> Any:
        ran = forward(batch)
        if batch.number == ALONE:
            raise RuntimeError("no memory for the answer")
        return ran

    def failing_at_first(runs: Any) -> Any:
        ran = decode(runs)
        if not next(decoding):
            raise torch.OutOfMemoryError("no memory for the answer")
        return ran

    engine.forward, engine.decode = failing_once, failing_at_first  # type: ignore[method-assign]


def _compare(trunk: Trunk, group: ShardGroup, trained: Trained, bytes_held: list[int], plain: Any) -> dict[str, Any]:
    failed = failing(trunk.engine)
    found, (weights, extra) = worked(trunk.engine)
    written, again_decoded = decoded(trunk.engine) if trunk.cache_obstacle is None else ({}, 0)
    trunk.engine.training.load(weights, extra)
    again, extra_again = trunk.engine.state()
    kept = kept_in_shards(trunk.engine) if plain.trainables == "full" else 0.0
    trunk.engine.stop()  # type: ignore[attr-defined]
    bytes_trained = _bytes_trained(trained, group)
    alone = Trunk(plain, torch.device("cpu"), AdapterBook(plain))
    trained_alone = Trained(alone.engine.training.optimizer)
    reference, (weights_alone, extra_alone) = worked(alone.engine)
    reference |= decoded(alone.engine)[0] if trunk.cache_obstacle is None else {}
    return {
        "failed": failed,
        "packing_obstacle": trunk.packing_obstacle,
        "cache_obstacle": trunk.cache_obstacle,
        "decoded_again": again_decoded,
        "numbers": farthest(found | written, reference),
        "weights": farthest(weights, weights_alone),
        "moments": farthest(moments(extra), moments(extra_alone)),
        "moved": min(
            float(tensor.norm()) for name, tensor in weights_alone.items() if ".lora_B." in name or ".lora_" not in name
        ),
        "resumed": farthest(again, weights) + farthest(moments(extra_again), moments(extra)),
        "kept": kept,
        "bytes": [held / bytes_of(alone.model) for held in bytes_held],
        "bytes_trained": [each / trained_alone.bytes for each in bytes_trained],
    }


def main(cases: str, out: str) -> None:
    """``cases``: a file of them; ``out``: one for what was found."""
    torch.set_num_threads(1)
    findings = [run_case(values) for values in json.loads(Path(cases).read_text())]
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(findings))
