"""The command line itself: it answers at once, shows steps in one line, and ends with the right code and last words."""

import argparse
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cli import main as command_line
from cli.display import Display, duration, pool_line, result_text, step_line
from cli.main import main
from plumbline.errors import DataError, LossError, RunError, SyncError, UserError
from tests.unit.conftest import TENSORS

HEAVY = ("torch", "ray", "vllm", "transformers", "datasets", "pandas", "numpy", "pyarrow", "pydantic", "yaml")


# Help


def test_help_answers_within_half_a_second() -> None:
    """The best of three runs; of more where other processes are crowding this machine."""

    def once() -> float:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "cli", "--help"], capture_output=True, text=True, check=True)
        assert all(name in done.stdout for name in ("run", "resume", "evaluate", "doctor", "validate"))
        return time.perf_counter() - started

    runs = 3 if os.getloadavg()[0] <= (os.cpu_count() or 1) else 20
    assert any(once() < 0.5 for _ in range(runs))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["doctor", "--help"], ["compare", "--help"], ["watch", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for line in ("continue a run at the step it stopped at", "check a data file row by row"):
        assert line in text


@pytest.mark.parametrize("arguments", [[], ["runn", "a.yaml"], ["run"], ["validate", "a.jsonl", "--kind", "texts"]])
def test_a_command_that_is_none_is_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: plumbline" in capsys.readouterr().err


# Exit codes and last words


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory that holds a config."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text("name: tiny\n")
    return directory


def ends_in(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, run_dir: Path) -> None:
    """Puts a `run` in place that has opened `run_dir` and ends in `error`."""

    def run_command(options: argparse.Namespace) -> int:
        options.run_dir = run_dir
        if error:
            raise error
        return 0

    monkeypatch.setattr(command_line, "run_command", run_command)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, []),
        (UserError("a.yaml: steps: too few"), 2, ["plumbline: a.yaml: steps: too few"]),
        (DataError("a.jsonl, row 3: no `prompt`"), 2, ["plumbline: a.jsonl, row 3: no `prompt`"]),
        (RunError("the learner of ple ended"), 1, ["plumbline: the learner of ple ended", "RESUME"]),
        (
            LossError("ple: the loss became nan in step 3"),
            1,
            ["plumbline: ple: the loss became nan in step 3", "RESUME"],
        ),
        (
            SyncError("ple", 3, "generator-1", 0.25, "it still answers as ple@2"),
            1,
            [
                "plumbline: ple v000003 did not arrive at engine generator-1: it still answers as ple@2 "
                "(largest log-prob difference 0.25)",
                "RESUME",
            ],
        ),
        (
            KeyboardInterrupt(),
            130,
            ["plumbline: interrupted; all steps that are done are saved", "RESUME"],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_end_has_its_code_and_its_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run_dir: Path,
    error: BaseException | None,
    code: int,
    said: list[str],
) -> None:
    ends_in(monkeypatch, error, run_dir)
    assert main(["run", "a.yaml"]) == code
    captured = capsys.readouterr()
    resume = f"plumbline: continue with: plumbline resume {run_dir}"
    assert captured.err.splitlines() == [resume if line == "RESUME" else line for line in said]
    assert captured.out == ""


