"""What every stage counts for Prometheus, through Ray: each node exports what its processes count, prefixed `ray_`.

All metrics of actors and pipelines stand below, by name; `serve` may declare its own with the same classes. Outside of
Ray they do nothing, so plain classes stay usable without it. A call costs microseconds: once a batch, never a token.
`deploy/grafana-dashboard.json` shows every one of them, and a test holds that.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

RUN_VARIABLE = "PLUMBLINE_RUN"
"""Environment variable with the run's name, the tag `run` of every metric; `actors.cluster` sets it everywhere."""

REFRESH_S = 5.0
"""Seconds between two reports of a gauge that did not change. Ray sends what was set since its last report, every 10
seconds, and forgets a gauge that was not sent for 20."""

REGISTRY: "dict[str, Metric]" = {}
"""All metrics that were declared, by name."""


class Metric:
    """A metric that is Ray's inside a process of Ray, and nothing elsewhere.

    Args:
        name: begins with `plumbline_`; that of a counter ends in `_total`.
        description: one line, with the unit.
        tags: names of the tags that calls give beside `run`; `replica` is the actor's name where they do not.
    """

    def __init__(self, name: str, description: str, tags: Sequence[str] = ()) -> None:
        assert name.startswith("plumbline_") and name not in REGISTRY, name
        self.name, self.description, self.tags = name, description, ("run", *tags)
        self._made: Any = None
        REGISTRY[name] = self

    def _of_ray(self) -> Any:
        """Ray's metric, made when first used; None where this process is none of Ray's."""
        ray = sys.modules.get("ray")  # not imported here: what does not run in Ray need not load it
        if ray is None or not ray.is_initialized():
            return None
        if self._made is None:
            self._made = self._make()
        return self._made

    def _told(self, tags: Mapping[str, str]) -> dict[str, str]:
        """`tags`, and those that every process knows of itself."""
        known = {"run": os.environ.get(RUN_VARIABLE, "")}
        if "replica" in self.tags:
            known["replica"] = _actor_name()
        return {**known, **tags}

    def _make(self) -> Any:
        raise NotImplementedError


class Counter(Metric):
    """A sum that only grows."""

    def inc(self, value: float = 1, **tags: str) -> None:
        """Add `value`; nothing is added where it is 0."""
        if value > 0 and (counter := self._of_ray()):
            counter.inc(value, tags=self._told(tags))

    @contextmanager
    def timing(self, **tags: str) -> Iterator[None]:
        """Add the seconds that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.inc(time.perf_counter() - started, **tags)

    def _make(self) -> Any:
        from ray.util.metrics import Counter

        return Counter(self.name, self.description, self.tags)


class Gauge(Metric):
    """A value that goes up and down. It stays what it was set to for as long as the process lives."""

    def __init__(self, name: str, description: str, tags: Sequence[str] = ()) -> None:
        super().__init__(name, description, tags)
        self._values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, **tags: str) -> None:
        """Set it for these tags."""
        if gauge := self._of_ray():
            told = self._told(tags)
            self._values[tuple(told[tag] for tag in self.tags)] = value
            gauge.set(value, tags=told)
            _keep_fresh()

    def refresh(self) -> None:
        """Tell Ray again what was set."""
        for told, value in list(self._values.items()):
            if gauge := self._of_ray():
                gauge.set(value, tags=dict(zip(self.tags, told, strict=True)))

    def _make(self) -> Any:
        from ray.util.metrics import Gauge

        return Gauge(self.name, self.description, self.tags)


class Histogram(Metric):
    """Observations by size. Ray passes on the counts of buckets: their sum is an estimate, quantiles are as exact as
    `bounds` are narrow."""

    def __init__(self, name: str, description: str, tags: Sequence[str] = (), *, bounds: Sequence[float]) -> None:
        super().__init__(name, description, tags)
        self.bounds = list(bounds)

    def observe(self, value: float, **tags: str) -> None:
        """Add one observation."""
        if histogram := self._of_ray():
            histogram.observe(value, tags=self._told(tags))

    def _make(self) -> Any:
        from ray.util.metrics import Histogram

        return Histogram(self.name, self.description, self.bounds, self.tags)


@functools.cache
def _actor_name() -> str:
    """Such as `generator-0`, without the run that it begins with; empty where this process is no named actor."""
    import ray

    return (ray.get_runtime_context().get_actor_name() or "").rpartition("/")[2]


_refreshing = threading.Lock()


def _keep_fresh() -> None:
    """Start the thread that repeats gauges, once a process."""
    if _refreshing.acquire(blocking=False):  # held from here on
        threading.Thread(target=_refresh, name="metrics", daemon=True).start()


def _refresh() -> None:
    while True:
        time.sleep(REFRESH_S)
        for metric in list(REGISTRY.values()):
            if isinstance(metric, Gauge):
                metric.refresh()


SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Bounds of buckets for anything from a miniature's step to a large model's."""

