"""What the gateway lets in, refuses, and says of it."""

from __future__ import annotations

import json
import queue
from dataclasses import replace

import pytest
import torch

from server_trunk.gateway import Gateway
from server_trunk.trunkloop import Event
from splitfl.channel.handler import Peer, SessionInfo
from splitfl.config import build_config
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.libraries import library_versions
from splitfl.parts.identity import ModelIdentity
from splitfl.protocol import messages as m
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.keys import Identity
from splitfl.runlog import RunLog

IDENTITY = ModelIdentity("0" * 64, None, {"model.safetensors": "1" * 64})
PEER = Peer(Identity.from_secret(bytes(range(32))).public, "ann", "192.0.2.1")
HELLO = m.Hello(m.PROTOCOL_VERSION, "run", {}, "")
OPEN = m.Open(bytes(32), bytes(1184), (AES_256_GCM,), IDENTITY.to_plain(), (1, 1), "a", replaces="before")
FORWARD = m.Forward(0, 0, ((2, 0),), 8, "float32", "raw", True, True, True)


class Gate:
    """A gateway with an inbox of two, and its log."""

    def __init__(self, work, **settings):
        self.inbox: queue.Queue[Event | None] = queue.Queue(2)
        self.file = work / "log.jsonl"
        config = build_config({"model": "m"} | settings)
        log = RunLog(self.file, echo=None)
        self.gateway = Gateway(
            config, IDENTITY, 8, self.inbox, log, longest=64, stands=lambda: 7, elsewhere=lambda name: m.Redirect(name, 1)
        )

    def open(self, session: str = "session", name: str = "ann") -> None:
        self.gateway.on_opened(SessionInfo(session, replace(PEER, name=name), OPEN, HELLO))

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture
def gate(tmp_path):
    return Gate(tmp_path)


def test_who_is_welcomed_and_who_is_not(gate):
    welcome = gate.gateway.welcome(PEER, HELLO)
    assert (welcome.run, welcome.config["hidden_size"]) == ("run", 8)
    with pytest.raises(Refused, match=r"speaks protocol 3 \(splitfl .*your client protocol 2") as caught:
        gate.gateway.welcome(PEER, replace(HELLO, protocol=2))
    assert caught.value.code == "protocol-version"
    with pytest.raises(Refused, match="this server runs 'run', not 'another'") as caught:
        gate.gateway.welcome(PEER, replace(HELLO, run="another"))
    assert caught.value.code == "unknown-run"
    name, version = next(iter(library_versions().items()))
    gate.gateway.welcome(PEER, replace(HELLO, libraries={name: "0.0"}))
    (event,) = gate.events()
    assert (event["event"], event["library"], event["client_has"], event["server_has"]) == (
        "version-differs",
        name,
        "0.0",
        version,
    )


def test_who_is_admitted_and_who_is_not(gate):
    assert gate.gateway.admit(PEER, OPEN) == 7
    with pytest.raises(Refused, match=r"the run is cut at 1:1, your client at 2:1; use --cut 1:1"):
        gate.gateway.admit(PEER, replace(OPEN, cut=(2, 1)))
    with pytest.raises(RemoteProtocolError, match="a model identity has the fields"):
        gate.gateway.admit(PEER, replace(OPEN, model={"config": 3}))
    other = ModelIdentity("2" * 64, None, {"model.safetensors": "1" * 64})
    with pytest.raises(Refused, match="your model is not the one this run trains"):
        gate.gateway.admit(PEER, replace(OPEN, model=other.to_plain()))
    assert gate.gateway.elsewhere(PEER) == m.Redirect("ann", 1)


def test_who_comes_goes_and_is_refused_stands_in_the_log_and_reaches_the_trunk(gate):
    gate.open()
    gate.gateway.on_refused("a stranger", "flood", "too many")
    gate.gateway.on_closed("session", "it said goodbye", lost=True)
    said = [{name: value for name, value in event.items() if name != "time"} for event in gate.events()]
    assert said == [
        {"event": "joined", "client": "ann", "address": "192.0.2.1", "session": "session"},
        {"event": "refused", "who": "a stranger", "code": "flood", "why": "too many"},
        {"event": "left", "client": "ann", "session": "session", "why": "it said goodbye", "lost": True},
    ]
    opened, closed = gate.inbox.get_nowait(), gate.inbox.get_nowait()
    assert (opened.session, opened.opened, opened.name, opened.replaces) == ("session", True, "ann", "before")
    assert (closed.session, closed.opened, closed.lost) == ("session", False, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": 16}, "hidden size 16, where the model has 8"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, where the run uses float32"),
        ({"train": False}, "a graph to keep for an evaluation forward"),
        ({"segments": ((2, 63),)}, "a token at position 64, where this model takes 64"),
    ],
)
def test_no_memory_for_what_does_not_fit_the_run(gate, change, said):
    with pytest.raises(RemoteProtocolError, match=said):
        gate.gateway.allocate("session", replace(FORWARD, **change))


def test_no_memory_for_another_codec(gate):
    forged = replace(FORWARD)
    object.__setattr__(forged, "codec", "int8")  # no decoder lets it through
    with pytest.raises(RemoteProtocolError, match="codec 'int8', where the run uses raw"):
        gate.gateway.allocate("session", forged)


def test_memory_for_what_fits(gate):
    tensor, view = gate.gateway.allocate("session", FORWARD)
    assert (tuple(tensor.shape), tensor.dtype, len(view)) == ((2, 8), torch.float32, FORWARD.payload_bytes)
    gate.gateway.on_data("session", FORWARD, tensor)
    assert gate.inbox.get_nowait().payload is tensor


def test_a_client_that_fills_the_inbox_ends_itself(gate):
    gate.open()
    gate.gateway.on_control("session", m.Enrol())
    with pytest.raises(RemoteProtocolError, match="more messages than the trunk can take in"):
        gate.gateway.on_control("session", m.Pause())


def test_a_norm_where_each_side_clips_its_own(gate):
    with pytest.raises(RemoteProtocolError, match="a norm for clipping together"):
        gate.gateway.on_control("session", m.StepDone(0, 1, 1, "continue", 1.0))


def test_ends_in_a_run_that_averages_none(gate):
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        gate.gateway.on_control("session", m.Ends((("a", ("float32", (1,))),)))
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        gate.gateway.allocate("session", m.EndsPart(0, 0, 0, 4))


def test_sequences_to_release_in_a_run_that_keeps_none(gate):
    with pytest.raises(RemoteProtocolError, match="where the run keeps none"):
        gate.gateway.on_data("session", m.Release((1,)), None)


def test_clipping_together_is_for_one_client(tmp_path):
    gate = Gate(tmp_path, **{"optimizer.clipping": "joint"})
    gate.inbox.maxsize = 0
    gate.open("one", "ann")
    gate.open("two", "bob")
    gate.gateway.on_control("one", m.Enrol())
    gate.gateway.on_control("one", m.StepDone(0, 1, 1, "continue", 1.0))
    with pytest.raises(Refused, match="which is for one client, and another trains already"):
        gate.gateway.on_control("two", m.Enrol())
    gate.gateway.on_closed("one", "goodbye", lost=False)
    gate.gateway.on_control("two", m.Enrol())
