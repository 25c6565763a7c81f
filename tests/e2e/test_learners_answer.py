"""A run of dlma and self_contrast whose learners answer for π0: no copy of it is there, their pairs are as with one."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from actors.reference import Reference, ReferenceSpec
from plumbline.records import TokenGroup
from plumbline.runs.parts import Parts
from plumbline.runs.policies import versions
from tests.runs import finish, processes, start
from tests.tiny import make_tiny_embedder, tiny_config

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run's world; the run itself is in `run`, its cache in `cache`."""
    directory = tmp_path_factory.mktemp("learners")
    config = tiny_config(directory)
    make_tiny_embedder(directory / "embedder")
    common = {"batch_size": 16, "generation": {"max_tokens": 16}, "learner": {"lr": 1e-3, "batch_size": 16}}
    config |= {
        "embedder": {"path": str(directory / "embedder")},
        "fleet": {"reference": {"replicas": "learner", "cache": str(directory / "cache")}},
        "pipelines": [
            {"type": "dlma", "contrast": {"preset": "harmless"}, "ahead": 1, "epochs": 2, **common},
            {"type": "self_contrast", "samples": 8, "keep": 0.5, "negatives": 2, **common},
        ],
    }
    process = start(directory, config)
    titles: set[str] = set()
    while process.poll() is None:
        titles |= set(processes(directory).values())
        time.sleep(1)
    code, _, err = finish(process)
    assert code == 0, err
    # A method's title lasts as long as the method: an actor's class is what is there all the time.
    assert "ray::Desk" in titles, titles
    assert not any("Reference" in title for title in titles), titles
    return directory


def pairs(run: Path, name: str) -> list[dict[str, Any]]:
    return Parts(str(run / "run" / "pairs" / name), read_only=True).read_all()


def reference(run: Path, cache: Path | None) -> Reference:
    spec = ReferenceSpec(
        model_path=str(run / "model"),
        dtype="float32",
        device="cpu",
        threads=1,
        batch_tokens=4096,
        cache=None if cache is None else str(cache),
    )
    return Reference(spec)


def test_every_part_was_trained_on(run: Path) -> None:
    assert versions(run / "run", "dlma")[-1] == 2 * STEPS
    assert versions(run / "run", "self_contrast")[-1] == STEPS
    events = [json.loads(line) for line in (run / "run" / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["pipeline"] == "pool"][-1]
    rows = {name: len(pairs(run, name)) for name in ("dlma", "self_contrast")}
    assert last["reference_misses"] >= 6 * rows["dlma"] + rows["self_contrast"] > 100


@pytest.mark.parametrize("name", ["dlma", "self_contrast"])
def test_the_pairs_have_the_log_probs_of_a_copy(run: Path, name: str) -> None:
    rows = pairs(run, name)
    groups = [TokenGroup(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    found = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows]
    copy = reference(run, None)
    for logps, expected in zip(found, copy.logps(groups), strict=True):
        assert logps == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert {row["model"] for row in rows} == {copy.fingerprint()}
    cached = reference(run, run / "cache")
    assert cached.logps(groups) == [list(logps) for logps in found]
    assert cached.counts()["misses"] == 0, "a run with a copy computes nothing again"
