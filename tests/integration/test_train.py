"""One client's run where it does not go from the first step to the last: joining late, losing the server."""

from __future__ import annotations

import pytest

from client_ends.session import TrunkSession
from client_ends.train import TrainSettings, train
from splitfl.errors import SessionLost
from tests.world import World, running


def settings(world, data, client: int, **options) -> TrainSettings:
    text = data / "text" / "tinyshakespeare" / "input.txt"
    return TrainSettings(
        trunk=world.join,
        identity=str(world.keys[client]),
        data=str(text),
        model=world.model,
        max_length=32,
        batch_size=2,
        evaluate=0,
        device="cpu",
        out=str(world.work / f"ends{client}"),
        **options,
    )


def test_whoever_joins_late_ends_with_the_run(tmp_path, data, stories):
    with running(World(tmp_path, stories, 2, needed=1, memory=False, **{"optimizer.steps": 3})) as world:
        assert train(settings(world, data, 0, steps=2)).steps == 2
        late = train(settings(world, data, 1))
    assert late.steps == len(late.losses) == 1
    assert late.checkpoint.name == "step-00000002"


def test_a_checkpoint_bears_the_number_of_the_step_its_weights_have_made(tmp_path, data, stories, monkeypatch):
    """The session breaks after the ends' optimizer has moved and before the trunk is told."""
    done = TrunkSession.step_done

    def lost(self: TrunkSession, *said: object) -> None:
        if self.step == 2:
            raise SessionLost("the link broke")
        done(self, *said)

    monkeypatch.setattr(TrunkSession, "step_done", lost)
    with running(World(tmp_path, stories, 1, memory=False)) as world, pytest.raises(SessionLost, match="the link broke"):
        train(settings(world, data, 0, steps=5, ends="full"))
    kept = sorted(path.name for path in (tmp_path / "ends0" / "checkpoints").iterdir())
    assert kept == ["start", "step-00000002"]
