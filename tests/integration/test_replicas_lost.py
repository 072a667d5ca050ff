"""A client whose process is killed amid a step over replicas, which goes on without it: what it has given counts, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.test_lost import FLIGHTY, STEADY, TRUNK, assert_equals_reference, join, step
from tests.replicas import ENVIRONMENT, Replicas, serving
from tests.world import tiny_llama

pytestmark = pytest.mark.slow

DOOMED = """
import sys, time
from client_ends.model import SplitModelForCausalLM
from tests.integration.test_lost import FLIGHTY, step, train_input

model, trunk, key, backwards = sys.argv[1:]
split = train_input(SplitModelForCausalLM.from_pretrained(model, trunk, key, device="cpu"))
step(split, *FLIGHTY[0])
losses = [split(**one).loss for one in FLIGHTY[1]]
for loss in losses[:int(backwards)]:
    loss.backward()
print("now", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("given", [0, 1])
def test_a_step_goes_on_without_a_client_of_another_replica(tmp_path, given):
    replicas = Replicas(tmp_path, tiny_llama(tmp_path / "model"), 2, 2, trainables="full", **TRUNK)
    losses: list[float] = []
    with serving(replicas):
        steady = join(replicas, 0)
        words = [sys.executable, "-c", DOOMED, replicas.model, replicas.join, str(replicas.keys[1]), str(given)]
        doomed = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        try:
            losses += step(steady, STEADY[0])
            assert doomed.stdout is not None
            assert doomed.stdout.readline() == "now\n"
        finally:
            doomed.kill()
            doomed.communicate()
        for number in range(1, 4):
            losses += step(steady, STEADY[number])
        steady.wait_step()
        steady.close()
    assert [len(replicas.events("joined", replica)) for replica in range(2)] == [1, 1]
    counted = [[STEADY[0], *FLIGHTY[0]], [STEADY[1], *FLIGHTY[1][:given]], [STEADY[2]], [STEADY[3]]]
    assert_equals_reference(replicas, counted, losses)
    parts = [event["parts"].get("client1") for event in replicas.events("step", 1)]
    assert parts[0]["micro_batches"] == 2
    if given:
        assert (parts[1]["micro_batches"], parts[1]["dropped"], parts[1]["why"]) == (given, True, "lost")
    else:  # its replica was left before anything counted there, and takes part with zeros
        assert parts[1] == {"targets": 0, "micro_batches": 0, "dropped": True, "why": "lost"}
    assert parts[2:] == [None, None]
