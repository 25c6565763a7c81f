"""`plumbline tune` through the command line: bad input is one line, and what a tuning leaves can be run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cli import tuning
from cli.main import main
from plumbline.config.file import load_config
from plumbline.config.tree import Config
from tests.tiny import make_prompts, tiny_config
from tests.unit.tuning.test_series import Runs

Change = Callable[[dict[str, Any]], None]


class World:
    """A directory with all that a tuning needs."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        (directory / "model").symlink_to(model)
        make_prompts(directory / "prompts.jsonl", 16)
        make_prompts(directory / "heldout.jsonl", 48, seed=1)
        self.tree = tiny_config(directory, batch_size=2)
        self.tree["data"]["heldout"] = {"path": str(directory / "heldout.jsonl")}
        self.tree["evaluation"] = {"prompts": 8}
        self.place = directory / "tuned"

    def tune(self, *arguments: str) -> int:
        config = self.directory / "tiny.yaml"
        config.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
        budget = () if "--budget" in arguments else ("--budget", "10m")
        return main(["tune", str(config), *budget, "--run-dir", str(self.place), *arguments])


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return World(tmp_path, tiny_model)


@pytest.fixture
def refused(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Tunes, which must end as wrong use before Ray is imported and with nothing written; returns the line."""

    def refuse(*arguments: str) -> str:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pipelines.run", None)  # importing it is an error
            capsys.readouterr()
            assert world.tune(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        return line.removeprefix("plumbline: ")

    return refuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "10x"], "--budget 10x: should be a time such as 90s, 10m or 1.5h"),
        (["--over", "lr=fast"], "--over lr=fast: write KEY=VALUE,VALUE"),
        (["--over", "lr=1e-3,2"], "pipelines.1.learner.lr: input should be less than or equal to 1, got 2.0"),
        (["--over", "beta=0.1,0.2"], "--over beta=…: no `beta` in ple"),
        (["--over", "lr=1e-3"], "1 of lr of ple should be 2 to 16 different settings"),
        (["--pipeline", "dlma"], "--pipeline dlma: "),
        (["--set", "pipelines.0.policy={type: full}"], "policy: {type: lora}"),
        (["--set", "reward=null", "--set", "pipelines.0.type=dlma"], "unknown key"),
        (["--prompts", "0"], "--prompts 0: should be 1 or more"),
        (["--length", "2", "3"], "--length 2 3: should be a number below 1 and one above"),
        (["--max-base-ppl", "0.5"], "--max-base-ppl 0.5: should be 1 or more"),
        (["--max-ppl-rise", "nan"], "--max-ppl-rise nan: should be 0 or more"),
        (["--set", "evaluation.prompts=40"], "evaluation.prompts leaves 8 of 48 rows, tuning asks 32 or more"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_bad_input_is_one_line(world: World, refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)
    assert not world.place.exists()


def without_evaluation(tree: dict[str, Any]) -> None:
    del tree["evaluation"], tree["data"]["heldout"]


def without_reward(tree: dict[str, Any]) -> None:
    del tree["reward"]
    tree["pipelines"] = [{"type": "dlma", "generation": {"max_tokens": 16}}]


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (
            without_evaluation,
            "it needs `evaluation` and `data.heldout`: arms are judged by held-out reward; `plumbline init --reward "
            "--heldout FILE` writes all three",
        ),
        (without_reward, "it needs `reward`: arms are judged"),
    ],
)
def test_what_a_config_lacks_is_named(world: World, refused: Callable[..., str], change: Change, missing: str) -> None:
    change(world.tree)
    assert missing in refused()


def test_a_directory_of_something_else_is_left_alone(world: World, refused: Callable[..., str]) -> None:
    world.place.mkdir()
    (world.place / "notes.txt").write_text("mine")
    assert "exists and holds no tuning" in refused()
    assert [file.name for file in world.place.iterdir()] == ["notes.txt"]


def test_a_tuning_from_its_command_to_its_files(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real data and checks, and runs that write what a run leaves."""
    runs = Runs()
    asked: list[Config] = []

    def start(config: Config, directory: Path) -> None:
        asked.append(config)
        runs(config, directory)

    monkeypatch.setattr(tuning, "_start", start)
    assert world.tune() == 0
    out = capsys.readouterr().out
    assert f"go on with: plumbline run {world.place / 'recommended.yaml'}" in out
    assert "| recommended" in out
    kept = [json.loads(line)["id"] for line in (world.place / "heldout.jsonl").read_text().splitlines()]
    assert len(kept) == 40 == len(set(kept)), "what the evaluation leaves of 48"
    found = load_config(world.place / "recommended.yaml")
    assert found == load_config(world.directory / "tiny.yaml"), "whose rate is the best here"
    assert (world.place / "tune.svg").read_text().startswith("<?xml")
    assert {config.evaluation.prompts for config in asked if config.evaluation} == {40}
    before = len(asked)
    assert world.tune() == 0
    assert len(asked) == before, "a rung was run twice"
    assert capsys.readouterr().out.splitlines()[-3:] == out.splitlines()[-3:]
    assert world.tune("--prompts", "33") == 2
    assert "--prompts was 128 there, is 33 here" in capsys.readouterr().err


def test_the_prompts_that_are_asked_are_none_of_the_final_evaluations(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.evaluate import heldout_prompts
    from plumbline.data.dataset import read_prompts

    monkeypatch.setattr(tuning, "_start", Runs())
    assert world.tune() == 0
    config = load_config(world.directory / "tiny.yaml")
    rows = SimpleNamespace(heldout=read_prompts(str(world.directory / "heldout.jsonl")))
    final = heldout_prompts(SimpleNamespace(config=config, rows=rows))  # type: ignore[arg-type]
    kept = read_prompts(str(world.place / "heldout.jsonl"))
    assert len(final) == 8
    assert not {prompt.id for prompt in final} & {prompt.id for prompt in kept}
    assert {prompt.target for prompt in kept} <= {prompt.target for prompt in rows.heldout}


def test_where_the_evaluation_asks_all_held_out_prompts_training_rows_are_judged_on(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in every config that `plumbline init` writes; the same when it goes on."""
    from plumbline.data.dataset import read_prompts

    make_prompts(world.directory / "prompts.jsonl", 160)
    world.tree["evaluation"] = {"prompts": 48}
    runs, asked = Runs(), list[Config]()
    runs.interrupt = "ple/rung-0"

    def start(config: Config, directory: Path) -> None:
        asked.append(config)
        runs(config, directory)

    monkeypatch.setattr(tuning, "_start", start)
    assert world.tune() == 130
    runs.interrupt = None
    assert world.tune() == 0
    assert capsys.readouterr().out.count("40 prompts of data.train are judged on, and not learnt from") == 2
    assert {config.data.train.path for config in asked} == {str(world.place / "train.jsonl")}
    assert {config.evaluation.prompts for config in asked if config.evaluation} == {40}
    judged, learnt = (
        {one.query for one in read_prompts(str(world.place / f"{name}.jsonl"))} for name in ("heldout", "train")
    )
    assert judged and learnt and not judged & learnt


def test_ctrl_c_says_how_to_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs()
    runs.interrupt = "ple/rung-0"
    monkeypatch.setattr(tuning, "_start", runs)
    assert world.tune() == 130
    assert capsys.readouterr().err.splitlines() == [
        "plumbline: interrupted; all steps that are done are saved",
        f"plumbline: the same command goes on there, in {world.place}",
    ]


def test_where_nothing_is_recommended_the_exit_code_is_1(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "_start", Runs(lambda lr: "the loss is nan"))
    assert world.tune() == 1
    assert "nothing to recommend" in capsys.readouterr().out
    assert not (world.place / "recommended.yaml").exists()