@pytest.mark.parametrize("error", [RunError("it ended"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_nothing_to_resume_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: BaseException
) -> None:
    ends_in(monkeypatch, error, tmp_path / "none")
    assert main(["run", "a.yaml"]) in (1, 130)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_that_nobody_foresaw_is_not_hidden(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    ends_in(monkeypatch, ZeroDivisionError("a bug of ours"), run_dir)
    with pytest.raises(ZeroDivisionError):
        main(["run", "a.yaml"])


def test_the_resume_command_names_the_directory_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    """`plumbline resume` itself: interrupted, it says where to go on, whatever the working directory was."""
    (run_dir / "config.yaml").write_text(
        "name: tiny\nmodel: {path: m}\ndata: {train: {path: a.jsonl}}\npipelines: [{type: sft}]\n"
    )

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_run", interrupted)
    monkeypatch.chdir(run_dir.parent)
    assert main(["resume", "run"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"plumbline: continue with: plumbline resume {run_dir}"


# What is shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (0.6, "0:01"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (245, "4:05"),
        (3599.7, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_step_is_one_line_of_what_its_pipeline_has() -> None:
    event = {
        "pipeline": "ple",
        "step": 12,
        "steps": 24,
        "seconds_left": 61.2,
        "tau": 0.0627,
        "reward_plain": 1.25,
        "reward_guided": -0.5,
        "gap": -1.75,
        "rank_share": 0.344,
        "loss": 0.12345,
        "staleness": 1.0,
        "generator_idle": 0.126,
        "learner_idle": 0.5,
        "tokens_per_s": 1234.5,
        "something_else": 3,
    }
    assert step_line(event) == (
        "ple 12/24 · τ 0.063 · plain +1.250 · guided -0.500 · gap -1.750 · rank 34% · loss 0.1235 · stale 1 · "
        "idle gen 13% · learn 50% · tok/s 1234 · 1:01 left"
    )
    bare = {"pipeline": "reward", "step": 1, "steps": 9, "seconds_left": 0, "loss": 0.5, "accuracy": 0.875}
    assert step_line(bare) == "reward 1/9 · loss 0.5000 · accuracy 0.875 · 0:00 left"


POOL = {
    "pipeline": "pool",
    "tokens_per_s": 4321.0,
    "queue": 3,
    "utilisation": 0.987,
    "shares": {"ple": 0.25, "dlma": 0.75},
}


def test_the_pool_is_one_line() -> None:
    assert pool_line(POOL) == "pool · tok/s 4321 · queue 3 · busy 99% · ple 25% dlma 75%"
    assert pool_line({**POOL, "shares": {}}) == "pool · tok/s 4321 · queue 3 · busy 99%"


def test_the_display_shows_steps_and_messages_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display({"message": "evaluating [before]"})
        display({"pipeline": "reward", "heldout_accuracy": 0.9})
        display({"pipeline": "sft", "step": 1, "steps": 2, "seconds_left": 3})
        display(POOL)
    assert capsys.readouterr().out.splitlines() == ["evaluating [before]", "sft 1/2 · 0:03 left", pool_line(POOL)]


def test_in_a_terminal_every_pipeline_has_one_line_and_the_pool_the_last() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Display(console) as display:
        display(POOL)
        for step in (1, 2):
            display({"pipeline": "sft", "step": step, "steps": 2, "seconds_left": 3})
        rendered = Console(width=80)
        with rendered.capture() as shown:
            rendered.print(display._live.get_renderable() if display._live else "")
    assert shown.get().splitlines() == ["sft 2/2 · 0:03 left", pool_line(POOL)]


def test_a_result_is_a_table_and_answers() -> None:
    assert result_text({}) == ""
    shown = result_text({"table": "| policy |", "samples": [{"prompt": "Why?", "before": "No.", "ple": "So."}] * 9})
    assert shown.splitlines()[:6] == ["", "| policy |", "", "  prompt: Why?", "  before: No.", "     ple: So."]
    assert shown.count("Why?") == 6


# validate


def test_validate_says_what_is_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Why?", "target": "So."}\n{"question": "How so?"}\n')
    assert main(["validate", str(path), "--column", "prompt=question"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "rows: 2",
        "multi turn share: 0.00",
        "with target: 1",
        "with preference: 0",
        "min characters: 4",
        "mean characters: 5.50",
        "max characters: 7",
    ]


def test_validate_of_labelled_texts_and_of_preferences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, pairs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    texts.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n{"text": "fine", "label": 1}\n')
    assert main(["validate", str(texts), "--kind", "labelled"]) == 0
    assert capsys.readouterr().out == f"{texts}: 3 labelled texts, 2 of them wanted ones\n"
    pairs.write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n')
    assert main(["validate", str(pairs), "--kind", "preferences"]) == 0
    assert "with preference: 1" in capsys.readouterr().out


@pytest.mark.parametrize("taken", ["serve.pid", "serve.log"])
def test_a_directory_that_cannot_be_written_is_not_left_served(
    run_dir: Path, capsys: pytest.CaptureFixture[str], taken: str
) -> None:
    (run_dir / taken).mkdir()
    assert main(["serve", str(run_dir), "--detach"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"plumbline: {run_dir}: `--detach` keeps serve.pid and serve.log there") and said[-1] == "\n"
    assert said.count("\n") == 1


def test_a_promotion_that_cannot_be_noted_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = run_dir / "policies" / "ple" / "v000001"
    version.mkdir(parents=True)
    (version / "proof.json").write_text('{"probe_logps": [-1.0]}')
    (version / "model.safetensors").write_bytes(TENSORS)
    ledger = run_dir / "policies" / "ple" / "promotions.jsonl"
    ledger.mkdir()
    assert main(["promote", str(run_dir), "ple@1"]) == 2
    assert capsys.readouterr().err == (
        f"plumbline: {ledger}: cannot be written: a directory has its name (Is a directory); all steps that are done "
        "are saved\n"
    )


def test_what_nobody_serves_is_not_stopped(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["serve", str(run_dir), "--stop"]) == 2
    assert "is not served by a detached process; for one on a cluster, set RAY_ADDRESS" in capsys.readouterr().err


def test_deterministic_is_a_key_of_the_config() -> None:
    given = ["run", "a.yaml", "--set", "seed=1", "--deterministic"]
    assert command_line.parser().parse_args(given).overrides == ["seed=1", "deterministic=true"]
    assert command_line.parser().parse_args(given[:2]).overrides == []
