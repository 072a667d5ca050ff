"""How much of the decoders the committed corpus and their own tests reach: ``python -m tests.fuzz.branches``.

Lists every module that what a peer sends goes through, and fails where one has less than 95 % of its branches, or of its lines,
reached; of modules that do more than decode, those functions alone that do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LEAST = 95.0

_ROOT = Path(__file__).resolve().parents[2]
#: Over the in-memory transport: what ZeroMQ does is not these modules' doing.
_TESTS = (
    "tests/unit/test_client_rounds.py",
    "tests/unit/test_client_session.py",
    "tests/unit/test_fuzz_corpus.py",
    "tests/unit/test_hostile_sessions.py",
    "tests/unit/test_parts_identity.py",
    "tests/unit/test_replicas_words.py",
    "tests/unit/test_server_books.py",
    "tests/unit/test_server_gateway.py",
    "tests/unit/test_transport_zap.py",
    *sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "tests/unit").glob("test_protocol_*.py")),
    *sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "tests/unit").glob("test_channel_*.py")),
)
DECODERS = (
    *sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "splitfl/protocol").glob("*.py")),
    "splitfl/channel/admission.py",
    "splitfl/channel/allowance.py",
    "splitfl/channel/client.py",
    "splitfl/channel/datapath.py",
    "splitfl/channel/entrance.py",
    "splitfl/channel/offer.py",
    "splitfl/channel/opening.py",
    "splitfl/channel/parting.py",
    "splitfl/channel/sessions.py",
    "splitfl/channel/tally.py",
    "splitfl/adapters/layout.py",
    "splitfl/transport/zap.py",
    "server_trunk/adapter_book.py",
    "server_trunk/ends_book.py",
    "server_trunk/gateway.py",
    "server_trunk/replicas/words.py",
)


#: Of these only the functions that what a peer sends goes through.
PARTLY = {
    "client_ends/rounds.py": ("EndsRounds.allocate", "EndsRounds.arrived"),
    "client_ends/session.py": ("TrunkSession._allocate",),
    "splitfl/parts/identity.py": ("ModelIdentity.from_plain",),
}


def measure(directory: str) -> tuple[dict[str, tuple[float, float]], bool]:
    """Percent of branches and of lines reached, by module, or by module and function; and whether all tests passed."""
    environment = os.environ | {"COVERAGE_FILE": f"{directory}/data", "OMP_NUM_THREADS": "1"}
    coverage = [sys.executable, "-m", "coverage"]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not zmq", *_TESTS]
    run = [*coverage, "run", "--branch", f"--include={','.join((*DECODERS, *PARTLY))}", *tests]
    passed = subprocess.run(run, cwd=_ROOT, env=environment, check=False).returncode == 0
    report = f"{directory}/report.json"
    subprocess.run([*coverage, "report", "--show-missing"], cwd=_ROOT, env=environment, check=True)
    subprocess.run([*coverage, "json", "-q", "-o", report], cwd=_ROOT, env=environment, check=True)
    files = json.loads(Path(report).read_text())["files"]
    reached = {name: _shares(files.get(name)) for name in DECODERS}
    for name, functions in PARTLY.items():
        regions = files.get(name, {}).get("functions", {})
        reached |= {f"{name} {function}": _shares(regions.get(function)) for function in functions}
    return reached, passed


def _shares(found: dict[str, Any] | None) -> tuple[float, float]:
    """Percent of branches and of lines."""
    if found is None:
        return 0.0, 0.0
    summary = found["summary"]

    def share(what: str, of: str) -> float:
        return 100.0 * summary[what] / summary[of] if summary[of] else 100.0

    return share("covered_branches", "num_branches"), share("covered_lines", "num_statements")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        reached, passed = measure(directory)
    below = {name: shares for name, shares in reached.items() if min(shares) < LEAST}
    for name, (branches, lines) in reached.items():
        print(f"{name}: {branches:.1f} % of the branches, {lines:.1f} % of the lines{' TOO FEW' * (name in below)}")
    raise SystemExit(1 if below or not passed else 0)


if __name__ == "__main__":
    main()
