"""The ledger of promotions."""

import json
from pathlib import Path

import pytest

from plumbline.errors import ModelError, RunError
from plumbline.records import PolicyRef
from plumbline.runs import promotions
from plumbline.runs.policies import version_digest
from plumbline.runs.promotions import Catalog, Promotion, ledger_path, promote, promoted, rollback
from tests.unit.conftest import TENSORS


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
    real = promotions._Ledger._add
    monkeypatch.setattr(promotions._Ledger, "_add", lambda ledger, line: read.append(line) or real(ledger, line))
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no safetensors file"),
        (TENSORS[:5], "is no safetensors file"),
        (TENSORS[:-2], f"has {len(TENSORS) - 2} bytes in place of {len(TENSORS)}"),
        (TENSORS + b"?", f"has {len(TENSORS) + 1} bytes in place of {len(TENSORS)}"),
        (b"not tensors at all", "is no safetensors file"),
        (None, "no weights in it"),
    ],
)
def test_a_version_whose_files_are_not_whole_is_not_promoted(run_dir: Path, content: bytes | None, said: str) -> None:
    path = run_dir / "policies" / "ple" / "v000002" / "adapter_model.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=f"v000002.*{said}.*; put back what the run wrote"):
        promote(run_dir, Promotion(ref=ref(2), by="hand"))
    assert not ledger_path(run_dir, "ple").exists()


def test_an_alias_means_the_version_that_was_promoted_not_what_took_its_name(run_dir: Path) -> None:
    catalog, proof = Catalog(run_dir), run_dir / "policies" / "ple" / "v000002" / "proof.json"
    promote(run_dir, Promotion(ref=ref(2), by="hand"))
    before = catalog.digest(catalog.resolve("ple"))
    proof.write_text('{"probe_logps": [-1.5]}')
    with pytest.raises(ModelError, match=r"ple@2 is not what was promoted.*`plumbline promote .* ple@2` promotes what"):
        catalog.resolve("ple")
    assert catalog.digest(catalog.resolve("ple@2")) != before, "its own name means what is there"
    promote(run_dir, Promotion(ref=ref(2), by="hand"))
    assert catalog.resolve("ple") == ref(2)


def test_a_version_is_known_by_its_tensors(run_dir: Path) -> None:
    proof = run_dir / "policies" / "ple" / "v000002" / "proof.json"
    proof.write_text('{"probe_logps": [-1.0], "digests": {"float32": {"a": "1"}}}')
    catalog = Catalog(run_dir)
    first = catalog.digest(ref(2))
    proof.write_text('{"probe_logps": [-1.00001], "digests": {"float32": {"a": "1"}}}')
    assert catalog.digest(ref(2)) == first == version_digest({"float32": {"a": "1"}}, [])
    proof.write_text('{"probe_logps": [-1.00001], "digests": {"float32": {"a": "2"}}}')
    assert catalog.digest(ref(2)) != first
    assert catalog.digest(ref(0)) == ""
    proof.write_text("{}")
    with pytest.raises(ModelError, match="is no proof of a version"):
        catalog.digest(ref(2))


def test_a_promotion_that_cannot_be_noted_is_one_line(run_dir: Path) -> None:
    ledger_path(run_dir, "ple").mkdir()
    with pytest.raises(RunError, match=r"promotions.jsonl: cannot be written: a directory has its name"):
        promote(run_dir, Promotion(ref=ref(2), by="hand"))
