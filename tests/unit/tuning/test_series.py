"""Rungs one after another, with runs that write what a run leaves; and what is said and written of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plumbline.config.file import parse_text
from plumbline.config.pipelines import Dlma
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, DataError, RunError
from plumbline.tuning import ledger as ledger_module
from plumbline.tuning.arms import TuningData, tuned_pipelines
from plumbline.tuning.halving import Bounds
from plumbline.tuning.ledger import Rung, open_ledger
from plumbline.tuning.plot import plot
from plumbline.tuning.result import recommended, said, table
from plumbline.tuning.series import Outcome, Plan, seconds_a_step, tune
from tests.unit.tuning.test_arms import config

READ = config({"type": "ple", "steps": 32, "learner": {"lr": 1e-3}})
FIGURES = {"PPL": 10.0, "base PPL": 4.0, "tokens": 20.0, "distinct-2": 0.8, "finished": 1.0}
BESIDE_S, STEP_S = 10.0, 0.5


def policy(name: str, reward: float) -> dict[str, Any]:
    interval = {"mean": reward, "low": reward - 0.1, "high": reward + 0.1, "n": 40}
    return {"policy": name, "reward": interval, **FIGURES}


class Runs:
    """In place of real runs, on a clock of their own: a run takes `BESIDE_S`, and `STEP_S` a step of each arm.

    The reward is best at 1e-3. `fate` says otherwise of an arm, by its rate: changed figures, or why it failed.
    """

    def __init__(self, fate: Callable[[float], Any] = lambda lr: None) -> None:
        self.fate = fate
        self.clock = 1000.0
        self.started: list[tuple[str, int, int]] = []
        self.interrupt: str | None = None

    def __call__(self, run: Config, directory: Path) -> None:
        place, steps, arms = f"{directory.parent.name}/{directory.name}", run.methods[0].steps or 0, run.methods
        self.started.append((place, len(arms), steps))
        directory.mkdir(parents=True, exist_ok=True)
        self.clock += BESIDE_S
        rows, events = [policy("before", 0.0)], []
        for section in arms:
            times = [self.clock + step * STEP_S * len(arms) for step in range(steps)]
            events += [{"pipeline": section.name, "step": i, "time": at} for i, at in enumerate(times, start=1)]
            told = self.fate(section.learner.lr)
            if isinstance(told, str):
                events.append({"pipeline": section.name, "error": told, "time": self.clock})
            else:
                rows.append(policy(section.name, 1 - abs(section.learner.lr - 1e-3)) | (told or {}))
        (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        self.clock += steps * STEP_S * len(arms)
        if place == self.interrupt:
            raise KeyboardInterrupt
        failed = len(arms) - (len(rows) - 1)
        if failed < len(arms):
            (directory / "evaluation.json").write_text(json.dumps({"rows": rows}))
        if failed:
            raise RunError(f"{failed} pipelines failed")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    clock = SimpleNamespace(time=lambda: made.clock, monotonic=lambda: made.clock)
    monkeypatch.setattr(ledger_module, "time", clock)
    return made


def tuned(
    directory: Path, runs: Callable[[Config, Path], None], budget: float = 1e6, read: Config = READ, name: str = "ple"
) -> Outcome:
    plan = Plan(
        over={},
        bounds=Bounds(),
        budget=budget,
        data=TuningData(heldout=directory / "h", prompts=40, train=directory / "t"),
        full={"ple": 32, "dlma": 32},
    )
    ledger = open_ledger(directory, read, {"budget": budget})
    directory.mkdir(exist_ok=True)
    return tune(ledger, tuned_pipelines(read, [name], "x")[0], plan, runs, lambda _: None)


def rate(found: Outcome) -> float | None:
    return found.best and found.best.values["lr"]


def test_arms_are_halved_until_one_is_left(tmp_path: Path, runs: Runs) -> None:
    """Of 140 s the first rung takes 38, so 51 are left for each of two; two steps of four arms take 4 of them."""
    found = tuned(tmp_path / "tune", runs, budget=140)
    assert runs.started == [("ple/rung-0", 7, 8), ("ple/rung-1", 4, 20), ("ple/rung-2", 2, 32)]
    assert [len(left) for left in found.left] == [4, 2, 1]
    assert rate(found) == 1e-3
    assert found.seconds == runs.clock - 1000 == 38 + 50 + 42


def test_with_time_enough_all_sound_arms_have_all_steps(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: {"PPL": 99.0} if lr >= 0.01 else None
    found = tuned(tmp_path / "tune", runs)
    assert runs.started == [("ple/rung-0", 7, 8), ("ple/rung-1", 5, 32)]
    assert rate(found) == 1e-3
    assert not [line for line in said(found, Bounds(), 1e6) if "the budget ended" in line]


def test_what_the_first_rung_took_more_than_the_budget_is_said(tmp_path: Path, runs: Runs) -> None:
    found = tuned(tmp_path / "tune", runs, budget=30)
    assert runs.started == [("ple/rung-0", 7, 8)]
    lines = said(found, Bounds(), 30)
    assert lines[0] == "ple: 38 s of 30 s used, 1 rung, 8 s more than the budget"
    assert lines[2] == (
        "ple: the budget ended at 8 of 32 steps with 4 arms left: the rate below that of the highest reward, lr 1e-3, "
        "is taken, for fewer steps favour higher rates"
    )
    assert rate(found) == 3.2e-4
    assert "| lr 1e-3   |" in table([found], Bounds()) and "highest, at few steps" in table([found], Bounds())


def test_a_lower_rate_that_is_out_is_not_taken_in_place_of_the_highest(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: {"PPL": 99.0} if lr == 3.2e-4 else None
    assert rate(tuned(tmp_path / "tune", runs, budget=30)) == 1e-4


def test_where_no_lower_rate_is_sound_the_highest_reward_is_taken_and_that_is_said(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: {"PPL": 99.0} if lr < 1e-3 else None
    found = tuned(tmp_path / "tune", runs, budget=30)
    assert rate(found) == 1e-3
    assert said(found, Bounds(), 30)[2] == (
        "ple: the budget ended at 8 of 32 steps with 4 arms left: the best is taken, for no lower rate was tried that "
        "is not out, though fewer steps favour higher rates"
    )


def test_a_rate_that_is_taken_although_it_is_not_above_the_base_is_said(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: None if lr == 1e-3 else {"reward": {"mean": -1.0, "low": -2.0, "high": 0.0, "n": 40}}
    found = tuned(tmp_path / "tune", runs, budget=30)
    assert rate(found) == 3.2e-4
    assert said(found, Bounds(), 30)[3] == (
        "ple: at 8 steps its reward is not above π0's; more steps would show whether it rises"
    )


def test_an_interrupted_rung_is_the_only_one_that_is_run_again(tmp_path: Path, runs: Runs) -> None:
    runs.interrupt = "ple/rung-1"
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "tune", runs, budget=180)
    runs.interrupt, before = None, list(runs.started)
    found = tuned(tmp_path / "tune", runs, budget=180)
    assert before == [("ple/rung-0", 7, 8), ("ple/rung-1", 4, 30)]
    assert runs.started[2] == ("ple/rung-1", 4, 30), "with the steps that it was begun with"
    assert found.rungs[1].seconds == 2 * 70, "both attempts count"
    assert len(runs.started) == 3, "which leaves no time for another"
    again = tuned(tmp_path / "tune", runs, budget=180)
    assert len(runs.started) == 3
    assert table([again], Bounds()) == table([found], Bounds())


def test_a_rung_whose_process_was_killed_counts_until_its_last_event(tmp_path: Path, runs: Runs) -> None:
    runs.interrupt = "ple/rung-0"
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "tune", runs)
    file = tmp_path / "tune" / "tune.json"
    tree = json.loads(file.read_text())
    tree["rungs"]["ple"][0] |= {"seconds": 5.0, "since": 1000.0}
    file.write_text(json.dumps(tree))
    [rung] = open_ledger(tmp_path / "tune", READ, {"budget": 1e6}).rungs["ple"]
    assert rung.seconds == 5 + BESIDE_S + 7 * 7 * STEP_S
    assert rung.since is None


def test_a_run_that_was_evaluated_before_its_process_died_is_read(tmp_path: Path, runs: Runs) -> None:
    tuned(tmp_path / "tune", runs, budget=30)
    file = tmp_path / "tune" / "tune.json"
    tree = json.loads(file.read_text())
    tree["rungs"]["ple"][0]["rows"] = None
    file.write_text(json.dumps(tree))
    assert rate(tuned(tmp_path / "tune", runs, budget=30)) == 3.2e-4
    assert len(runs.started) == 1


def test_failed_arms_are_out_and_the_others_go_on(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: "the loss is nan" if lr >= 1e-3 else None
    found = tuned(tmp_path / "tune", runs, budget=120)
    assert rate(found) == 3.2e-4
    text = table([found], Bounds())
    assert "failed: the loss is nan" in text
    assert "recommended" in next(line for line in text.splitlines() if "32" in line and "lr 3.2e-4" in line)


def test_where_all_are_out_nothing_is_recommended(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: {"tokens": 1.0}
    found = tuned(tmp_path / "tune", runs)
    assert found.best is None and len(runs.started) == 1
    assert said(found, Bounds(), 1e6)[1] == (
        "ple: nothing to recommend: every arm of rung 0 is out; the lowest, lr 3.2e-5: tokens 1, below 10"
    )
    assert "<svg" in plot([found], Bounds())


def test_where_all_fail_no_evaluation_is_waited_for(tmp_path: Path, runs: Runs) -> None:
    runs.fate = lambda lr: "the loss is nan"
    found = tuned(tmp_path / "tune", runs)
    assert found.best is None
    assert "failed: the loss is nan" in said(found, Bounds(), 1e6)[1]
    assert "<svg" in plot([found], Bounds())
    tuned(tmp_path / "tune", runs)
    assert len(runs.started) == 1


def test_a_run_that_ended_for_another_reason_is_no_arms_fault(tmp_path: Path, runs: Runs) -> None:
    def full_disk(run: Config, directory: Path) -> None:
        raise RunError("there is no room left")

    with pytest.raises(RunError, match="no room"):
        tuned(tmp_path / "tune", full_disk)  # type: ignore[arg-type]
    assert rate(tuned(tmp_path / "tune", runs)) == 1e-3


def test_an_end_of_the_grid_and_a_reward_below_the_base_are_said(tmp_path: Path, runs: Runs) -> None:
    low = config({"type": "ple", "steps": 32, "learner": {"lr": 1e-5}})
    runs.fate = lambda lr: {"reward": {"mean": lr - 1, "low": -2.0, "high": 0.0, "n": 40}}
    lines = said(tuned(tmp_path / "tune", runs, read=low), Bounds(), 1e6)
    assert any("highest rate that was tried" in line for line in lines)
    assert any("no arm's reward is above π0's" in line for line in lines)


def test_a_second_pipeline_has_a_budget_and_rungs_of_its_own(tmp_path: Path, runs: Runs) -> None:
    given = {"type": "dlma", "pairs": {"path": "p"}, "learner": {"lr": 1e-3}}
    both = config({"type": "ple", "steps": 32, "learner": {"lr": 1e-3}}, given)
    first = tuned(tmp_path / "tune", runs, 140, both)
    second = tuned(tmp_path / "tune", runs, 140, both, "dlma")
    assert second.seconds == first.seconds
    assert {place for place, *_ in runs.started} >= {"ple/rung-2", "dlma/rung-2"}
    text = recommended(both, [first, second], "one.yaml")
    read = parse_text(text, "recommended.yaml")
    assert [section.learner.lr for section in read.pipelines] == [1e-3, 1e-3]
    assert text.splitlines()[1].startswith("# ple: lr 1e-3; reward +1.000 (π0 +0.000)")
    svg = plot([first, second], Bounds())
    assert svg.count("<svg") == 1 and len(svg) > 5000


def test_what_all_arms_would_draw_is_drawn_once_for_each_rung(tmp_path: Path, runs: Runs) -> None:
    read = config({"type": "dlma", "learner": {"lr": 1e-3}})
    learnt: dict[str, list[str | None]] = {}

    def start(run: Config, directory: Path) -> None:
        learnt[directory.name] = [one.pairs and one.pairs.path for one in run.methods if isinstance(one, Dlma)]
        runs(run, directory)

    runs.interrupt = "dlma/rung-0"
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "tune", start, 280, read, "dlma")
    runs.interrupt = None
    found = tuned(tmp_path / "tune", start, 280, read, "dlma")
    places = [place for place, *_ in runs.started]
    assert places[:4] == ["dlma/drawn-0", "dlma/rung-0", "dlma/rung-0", "dlma/drawn-1"]
    assert runs.started[0] == ("dlma/drawn-0", 1, 8)
    assert learnt["drawn-0"] == [None]
    assert learnt["rung-0"] == [str(tmp_path / "tune/dlma/drawn-0/pairs/dlma")] * 7
    assert found.seconds == runs.clock - 1000, "drawing is part of the budget"
    assert (found.rungs[0].per_step, found.rungs[0].drawn_per_step) == (7 * STEP_S, STEP_S)
    assert rate(found) == 1e-3


def test_the_base_is_made_once_for_all_pipelines_and_in_no_budget(tmp_path: Path, runs: Runs) -> None:
    read = config({"type": "ple", "learner": {"lr": 1e-3}}, {"type": "dlma", "learner": {"lr": 1e-3}}, sft={})
    models: list[tuple[str, str | None]] = []

    def start(run: Config, directory: Path) -> None:
        if directory.name == "base":
            runs.clock += 500
            made = directory / "policies/sft/v000003"
            made.mkdir(parents=True)
            (made / "proof.json").touch()
        else:
            assert run.sft is None
            runs(run, directory)
        models.append((directory.name, run.model.path))

    first = tuned(tmp_path / "tune", start, 30, read)
    second = tuned(tmp_path / "tune", start, 30, read, "dlma")
    made = str(tmp_path / "tune/base/policies/sft/v000003")
    assert models == [("base", "m"), ("rung-0", made), ("drawn-0", made), ("rung-0", made)]
    assert first.seconds + second.seconds == runs.clock - 1000 - 500
    with pytest.raises(ConfigError, match="holds another config"):
        open_ledger(tmp_path / "tune", read.model_copy(update={"seed": 1}), {"budget": 30})


def test_only_the_same_tuning_goes_on_in_a_directory(tmp_path: Path, runs: Runs) -> None:
    place = tmp_path / "tune"
    tuned(place, runs, budget=30)
    with pytest.raises(ConfigError, match=r"--budget was 30 there, is 60 here; give what was given there"):
        tuned(place, runs, budget=60)
    with pytest.raises(ConfigError, match=r"holds another config \(`seed` is 0 there, 1 here\)"):
        tuned(place, runs, budget=30, read=READ.model_copy(update={"seed": 1}))
    whole = json.loads((place / "tune.json").read_text())
    [rung] = whole["rungs"]["ple"]
    for damaged in (
        [],
        {**whole, "options": None},
        {**whole, "config": "x"},
        *({**whole, "rungs": {"ple": [{**rung, **part}]}} for part in ({"since": "x"}, {"steps": "a"}, {"rows": {}})),
    ):
        (place / "tune.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="is damaged"):
            tuned(place, runs, budget=30)
    (place / "tune.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        tuned(place, runs, budget=30)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="exists and holds no tuning"):
        open_ledger(tmp_path / "other", READ, {})


def test_a_tuning_of_which_no_run_has_begun_may_be_another(tmp_path: Path) -> None:
    """A rung that had no room on the machine was refused before its run began."""
    first = open_ledger(tmp_path / "tune", READ, {"over": {}})
    first.directory.mkdir()
    first.rungs["ple"] = [Rung(steps=8, arms=["a"])]
    first.save()
    assert open_ledger(tmp_path / "tune", READ, {"over": {"lr": [1e-3, 1e-4]}}).rungs == {}


def test_a_pause_is_no_step(tmp_path: Path) -> None:
    times = [0.0, 2.0, 4.0, 3600.0, 3602.0, 3604.0]
    lines = [{"pipeline": "a", "step": i, "time": at} for i, at in enumerate(times, start=1)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds_a_step(tmp_path, Rung(steps=6, arms=["a", "b"])) == 2.0
    assert seconds_a_step(tmp_path, Rung(steps=3, arms=["a"])) == 4.0, "two epochs are two of its steps each"
    assert seconds_a_step(tmp_path, Rung(steps=4, arms=["b"], seconds=8.0)) == 2.0, "nothing else is known"
