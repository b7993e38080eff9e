"""What the server has done and what it does now, in the text form of Prometheus."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from jlrm.server.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass
class Answered:
    """How a request ended."""

    status: int = 500


class Metrics:
    """The counters of one server; `text` gives them."""

    def __init__(self, engine: Engine) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        self._requests = Counter(
            "jlrm_requests", "Requests answered", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "jlrm_request_seconds",
            "Seconds from a request's coming to its reply, or to the first part of it",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )

    @contextlib.contextmanager
    def request(self, route: str) -> Iterator[Answered]:
        """Count a request, whose handler says how it ended."""
        began, outcome = time.monotonic(), Answered()
        try:
            yield outcome
        finally:
            self._seconds.labels(route).observe(time.monotonic() - began)
            self._requests.labels(route, str(outcome.status)).inc()

    def text(self) -> tuple[bytes, str]:
        """Return the metrics, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _OfEngine(Collector):
    """Reads the engine's counters when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine, done = self._engine, self._engine.counters
        counted = {
            "prompts": (done.prompts, "Prompts run"),
            "prompt_tokens": (done.prompt_tokens, "Tokens of prompts run"),
            "completions": (done.completions, "Completions ended"),
            "completion_tokens": (done.tokens, "Tokens drawn"),
            "cancelled": (done.cancelled, "Completions that nobody waited for any more"),
            "rejected": (done.rejected, "Requests refused because too many waited"),
            "busy_seconds": (done.seconds, "Seconds with something to decode"),
        }
        for name, (value, what) in counted.items():
            yield CounterMetricFamily(f"jlrm_{name}", what, value=value)
        now = {
            "waiting": (engine.num_waiting, "Completions without a slot"),
            "running": (engine.num_running, "Completions in a slot"),
            "slots": (engine.settings.num_slots, "Slots"),
        }
        for name, (value, what) in now.items():
            yield GaugeMetricFamily(f"jlrm_{name}", what, value=value)
