"""What the endpoint counts, in Prometheus' form."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("model", "version", "status")
        self.requests = Counter("plumbline_serve_requests_total", "requests that ended", names, registry=self.registry)
        self.tokens = Counter("plumbline_serve_tokens_total", "tokens sent", ("model",), registry=self.registry)
        self.ttft = Histogram(
            "plumbline_serve_ttft_seconds", "to the first piece", buckets=_SECONDS, registry=self.registry
        )
        self.seconds = Histogram(
            "plumbline_serve_request_seconds", "to the last piece", buckets=_SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("plumbline_serve_in_flight", "requests being answered", registry=self.registry)

    def begin(self) -> "Call":
        """A request has come."""
        self.in_flight.inc()
        return Call(self)


class Call:
    """One request, from its arrival to its last piece."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._waits = True
        self._model, self._version = "unknown", ""

    def of(self, model: str, version: int) -> None:
        """It asks for this one. What users write as a name never becomes a label."""
        self._model, self._version = model, str(version)

    def first(self) -> None:
        """A piece of the answer is there; the first one counts."""
        if self._waits:
            self._waits = False
            self._metrics.ttft.observe(time.monotonic() - self._began)

    def tokens(self, count: int) -> None:
        """So many more were sent."""
        self._metrics.tokens.labels(self._model).inc(count)

    def end(self, status: int) -> None:
        """It was answered, or refused."""
        self._metrics.in_flight.dec()
        self._metrics.seconds.observe(time.monotonic() - self._began)
        self._metrics.requests.labels(self._model, self._version, str(status)).inc()
