"""The ledger of parts and the rejected prompts: whole or absent, listed or not done, and alike on any filesystem."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from plumbline.errors import DataError
from plumbline.runs.parts import Parts, Rejected

SCHEMA = pa.schema([("prompt_id", pa.string()), ("reward", pa.float64()), ("ids", pa.list_(pa.int32()))])
ROW = {"prompt_id": "7", "reward": 0.5, "ids": [1, 2]}


@pytest.fixture(params=["path", "uri", "filesystem"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Parts]:
    """The same directory, opened as a path, as a URI, and below a filesystem that is not the local disk's class."""
    if request.param == "filesystem":
        yield Parts("rollouts/ple", SCHEMA, filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    else:
        root = tmp_path / "rollouts" / "ple"
        yield Parts(root.as_uri() if request.param == "uri" else str(root), SCHEMA)


def test_what_is_written_is_listed_and_read(parts: Parts) -> None:
    assert parts.steps() == []
    parts.write(12, [ROW, {**ROW, "prompt_id": "8"}])
    parts.write(3, [{"prompt_id": "1", "reward": None, "ids": []}])
    parts.write(1_000_000, [])
    assert parts.steps() == [3, 12, 1_000_000]
    assert parts.read(12) == [ROW, {**ROW, "prompt_id": "8"}]
    assert parts.read(1_000_000) == []
    assert [row["prompt_id"] for row in parts.read_all()] == ["1", "7", "8"]
    assert parts.path(12).endswith("rollouts/ple/step-000012.parquet")


def test_an_empty_part_has_its_columns(tmp_path: Path) -> None:
    Parts(str(tmp_path), SCHEMA).write(1, [])
    assert pq.read_schema(tmp_path / "step-000001.parquet").equals(SCHEMA)


def test_a_committed_step_stays_as_it_is(parts: Parts) -> None:
    parts.write(1, [ROW])
    with pytest.raises(FileExistsError, match="step 1 is committed already"):
        parts.write(1, [])
    assert parts.read(1) == [ROW]


def test_an_unknown_column_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path), SCHEMA)
    with pytest.raises(ValueError, match=r"\['rewrad'\]"):
        parts.write(1, [{"prompt_id": "7", "rewrad": 1.0}])
    with pytest.raises(pa.ArrowInvalid):
        parts.write(1, [{"prompt_id": "7", "reward": "high"}])
    assert list(tmp_path.iterdir()) == []


def test_temporaries_are_not_counted_and_go_when_a_writer_opens(tmp_path: Path) -> None:
    stale = tmp_path / ".step-000002.parquet.tmp-0123abcd"
    kept = [tmp_path / "notes.txt", tmp_path / ".other.tmp-0", tmp_path / "step-000003.parquet.bak"]
    for path in (stale, *kept):
        path.write_bytes(b"half a part")
    assert Parts(str(tmp_path), read_only=True).steps() == []
    assert stale.exists(), "a reader removed what may be a running writer's"
    assert Parts(str(tmp_path), SCHEMA).steps() == []
    assert not stale.exists()
    assert all(path.exists() for path in kept)


def test_a_write_that_fails_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(str(tmp_path), SCHEMA)

    def half(table: pa.Table, where: str, filesystem: fs.FileSystem) -> None:
        with filesystem.open_output_stream(where) as stream:
            stream.write(b"PAR1")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("plumbline.runs.parts.pq.write_table", half)
        with pytest.raises(OSError, match="No space left"):
            parts.write(1, [ROW])
    assert list(tmp_path.iterdir()) == []
    parts.write(1, [ROW])
    assert parts.steps() == [1]


def test_reading_what_is_not_there_or_damaged(tmp_path: Path) -> None:
    assert Parts(str(tmp_path / "none"), read_only=True).steps() == []
    assert not (tmp_path / "none").exists()
    parts = Parts(str(tmp_path), SCHEMA)
    with pytest.raises(DataError, match=r"step-000001\.parquet: no such part"):
        parts.read(1)
    for damage in (b"", b"PAR1 and no more"):
        (tmp_path / "step-000001.parquet").write_bytes(damage)
        with pytest.raises(DataError, match=r"step-000001\.parquet cannot be read as Parquet .*; remove it"):
            parts.read(1)


