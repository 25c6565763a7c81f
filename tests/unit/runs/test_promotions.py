"""The ledger of promotions."""

import json
from pathlib import Path

import pytest

from plumbline.errors import ModelError
from plumbline.records import PolicyRef
from plumbline.runs import promotions
from plumbline.runs.promotions import Catalog, Promotion, ledger_path, promote, promoted, rollback


def ref(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


def test_a_rollback_goes_back_a_promotion_at_a_time(run_dir: Path) -> None:
    for version in (1, 2, 4):
        promote(run_dir, Promotion(ref=ref(version), by="gate", figures={"new": {"reward": version}}))
    assert Catalog(run_dir).resolve("ple") == ref(4)
    assert rollback(run_dir, "ple") == ref(2) == Catalog(run_dir).resolve("ple")
    assert rollback(run_dir, "ple") == ref(1)
    promote(run_dir, Promotion(ref=ref(3), by="hand"))
    assert promoted(run_dir, "ple") == [1, 3]
    assert rollback(run_dir, "ple") == ref(1)
    with pytest.raises(ModelError, match="no earlier promotion"):
        rollback(run_dir, "ple")
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(e["pipeline"], e["policy"], e["version"], e["by"]) for e in lines[:4]] == [
        ("serve", "ple", 1, "gate"),
        ("serve", "ple", 2, "gate"),
        ("serve", "ple", 4, "gate"),
        ("serve", "ple", 2, "rollback"),
    ]
    assert lines[2]["figures"] == {"new": {"reward": 4}}


def test_only_what_is_there_is_promoted(run_dir: Path) -> None:
    with pytest.raises(ModelError, match="no version ple@9 to promote; there are 1 to 4"):
        promote(run_dir, Promotion(ref=ref(9), by="hand"))
    assert not ledger_path(run_dir, "ple").exists()


def test_a_line_that_was_not_finished_is_not_a_promotion(run_dir: Path) -> None:
    promote(run_dir, Promotion(ref=ref(1), by="gate"))
    with ledger_path(run_dir, "ple").open("a") as file:
        file.write('{"version": 2, "by": "ga')
    assert promoted(run_dir, "ple") == [1]


def test_a_ledger_is_read_on_where_it_grew_and_anew_where_it_is_another(run_dir: Path) -> None:
    path = ledger_path(run_dir, "ple")

    def lines(*versions: int, by: str = "proof") -> str:
        return "".join(json.dumps({"version": version, "by": by}) + "\n" for version in versions)

    path.write_text(lines(1, 2))
    assert promoted(run_dir, "ple") == [1, 2]
    with path.open("a") as file:  # another process, whose last line is still being written
        file.write(lines(3) + '{"version": 4,')
    assert promoted(run_dir, "ple") == [1, 2, 3]
    with path.open("a") as file:
        file.write(' "by": "hand"}\n')
    assert promoted(run_dir, "ple") == [1, 2, 3, 4]
    path.write_text(lines(2, 3, 4, 1, 2))  # in place, and longer
    assert promoted(run_dir, "ple") == [2, 3, 4, 1, 2]
    path.write_text(lines(3))
    assert promoted(run_dir, "ple") == [3]
    (other := path.with_suffix(".new")).write_text(lines(3, 1))
    other.replace(path)
    assert promoted(run_dir, "ple") == [3, 1]


def test_what_was_read_is_not_read_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = ledger_path(run_dir, "ple"), []
    monkeypatch.setattr(promotions.json, "loads", lambda line, real=json.loads: read.append(line) or real(line))
    for count in range(1, 50):
        promote(run_dir, Promotion(ref=ref(1 + count % 4), by="proof"))
        assert promoted(run_dir, "ple")[-1] == 1 + count % 4
    assert len(read) == 49 == len(path.read_text().splitlines())


@pytest.mark.parametrize("line", ["[]", "{}", '{"version": "new", "by": "hand"}', "not JSON", '{"version": 1}'])
def test_a_line_that_is_none_is_named(run_dir: Path, line: str) -> None:
    promote(run_dir, Promotion(ref=ref(1), by="gate"))
    with ledger_path(run_dir, "ple").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ModelError, match=r"promotions.jsonl: line 2 is no promotion; remove it"):
        promoted(run_dir, "ple")


def test_what_was_not_proved_is_not_promoted(run_dir: Path) -> None:
    (run_dir / "policies" / "ple" / "v000004" / "proof.json").unlink()
    with pytest.raises(ModelError, match="no version ple@4 to promote; there are 1 to 3"):
        promote(run_dir, Promotion(ref=ref(4), by="hand"))
    assert Catalog(run_dir).resolve("ple") == ref(3)
