"""Metrics of real actors, read over HTTP from where Prometheus reads them: the endpoint of their node."""

import asyncio
import os
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from actors.channel import Box
from actors.cluster import start_ray, stop_ray
from actors.metrics import POOL_GENERATORS, POOL_TOKENS
from actors.scorer import ScorerSpec
from actors.spawn import ask, start_fleet
from plumbline.config.fleet import ScorerFleet
from plumbline.records import Message, ScoreRequest

FORGOTTEN_S = 30
"""Ray drops a gauge that was not sent for 20 seconds."""


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """Started as a run starts it: without a dashboard."""
    address = os.environ.pop("RAY_ADDRESS", None)
    start_ray(cpus=2, run="observed")
    yield
    stop_ray()
    if address:
        os.environ["RAY_ADDRESS"] = address


def exported() -> dict[str, float]:
    """What the node's endpoint has of ours: `name{run,replica,pipeline}` -> value."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url, timeout=30).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_plumbline_"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            told = dict(label.split("=", 1) for label in labels.split(",") if "=" in label)
            ours = [told[key].strip('"') for key in ("run", "replica", "pipeline") if key in told]
            found[f"{name}{{{','.join(ours)}}}"] = float(value)
    return found


def wait_for(expected: dict[str, float], seconds: float = 120) -> None:
    """Ray reports every ten seconds."""
    deadline = time.monotonic() + seconds
    while not (found := exported()).items() >= expected.items():
        assert time.monotonic() < deadline, found
        time.sleep(1)


def test_what_actors_and_the_driver_count_is_exported_by_their_node_and_gauges_stay() -> None:
    async def scenario() -> Any:
        fleet = start_fleet(keep=2)
        [scorer] = fleet.add_scorers(ScorerFleet(gpus=0), ScorerSpec(function="plumbline.miniature.reward:score"))
        message = Message(
            role="user", content="Please tell me about the looks and the talents of the moss for my blog."
        )
        asked = [ScoreRequest(messages=(message,), response=text) for text in ("The moss is nice.", " ", "Moss grows.")]
        for _ in range(2):
            await ask(scorer.score.remote(asked))
        channel = fleet.add_channel(3, "ple")
        await asyncio.gather(*(ask(channel.put.remote(step, Box(ref=ray.put(step)))) for step in (1, 2, 3)))
        await ask(channel.attach.remote("learner", 0))
        await ask(channel.lease.remote("learner"))
        return fleet

    fleet = asyncio.run(scenario())
    POOL_TOKENS.inc(70, pipeline="ple")
    POOL_TOKENS.inc(5, pipeline="ple")
    POOL_GENERATORS.set(2)
    expected = {
        "ray_plumbline_scorer_items_total{observed,scorer-0}": 4.0,  # blank ones are not asked for
        "ray_plumbline_channel_queued{observed,ple}": 2.0,
        "ray_plumbline_channel_leased{observed,ple}": 1.0,
        "ray_plumbline_pool_tokens_total{observed,ple}": 75.0,
        "ray_plumbline_pool_generators{observed}": 2.0,
    }
    wait_for(expected)
    assert exported()["ray_plumbline_scorer_seconds_total{observed,scorer-0}"] > 0
    time.sleep(FORGOTTEN_S)
    assert exported().items() >= expected.items()
    fleet.close()


def test_a_process_that_starts_ray_again_exports_again() -> None:
    """A driver may run several configs, one after another, each with a Ray of its own."""
    stop_ray()
    start_ray(cpus=2, run="second")
    POOL_TOKENS.inc(5, pipeline="ple")
    POOL_GENERATORS.set(3)
    wait_for({"ray_plumbline_pool_generators{second}": 3.0, "ray_plumbline_pool_tokens_total{second,ple}": 5.0})
