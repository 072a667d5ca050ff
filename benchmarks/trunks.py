"""A trunk server as processes of their own, for a benchmark: one in a worker, or replicas, as ``splitfl serve`` starts them."""

from __future__ import annotations

import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["ReplicatedTrunk", "serve"]

#: Seconds for replicas to end by themselves.
_PATIENCE = 60.0


def serve(pipe: Connection, settings: dict[str, Any]) -> None:
    """Worker: the trunk server; sends its join string, and its peak memory when asked."""
    import resource

    from server_trunk.server import TrunkServer
    from splitfl.config import build_config

    server = TrunkServer(build_config(settings))
    server.start()
    pipe.send(str(server.join))
    while pipe.recv() is not None:
        # ru_maxrss is in KiB, on macOS in bytes.
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    server.stop()


class ReplicatedTrunk:
    """``splitfl serve`` and the replicas that it starts."""

    def __init__(self, settings: dict[str, Any], work: str) -> None:
        """``settings``: a whole run's. Returns when clients can join, at :attr:`join`. Raises RuntimeError with what was said."""
        from splitfl.config import build_config, to_toml

        config, said = Path(work) / "run.toml", Path(work) / "replicas.err"
        config.write_text(to_toml(build_config(settings)))
        self.join = ""
        with said.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server_trunk", "--config", str(config)], stdout=subprocess.PIPE, stderr=err, text=True
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().startswith("splitfl://"):
                self.join = line.strip()
                return
        self.stop()
        raise RuntimeError(f"the replicas did not start: {said.read_text()[-2000:]}")

    def peak_memory(self) -> int:
        """The resident high-water marks of all replicas, bytes, together; where the system keeps none, what they hold now."""
        import psutil

        total = 0
        for process in psutil.Process(self._process.pid).children(recursive=True):
            words = process.cmdline()
            if "server_trunk" in words and "torch.distributed.run" not in words:
                total += _high_water(process)
        return total

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _high_water(process: Any) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return int(process.memory_info().rss)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
