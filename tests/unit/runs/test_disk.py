"""A disk that is full or may not be written: one line that names the file, and nothing half-written."""

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipelines.context import EventLog
from plumbline.errors import DiskError, RunError
from plumbline.records import PolicyRef, TokenGroup
from plumbline.runs.checkpoint import latest_step, whole, write_directory, write_manifest, write_pieces
from plumbline.runs.disk import append_line, write_text, writing
from plumbline.runs.parts import Parts, Rejected
from plumbline.runs.policies import write_probe
from plumbline.runs.promotions import Promotion, promote
from plumbline.runs.storage import Storage
from tests.unit.conftest import TENSORS

LIMIT = 4096
LARGE = "".join(f"{number:06d}" for number in range(4096))  # does not compress to so little
REJECTION = {"prompt_id": "p", "prompt": "?", "reason": LARGE, "detail": ""}


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may become larger than `LIMIT`: a write fails in its midst, as on a full disk. Around
    the write alone: pytest's own output may be a file too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def part(root: Path) -> None:
    Parts(str(root), pa.schema([("text", pa.string())])).write(1, [{"text": LARGE}])


def rejected(root: Path) -> None:
    Rejected(str(root / "rejected.parquet")).add(1, [REJECTION])


def checkpoint(root: Path) -> None:
    write_pieces(root, 3, {"model.a": whole(torch.ones(LIMIT))})


def manifest(root: Path) -> None:
    (root / "step-000003").mkdir()
    write_manifest(root, 3, [LARGE], {})


def version(root: Path) -> None:
    write_directory(root / "v000001", lambda aside: (aside / "weights").write_text(LARGE))


def probe(root: Path) -> None:
    write_probe(root, [TokenGroup([5], [[6] * LIMIT])])


def pulled(root: Path) -> None:
    there = root.parent / "store"
    Storage(root, str(there)).pull(root / "report.html")


def adapter(root: Path) -> None:
    """As PEFT writes it: the error is one of a library in Rust."""
    from safetensors.torch import save_file

    write_directory(root / "v000001", lambda aside: save_file({"a": torch.ones(LIMIT)}, aside / "a.safetensors"))


@pytest.mark.parametrize("write", [part, rejected, checkpoint, manifest, version, adapter, probe])
def test_a_write_that_the_disk_does_not_take(tmp_path: Path, write: Callable[[Path], None]) -> None:
    root = tmp_path / "run"
    root.mkdir()
    with small_files(), pytest.raises(DiskError) as caught:
        write(root)
    assert str(caught.value).startswith(f"{root}/")
    assert "cannot be written: files may not become that large there (File too large); all steps" in str(caught.value)
    assert "\n" not in str(caught.value)
    left = [file for file in root.rglob("*") if file.is_file()]
    assert left == [] and latest_step(root) == 0, "nothing is left that takes room or could be read"


def test_what_is_pulled_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "report.html").write_text(LARGE)
    with small_files(), pytest.raises(RunError, match="File too large"):
        pulled(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_line_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """The next one, once there is room again, is not written behind half of it."""
    path = tmp_path / "events.jsonl"
    log = EventLog(path, lambda event: None)
    log.write({"pipeline": "ple", "step": 1, "text": "x" * (LIMIT - 200)})
    with small_files(), pytest.raises(DiskError, match=r"events\.jsonl: cannot be written"):
        log.write({"pipeline": "ple", "step": 2, "text": "x" * 300})
    log.write({"pipeline": "ple", "step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert EventLog(path, lambda event: None).keep("ple", 2) == 2


def test_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_text(path, "before")
    with small_files(), pytest.raises(DiskError, match=r"evaluation\.json: cannot be written"):
        write_text(path, LARGE)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_promotion_that_cannot_be_noted(tmp_path: Path) -> None:
    directory = tmp_path / "policies" / "ple" / "v000001"
    directory.mkdir(parents=True)
    (directory / "proof.json").write_text('{"probe_logps": [-1.0]}')
    (directory / "adapter_model.safetensors").write_bytes(TENSORS)
    with small_files(), pytest.raises(DiskError, match=r"promotions\.jsonl: cannot be written"):
        promote(tmp_path, Promotion(ref=PolicyRef(policy="ple", version=1), by="gate", figures={"a": LARGE}))
    assert (tmp_path / "policies" / "ple" / "promotions.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "there is no room left on it (No space left on device)"),
        (errno.EROFS, "it is read-only (Read-only file system)"),
        (errno.EDQUOT, "the quota is used up"),
    ],
)
def test_around_the_work_in_a_directory_the_file_is_named(tmp_path: Path, number: int, told: str) -> None:
    with pytest.raises(DiskError) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number), "/elsewhere/file")
    assert str(caught.value).startswith(f"/elsewhere/file: cannot be written: {told}")


def test_of_a_rename_where_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").touch()
    with pytest.raises(DiskError) as caught, writing(tmp_path, then=""):
        (tmp_path / "old").replace(tmp_path / "new")
    assert str(caught.value) == (f"{tmp_path / 'new'}: cannot be written: a directory has its name (Is a directory)")


def test_what_is_no_fault_of_a_disk_passes(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError), writing(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "no" / "where", "{}")
