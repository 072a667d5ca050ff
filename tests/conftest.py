"""What all tests share: quiet threads, and where the real weights and texts lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: several processes and threads share few cores, and spinning ones would eat them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """Real weights and text; a checkout without them skips what needs them, and says so."""
    if not DATA.is_dir():
        pytest.skip(f"the real weights and texts are not there: {DATA}")
    return DATA


@pytest.fixture(scope="session")
def stories(data: Path) -> str:
    """A real pretrained Llama of 260 thousand parameters."""
    return str(data / "models" / "stories260K")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what it has counted."""
    from tests.divergences import COUNTED

    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["divergences"] = (COUNTED.rows, COUNTED.excused)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    from tests.divergences import COUNTED

    rows, excused = getattr(node, "workeroutput", {}).get("divergences", (0, ()))
    COUNTED.rows += rows
    COUNTED.excused += excused


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often a text that was generated may part from the whole model's, and has."""
    from tests.divergences import COUNTED

    for line in COUNTED.summary():
        terminalreporter.write_line(line)