POOL_GENERATORS = Gauge("plumbline_pool_generators", "generators that rollouts are asked of")
POOL_QUEUE = Gauge("plumbline_pool_queue", "batches of requests that wait for a place in the pool")
POOL_OUTSTANDING = Gauge("plumbline_pool_outstanding_answers", "answers that generators were asked for and owe")
POOL_UTILISATION = Gauge("plumbline_pool_utilisation", "share of the last seconds in which a generator worked, 0 to 1")
POOL_TOKENS = Counter("plumbline_pool_tokens_total", "tokens sampled for a pipeline", ("pipeline",))

GENERATOR_REQUESTS = Counter("plumbline_generator_requests_total", "requests of rollouts answered", ("replica",))
GENERATOR_TOKENS = Counter("plumbline_generator_sampled_tokens_total", "tokens sampled for rollouts", ("replica",))
GENERATOR_ACTIVE = Gauge("plumbline_generator_active_requests", "requests under way, users' among them", ("replica",))
PROOF_SECONDS = Histogram(
    "plumbline_generator_proof_seconds",
    "seconds that the proof of a version took",
    ("replica", "policy"),
    bounds=SECONDS,
)
PROBE_DIFFERENCE = Gauge(
    "plumbline_generator_probe_difference",
    "largest difference of a probe log-prob between engine and learner at the newest proof, nats a token",
    ("replica", "policy"),
)

SCORER_ITEMS = Counter("plumbline_scorer_items_total", "responses that a reward was asked for", ("replica",))
SCORER_SECONDS = Counter("plumbline_scorer_seconds_total", "seconds of computing rewards", ("replica",))
REFERENCE_ITEMS = Counter("plumbline_reference_items_total", "responses whose log-probs were computed", ("replica",))
REFERENCE_HITS = Counter(
    "plumbline_reference_cache_hits_total", "responses whose log-probs were in the cache", ("replica",)
)
REFERENCE_SECONDS = Counter("plumbline_reference_seconds_total", "seconds of computing log-probs", ("replica",))
EMBEDDER_ITEMS = Counter("plumbline_embedder_items_total", "texts embedded", ("replica",))
EMBEDDER_SECONDS = Counter("plumbline_embedder_seconds_total", "seconds of embedding", ("replica",))

CHANNEL_QUEUED = Gauge("plumbline_channel_queued", "parts that wait for the learner", ("pipeline",))
CHANNEL_LEASED = Gauge("plumbline_channel_leased", "parts that the learner has and has not acknowledged", ("pipeline",))

LEARNER_UPDATES = Counter("plumbline_learner_updates_total", "optimiser steps", ("pipeline",))
LEARNER_SAMPLES = Counter("plumbline_learner_samples_total", "samples trained on, repeats counted", ("pipeline",))
LEARNER_TOKENS = Counter("plumbline_learner_tokens_total", "tokens computed in training", ("pipeline",))
LEARNER_WAIT = Counter("plumbline_learner_wait_seconds_total", "seconds of waiting for parts", ("pipeline",))
LEARNER_MFU = Gauge(
    "plumbline_learner_mfu", "share of its cards' peak that training on the newest part used, 0 to 1", ("pipeline",)
)
LEARNER_SECONDS = Histogram(
    "plumbline_learner_part_seconds", "seconds of training on a part", ("pipeline",), bounds=SECONDS
)
LEARNER_LOSS = Gauge("plumbline_learner_loss", "mean loss of the newest part", ("pipeline",))
