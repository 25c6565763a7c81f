"""Runs beside each other: differences by hand, which prompts are paired, whose configs differ, and wrong input."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from plumbline.report.compare import compare_runs, config_differences, paired, read_runs
from tests.unit.report.runs import BREAKOUT, CONFIG, EVENTS, HOSTILE, Page, interval, make_run


def evaluation(prompts: Sequence[str], **rewards: Sequence[float | None]) -> dict[str, Any]:
    rows = [{"policy": who, "prompts": len(prompts), "reward": interval(0.5, 0.25), "win rate": 0.5} for who in rewards]
    return {"rows": rows, "samples": [], "prompts": list(prompts), "rewards": rewards}


def two(tmp_path: Path, first: dict[str, Any] | None, second: dict[str, Any] | None, **config: Any) -> list[Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    return [make_run(a, CONFIG, EVENTS, first), make_run(b, {**CONFIG, **config}, EVENTS, second)]


def compared(tmp_path: Path, *runs: dict[str, Any] | None, **config: Any) -> tuple[str, Page]:
    shown = compare_runs(two(tmp_path, *runs, **config), tmp_path / "compare.html")
    return shown, Page(tmp_path / "compare.html")


def test_a_difference_is_paired_by_prompt_wherever_it_stands(tmp_path: Path) -> None:
    first = evaluation(["p", "q", "r", "s"], ple=[1.0, 2.0, None, 9.0])
    second = evaluation(["x", "r", "q", "p"], ple=[7.0, 5.0, 2.5, 2.0])
    [one] = paired(*read_runs(two(tmp_path, first, second)))
    # p: 2 − 1, q: 2.5 − 2; r has no reward in the first. t of one degree is 12.706, the deviation 0.5 / √2.
    assert (one.what, one.reward.n, one.reward.mean, one.wins) == ("b: ple − a: ple", 2, 0.75, 1.0)
    assert one.reward.high == pytest.approx(0.75 + 12.706 * 0.25, abs=1e-3)


def test_a_prompt_that_is_asked_twice_is_two(tmp_path: Path) -> None:
    first, second = evaluation(["p", "p"], ple=[1.0, 2.0]), evaluation(["p", "p", "p"], ple=[1.5, 2.5, 9.0])
    [one] = paired(*read_runs(two(tmp_path, first, second)))
    assert (one.reward.n, one.reward.mean, one.reward.low) == (2, 0.5, 0.5)


def test_bases_are_compared_with_bases_and_policies_with_policies(tmp_path: Path) -> None:
    first = evaluation(["p"], before=[1.0], ple=[2.0], dlma=[3.0])
    second = evaluation(["p"], base=[1.0], raft=[4.0])
    found = list(paired(*read_runs(two(tmp_path, first, second))))
    assert [one.what for one in found] == ["b: base − a: before", "b: raft − a: ple", "b: raft − a: dlma"]
    assert math.isnan(found[0].reward.low)


def test_the_page_and_the_terminal_say_the_same(tmp_path: Path) -> None:
    prompts = ["p", "q", "r"]
    shown, page = compared(
        tmp_path, evaluation(prompts, ple=[0.0, 1.0, 2.0]), evaluation(prompts, ple=[1.0, 2.25, 3.5]), seed=8
    )
    assert page.row("b: ple − a: ple") == ["3", "+1.250[+0.629, +1.871]", "100.0 %"]  # 4.3027 · 0.25 / √3
    assert "| b: ple − a: ple |       3 | 1.2500 [0.6290, 1.8710] |    1 |" in shown
    assert page.best == ["+1.250"]  # its interval does not hold 0; the means are alike
    assert page.row("a: ple") == ["0.500[0.250, 0.750]"]
    assert page.row("key") == ["a", "b"] and page.row("seed") == ["7", "8"]
    assert page.notices == [li for li in page.notices if li.startswith(("a ", "b "))]  # legends alone


def test_curves_lie_over_each_other(tmp_path: Path) -> None:
    _, page = compared(tmp_path, None, None)
    assert "ple: Rewards of sampled answers" in page.headings
    assert page.notices[-4:] == ["a plain", "a guided", "b plain", "b guided"]
    assert page.tags.count("figure") == 1  # the others have no rewards by step
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 10


def test_what_keeps_runs_from_being_compared_is_said(tmp_path: Path) -> None:
    some = evaluation(["p", "q"], ple=[1.0, 2.0])

    def notices(name: str, first: Any, second: Any, **config: Any) -> str:
        (tmp_path / name).mkdir()
        shown, page = compared(tmp_path / name, first, second, **config)
        told = shown.rpartition("\n\n")[2]
        assert all(page.has_notice(line.replace("`", "")) for line in told.splitlines())
        return told

    path = tmp_path / "none" / "b"
    assert notices("none", some, None) == f"b: not evaluated; `plumbline evaluate {path}` does it."
    (tmp_path / "both").mkdir()
    shown, _ = compared(tmp_path / "both", some, None, reward=None)
    assert "different rewards" not in shown  # the second has none that is shown
    old = {"rows": some["rows"], "samples": [], "rewards": some["rewards"]}
    assert notices("old", some, old).startswith("b: its evaluation.json has no rewards by prompt to be paired; ")
    assert notices("other", some, evaluation(["x"], ple=[1.0])) == (
        "b: no prompt in common with a, and so no differences."
    )
    assert notices("part", some, evaluation(["q", "r", "s"], ple=[1.0, 2.0, 3.0])).startswith(
        "b: 1 of its 3 held-out prompts are among the 2 of a; "
    )
    assert notices("reward", some, some, reward={"type": "program", "function": "other:score"}) == (
        "The runs have different rewards: their numbers are of different scales."
    )


def test_pipelines_of_configs_are_known_by_their_names(tmp_path: Path) -> None:
    ple, dlma, _ = CONFIG["pipelines"]
    runs = read_runs(two(tmp_path, None, None, seed=None, pipelines=[{**dlma, "beta": 0.5, "train": True}, ple]))
    found = config_differences(runs)
    assert found == [
        ("seed", ["7", "null"]),
        ("pipelines.dlma.beta", ["0.1", "0.5"]),
        ("pipelines.sc.name", ["sc", "not there"]),
        ("pipelines.sc.type", ["self_contrast", "not there"]),
        ("pipelines.sc.steps", ["4", "not there"]),
        ("pipelines.sc.negatives", ["8", "not there"]),
        ("pipelines.dlma.train", ["not there", "true"]),
    ]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    _, page = compared(
        tmp_path, evaluation(["p"], **{BREAKOUT: [1.0]}), evaluation(["p"], **{HOSTILE: [2.0]}), name=HOSTILE
    )
    assert "img" not in page.tags and page.tags.count("script") == 1
    assert page.row(f"b: {HOSTILE} − a: {BREAKOUT}")[0] == "1"
    assert HOSTILE in page.row("name")


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name / "run")
    runs = read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    assert [run.label for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_the_command_writes_where_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = evaluation(["p", "q"], ple=[1.0, 2.0])
    two(tmp_path, some, some)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| policy |") and lines[-1] == str(tmp_path / "compare.html")
    assert main(["compare", "a", "b", "--out", "out.html"]) == 0
    assert (tmp_path / "out.html").read_bytes() == (tmp_path / "compare.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "a: is one run; name two or more"),
        (["a", "./a"], "a: is named twice; name two runs or more"),
        (["a", "gone"], "gone: no such directory; name a run's, such as runs/quickstart"),
        (["a", "."], ".: no run directory: there is no config.yaml in it"),
        (
            ["a", "b", "--out", "b/events.jsonl"],
            "--out b/events.jsonl: should be a file that ends in .html, in a directory that is there",
        ),
        (
            ["a", "b", "--out", "c/d.html"],
            "--out c/d.html: should be a file that ends in .html, in a directory that is there",
        ),
        (
            ["a", "b", "--out", "a/config.yaml/d.html"],
            "--out a/config.yaml/d.html: should be a file that ends in .html, in a directory that is there",
        ),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    two(tmp_path, None, None)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"plumbline: {said}\n")
    assert not (tmp_path / "compare.html").exists()


def test_figures_that_are_none_are_left_out(tmp_path: Path) -> None:
    odd = evaluation(["p", "q"], ple=[math.nan, 2.0])
    odd["rows"][0]["reward"] = {"mean": None}
    shown, page = compared(tmp_path, odd, evaluation(["p", "q"], ple=[1.0, 3.0]))
    assert page.row("b: ple − a: ple") == ["1", "+1.000", "100.0 %"]
    assert page.row("a: ple") == [""] and "| a: ple |       2 |                         |" in shown
