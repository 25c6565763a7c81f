"""`plumbline theory`: what it prints, and bad input."""

from pathlib import Path

import pytest

from cli.main import main
from cli.theory import theory_text
from plumbline.methods.theory import Theory
from tests.tiny import preference, write_rows


def theory_with(positive: float, negative: float, covariance: float) -> Theory:
    return Theory(
        prompts=8,
        negatives=9,
        positive_variance=positive,
        negative_variance=negative,
        covariance=covariance,
        lam_error=0.1,
        agreement=0.5,
    )


def test_the_table_is_the_theorems() -> None:
    text = theory_text(theory_with(1.0, 4.0, 0.0), [2, 3, 6])  # λ = .8
    assert text.splitlines()[-3:] == [
        "| 2 | 3 (2.667) | 3 (2.667) |",
        "| 3 | 6 (6.000) | 6 (6.000) |",
        "| 6 | no number is enough | no number is enough |",
    ]
    assert "8 prompts with 9 negatives" in text and "λ 0.800 ± 0.100" in text


def test_lambda_above_one_has_no_first_bound() -> None:
    found = theory_with(1.0, 1.0, 0.8)  # ρ = .8, λ = 1/.4
    assert found.lam == pytest.approx(2.5) and found.lam_given_positive == pytest.approx(0.9)
    assert theory_text(found, [2]).splitlines()[-1] == "| 2 | does not hold: λ > 1 | 3 (2.250) |"  # .9 / .4


def test_the_command_prints_a_table(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**preference(i, ["No.", "Not " + "at all " * (i % 5)]), "text": f"Why {i}?"} for i in range(20)]
    for row in rows:
        del row["prompt"]
    path = write_rows(tmp_path / "a.jsonl", rows)
    command = ["theory", str(tiny_model), path, "--column", "prompt=text", "--prompts", "12", "--pairs", "2", "1.5"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 prompts with 24 negatives")
    assert [line.split(" ")[1] for line in out.splitlines()[-2:]] == ["2", "1.5"]
    assert main(command) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (7, [], "7 prompts to estimate from, at least 8 are needed (0 have no rejected answer other than the chosen"),
        (20, ["--prompts", "7"], "7 prompts are too few to estimate from; at least 8 are needed"),
        (20, ["--pairs", "0.5"], "--pairs 0.5: it should be 1 or more"),
        (20, ["--beta", "0"], "beta is 0; it should be above 0"),
        (20, ["--column", "prompt"], "--column prompt: write OURS=THEIRS"),
        (20, ["--column", "prompt=question"], "row 1: no 'question'; it has prompt, chosen, rejected"),
        (20, ["--max-len", "3"], "20 are longer than 3 tokens"),
    ],
)
def test_wrong_use_is_one_line(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: int,
    options: list[str],
    said: str,
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [preference(i) for i in range(rows)])
    assert main(["theory", str(tiny_model), path, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_equal_answers_are_one_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [preference(i, "So it is.") for i in range(20)])
    assert main(["theory", str(tiny_model), path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plumbline: {path}: 0 prompts") and "20 have no rejected answer other than" in line


def test_a_directory_without_weights_is_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [preference(i) for i in range(9)])
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert main(["theory", str(bare), path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plumbline: model {bare}: cannot be loaded (OSError: ")
