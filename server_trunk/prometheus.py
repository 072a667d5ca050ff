"""The metrics endpoint: ``/metrics`` in Prometheus' text format, ``/status.json`` for everything else that asks.

It answers whoever can reach it, with names of clients and numbers, and with nothing of what they send; so it listens on loopback
unless it is told another address.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from server_trunk.meter import QUEUE_BOUNDS, Meter
from splitfl.errors import ConfigError

__all__ = ["MetricsEndpoint", "expose"]

#: Metric: (its sum in a client's snapshot, the values of its label ``direction`` or ``kind``, help).
_SUMS: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("tokens", "direction", {"forward": "tokens", "backward": "backward_tokens"}, "Tokens that have run through the trunk"),
    ("micro_batches", "direction", {"forward": "forwards", "backward": "backwards"}, "Micro-batches that have run"),
    ("wire_bytes", "direction", {"received": "bytes_received", "sent": "bytes_sent"}, "Bytes of frames, seen from the server"),
    ("target_tokens", "", {"": "targets"}, "Target tokens whose gradient counted in a step"),
    ("parts", "", {"": "steps"}, "Closed steps that a client took part in"),
    ("dropped_parts", "", {"": "dropped"}, "Parts of closed steps that were not waited for to their end"),
    ("uncounted_micro_batches", "", {"": "uncounted"}, "Micro-batches whose gradient counted as zero"),
)

_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("sessions", "sessions", "Open sessions"),
    ("occupancy_ratio", "occupancy", "Tokens of a batch over its budget, mean over the window"),
    ("batch_members", "members", "Micro-batches of a batch, mean over the window"),
    ("padding_ratio", "padding", "Share of pads in what the trunk computes, over the window"),
    ("waiting_tokens", "waiting_tokens", "Tokens that wait for their forward"),
    ("graph_tokens", "graph_tokens", "Tokens whose graph is kept for a backward"),
)


class _Collector:
    """A :class:`prometheus_client` collector over a meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        taken = self._meter.snapshot()
        clients = taken["clients"]
        for name, label, values, text in _SUMS:
            family = CounterMetricFamily(f"splitfl_{name}", text, labels=["client", label] if label else ["client"])
            for client, sums in clients.items():
                for value, key in values.items():
                    family.add_metric([client, value] if label else [client], sums[key])
            yield family
        yield CounterMetricFamily("splitfl_steps", "Optimizer steps of the trunk", value=taken["steps"])
        yield CounterMetricFamily("splitfl_busy_seconds", "Seconds the engine was at work", value=taken["busy_seconds"])
        batches = CounterMetricFamily("splitfl_batches", "Batches that have run", labels=["direction"])
        queues = HistogramMetricFamily(
            "splitfl_queue_seconds", "Time from a message's arrival to the start of its batch", labels=["direction"]
        )
        for direction, count in taken["batches"].items():
            batches.add_metric([direction], count)
            queues.add_metric([direction], *_cumulative(*self._meter.histogram(direction)))
        yield batches
        yield queues
        for name, key, text in _GAUGES:
            # What nothing was measured of is left out, as a gap in a graph.
            if taken[key] is not None:
                yield GaugeMetricFamily(f"splitfl_{name}", text, value=taken[key])
        kept = GaugeMetricFamily("splitfl_kept_tokens", "Tokens of a client that wait or are kept", labels=["client"])
        for client, sums in clients.items():
            kept.add_metric([client], sums["kept_tokens"])
        yield kept


def _cumulative(counts: list[int], total: float) -> tuple[list[tuple[str, float]], float]:
    buckets: list[tuple[str, float]] = []
    reached = 0
    for bound, count in zip([*map(str, QUEUE_BOUNDS), "+Inf"], counts, strict=True):
        reached += count
        buckets.append((bound, reached))
    return buckets, total


def expose(meter: Meter) -> bytes:
    """A meter's numbers in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(meter))
    return generate_latest(registry)


class _HttpServer(ThreadingMixIn, TCPServer):
    """Not http.server's own, which asks the name service who it is."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)


class MetricsEndpoint:
    """Serves a meter's numbers over HTTP, on threads of its own, from :meth:`start` to :meth:`stop`."""

    def __init__(self, address: str, meter: Meter) -> None:
        """``address``: ``HOST:PORT``, or a port of 127.0.0.1; port 0 lets the system choose.

        Raises:
            ConfigError: the address cannot be bound, or prometheus-client is not installed.
        """
        try:
            from prometheus_client import CONTENT_TYPE_LATEST
        except ImportError:
            raise ConfigError(
                "--metrics needs the package prometheus-client: pip install 'splitfl[metrics]', or leave --metrics out"
            ) from None
        host, _, port = address.rpartition(":")
        answers = {
            "/metrics": (CONTENT_TYPE_LATEST, lambda: expose(meter)),
            "/status.json": ("application/json", lambda: json.dumps(meter.snapshot()).encode()),
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                kind, answer = answers.get(self.path.partition("?")[0], (None, None))
                if kind is None or answer is None:
                    self.send_error(404, "there are /metrics and /status.json")
                    return
                body = answer()
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """A scrape is no event."""

        try:
            self._server = _HttpServer({"*": "0.0.0.0"}.get(host, host.strip("[]")) or "127.0.0.1", int(port), Handler)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ConfigError(f"cannot serve metrics at {address}: {why}; choose another address with --metrics") from None
        self.port: int = self._server.server_address[1]
        self.url = f"http://{host or '127.0.0.1'}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
