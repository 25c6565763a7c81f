"""What a report lets a reader turn through: answers of every version, and samples behind the bars of a histogram."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from plumbline.errors import DataError
from plumbline.records import Message, Prompt
from plumbline.report.answers import MOST, by_policy, side_by_side
from plumbline.report.page import write_report
from plumbline.report.samples import BARS, EACH, LONGEST, training_spreads
from plumbline.runs.evaluated import keep_answers, prompt_key
from plumbline.runs.pairs import PAIR_SCHEMA
from plumbline.runs.parts import Parts, Row
from plumbline.runs.rollouts import PLE_SCHEMA
from tests.unit.report.runs import HOSTILE, ROWS, SAMPLES, make_run, report

PROMPTS = [Prompt(id=str(i), messages=(Message(role="user", content=f"Why {i}?"),)) for i in range(4)]


def rows(answers: Sequence[str], rewards: Sequence[float | None] = (), first: int = 0) -> list[Row]:
    return [
        {"key": str(i), "prompt": f"Why {i}?", "answer": answer, "reward": reward}
        for i, (answer, reward) in enumerate(zip(answers, rewards or [None] * len(answers), strict=True), start=first)
    ]


# Answers of every version


def test_versions_stand_by_policy_in_their_order() -> None:
    kept = {who: rows("a") for who in ("ple@12", "ple@4", "out/model", "base", "dlma@1", "me@home")}
    assert by_policy(kept, ["ple", "dlma"]) == {
        "out/model": ["out/model"],
        "base": ["base"],
        "me@home": ["me@home"],
        "ple": ["ple@4", "ple@12"],
        "dlma": ["dlma@1"],
    }


def test_answers_meet_at_their_prompts() -> None:
    kept = {"base": rows("abc", [1.0, None, 3.0]), "ple@2": rows("xy", first=1), "ple@1": rows("mno")}
    found = side_by_side(kept, ["ple"], ["2", "gone", "0"], 2)
    assert found is not None
    assert found.policies == [("base", ["base, mean reward 2.000 of 2 answers"]), ("ple", ["ple@1", "ple@2"])]
    told = [
        (prompt, [[(a.version, a.text, a.reward) for a in column] for column in columns])
        for prompt, columns in found.prompts
    ]
    assert told == [
        ("Why 2?", [[("base", "c", "3.000")], [("ple@1", "o", ""), ("ple@2", "y", "")]]),
        ("Why 0?", [[("base", "a", "1.000")], [("ple@1", "m", ""), ("ple@2", None, "")]]),  # it was not asked
    ]
    assert side_by_side({}, ["ple"], [], 20) is None
    assert side_by_side(kept, ["ple"], [], 0) is None


def test_of_many_versions_the_first_and_the_last_stay() -> None:
    found = side_by_side({f"ple@{i}": rows("a") for i in range(1, 101)}, ["ple"], [], 1)
    assert found is not None
    [(_, labels)] = found.policies
    assert (len(labels), labels[0], labels[-1], found.left_out) == (MOST, "ple@1", "ple@100", 100 - MOST)


def test_the_page_shows_the_newest_and_hides_the_others(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", evaluation={"rows": ROWS, "samples": []})
    for who, word in (("base", "b"), ("ple@1", HOSTILE), ("ple@2", "new")):
        keep_answers(run_dir, who, PROMPTS, [f"{word} {i}" for i in range(4)], [0.25 * i for i in range(4)])
    page = report(run_dir)
    versions = re.findall(
        r'class="version" data-policy="(\w+)" data-at="(\d)" data-reward="([\d.]+)"( hidden)?', page.source
    )
    assert versions[:3] == [("base", "0", "0.000", ""), ("ple", "0", "0.000", " hidden"), ("ple", "1", "0.000", "")]
    assert len(versions) == 12
    assert 'max="1" value="1" aria-label="version of ple"' in page.source
    assert page.source.count('type="range"') == 1  # of a policy with one version there is nothing to choose
    assert f"{HOSTILE} 3" in page.paragraphs and page.tags.count("script") == 1


def test_without_kept_answers_those_of_the_evaluation_are_shown(tmp_path: Path) -> None:
    page = report(
        make_run(tmp_path / "run", evaluation={"rows": ROWS, "samples": SAMPLES, "rewards": {"ple": [0.5, 1]}})
    )
    assert 'data-policy="ple" data-at="0" data-reward="1.000"' in page.source
    assert "Held out: ple" in page.headings and "Held out: before" not in page.headings  # it has no rewards


def test_a_damaged_file_of_answers_names_itself(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    keep_answers(run_dir, "ple@1", PROMPTS, ["a"] * 4, [])
    file = run_dir / "evaluated" / "ple@1.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=re.escape(str(file))):
        write_report(run_dir)
    file.unlink()
    Parts(str(file.parent), PLE_SCHEMA).write(1, [])
    with pytest.raises(DataError, match="its columns are not those of answers"):
        write_report(run_dir)


def test_a_prompt_is_known_by_its_turns() -> None:
    same = Prompt(id="other", row=9, target="So.", messages=PROMPTS[0].messages)
    assert prompt_key(same) == prompt_key(PROMPTS[0])
    assert len({prompt_key(prompt) for prompt in PROMPTS}) == 4


# Samples behind bars


def test_bars_by_hand(tmp_path: Path) -> None:
    rewards = [0.0, 0.0, 1.0, 3.0, None]
    parts = Parts(str(tmp_path / "rollouts" / "ple"), PLE_SCHEMA)
    parts.write(1, [{"step": 1, "prompt": "old", "plain": "a", "plain_reward": rewards[0]}])
    parts.write(
        2,
        [
            {"step": 2, "prompt": "p" * (LONGEST + 1), "plain": "a", "guided_reward": 0.5, "plain_reward": r}
            for r in rewards[1:]
        ],
    )
    [one] = training_spreads(tmp_path, {"ple": "#123456", "dlma": "#000000"})
    assert (one.title, one.unit, one.color, one.total) == (
        "Training: ple, steps 1 to 2",
        "reward of plain answers",
        "#123456",
        4,
    )
    assert [(bar.low, bar.high, bar.count, bar.height) for bar in one.bars] == [
        ("0.00", "1.00", 2, 100.0),
        ("1.00", "2.00", 1, 50.0),
        ("2.00", "3.00", 1, 50.0),
    ]
    assert one.columns == ["step", "prompt", "plain", "guided", "guided reward", "plain reward"]
    assert [bar for bar, _ in one.rows] == [0, 0, 1, 2]
    assert one.rows[0][1] == ["1", "old", "a", "", "", "0.00"]
    assert one.rows[3][1] == ["2", "p" * LONGEST + "…", "a", "", "0.500", "3.00"]


def test_a_bar_keeps_few_samples_and_equal_values_are_one_bar(tmp_path: Path) -> None:
    pairs = Parts(str(tmp_path / "pairs" / "dlma"), PAIR_SCHEMA)
    pairs.write(1, [{"step": 1, "margin": float(i % 40)} for i in range(4000)])
    [one] = training_spreads(tmp_path, {"dlma": "#000000"})
    assert (len(one.bars), one.total, {bar.count for bar in one.bars}) == (BARS, 4000, {200})
    assert len(one.rows) == BARS * EACH
    pairs.write(2, [{"step": 2, "margin": 1.5} for _ in range(4000)])
    [one] = training_spreads(tmp_path, {"dlma": "#000000"})  # the newest are enough
    assert (len(one.bars), one.total, one.title) == (1, 4000, "Training: dlma, steps 2 to 2")


def test_a_bar_opens_its_samples(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    pairs = Parts(str(run_dir / "pairs" / "sc"), PAIR_SCHEMA)
    pairs.write(1, [{"step": 1, "prompt": HOSTILE, "rejected": "No.", "similarity": i / 4} for i in range(4)])
    page = report(run_dir)
    assert (
        page.source.count('<tr class="item" data-bar="3">')
        == page.source.count('class="bar" aria-pressed="false" data-bar="3"')
        == 1
    )
    assert ["1", HOSTILE, "", "No.", "", "0.750"] in page.rows
    assert page.tags.count("script") == 1
