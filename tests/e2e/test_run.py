"""Whole runs through the command line: staleness, Ctrl-C and resume, and processes killed in the middle."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.runs import (
    assert_each_prompt_once,
    events,
    finish,
    kill,
    leftovers,
    plumbline,
    start,
    wait_for,
)
from tests.tiny import make_tiny_adapter, tiny_config, write_config

pytestmark = pytest.mark.slow


def test_no_rollout_is_staler_than_the_bound(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_staleness=2)
    config["fleet"] = {"engine": "transformers"}
    config["pipelines"].append({**config["pipelines"][0], "name": "fresh", "max_staleness": 0})
    code, out, err = finish(start(tmp_path, config))
    assert code == 0, err
    for name, bound in (("ple", 2), ("fresh", 0)):
        rows = assert_each_prompt_once(tmp_path, name)
        assert all(r["staleness"] == r["step"] - 1 - r["version"] for r in rows)
        assert max(r["staleness"] for r in rows) <= bound
        assert min(r["staleness"] for r in rows) >= 0
        assert f"{name} 8/8" in out
    assert "engine: transformers" in out
    assert leftovers(tmp_path) == []


def test_a_deterministic_run_gives_the_same_bytes_again(tmp_path: Path) -> None:
    """On vLLM, from a config that says nothing of staleness; answers that were drawn, and weights."""
    path = write_config(tmp_path, tiny_config(tmp_path, batch_size=32, steps=3))
    made = []
    for name in ("one", "two"):
        run_dir = tmp_path / name
        code, out, err = finish(plumbline(tmp_path, "run", str(path), "--run-dir", str(run_dir), "--deterministic"))
        assert code == 0, err
        assert "engine: vllm" in out and "stale 0" in out
        files = [p for room in ("rollouts", "policies") for p in (run_dir / room).rglob("*") if p.is_file()]
        made.append({p.relative_to(run_dir).as_posix(): p.read_bytes() for p in files})
    one, two = made
    assert {"rollouts/ple/step-000003.parquet", "policies/ple/v000003/adapter_model.safetensors"} <= one.keys()
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_ctrl_c_saves_and_resume_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """From an adapter on the model, which is merged once."""
    config = tiny_config(tmp_path)
    config["model"]["adapter"] = str(make_tiny_adapter(tmp_path / "adapter", tmp_path / "model"))
    config["fleet"] = {"engine": "transformers"}
    process = start(tmp_path, config)
    wait_for(tmp_path, process, steps=3)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    code, _, err = finish(process)
    assert code == 130, err
    assert time.monotonic() - pressed < 10
    assert "plumbline resume" in err and "Traceback" not in err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "rollouts").rglob("step-*.parquet")}
    merged = tmp_path / "run" / "base" / "model.safetensors"
    before[merged] = merged.stat().st_mtime_ns
    done = len(events(tmp_path))
    assert 3 <= done < 8
    command = err.split("continue with: plumbline ")[1].split()
    code, _, err = finish(plumbline(tmp_path, *command))
    assert code == 0, err
    assert_each_prompt_once(tmp_path)
    assert all(p.stat().st_mtime_ns == then for p, then in before.items()), "a part, or π0, was written twice"
    trained = json.loads((tmp_path / "run/policies/ple/v000008/adapter_config.json").read_text())
    assert trained["base_model_name_or_path"] == str(merged.parent)
    assert leftovers(tmp_path) == []


def test_several_learners_end_with_an_interrupted_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config["fleet"] = {"engine": "transformers"}
    [ple] = config["pipelines"]
    dlma = {k: ple[k] for k in ("batch_size", "generation", "learner")} | {"type": "dlma", "epochs": 8}
    config["pipelines"] = [ple, {**ple, "name": "other"}, dlma]
    process = start(tmp_path, config)
    wait_for(tmp_path, process, steps=2)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130, err
    assert "interrupted; all steps" in err and "plumbline resume" in err and "Traceback" not in err
    assert leftovers(tmp_path) == []


def test_a_run_survives_its_generator_and_a_learner_worker_killed(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    process = start(tmp_path, tiny_config(tmp_path, learner={"lr": 1e-3, "batch_size": 8, "workers": 2}))
    wait_for(tmp_path, process, steps=2)
    assert kill(tmp_path, "ray::Generator") >= 1
    wait_for(tmp_path, process, steps=4)
    assert kill(tmp_path, "RayTrainWorker") >= 1
    code, _, err = finish(process)
    assert code == 0, err
    assert_each_prompt_once(tmp_path)
    assert leftovers(tmp_path) == []
    versions = sorted(p.name for p in (tmp_path / "run" / "policies" / "ple").iterdir())
    assert versions == [f"v{i:06d}" for i in range(1, 9)]


@pytest.mark.parametrize("method", ["ple", "dlma"])
def test_whole_weights_are_published_proved_and_compared(tmp_path: Path, method: str) -> None:
    config = tiny_config(tmp_path, policy={"type": "full"})
    config["fleet"] = {"engine": "transformers"}
    config["data"]["heldout"] = config["data"]["train"]
    config["evaluation"] = {"prompts": 8}
    [section] = config["pipelines"]
    if method == "dlma":
        config["pipelines"] = [
            {k: section[k] for k in ("policy", "batch_size", "generation", "learner")} | {"type": method}
        ]
    code, _, err = finish(start(tmp_path, config))
    assert code == 0, err
    steps = events(tmp_path, method)
    assert [e["step"] for e in steps] == list(range(1, 9))
    assert 0 < steps[-1]["proof_difference"] < 1e-3
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["before", method]
    assert rows[0]["PPL"] != rows[1]["PPL"], "the base was asked first, then the new weights"