def test_an_unknown_kind_of_storage() -> None:
    with pytest.raises(DataError, match="nowhere://x: no storage of this kind"):
        Parts("nowhere://x", SCHEMA)


def reject(prompt_id: str, reason: str = "too long") -> dict[str, object]:
    return {"prompt_id": prompt_id, "prompt": "Why?", "reason": reason, "detail": "300 tokens"}


def test_rejections_are_kept_and_counted(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "rejected.parquet")
    rejected = Rejected(path)
    assert rejected.counts() == {}
    rejected.add(0, [reject("1"), reject("2")])
    rejected.add(1, [])
    rejected.add(2, [reject("3", "blank")])
    for opened in (rejected, Rejected(path), Rejected(path, read_only=True)):
        assert opened.counts() == {"too long": 2, "blank": 1}
        assert [(row["step"], row["prompt_id"]) for row in opened.read_all()] == [(0, "1"), (0, "2"), (2, "3")]
    assert pq.read_table(path).column_names == ["step", "prompt_id", "prompt", "reason", "detail"]


def test_resume_forgets_rejections_of_steps_that_are_not_done(tmp_path: Path) -> None:
    path = str(tmp_path / "rejected.parquet")
    rejected = Rejected(path)
    for step in range(4):
        rejected.add(step, [reject(str(step))])
    rejected.keep_steps([2])
    assert [row["step"] for row in Rejected(path).read_all()] == [0, 2]
    rejected.add(3, [reject("3")])
    assert [row["step"] for row in Rejected(path).read_all()] == [0, 2, 3]


def test_only_steps_that_reject_are_written_each_once(tmp_path: Path) -> None:
    path = tmp_path / "rejected.parquet"
    rejected = Rejected(str(path))
    rejected.add(1, [reject("1")])
    rejected.add(2, [])
    written = (path / "step-000001.parquet").stat().st_mtime_ns
    rejected.add(3, [reject("3"), reject("4")])
    assert sorted(found.name for found in path.iterdir()) == ["step-000001.parquet", "step-000003.parquet"]
    assert (path / "step-000001.parquet").stat().st_mtime_ns == written
    assert [rejected.count(step) for step in range(4)] == [0, 1, 0, 2]
    assert len(pq.read_table(path)) == 3


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_where_a_directory_of_parts_is_expected(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "rejected.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rejected\.parquet is a file, where a directory .*; move it away"):
        Rejected(str(tmp_path / "rejected.parquet"), read_only=read_only)


def test_rejected_beside_parts_leave_each_other_alone(tmp_path: Path) -> None:
    parts, rejected = Parts(str(tmp_path), SCHEMA), Rejected(str(tmp_path / "rejected.parquet"))
    (tmp_path / "rejected.parquet" / ".step-000001.parquet.tmp-00ff").write_bytes(b"half")
    rejected.add(1, [reject("1")])
    parts.write(1, [ROW])
    assert Parts(str(tmp_path), SCHEMA).steps() == [1]
    assert Rejected(str(tmp_path / "rejected.parquet")).counts() == {"too long": 1}
    assert [found.name for found in (tmp_path / "rejected.parquet").iterdir()] == ["step-000001.parquet"]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["rejected.parquet", "step-000001.parquet"]


def test_steps_that_reject_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    rejected = Rejected(str(tmp_path / "rejected.parquet"))
    row = {"prompt_id": "p", "prompt": "Why?", "reason": "blank answer", "detail": ""}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda step: rejected.add(step, [row]), range(1, 41)))
    assert sorted(int(str(r["step"])) for r in rejected.read_all()) == list(range(1, 41))
    assert len(Rejected(str(tmp_path / "rejected.parquet"), read_only=True).read_all()) == 40
