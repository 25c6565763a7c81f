"""How `benchmarks/hh.py` cuts HH in two, and which rows it takes."""

import json
import random
from pathlib import Path

from benchmarks.hh_data import balanced, first_fitting, parted, split, whole_sentences, write_rows
from plumbline.data.dataset import read_preferences, read_prompts
from plumbline.records import Message, Prompt


def conversation(i: int, turns: int) -> Prompt:
    """A pair of the i-th conversation after so many turns of the user."""
    messages = [Message(role="user", content=f"query {i}")]
    for turn in range(1, turns):
        messages += [
            Message(role="assistant", content=f"answer {turn}"),
            Message(role="user", content=f"more of {i}.{turn}"),
        ]
    return Prompt(id=f"{i}-{turns}", messages=tuple(messages), chosen=f"good {i}", rejected=(f"bad {i}",))


ROWS = [conversation(i, turns) for i in range(400) for turns in range(1, 2 + i % 3)]


def conversations(rows: list[Prompt]) -> set[str]:
    return {row.messages[0].content for row in rows}


def test_no_conversation_is_in_two_parts_and_no_row_is_lost() -> None:
    found = split(ROWS)
    parts = [found.reward_train, found.reward_heldout, found.train, found.heldout]
    assert sum(map(len, parts)) == len(ROWS)
    assert sum(len(conversations(part)) for part in parts) == 400
    halves = [len(conversations(found.reward_train + found.reward_heldout)), len(conversations(found.train))]
    assert 160 < halves[0] < 240 and 120 < halves[1] < 200
    assert 20 < len(conversations(found.heldout)) < 60


def test_a_row_goes_where_it_went_whatever_else_there_is() -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert split(shuffled) == split(ROWS)
    some = split([row for row in ROWS if row.id.endswith("-1")])
    assert {row.id for row in some.train} <= {row.id for row in split(ROWS).train}


def test_no_conversation_is_both_tuned_on_and_judged_on() -> None:
    rows = split(ROWS).heldout
    longer = 0
    for at in range(len(rows) + 1):
        tuned, judged = parted(rows, at)
        assert [*tuned, *judged] == rows and at <= len(tuned) <= at + 2
        assert not conversations(tuned) & conversations(judged)
        longer += len(tuned) > at
    assert longer > 10


def test_prompts_have_the_chosen_answer_as_their_target_and_no_preference(tmp_path: Path) -> None:
    found = split(ROWS)
    assert all(row.chosen and row.rejected for row in found.reward_train)
    assert {(row.target, row.chosen, row.rejected) for row in found.train if "query 7" in row.messages[0].content} <= {
        (f"good {row.messages[0].content.removeprefix('query ')}", None, ()) for row in found.train
    }
    write_rows(tmp_path / "data/train.jsonl", found.train)
    read = read_prompts(str(tmp_path / "data/train.jsonl"), target="needed")
    assert [(row.id, row.messages, row.target) for row in read] == [(r.id, r.messages, r.target) for r in found.train]
    assert "chosen" not in json.loads((tmp_path / "data/train.jsonl").read_text().splitlines()[0])
    write_rows(tmp_path / "pairs.jsonl", found.reward_train)
    assert [row.rejected for row in read_preferences(str(tmp_path / "pairs.jsonl"))] == [
        row.rejected for row in found.reward_train
    ]


def test_rows_that_fit_are_taken_in_order_in_whole_batches() -> None:
    rows = ROWS[:20]
    assert first_fitting(rows, 7, lambda row: row.id.endswith("-1"), 3) == [r for r in rows if r.id.endswith("-1")][:6]
    assert first_fitting(rows, 100, lambda row: True) == rows


def test_a_part_of_xstest_has_as_many_of_either_label() -> None:
    rows = [
        Prompt(
            id=str(i), messages=(Message(role="user", content=f"{i}"),), extra={"label": "unsafe" if i % 3 else "safe"}
        )
        for i in range(90)
    ]
    labels = [row.extra["label"] for row in balanced(rows, 24)]
    assert labels.count("safe") == labels.count("unsafe") == 12
    assert len(balanced(rows, 90)) == 90


def test_a_text_that_was_cut_off_ends_with_its_last_whole_sentence() -> None:
    assert whole_sentences('One. "Two!" And thr') == 'One. "Two!"'
    assert whole_sentences("It costs 3.50 and no") == "It costs 3.50 and no"
    assert whole_sentences("Whole.") == "Whole."
