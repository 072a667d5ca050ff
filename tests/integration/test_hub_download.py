"""Only the shards a side holds are fetched from the hub: against a loopback hub that counts what is asked for.

The programs under test run in processes of their own, for the hub's address is read when its library is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from splitfl.parts.identity import model_identity
from tests.families import FAMILIES, save_family

REPO = "someone/tiny-llama"
COMMIT = "a" * 40


@dataclass
class Hub:
    """A hub with one repository, whose files are those of ``directory``. ``asked``: requests for each file."""

    directory: Path
    endpoint: str = ""
    asked: Counter[str] = field(default_factory=Counter)

    def weights_asked(self) -> set[str]:
        return {name for name in self.asked if name.endswith(".safetensors")}

    def info(self) -> dict[str, Any]:
        files = []
        for path in sorted(self.directory.iterdir()):
            entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": "b" * 40}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 130}
            files.append(entry)
        return {
            "id": REPO,
            "modelId": REPO,
            "sha": COMMIT,
            "siblings": files,
            "tags": [],
            "private": False,
            "downloads": 0,
        }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/{COMMIT}"):
                self.answer(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
                return
            parts = path.strip("/").split("/")
            if len(parts) != 5 or "/".join(parts[:3]) != f"{REPO}/resolve":
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            revision, name = parts[3:]
            if revision not in ("main", "v1", COMMIT):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            file = hub.directory / name
            if not file.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            hub.asked[name] += 1
            lfs = name.endswith(".safetensors")
            etag = sha256(file) if lfs else hashlib.sha1(file.read_bytes()).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
            if lfs:
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.stat().st_size)}
            self.answer(200, file.read_bytes(), headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = tmp_path / "repository"
    save_family(FAMILIES[0], directory, shard_size="16KB")
    served = Hub(directory)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(served))
    served.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, home: Path, program: str, **environment: str) -> Any:
    """Runs a program against the hub with an empty cache at ``home``; returns what it printed last, as JSON."""
    names = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    names |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "XDG_CACHE_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", program], env=names, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LOAD = """
import json
from splitfl.parts.loading import load_ends, load_trunk
model = {part}("{repo}", ({cut}))
print(json.dumps([
    {{name: float(value.double().sum()) for name, value in model.state_dict().items()}}, model.name_or_path
]))
"""


def expected_shards(directory: Path, *, trunk: bool, blocks: range) -> set[str]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]

    def in_trunk(name: str) -> bool:
        parts = name.split(".")
        return "layers" in parts and int(parts[parts.index("layers") + 1]) in blocks

    return {shard for name, shard in index.items() if in_trunk(name) == trunk}


@pytest.mark.parametrize("part", [pytest.param("load_ends", marks=pytest.mark.slow), "load_trunk"])
def test_only_the_shards_that_hold_the_part_are_requested(hub: Hub, tmp_path: Path, part: str) -> None:
    trunk = part == "load_trunk"
    mine = expected_shards(hub.directory, trunk=trunk, blocks=range(1, 4))
    others = expected_shards(hub.directory, trunk=not trunk, blocks=range(1, 4)) - mine
    assert len(mine) >= 2
    assert len(others) >= 2
    program = LOAD.format(part=part, repo=REPO, cut="1, 1")
    sums, name = run(hub, tmp_path / "home", program)
    assert hub.weights_asked() == mine
    assert name == REPO
    seen = set()
    for shard in mine:
        with safe_open(hub.directory / shard, "pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118
                if tensor in sums:
                    seen.add(tensor)
                    assert float(opened.get_tensor(tensor).double().sum()) == sums[tensor]
    assert seen == {tensor for tensor in sums if tensor != "lm_head.weight"}
    if trunk:
        assert_serves_again_without_the_hub(hub, tmp_path, program, [sums, name])


def assert_serves_again_without_the_hub(hub: Hub, tmp_path: Path, program: str, first: Any) -> None:
    asked = Counter(hub.asked)
    assert run(hub, tmp_path / "home", program, HF_HUB_OFFLINE="1") == first
    assert hub.asked == asked


ASK = """
import json
from splitfl.errors import ModelError
from splitfl.parts.identity import model_identity
from splitfl.parts.loading import load_ends
from splitfl.parts.plan import plan
found = plan("REPO", "1:1")
said = []
for path, revision in (("someone/unknown", None), ("REPO", "no-such-branch")):
    try:
        load_ends(path, revision=revision)
    except ModelError as error:
        said.append(str(error))
print(json.dumps([model_identity("REPO", "v1").to_plain(), found.ends.files, found.trunk.files, *said]))
""".replace("REPO", REPO)


def test_identity_plan_and_mistakes_need_no_weights(hub: Hub, tmp_path: Path) -> None:
    identity, ends, trunk, unknown, revision = run(hub, tmp_path / "home", ASK)
    assert not hub.weights_asked()
    assert identity == {**model_identity(hub.directory).to_plain(), "revision": COMMIT}
    assert set(ends) == expected_shards(hub.directory, trunk=False, blocks=range(1, 4))
    assert set(trunk) == expected_shards(hub.directory, trunk=True, blocks=range(1, 4))
    assert "the hub has no model someone/unknown" in unknown
    assert f"the hub has no model {REPO} at revision no-such-branch" in revision
    assert "\n" not in unknown + revision


def test_a_single_file_just_works(tmp_path: Path, hub: Hub) -> None:
    AutoModelForCausalLM.from_pretrained(hub.directory).save_pretrained(tmp_path / "single")
    hub.directory = tmp_path / "single"
    sums, _ = run(hub, tmp_path / "home", LOAD.format(part="load_trunk", repo=REPO, cut="2, 1"))
    assert hub.weights_asked() == {"model.safetensors"}
    assert {name.split(".")[2] for name in sums} == {"2", "3"}
