"""A run of several pipelines over one pool of a real vLLM engine, one of them broken, and a second on what it left."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import Message, Prompt
from plumbline.runs.pairs import PAIR_SCHEMA, Answer, pair_rows
from plumbline.runs.parts import Parts, Rejected
from plumbline.runs.policies import versions
from tests.tiny import make_prompts, make_tiny_embedder, tiny_config, write_config

pytestmark = pytest.mark.slow
LIMIT_S = 500
PROMPTS, EQUAL = 64, 3


@dataclass(frozen=True)
class Run:
    directory: Path
    code: int
    out: str
    err: str

    def events(self, pipeline: str) -> list[dict[str, Any]]:
        lines = (self.directory / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["pipeline"] == pipeline]

    def rows(self, room: str, name: str) -> list[dict[str, Any]]:
        return Parts(str(self.directory / room / name), read_only=True).read_all()

    def rejected(self, room: str, name: str) -> list[dict[str, Any]]:
        return Rejected(str(self.directory / room / name / "rejected.parquet"), read_only=True).read_all()


def launch(directory: Path, config: dict[str, Any], name: str) -> Run:
    path = write_config(directory, config)
    command = [sys.executable, "-m", "cli", "run", str(path), "--run-dir", str(directory / name)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["XDG_CACHE_HOME"] = str(directory / "cache")
    done = subprocess.run(
        command, cwd=directory, env=environment, text=True, capture_output=True, timeout=LIMIT_S, check=False
    )
    return Run(directory / name, done.returncode, done.stdout, done.stderr)


def write_preferences(path: Path, prompts: Path) -> None:
    """Rows with one or two rejected answers, and a few whose answers are equal."""
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    rude = ["You waste my time.", ["You waste my time.", "What a dull question."]]
    rows = [
        {"prompt": row["prompt"], "chosen": row["target"], "rejected": row["target"] if i < EQUAL else rude[i % 2]}
        for i, row in enumerate(asked)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_broken_parts(directory: Path, model: Path) -> None:
    """Parts of the right model whose reference log-probs are infinite: the loss of their learner will be too."""
    prompt = Prompt(id="p", messages=(Message(role="user", content="Hi"),))
    rows = pair_rows(
        step=1,
        prompt=prompt,
        prompt_ids=[5, 6],
        answers=[Answer(text="a", ids=[7]), Answer(text="b", ids=[8])],
        ref_logps=[float("inf"), -1.0],
        rewards=None,
        engine=None,
        model=model_fingerprint(str(model)),
    )
    Parts(str(directory), PAIR_SCHEMA).write(1, rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("pipelines")
    config = tiny_config(directory, steps=4)
    make_prompts(directory / "heldout.jsonl", 8, seed=1)
    make_tiny_embedder(directory / "embedder")
    write_preferences(directory / "preferences.jsonl", directory / "prompts.jsonl")
    write_broken_parts(directory / "broken", directory / "model")
    config["data"]["heldout"] = {"path": str(directory / "heldout.jsonl")}
    config["embedder"] = {"path": str(directory / "embedder")}
    config["evaluation"] = {"prompts": 8, "samples": 2}
    return directory, config


@pytest.fixture(scope="module")
def together(world: tuple[Path, dict[str, Any]]) -> Run:
    directory, config = world
    made = {"batch_size": 16, "generation": {"max_tokens": 16}}
    learner = {"lr": 1e-3, "batch_size": 16}
    given = {"type": "self_contrast", "batch_size": 16, "learner": learner}
    pipelines = [
        *config["pipelines"],
        {"type": "dlma", "train": False, **made},
        {"type": "self_contrast", "samples": 8, "keep": 0.5, "negatives": 2, "learner": learner, **made},
        {**given, "name": "dpo", "pairs": {"path": str(directory / "preferences.jsonl")}},
        {
            **given,
            "name": "broken",
            "learner": {**learner, "max_skipped": 0},
            "pairs": {"path": str(directory / "broken")},
        },
    ]
    return launch(directory, {**config, "pipelines": pipelines}, "together")


def test_a_failing_pipeline_ends_alone_and_the_exit_code_says_so(together: Run) -> None:
    assert together.code == 1, together.err
    [line] = [line for line in together.err.splitlines() if "pipelines failed" in line] or [together.err]
    assert "1 of 5 pipelines failed" in line and "broken" in line and "the loss became inf" in line
    assert "Traceback" not in together.err
    assert together.events("broken")[-1]["error"].startswith("broken: the loss became inf")
    for name in ("ple", "self_contrast", "dpo"):
        assert [e["step"] for e in together.events(name)] == [1, 2, 3, 4], name
        assert versions(together.directory, name)[-1] == 4


def test_a_pipeline_may_only_make_parts(together: Run) -> None:
    assert sorted(e["step"] for e in together.events("dlma")) == [1, 2, 3, 4]
    assert versions(together.directory, "dlma") == []


def test_every_prompt_is_in_one_part_or_rejected(together: Run) -> None:
    for name in ("dlma", "self_contrast"):
        rows = {(row["step"], row["prompt_id"]) for row in together.rows("pairs", name)}
        left = [row["prompt_id"] for row in together.rejected("pairs", name)]
        assert sorted([prompt for _, prompt in rows] + left) == sorted(f"p{i}" for i in range(PROMPTS)), name


def test_the_pairs_are_what_the_methods_say(together: Run) -> None:
    for row in together.rows("pairs", "dlma"):
        margin = row["chosen_pos"] - row["chosen_neg"] - (row["rejected_pos"] - row["rejected_neg"])
        assert row["margin"] == pytest.approx(margin, abs=1e-9)
        assert row["chosen_ids"] != row["rejected_ids"]
    rows = together.rows("pairs", "self_contrast")
    targets = {json.loads(line)["id"]: json.loads(line)["target"] for line in prompts_of(together)}
    assert set(Counter(row["prompt_id"] for row in rows).values()) == {2}
    assert all(row["chosen"] == targets[row["prompt_id"]] != row["rejected"] for row in rows)
    assert all(-1 <= row["similarity"] <= 1 for row in rows)


def prompts_of(run: Run) -> list[str]:
    return (run.directory.parent / "prompts.jsonl").read_text().splitlines()


def test_a_preference_file_keeps_several_rejected_answers_and_drops_equal_ones(together: Run) -> None:
    counts = Counter(row["prompt_id"] for row in together.rows("pairs", "dpo"))
    assert set(counts.values()) == {1, 2}
    assert [row["reason"] for row in together.rejected("pairs", "dpo")] == ["equal answers"] * EQUAL


def test_the_pool_was_shared(together: Run) -> None:
    last = together.events("pool")[-1]
    assert set(last["shares"]) == {"ple", "dlma", "self_contrast"}
    assert sum(last["shares"].values()) == pytest.approx(1)
    assert last["reference_misses"] > 0 and last["embedded"] > 0


def test_all_policies_are_evaluated_side_by_side(together: Run) -> None:
    result = json.loads((together.directory / "evaluation.json").read_text())
    assert [row["policy"] for row in result["rows"]] == ["before", "ple", "self_contrast", "dpo"]
    assert set(result["samples"][0]) == {"prompt", "before", "ple", "self_contrast", "dpo"}


def test_another_beta_computes_no_reference_again_and_parts_train_elsewhere(
    together: Run, world: tuple[Path, dict[str, Any]]
) -> None:
    directory, config = world
    common = {"batch_size": 16, "learner": {"lr": 1e-3, "batch_size": 16}}
    parts = together.directory / "pairs" / "dlma"
    pipelines = [
        {
            "type": "self_contrast",
            "name": "dpo",
            "beta": 0.5,
            "pairs": {"path": str(directory / "preferences.jsonl")},
            **common,
        },
        {"type": "dlma", "epochs": 2, "pairs": {"path": str(parts)}, **common},
        {"type": "raft", "generation": {"max_tokens": 16}, **common},
    ]
    rest = {key: value for key, value in config.items() if key not in ("embedder", "evaluation")}
    again = launch(directory, rest | {"pipelines": pipelines, "data": {**config["data"], "heldout": None}}, "again")
    assert again.code == 0, again.err
    last = again.events("pool")[-1]
    assert (last["reference_misses"], last["shares"]) == (0, {"raft": 1.0})
    assert last["reference_hits"] > 0
    ids = [sorted(map(str, (r["chosen_ids"] for r in run.rows("pairs", "dlma")))) for run in (together, again)]
    assert ids[0] == ids[1], "every pair of the other run, once"
    trained = [e["step"] for e in again.events("dlma")]
    assert trained == list(range(1, len(trained) + 1)) and versions(again.directory, "dlma")[-1] == trained[-1]
    assert len(trained) == 2 * len(Parts(str(again.directory / "pairs" / "dlma"), read_only=True).steps()), "two epochs"
    for row in again.rows("rollouts", "raft"):
        assert row["reward"] == max(row["rewards"])
