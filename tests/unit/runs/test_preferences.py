"""A sample of preference pairs as token groups: from a file, and from a run's parts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.data.dataset import read_preferences
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.data.tokenizer import load_tokenizer
from plumbline.errors import DataError
from plumbline.records import Message, Prompt, TokenGroup
from plumbline.runs.pairs import PAIR_SCHEMA, Answer, pair_rows
from plumbline.runs.preferences import sample_groups
from tests.tiny import preference, write_rows


def test_rows_of_one_prompt_and_answer_are_one_group(tiny_model: Path, tmp_path: Path) -> None:
    rows = [preference(i) for i in range(8)]
    rows += [preference(3, "It is not."), preference(3, "No."), preference(3, "So it is."), preference(8, "So it is.")]
    tokenizer = load_tokenizer(str(tiny_model))
    groups = sample_groups(write_rows(tmp_path / "a.jsonl", rows), tokenizer, prompts=64, least=8, max_len=64, seed=0)
    assert len(groups) == 8
    by_count = sorted(groups, key=lambda group: len(group.response_ids))
    assert [len(group.response_ids) for group in by_count] == [2] * 7 + [3]
    answers = [encode_response(tokenizer, text) for text in ("So it is.", "No.", "It is not.")]
    assert by_count[-1].response_ids == answers
    (row,) = [r for r in read_preferences(str(tmp_path / "a.jsonl"), limit=4) if r.query == "Why 3?"]
    assert by_count[-1].prompt_ids == render(tokenizer, row.messages)


def test_a_sample_is_drawn_by_its_seed(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [preference(i, "word " * (i + 1)) for i in range(40)])
    tokenizer = load_tokenizer(str(tiny_model))

    def drawn(seed: int) -> list[int]:
        groups = sample_groups(path, tokenizer, prompts=10, least=8, max_len=64, seed=seed)
        return [len(group.response_ids[1]) for group in groups]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 10


def test_what_is_too_long_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    rows = [preference(i, ["No.", "no " * 60]) for i in range(9)] + [preference(9, "no " * 60)]
    rows[0]["chosen"] = "so " * 60
    path = write_rows(tmp_path / "a.jsonl", rows)
    tokenizer = load_tokenizer(str(tiny_model))
    groups = sample_groups(path, tokenizer, prompts=64, least=8, max_len=64, seed=0)
    assert [len(group.response_ids) for group in groups] == [2] * 8
    with pytest.raises(DataError, match=r": 0 prompts .* \(0 have no .*, 10 are longer than 12 tokens\)"):
        sample_groups(path, tokenizer, prompts=64, least=8, max_len=12, seed=0)


def test_a_runs_pairs_are_read_as_their_token_ids(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        row
        for i in range(9)
        for row in pair_rows(
            step=1,
            prompt=Prompt(id=str(i), messages=(Message(role="user", content="Why?"),)),
            prompt_ids=[5, 10 + i],
            answers=[Answer(text="So.", ids=[20]), Answer(text="No.", ids=[30, 2]), Answer(text="Not.", ids=[31, 2])],
            ref_logps=[-1.0, -2.0, -3.0],
            rewards=None,
            engine=None,
            model="m",
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), tmp_path / "step-000001.parquet")
    tokenizer = load_tokenizer(str(tiny_model))
    groups = sample_groups(str(tmp_path), tokenizer, prompts=64, least=8, max_len=64, seed=0)
    expected = [TokenGroup([5, 10 + i], [[20], [30, 2], [31, 2]]) for i in range(9)]
    assert sorted(groups, key=lambda group: group.prompt_ids) == expected != groups
