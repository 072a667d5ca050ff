"""Which model a client's ends, tokenizer and results are of."""

import pytest

from client_ends.preparing import model_of
from client_ends.train import TrainSettings, train
from splitfl.errors import ConfigError

TERMS = {"model": "owner/name", "revision": "v1"}


@pytest.mark.parametrize(
    ("model", "revision", "held"),
    [(None, None, ("owner/name", "v1")), ("mine", None, ("mine", None)), ("owner/name", "v2", ("owner/name", "v2"))],
)
def test_the_runs_model_comes_with_the_runs_revision(model, revision, held):
    assert model_of(TrainSettings(trunk="", identity="", data="", model=model, revision=revision), TERMS) == held


def test_a_revision_of_no_model_is_refused():
    with pytest.raises(ConfigError, match="give both, or neither"):
        train(TrainSettings(trunk="", identity="", data="", revision="v1"))
