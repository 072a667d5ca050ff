"""Which model a client's ends, tokenizer and results are of."""

from argparse import Namespace

import pytest

from client_ends.command import check_joining
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


@pytest.mark.parametrize(
    "use",
    [
        lambda: train(TrainSettings(trunk="", identity="", data="", revision="v1")),
        lambda: check_joining(Namespace(model=None, revision="v1")),
    ],
)
def test_a_revision_of_no_model_is_refused(use):
    with pytest.raises(ConfigError, match="give both, or neither"):
        use()
