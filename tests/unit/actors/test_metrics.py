"""Metrics: what plain classes may call anywhere, what Ray gets of it, and a dashboard that shows exactly these."""

import ast
import asyncio
import json
import re
import subprocess
import sys
from collections import Counter as Count
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from actors import metrics
from actors.versions import Prober
from plumbline.records import PolicyRef, Publication, TokenGroup

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text("utf-8"))
DECLARED = {name: value for name, value in vars(metrics).items() if isinstance(value, metrics.Metric)}


class FakeMetric:
    """Stands for each of Ray's three classes."""

    def __init__(self, name: str, description: str, *rest: Any) -> None:
        self.name, self.tag_keys = name, rest[-1]
        self.calls: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # or Ray raises
        self.set(value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags.keys() == {*self.tag_keys}
        self.calls.append((value, tags))

    observe = set


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A Ray that is initialised, in an actor with a name."""
    fake: Any = ModuleType("ray")
    fake.is_initialized = lambda: True
    fake.get_runtime_context = lambda: type("Context", (), {"get_actor_name": lambda self: "tiny-1a2b/scorer-1"})()
    util: Any = ModuleType("ray.util.metrics")
    util.Counter = util.Gauge = util.Histogram = FakeMetric
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.metrics", util)
    monkeypatch.setattr(metrics, "REGISTRY", {})
    monkeypatch.setenv(metrics.RUN_VARIABLE, "tiny")
    metrics._actor_name.cache_clear()
    yield fake
    metrics._actor_name.cache_clear()


def calls(metric: metrics.Metric) -> list[tuple[float, dict[str, str]]]:
    return metric._made.calls


def test_outside_of_ray_they_do_nothing_and_load_nothing() -> None:
    code = (
        "import sys; from actors.metrics import SCORER_ITEMS, CHANNEL_LEASED, LEARNER_SECONDS;"
        "SCORER_ITEMS.inc(3); CHANNEL_LEASED.set(1, pipeline='ple'); LEARNER_SECONDS.observe(2, pipeline='ple');"
        "assert 'ray' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ray_gets_the_tags_of_the_call_and_those_that_a_process_knows(ray: ModuleType) -> None:
    items = metrics.Counter("plumbline_a_total", "items", ("replica",))
    items.inc(3)
    items.inc(2, replica="other")
    items.inc(0)  # Ray refuses it
    assert calls(items) == [(3, {"run": "tiny", "replica": "scorer-1"}), (2, {"run": "tiny", "replica": "other"})]


def test_a_counter_times_a_block_also_where_it_raises(ray: ModuleType) -> None:
    seconds = metrics.Counter("plumbline_a_seconds_total", "seconds")
    with pytest.raises(KeyError), seconds.timing():
        raise KeyError
    [(value, tags)] = calls(seconds)
    assert 0 < value < 10 and tags == {"run": "tiny"}


def test_a_gauge_is_told_again_so_that_ray_does_not_forget_it(ray: ModuleType) -> None:
    gauge = metrics.Gauge("plumbline_a", "a", ("pipeline",))
    for pipeline, value in (("ple", 1), ("dlma", 2), ("ple", 3)):
        gauge.set(value, pipeline=pipeline)
    before = len(calls(gauge))
    gauge.refresh()
    again = {tags["pipeline"]: value for value, tags in calls(gauge)[before:]}
    assert again == {"ple": 3, "dlma": 2}


def test_a_proof_is_counted_by_generator_and_policy(ray: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for metric in (metrics.PROOF_SECONDS, metrics.PROBE_DIFFERENCE):
        monkeypatch.setattr(metric, "_made", None)

    class Engine:
        async def logprobs(self, prompt_ids: list[int], response_ids: list[int], *, adapter: object) -> list[float]:
            return [-1.5] * len(response_ids)

    publication = Publication(
        ref=PolicyRef(policy="ple", version=1),
        files={},
        probe_logps=[-1.5],
        previous_probe_logps=[-1.5],
        base_probe_logps=[-1.5],
    )
    engine: Any = Engine()
    prober = Prober("generator-1", engine, [TokenGroup([1], [[2, 3]])], "float32", tolerance=1e-3)
    prober.base_measured = [-1.5]
    asyncio.run(prober.prove(publication, None))
    tags = {"run": "tiny", "replica": "scorer-1", "policy": "ple"}
    [(seconds, told)] = calls(metrics.PROOF_SECONDS)
    assert seconds > 0 and told == tags
    assert calls(metrics.PROBE_DIFFERENCE) == [(0.0, tags)]


def test_what_is_declared_has_a_fitting_name() -> None:
    assert set(metrics.REGISTRY) >= {metric.name for metric in DECLARED.values()}
    for metric in DECLARED.values():
        assert metric.name.endswith("_total") == isinstance(metric, metrics.Counter)
        assert metric.name.endswith("_seconds") == isinstance(metric, metrics.Histogram)


def test_every_metric_that_is_declared_is_counted_somewhere() -> None:
    used = Count()
    for path in (*ROOT.glob("actors/**/*.py"), *ROOT.glob("pipelines/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used[node.value.id] += node.attr in ("inc", "set", "observe", "timing")
    assert [name for name in DECLARED if not used[name]] == []


def shown() -> set[str]:
    """Names in the dashboard, without the prefix that Ray adds and the suffix that Prometheus adds to histograms."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    names = {name for one in asked for name in re.findall(r"(?<!\w)(?:ray_|\(ray_\)\?)(plumbline_\w+)", one)}
    assert names and not {one for one in asked if "plumbline_" not in one}
    return {re.sub(r"_seconds_(bucket|count|sum)$", "_seconds", name) for name in names}


def test_the_dashboard_shows_what_actors_and_pipelines_export_and_nothing_else() -> None:
    exported = {metric.name for metric in DECLARED.values()}
    assert {name for name in shown() if not name.startswith("plumbline_serve_")} == exported


def test_the_dashboard_shows_what_the_endpoint_exports_and_nothing_else() -> None:
    found = {
        node.value
        for path in ROOT.glob("serve/*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and re.fullmatch(r"plumbline_serve_\w+", str(node.value))
    }
    assert {name for name in shown() if name.startswith("plumbline_serve_")} == found


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana needs of one: an own uid, ids and places that do not clash, and a source that it may choose."""
    assert DASHBOARD["uid"] and DASHBOARD["title"] == "Plumbline" and DASHBOARD["schemaVersion"] >= 36
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = Count()
    for panel in panels:
        grid = panel["gridPos"]
        assert grid["x"] >= 0 and grid["x"] + grid["w"] <= 24
        places.update(
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        )
        if panel["type"] != "row":
            assert panel["description"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert set(places.values()) == {1}
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Pool", "Generators", "Scorers, reference and embedder", "Channels and learners", "Serving"]
