"""`plumbline tune` with real runs: interrupted, gone on with, and asked again."""

import json
import signal
import time
from pathlib import Path

import pytest

from plumbline.config.file import load_config
from tests.runs import LIMIT_S, finish, leftovers, plumbline
from tests.tiny import make_prompts, tiny_config, write_config

pytestmark = pytest.mark.slow

RATES = {"1e-3": 1e-3, "0.01": 1e-2}


def test_a_tuning_goes_on_where_it_was_interrupted_and_runs_nothing_twice(tmp_path: Path) -> None:
    """Two arms in two rungs; of the first, parts that were there before Ctrl-C are not drawn again."""
    config = tiny_config(tmp_path, batch_size=4)
    make_prompts(tmp_path / "heldout.jsonl", 24, seed=1)
    config["fleet"] = {"engine": "transformers"}
    config["data"]["heldout"] = {"path": str(tmp_path / "heldout.jsonl")}
    config["evaluation"] = {"prompts": 8}
    place = tmp_path / "tuned"
    bounds = ["--max-ppl-rise", "1e9", "--max-base-ppl", "1e9", "--length", "0", "1e9", "--min-distinct", "0"]
    asked = ["--budget", "10h", "--over", f"lr={','.join(RATES)}", "--prompts", "16", "--run-dir", str(place), *bounds]
    command = ["tune", str(write_config(tmp_path, config)), *asked]

    process = plumbline(tmp_path, *command)
    deadline = time.monotonic() + LIMIT_S
    while not (parts := sorted((place / "ple" / "rung-0").rglob("step-*.parquet"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no part in time"
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert f"the same command goes on there, in {place}" in err and "Traceback" not in err
    before = {part: part.stat().st_mtime_ns for part in parts}

    code, out, err = finish(plumbline(tmp_path, *command))
    assert code == 0, err
    assert all(part.stat().st_mtime_ns == then for part, then in before.items()), "a part was drawn twice"
    rungs = json.loads((place / "tune.json").read_text())["rungs"]["ple"]
    assert [(rung["steps"], len(rung["arms"])) for rung in rungs] == [(8, 2), (16, 2)], "time is no matter, all go on"
    for number, rung in enumerate(rungs):
        kept = load_config(place / "ple" / f"rung-{number}" / "config.yaml")
        assert [section.name for section in kept.methods] == rung["arms"]
        assert {section.name: section.learner.lr for section in kept.methods} == {
            f"ple-lr-{text}": rate for text, rate in RATES.items()
        }
        for name in rung["arms"]:
            policies = sorted((place / "ple" / f"rung-{number}" / "policies" / name).iterdir())
            assert policies[-1].name == f"v{rung['steps']:06d}"
            assert rung["rows"][name]["prompts"] == 16
    last = rungs[-1]["rows"]
    rewards = {text: last[f"ple-lr-{text}"]["reward"]["mean"] for text in RATES}
    best = max(rewards, key=lambda text: (rewards[text], -RATES[text]))
    assert load_config(place / "recommended.yaml").pipelines[0].learner.lr == RATES[best]
    assert f"go on with: plumbline run {place / 'recommended.yaml'}" in out

    done = {path: path.stat().st_mtime_ns for path in (place / "ple").rglob("*") if path.is_file()}
    code, again, err = finish(plumbline(tmp_path, *command))
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in (place / "ple").rglob("*") if path.is_file()} == done
    assert again.splitlines()[-4:] == out.splitlines()[-4:]
    assert leftovers(tmp_path) == []
