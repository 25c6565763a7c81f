"""Rows that cannot be used: left out up to a share, told by reason, and gone from a cleaned file."""

import json
import pickle
from pathlib import Path

import pytest

from cli.main import main
from plumbline.data.bad_rows import BadRows, by_reason
from plumbline.data.dataset import as_row, read_labelled, read_preferences, read_prompts
from plumbline.errors import DataError, RowError
from tests.tiny import write_rows

LINES = [
    '{"prompt": "Why?", "target": "So.", "kind": 3}',
    '{"prompt": ""}',
    "broken",
    '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}',
    '{"prompt": "  "}',
    '{"prompt": "Why?", "id": "1"}',
    "[1]",
    '{"prompt": [{"role": "bishop", "content": "x"}]}',
    '{"prompt": [{"role": "user", "content": "x"}, {"role": "rook", "content": "x"}]}',
]
BAD = [2, 3, 5, 6, 7, 8, 9]


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_bytes("\n".join(LINES).encode() + b'\n{"prompt": "caf\xe9"}\n')
    return str(tmp_path / "a.jsonl")


def test_the_others_are_read(path: str) -> None:
    bad = BadRows(path, allowed=1)
    assert [prompt.row for prompt in read_prompts(path, on_bad=bad)] == [1, 4]
    assert [error.row for error in bad.errors] == [*BAD, 10]
    with pytest.raises(RowError, match=r"a\.jsonl, row 2, prompt: is blank"):
        read_prompts(path)
    with pytest.raises(RowError, match="row 2, prompt: is blank"):
        read_prompts(path, on_bad=BadRows(path, allowed=None))


def test_more_than_the_share_is_refused(path: str) -> None:
    bad = BadRows(path, allowed=0.5)
    good = read_prompts(path, on_bad=bad)
    line = (
        r"8 of 10 rows cannot be used, and data.max_bad_rows allows a share of 0\.5; the first: .*row 2, prompt: is b"
    )
    with pytest.raises(DataError, match=line):
        bad.check(len(good))
    bad.check(8)


def test_a_file_of_bad_rows_alone_is_told_by_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,target\na,b,c\n")
    bad = BadRows("a.csv", allowed=0.5)
    assert read_prompts(str(tmp_path / "a.csv"), on_bad=bad) == []
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        bad.check(0)


def test_a_broken_row_of_a_csv_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,target\na,b\nc,d,e\n\nf,g\n")
    bad = BadRows("a.csv", allowed=1)
    assert [prompt.query for prompt in read_prompts(str(tmp_path / "a.csv"), on_bad=bad)] == ["a", "f"]
    assert [str(error) for error in bad.errors] == [
        f"{tmp_path}/a.csv, row 2: 3 cells where the header has 2; put text that holds commas or line breaks between "
        'double quotes (")'
    ]


def test_reasons_stand_once(path: str) -> None:
    bad = BadRows(path, allowed=1)
    read_prompts(path, on_bad=bad)
    first, second, *others = by_reason(bad.errors)
    assert first == f"{path}, row 2, prompt: is blank; write text, or remove the row (1 more: rows 5)"
    assert second.startswith(f"{path}, row 8, prompt: turn 1 has the unknown role 'bishop'")
    assert second.endswith("(1 more: rows 9)")
    assert len(others) == 4


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RowError("a.jsonl", 3, "id", "is blank")))
    assert (str(error), error.row) == ("a.jsonl, row 3, id: is blank", 3)


def test_validate_lists_and_writes(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", path]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 6
    out = tmp_path / "clean.jsonl"
    assert main(["validate", path, "--write", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"{out}: 2 rows that can be used, of 10"
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"id": "1", "prompt": "Why?", "target": "So.", "kind": 3},
        {"id": "4", "prompt": "Why?", "target": "So."},
    ]
    assert main(["validate", str(out), "--kind", "targets"]) == 0
    assert main(["validate", path, "--write", str(out)]) == 2
    assert "should be a .jsonl file that is not there yet" in capsys.readouterr().err


def test_a_written_row_is_read_as_it_was(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    rows = [
        {"messages": turns, "chosen": "So.", "rejected": ["No.", "Ha."], "n": 1},
        {"chosen": "a b", "rejected": "a c"},
    ]
    file, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for read, raw in (
        (read_preferences, rows),
        (read_labelled, [{"text": "x", "label": 1}, {**rows[0], "text": "y", "label": 0}]),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in raw))
        records = read(str(file))
        again.write_text("".join(json.dumps(as_row(record)) + "\n" for record in records))
        assert read(str(again)) == records


def test_rows_that_are_written_are_read_alike(tmp_path: Path) -> None:
    rows = [
        {"question": "Why?", "prompt": "no prompt", "answer": "So.", "completion": "No.", "source": None},
        {"question": "Who?", "prompt": "no prompt", "answer": None, "completion": "No.", "source": "a"},
    ]
    path, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    columns = ["--column", "prompt=question", "--column", "target=answer"]
    assert main(["validate", path, *columns, "--write", str(out)]) == 0
    first, second = read_prompts(str(out), target="read")
    assert (first.messages[0].content, first.target, first.extra["source"]) == ("Why?", "So.", None)
    assert (second.messages[0].content, second.target, second.extra["source"]) == ("Who?", None, "a")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?"}])
    for out in (tmp_path / "none" / "out.jsonl", Path(path) / "out.jsonl", tmp_path / ("a" * 300 + ".jsonl")):
        assert main(["validate", path, "--write", str(out)]) == 2
        assert "cannot be made" in capsys.readouterr().err
