"""What /metrics tells, in Prometheus' text format: of requests over HTTP, and the engine's counts."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llada_jax.serving.events import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_GAUGES = {
    "rows": "Rows of the batch.",
    "busy": "Rows that have requests.",
    "queue": "Most requests that wait.",
    "queued": "Requests that wait.",
    "prefix_bytes": "Bytes of known beginnings of prompts, on each device.",
    "alive": "Whether the engine runs.",
    "stopping": "Whether it is about to end.",
}
_COUNTERS = {
    "submitted": "Requests that the engine has taken.",
    "rejected": "Requests that found the queue full.",
    "finished": "Requests with a whole answer.",
    "cancelled": "Requests that were given up, or ended at a stop text.",
    "expired": "Requests whose deadline came first.",
    "failed": "Requests that ended by an error.",
    "resets": "Errors of the device.",
    "tokens": "Tokens of answers.",
    "prompt_tokens": "Tokens of prompts.",
    "passes": "Decoding passes.",
    "row_passes": "Rows, summed over decoding passes.",
    "running_row_passes": "Rows that decode, summed over decoding passes.",
    "prefill_passes": "Passes over prompts.",
    "prefix_hits": "Chunks of prompts that were known.",
    "prefix_misses": "Whole chunks of prompts that were computed.",
}


class Metrics:
    """stats: the engine's counts at this moment."""

    def __init__(self, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(stats))

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, registry=self._registry, buckets=_SECONDS)

        self._requests = Counter(
            "llada_jax_http_requests", "Requests over HTTP.", ["route", "code"], registry=self._registry
        )
        self._first_block = histogram("llada_jax_first_block_seconds", "Until a request's first block is committed.")
        self._answer = histogram("llada_jax_answer_seconds", "Until all answers of a request are there.")

    def answered(self, route: str, code: int) -> None:
        self._requests.labels(route, str(code)).inc()

    def first_block(self, began: float) -> None:
        """began: in time.monotonic() seconds."""
        self._first_block.observe(time.monotonic() - began)

    def finished(self, began: float) -> None:
        self._answer.observe(time.monotonic() - began)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # so that registering does not ask the engine

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for kind, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text in names.items():
                yield kind(f"llada_jax_{name}", text, value=float(getattr(stats, name)))
