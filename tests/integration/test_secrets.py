"""No secret of a run stands anywhere but in its key file: not in logs, in what objects show of themselves, in what is kept."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfl.channel.admission import Admission
from splitfl.protocol import schedule
from splitfl.protocol.keys import read_identity
from splitfl.protocol.schedule import TrafficSecrets
from tests.world import World, running, tiny_llama

BATCH = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)}


def forms(secret: bytes) -> list[bytes]:
    """The ways in which a secret might be written down."""
    texts = [secret.hex(), base64.b32encode(secret).decode().rstrip("=").lower(), base64.b64encode(secret).decode().rstrip("=")]
    return [secret, repr(secret).encode(), *(text.encode() for text in texts), str(list(secret)).encode()]


def shown(thing: Any, depth: int = 6, seen: set[int] | None = None) -> list[str]:
    """What an object and all it holds would print of themselves, as a debugger or a log line would."""
    seen = set() if seen is None else seen
    if id(thing) in seen or depth < 0 or isinstance(thing, (torch.Tensor, torch.nn.Module)):
        return []
    seen.add(id(thing))
    if isinstance(thing, (bytes, bytearray, memoryview)):
        return []  # raw memory is nobody's repr
    own = type(thing).__module__.startswith(("splitfl", "server_trunk", "client_ends"))
    texts = [repr(thing)] if own else []
    values = list(thing.values()) if isinstance(thing, dict) else []
    values += list(thing) if isinstance(thing, (list, tuple, set)) else []
    if own:
        values += list(getattr(thing, "__dict__", {}).values())
        values += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    return texts + [text for value in values for text in shown(value, depth - 1, seen)]


@pytest.mark.parametrize("bulk", ["sealed", "curve"])
def test_no_secret_is_written_down(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bulk: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets: list[bytes] = []
    derive = schedule.traffic_secrets

    def overheard(handshake: Any, client: bytes, server: bytes, kem: bytes) -> TrafficSecrets:
        derived = derive(handshake, client, server, kem)
        for direction in (derived.client, derived.server):
            secrets.extend([direction, *schedule.key_and_iv(direction), schedule.next_secret(direction)])
        secrets.extend([client, server, kem])
        return derived

    monkeypatch.setattr("splitfl.protocol.session.schedule.traffic_secrets", overheard)
    give = Admission.ticket
    monkeypatch.setattr(Admission, "ticket", lambda self, session: secrets.append(give(self, session)) or secrets[-1])
    world = World(tmp_path, tiny_llama(tmp_path / "model"), 1, memory=False, bulk=bulk)
    with running(world):
        model = world.join_as(0)
        model.train()
        model(**BATCH).loss.backward()
        model.step()
        endpoints = world.server.endpoints
        sessions = endpoints.channel._sessions
        objects = [world.server, endpoints, endpoints.channel, sessions, model.trunk.session, *sessions._links.values()]
        printed = "\n".join(text for thing in objects for text in shown(thing))
        printed += "\n".join(repr(link.__dict__) for link in sessions._links.values() if link.id)
        model.close()
    keys = [tmp_path / "server.key", *world.keys]
    secrets += [read_identity(key).secret for key in keys]
    assert len(secrets) >= 2 * 11 + 1 + 2
    streams = capfd.readouterr()
    places = {"reprs": printed.encode(), "logs": caplog.text.encode(), "output": (streams.out + streams.err).encode()}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in keys]
    assert any(path.name == "config.toml" for path in files)
    assert any(path.name == "log.jsonl" for path in files)
    places |= {str(path): path.read_bytes() for path in files}
    for place, content in places.items():
        assert b"splitfl-sec-" not in content, place
        for secret in secrets:
            assert not [form for form in forms(secret) if len(form) >= 12 and form in content], place
