"""What every benchmark prints: the machine, the versions, medians with their interval, and one JSON object on the last line."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitfl.libraries import library_versions

__all__ = ["emit", "machine", "median_interval"]


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit or None,
    } | library_versions()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def median_interval(values: Sequence[float], *, resamples: int = 4000) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval (Efron 1979): ``(median, low, high)``."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.median(values), medians[math.floor(0.025 * resamples)], medians[math.ceil(0.975 * resamples) - 1]


def emit(result: dict[str, Any], *, as_json: bool) -> None:
    """Print the result's JSON, alone on the last line, where asked to."""
    if as_json:
        print(json.dumps({"machine": machine()} | result))
