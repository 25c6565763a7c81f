"""A data file that was edited between a run's start and its resume: told, with the row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plumbline.config.file import parse_config
from plumbline.config.tree import Config
from plumbline.errors import DataError
from plumbline.runs.digests import FILE, check_digests, digests_by_source, digests_of, keep_digests
from plumbline.runs.rows import read_rows

ROWS = [{"prompt": f"Why {i}?", "target": "So.", "kind": i} for i in range(5)]
Edit = Callable[[list[dict[str, Any]]], object]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("train", "heldout"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    write(tmp_path / "given.jsonl", [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
    return parse_config(
        {
            "name": "edited",
            "model": {"path": "model"},
            "data": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("train", "heldout")},
            "reward": {"type": "program", "function": "a:b"},
            "evaluation": {},
            "pipelines": [{"type": "ple"}, {"type": "self_contrast", "pairs": {"path": str(tmp_path / "given.jsonl")}}],
        },
        origin="test",
    )


def digests(config: Config) -> Any:
    return digests_of(config, read_rows(config))


@pytest.mark.parametrize(
    ("file", "edit", "told"),
    [
        ("train", lambda rows: rows[3].update(prompt="Who?"), "train.jsonl, row 4: is another since the run in"),
        ("train", lambda rows: rows[3].update(kind=9), "train.jsonl, row 4: is another"),  # rewards read it
        ("train", lambda rows: rows.pop(1), "train.jsonl, row 2: is another"),
        ("train", lambda rows: rows.pop(), "train.jsonl, row 5: is gone"),
        ("heldout", lambda rows: rows.append({"prompt": "x"}), "heldout.jsonl, row 6: is new"),
        ("given", lambda rows: rows[2].update(rejected=["c"]), "given.jsonl, row 3: is another"),
    ],
)
def test_an_edited_file_is_told(tmp_path: Path, config: Config, file: str, edit: Edit, told: str) -> None:
    kept = keep_digests(tmp_path, digests(config))
    before = kept.read_bytes()
    keep_digests(tmp_path, digests(config))
    path = tmp_path / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows)
    write(path, rows)
    for again in (check_digests, keep_digests):
        with pytest.raises(DataError) as caught:
            again(tmp_path, digests(config))
        assert told in str(caught.value) and "\n" not in str(caught.value)
        assert "put the file back as it was, or start anew with another `name` or --run-dir" in str(caught.value)
    assert kept.read_bytes() == before


def test_what_nobody_reads_may_change(tmp_path: Path, config: Config) -> None:
    keep_digests(tmp_path, digests(config))
    write(tmp_path / "train.jsonl", [{**row, "deep": [1], "rejected": "x"} for row in ROWS])
    check_digests(tmp_path, digests(config))


def test_a_run_without_digests_gets_some(tmp_path: Path, config: Config) -> None:
    check_digests(tmp_path / "none", digests(config))
    assert not (tmp_path / "none").exists()
    assert keep_digests(tmp_path, digests(config)) == tmp_path / FILE


def test_a_damaged_file_is_named(tmp_path: Path, config: Config) -> None:
    keep_digests(tmp_path, digests(config)).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet"):
        check_digests(tmp_path, digests(config))


def test_each_source_has_a_digest_of_all_its_rows(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert digests_by_source(run_dir) == {}
    keep_digests(run_dir, digests_of(config, read_rows(config)))
    told = digests_by_source(run_dir)
    assert {source: count for source, (count, _) in told.items()} == {
        "data.train": 5,
        "data.heldout": 5,
        "pairs of self_contrast": 3,
    }
    assert told["data.train"][1] == told["data.heldout"][1], "the same rows"
    (run_dir / FILE).unlink()
    write(tmp_path / "train.jsonl", ROWS[::-1])
    keep_digests(run_dir, digests_of(config, read_rows(config)))
    assert digests_by_source(run_dir)["data.train"][1] != told["data.train"][1], "in another order"
