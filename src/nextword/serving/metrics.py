"""Prometheus metrics of the server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
disable_created_metrics()


class Metrics:
    """Counters, gauges and latency histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP responses by route and status code.", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generated_tokens = self._counter("generated_tokens", "Generated tokens.")
        self.client_disconnects = self._counter("clients_left", "Requests whose client disconnected before the end.")
        self.time_to_first_token = self._histogram("time_to_first_token", "Time from admission to the first token.")
        self.inter_token_latency = self._histogram("time_between_tokens", "Time between two tokens of a sequence.")
        self.request_seconds = self._histogram("request", "Time from the request headers to the end of the response.")

    def _counter(self, name: str, documentation: str, *label_names: str) -> Counter:
        return Counter(f"nextword_{name}", documentation, label_names, registry=self.registry)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(f"nextword_{name}_seconds", documentation, buckets=LATENCY_BUCKETS, registry=self.registry)

    def register_gauge(self, name: str, documentation: str, read_value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape."""
        Gauge(name, documentation, registry=self.registry).set_function(read_value)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format (version 0.0.4)."""
        return generate_latest(self.registry)
