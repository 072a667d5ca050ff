"""How much of the decoders the committed corpus and their own tests reach: ``python -m tests.fuzz.branches``.

Lists every module that what a peer sends goes through, and fails where one has less than 95 % of its lines and branches reached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST = 95.0

_ROOT = Path(__file__).resolve().parents[2]
#: Over the in-memory transport: what ZeroMQ does is not these modules' doing.
_TESTS = (
    "tests/unit/test_fuzz_corpus.py",
    "tests/unit/test_hostile_sessions.py",
    "tests/unit/test_replicas_words.py",
    "tests/unit/test_server_books.py",
    "tests/unit/test_server_gateway.py",
    *sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "tests/unit").glob("test_protocol_*.py")),
    *sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "tests/unit").glob("test_channel_*.py")),
)
DECODERS = (
    *sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "splitfl/protocol").glob("*.py")),
    "splitfl/channel/admission.py",
    "splitfl/channel/allowance.py",
    "splitfl/channel/datapath.py",
    "splitfl/channel/entrance.py",
    "splitfl/channel/offer.py",
    "splitfl/channel/sessions.py",
    "splitfl/channel/tally.py",
    "splitfl/adapters/layout.py",
    "server_trunk/adapter_book.py",
    "server_trunk/ends_book.py",
    "server_trunk/gateway.py",
    "server_trunk/replicas/words.py",
)


def measure(directory: str) -> tuple[dict[str, float], bool]:
    """Percent reached, lines and branches together, by module; and whether all tests passed."""
    environment = os.environ | {"COVERAGE_FILE": f"{directory}/data", "OMP_NUM_THREADS": "1"}
    coverage = [sys.executable, "-m", "coverage"]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not zmq", *_TESTS]
    run = [*coverage, "run", "--branch", f"--include={','.join(DECODERS)}", *tests]
    passed = subprocess.run(run, cwd=_ROOT, env=environment, check=False).returncode == 0
    report = f"{directory}/report.json"
    subprocess.run([*coverage, "report", "--show-missing"], cwd=_ROOT, env=environment, check=True)
    subprocess.run([*coverage, "json", "-q", "-o", report], cwd=_ROOT, env=environment, check=True)
    files = json.loads(Path(report).read_text())["files"]
    return {name: files[name]["summary"]["percent_covered"] if name in files else 0.0 for name in DECODERS}, passed


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        reached, passed = measure(directory)
    below = {name: percent for name, percent in reached.items() if percent < LEAST}
    for name, percent in below.items():
        print(f"{name}: {percent:.1f} %, less than {LEAST:g}")
    raise SystemExit(1 if below or not passed else 0)


if __name__ == "__main__":
    main()
