"""What goes wrong in one session stays there: clients that vanish, lie, stay away or come too late."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from client_ends import SplitModelForCausalLM, SplitModelForSequenceClassification
from splitfl.checkpoint import load_checkpoint
from splitfl.errors import SessionLost, UserError
from splitfl.packed_state import unpack_state
from splitfl.protocol.keys import write_identity
from splitfl.protocol.messages import Backward, Forward
from tests.world import World, running, side_by_side, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def batch(rows: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train_step(split) -> float:
    loss = split.train()(**batch()).loss
    loss.backward()
    split.step()
    return float(loss.detach())


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("stage", ["enrolled", "forward", "backward"])
@pytest.mark.parametrize("memory", [True, False])
def test_the_others_go_on_without_a_client_that_vanishes(tmp_path, model, stage, memory):
    world = World(tmp_path, model, 2, memory=memory)
    with running(world):
        steady, flighty = world.join_as(0), world.join_as(1)

        def vanish() -> None:
            flighty.train()
            if stage == "enrolled":
                flighty.trunk.session._take_part()
            else:
                loss = flighty(**batch(seed=1)).loss
                if stage == "backward":
                    loss.backward()
            flighty.close()

        def go_on() -> None:
            for _ in range(3):
                train_step(steady)
            steady.wait_step()

        side_by_side(2, lambda index: go_on() if index == 0 else vanish())
        steady.close()
    first, *rest = world.events("step")
    if stage == "enrolled":
        assert list(first["parts"]) == ["client0"]
    else:
        assert first["parts"]["client1"]["dropped"]
    # What ran counts, what did not does not: 2 rows of 7 targets each.
    assert first["targets"] == (28 if stage == "backward" else 14)
    assert [event["targets"] for event in rest] == [14, 14]
    assert all(list(event["parts"]) == ["client0"] for event in rest)


def test_a_dropped_clients_step_equals_the_others_alone(tmp_path, model):
    """The missing rows of a shared trunk batch are zero: what remains is the gradient of those who stayed."""
    results = []
    for clients in (1, 2):
        work = tmp_path / str(clients)
        work.mkdir()
        world = World(work, model, clients, trainables="full", **{"optimizer.learning_rate": 1e-2})
        with running(world):
            steady = world.join_as(0)
            if clients == 2:
                flighty = world.join_as(1)
                arrived = threading.Barrier(2)

                def vanish(flighty=flighty, arrived=arrived) -> None:
                    flighty.train()(**batch(seed=1))
                    arrived.wait(20)
                    flighty.close()

                def stay(steady=steady, arrived=arrived) -> None:
                    loss = steady.train()(**batch()).loss
                    arrived.wait(20)
                    loss.backward()
                    steady.step()

                side_by_side(2, lambda index, stay=stay, vanish=vanish: stay() if index == 0 else vanish())
            else:
                train_step(steady)
            steady.wait_step()
            losses = [train_step(steady) for _ in range(3)]
            steady.close()
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_a_client_that_breaks_the_rules_ends_alone(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        honest, liar = world.join_as(0), None
        train_step(honest)
        honest.wait_step()
        line = (tmp_path / "authorized_clients").read_text()
        key = write_identity(tmp_path / "liar.key")
        (tmp_path / "authorized_clients").write_text(line + f"{key.public} liar\n")
        wait_for(lambda: world.server.authorized.lookup(key.public) or world.server.authorized.refresh())
        liar = SplitModelForCausalLM.from_pretrained(
            model, world.join, tmp_path / "liar.key", device="cpu", channel_options=world.channel_options()
        )
        wrong = torch.zeros(4, 7)
        channel = liar.trunk.session.channel
        channel.send(Forward(-1, 0, ((4, 0),), 7, "float32", "raw", False, False, True), memoryview(wrong.numpy()).cast("B"))
        with pytest.raises(SessionLost, match="hidden size 7"), torch.no_grad():
            liar.eval()(**batch())
        assert train_step(honest) > 0
        honest.wait_step()
        honest.close()
    assert any("hidden size 7" in event["why"] for event in world.events("left"))


def test_a_backward_nobody_asked_for_ends_its_session(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        split = world.join_as(0)
        loss = split.train()(**batch()).loss
        gradient = torch.zeros(16, split.config.hidden_size)
        split.trunk.session.channel.send(
            Backward(0, 9, 16, split.config.hidden_size, "float32", "raw", 1, 1.0), memoryview(gradient.numpy()).cast("B")
        )

        def go_on() -> None:
            loss.backward()
            split.step()
            split.wait_step()

        with pytest.raises(SessionLost, match="micro-batch 9"):
            go_on()


def test_more_tokens_than_the_trunk_keeps_for_one_client(tmp_path, model):
    world = World(tmp_path, model, 1, client_tokens=20)
    with running(world):
        split = world.join_as(0).train()
        first = split(**batch()).loss  # 16 tokens wait for their backward
        with pytest.raises(SessionLost, match="smaller batch"):
            split(**batch())
        del first


def test_a_row_that_fits_no_message(tmp_path, model):
    world = World(tmp_path, model, 1, window=1 << 20)
    with running(world):
        split = world.join_as(0)
        long = {"input_ids": torch.ones(1, (1 << 20) // (4 * split.config.hidden_size) + 1, dtype=torch.long)}
        with pytest.raises(UserError, match="shorter rows"), torch.no_grad():
            split.eval()(**long)
        split.close()


def test_a_batch_larger_than_the_window_travels_in_pieces(tmp_path, model):
    world = World(tmp_path, model, 1, window=1 << 20)
    rows, length = 24, 512
    assert rows * length * 32 * 4 > 1 << 20
    with running(world):
        split = world.join_as(0)
        for _ in range(2):
            loss = split.train()(**batch(rows, length)).loss
            loss.backward()
            split.step()
        split.wait_step()
        split.close()
    assert [event["targets"] for event in world.events("step")] == [rows * (length - 1)] * 2


def test_no_gradient_travels_back_to_a_frozen_input_end(tmp_path, model):
    received = {}
    for frozen in (True, False):
        work = tmp_path / str(frozen)
        work.mkdir()
        world = World(work, model, 1)
        with running(world):
            split = world.join_as(0).train()
            split.requires_grad_(not frozen)
            split(**batch(4, 64)).loss.backward()
            split.step()
            split.wait_step()
            session = split.trunk.session
            received[frozen] = session.bytes_received
            assert session.bytes_sent >= 2 * 4 * 64 * 32 * 4
            split.close()
    payload = 4 * 64 * 32 * 4
    assert payload <= received[True] < 2 * payload <= received[False]


def test_evaluation_between_steps_neither_stalls_nor_counts(tmp_path, model):
    world = World(tmp_path, model, 2)
    with running(world):

        def client(index: int) -> None:
            split = world.join_as(index)
            for step in range(4):
                train_step(split)
                if index == 0 and step == 1:
                    split.trunk.session.pause()
                    with torch.no_grad():
                        for _ in range(3):
                            split.eval()(**batch())
            split.trunk.session.leave()
            split.wait_step()
            split.close()

        side_by_side(2, client)
    per_client = {"client0": 0, "client1": 0}
    for event in world.events("step"):
        for name in event["parts"]:
            per_client[name] += 1
    assert per_client == {"client0": 4, "client1": 4}


def test_evaluation_sees_the_weights_after_the_step(tmp_path, model):
    world = World(tmp_path, model, 1, trainables="full", **{"optimizer.learning_rate": 1e-1})
    with running(world):
        split = world.join_as(0)
        with torch.no_grad():
            before = float(split.eval()(**batch()).loss)
        train_step(split)
        with torch.no_grad():  # sent at once, while the step may still be closing
            after = float(split.eval()(**batch()).loss)
        split.close()
    assert after != before


def test_backward_through_an_evaluation_is_an_error_not_a_silence(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        split = world.join_as(0).eval()
        loss = split(**batch()).loss
        with pytest.raises(UserError, match=r"model\.train\(\)"):
            loss.backward()
        split.close()


def test_a_loss_of_ones_own_must_be_declared(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        split = world.join_as(0).train()
        ids = batch()["input_ids"]
        with pytest.raises(UserError, match="objective"):
            split(input_ids=ids).logits.mean().backward()
        with split.objective(targets=[8, 8], divisor=16):
            logits = split(input_ids=ids).logits
        logits.mean().backward()
        split.step()
        assert split.wait_step().targets == 16
        split.close()


def test_pausing_amid_a_step_is_refused(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        split = world.join_as(0).train()
        split(**batch()).loss.backward()
        with pytest.raises(UserError, match=r"model\.step\(\)"):
            split.trunk.session.pause()
        split.step("pause")
        split.wait_step()
        split.close()


def test_a_finished_run_takes_no_more_steps(tmp_path, model):
    world = World(tmp_path, model, 1, **{"optimizer.steps": 2})
    with running(world):
        split = world.join_as(0)
        for _ in range(2):
            train_step(split)
        split.wait_step()
        with pytest.raises(UserError, match="2 steps"):
            train_step(split)
        split.close()
    assert (tmp_path / "server" / "checkpoints" / "step-00000001").is_dir()


def test_whoever_comes_after_the_last_step_may_still_evaluate(tmp_path, model):
    world = World(tmp_path, model, 1, **{"optimizer.steps": 1})
    with running(world):
        first = world.join_as(0)
        train_step(first)
        first.wait_step()
        late = world.join_as(0)
        with pytest.raises(UserError, match="has made its 1 steps"):
            train_step(late)
        with torch.no_grad():
            assert float(late.eval()(**batch()).loss) == float(first.eval()(**batch()).loss)
        first.close()
        late.close()


def test_a_checkpoint_holds_the_weights_and_the_optimizer_as_they_are(tmp_path, model):
    world = World(tmp_path, model, 1, checkpoint_every=2)
    with running(world):
        split = world.join_as(0)
        for _ in range(2):
            train_step(split)
        split.wait_step()
        split.close()
    tensors, meta, extra = load_checkpoint(tmp_path / "server" / "checkpoints" / "step-00000001")
    training = world.server._engine.training
    assert meta["step"] == 1
    assert tensors.keys() == training.trainables.keys()
    assert all(torch.equal(tensors[name], parameter) for name, parameter in training.trainables.items())
    held, kept = training.optimizer.state_dict()["state"], unpack_state(extra["optimizer"])["state"]
    assert held.keys() == kept.keys()
    assert all(torch.equal(held[key]["exp_avg"], kept[key]["exp_avg"]) for key in held)


def test_two_sessions_of_one_client_are_told_apart_in_the_log(tmp_path, model):
    world = World(tmp_path, model, 2)
    with running(world):
        side_by_side(2, lambda _: train_step(world.join_as(0)))
        wait_for(lambda: world.events("step"))
    (event,) = world.events("step")
    assert len(event["parts"]) == 2
    assert event["targets"] == sum(part["targets"] for part in event["parts"].values()) == 28


def test_a_second_session_after_the_first(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        for _ in range(2):
            split = world.join_as(0)
            train_step(split)
            split.wait_step()
            split.close()
    assert [event["step"] for event in world.events("step")] == [0, 1]


def test_a_stopping_server_tells_its_clients(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world):
        split = world.join_as(0)
        train_step(split)
        split.wait_step()
        world.server.stop("gone for lunch")
        with pytest.raises(SessionLost, match="gone for lunch"):
            train_step(split)


def test_classifiers_and_language_models_share_one_trunk(tmp_path, model):
    world = World(tmp_path, model, 2)
    with running(world):

        def client(index: int) -> None:
            if index == 0:
                split = world.join_as(0)
                data = batch()
            else:
                split = world.join_as(1, SplitModelForSequenceClassification, num_labels=3, seed=0)
                split.config.pad_token_id = 0
                data = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 2])}
            for _ in range(2):
                split.train()(**data).loss.backward()
                split.step()
            split.wait_step()
            split.close()

        side_by_side(2, client)
    assert [event["targets"] for event in world.events("step")] == [14 + 2] * 2


def test_the_join_string_names_the_host_that_the_operator_says(tmp_path, model):
    with running(World(tmp_path, model, clients=1, bind="127.0.0.1:0", host="trunk.example.org")) as world:
        assert f"@trunk.example.org:{world.server.join.port}/" in world.join
