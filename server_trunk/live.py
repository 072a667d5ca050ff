"""A run's live numbers on their way out: status lines in the log, and the metrics endpoint."""

from __future__ import annotations

import threading

from server_trunk.meter import Meter
from server_trunk.prometheus import MetricsEndpoint
from splitfl.runlog import RunLog

__all__ = ["Live"]


class Live:
    """Writes a ``status`` event to the log every ``every`` seconds in which something happened (0: never), and one at the end;
    serves metrics at ``address``, where one is given.
    """

    def __init__(self, meter: Meter, log: RunLog, *, every: float, address: str = "") -> None:
        self._meter, self._log, self._every, self._address = meter, log, every, address
        self.endpoint: MetricsEndpoint | None = None
        self._stopping = threading.Event()
        self._written = 0
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self) -> None:
        """Raises ConfigError where the address cannot be bound."""
        if self._address:
            self.endpoint = MetricsEndpoint(self._address, self._meter)
            self.endpoint.start()
            self._log.write("metrics", url=f"{self.endpoint.url}/metrics")
        if self._every:
            self._thread.start()

    def stop(self) -> None:
        """Ends both; nothing is written afterwards."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
            self._write()
        if self.endpoint is not None:
            self.endpoint.stop()

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            self._write()

    def _write(self) -> None:
        events = self._meter.events
        if events != self._written:
            self._written = events
            self._log.write("status", quiet=True, **self._meter.snapshot())
