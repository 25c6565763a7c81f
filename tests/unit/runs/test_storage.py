"""The storage of a run: what counts as there, in which order it comes, which side wins, what is said if it fails."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.far_store import FarStore
from cli.display import step_line
from pipelines.context import Context, EventLog
from pipelines.loop import Progress, advance, commit
from pipelines.method import Rollout
from pipelines.raft import RaftMethod
from plumbline.config.file import dump_config, load_config, parse_config
from plumbline.config.tree import Config
from plumbline.data.length_filter import Fit
from plumbline.data.tokenizer import load_tokenizer
from plumbline.errors import ConfigError, RunError
from plumbline.records import Message, PolicyRef, Prompt, Publication
from plumbline.runs.checkpoint import KEPT, MARKER, Checkpoint, Piece, latest_step, whole, write_manifest, write_pieces
from plumbline.runs.directory import check_run_dir, open_run_dir
from plumbline.runs.mirror import (
    check_storage,
    open_storage,
    prune_versions,
    pull_checkpoint,
    pull_parts,
    push_checkpoint,
    push_logs,
    pushed_at_end,
    run_storage,
    saved_step,
    seal_checkpoint,
)
from plumbline.runs.parts import Parts, Rejected
from plumbline.runs.policies import PROOF, versions
from plumbline.runs.promotions import Promotion, promote
from plumbline.runs.rollouts import BEST_SCHEMA
from plumbline.runs.rows import Rows
from plumbline.runs.storage import ASIDE, FILES, Storage, batches, redacted
from tests.unit.conftest import TENSORS


@pytest.fixture(params=["memory", "disk"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a storage can be: an object store's kind, and a disk's."""
    if request.param == "disk":
        yield f"file://{tmp_path}/store"
        return
    yield f"memory://{tmp_path.name}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def directory(root: Path, name: str, *files: str) -> Path:
    """A directory of small files, each with its own name in it."""
    for file in files:
        write(root / name / file, file)
    return root / name


def save_checkpoint(root: Path, step: int) -> None:
    write_manifest(root, step, [write_pieces(root, step, {"weight": whole(torch.ones(2))}).name], {})


class Uploads:
    """The names of files in the order that they are uploaded; `fails_at` is one whose upload fails half-way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: str = "") -> None:
        self.names: list[str] = []
        self.rooms: list[str] = []
        self.fails_at = fails_at
        for kind in (MemoryFileSystem, LocalFileSystem):
            monkeypatch.setattr(kind, "put_file", self._spy(kind.put_file))

    def _spy(self, put: Callable[..., Any]) -> Callable[..., Any]:
        def spy(files: Any, source: str, target: str, **options: Any) -> None:
            self.names.append(Path(source).name)
            self.rooms.append(Path(source).parent.name)
            if Path(source).name == self.fails_at:
                if isinstance(files, LocalFileSystem):  # an object that was not uploaded whole is not there at all
                    Path(target).write_text("half")
                raise OSError(5, "Input/output error")
            put(files, source, target, **options)

        return spy


# Files and directories


def test_what_is_pushed_on_one_machine_is_pulled_on_another(tmp_path: Path, url: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    Storage(here, url).push(write(here / "events.jsonl", "1\n"), write(here / "rollouts/ple/step-000001.parquet", "p"))
    other = Storage(there, url)
    assert other.sizes(there) == {"events.jsonl": 2, "rollouts/ple/step-000001.parquet": 1}
    assert other.sizes(there / "rollouts" / "ple") == {"step-000001.parquet": 1}
    assert other.sizes(there / "none") == {}
    other.pull(there / "rollouts/ple/step-000001.parquet")
    assert (there / "rollouts/ple/step-000001.parquet").read_text() == "p"
    assert other.read_text(there / "events.jsonl") == "1\n"
    assert other.read_text(there / "none.json") is None


def test_without_a_url_nothing_happens(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "run", None)
    whole = directory(tmp_path / "run", "v000001", PROOF)
    storage.check()
    storage.push(tmp_path / "run" / "not_even_there")
    storage.push_directory(whole, PROOF)
    storage.pull_directory(tmp_path / "run" / "v000002", PROOF)
    storage.write_text(tmp_path / "run" / "a", "text")
    storage.keep_newest(tmp_path / "run", PROOF, 1)
    assert (storage.sizes(tmp_path / "run"), storage.complete(tmp_path / "run", PROOF)) == ({}, [])
    assert storage.read_text(tmp_path / "run" / "a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["v000001"]


def test_only_what_has_changed_is_uploaded_again(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uploads = Storage(tmp_path / "run", url), Uploads(monkeypatch)
    log = write(tmp_path / "run" / "events.jsonl", "1\n")
    storage.push(log)
    storage.push(log)
    assert len(uploads.names) == 1
    write(log, "1\n2\n")
    storage.push(log)
    assert len(uploads.names) == 2
    assert storage.read_text(log) == "1\n2\n"


def test_a_directory_counts_once_its_marker_is_there(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run" / "policies" / "ple"
    storage, uploads = Storage(tmp_path / "run", url), Uploads(monkeypatch, fails_at="weights.safetensors")
    version = directory(root, "v000012", PROOF, "a.json", "weights.safetensors", "z.json")
    with pytest.raises(RunError, match="Input/output error"):
        storage.push_directory(version, PROOF)
    assert storage.complete(root, PROOF) == []
    uploads.fails_at, uploads.names = "", []
    storage.push_directory(version, PROOF)
    assert uploads.names == ["a.json", "weights.safetensors", "z.json", PROOF]
    assert storage.complete(root, PROOF) == [12]


def test_a_directory_that_is_written_again_does_not_count_meanwhile(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the old marker would vouch for new weights."""
    root = tmp_path / "run" / "policies" / "ple"
    storage, uploads = Storage(tmp_path / "run", url), Uploads(monkeypatch)
    version = directory(root, "v000001", PROOF, "weights.safetensors")
    storage.push_directory(version, PROOF)
    assert storage.complete(root, PROOF) == [1]
    uploads.fails_at = "weights.safetensors"
    with pytest.raises(RunError):
        storage.push_directory(version, PROOF)
    assert storage.complete(root, PROOF) == []


def test_a_file_on_a_disk_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uploads = Storage(tmp_path / "run", str(tmp_path / "store")), Uploads(monkeypatch)
    part = write(tmp_path / "run" / "step-000001.parquet", "whole")
    uploads.fails_at = part.name
    with pytest.raises(RunError):
        storage.push(part)
    assert storage.sizes(tmp_path / "run") == {}
    uploads.fails_at = ""
    storage.push(part)
    assert storage.sizes(tmp_path / "run") == {"step-000001.parquet": 5}
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["step-000001.parquet"], "nothing is left aside"


def test_a_directory_is_pulled_whole_or_not_at_all(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    Storage(here, url).push_directory(directory(here, "v000001", "a.json", "sub/b.json", PROOF), PROOF)
    storage = Storage(there, url)
    with monkeypatch.context() as failing:
        failing.setattr(MemoryFileSystem, "get_file", fail)
        failing.setattr(LocalFileSystem, "get_file", fail)
        with pytest.raises(RunError):
            storage.pull_directory(there / "v000001", PROOF)
    assert not (there / "v000001").exists()
    storage.pull_directory(there / "v000001", PROOF)
    assert (there / "v000001" / "sub" / "b.json").read_text() == "sub/b.json"
    write(there / "v000001" / "a.json", "newer")
    storage.pull_directory(there / "v000001", PROOF)
    assert (there / "v000001" / "a.json").read_text() == "newer", "what is here stays"
    storage.pull_directory(there / "v000002", PROOF)
    assert not (there / "v000002").exists(), "what is not there is not made"


def fail(*_: Any, **__: Any) -> None:
    raise TimeoutError("no answer from https://me:secret@host/bucket")


def test_all_but_the_newest_complete_ones_are_removed(tmp_path: Path, url: str) -> None:
    root = tmp_path / "run" / "checkpoints" / "ple"
    storage = Storage(tmp_path / "run", url)
    for step in (1, 2, 4, 5):
        storage.push_directory(directory(root, f"step-{step:06d}", "state.safetensors", MARKER), MARKER)
    for step in (3, 6):  # their uploads were cut short
        storage.push(directory(root, f"step-{step:06d}", "state.safetensors") / "state.safetensors")
    storage.keep_newest(root, MARKER, 2)
    assert storage.complete(root, MARKER) == [4, 5]
    assert {name.split("/")[0] for name in storage.sizes(root)} == {"step-000004", "step-000005", "step-000006"}


def test_a_name_that_leads_out_of_the_directory_is_not_told(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "run", f"memory://{tmp_path.name}")
    files = MemoryFileSystem()
    top = f"/{tmp_path.name}/v000001"
    for name in (f"{top}/{PROOF}", f"{top}/../../../evil", f"{top}/.hidden"):
        files.pipe_file(top + "/aside", b"x")
        files.store[name] = files.store.pop(f"{top}/aside")
    assert list(storage.sizes(tmp_path / "run" / "v000001")) == [PROOF]
    MemoryFileSystem.store.clear()


# Failures


def test_a_failure_names_the_storage_and_says_that_the_run_is_whole(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path / "run", url)
    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    with pytest.raises(RunError) as raised:
        storage.push(write(tmp_path / "run" / "events.jsonl", "1\n"))
    message = str(raised.value)
    assert f"cannot write the storage {url} (TimeoutError: no answer from https://***@host/bucket)" in message
    assert f"{tmp_path / 'run'} is whole" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nonsense://x", "nonsense"),
        ("ftp://me:pass/word@host/runs", "by the environment"),
        ("https://host/runs?sig=pass/word", "by the environment"),
    ],
)
def test_a_storage_that_cannot_be_is_wrong_use(tmp_path: Path, path: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as raised:
        Storage(tmp_path, path)
    assert str(raised.value).startswith("storage_path: ")
    assert "pass/word" not in str(raised.value)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    try:
        import s3fs  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        with pytest.raises(ConfigError, match=r"storage_path: s3://bucket/a: Install s3fs"):
            Storage(tmp_path, "s3://bucket/a")
    else:
        pytest.skip("s3fs is installed here")


def test_passwords_are_left_out_of_what_is_said() -> None:
    assert redacted("at sftp://me:pa/s@s@host/x and s3://bucket/y") == "at sftp://***@host/x and s3://bucket/y"
    assert redacted("abfs://container@account/x: 3@4") == "abfs://container@account/x: 3@4"


# What a run keeps there


def config(tmp_path: Path, **changes: Any) -> Config:
    tree = {
        "name": "tiny",
        "model": {"path": str(tmp_path / "model"), "max_len": 128},
        "data": {"train": {"path": str(tmp_path / "prompts.jsonl")}},
        "reward": {"type": "program", "function": "plumbline.miniature.reward:score"},
        "pipelines": [{"type": "ple"}],
        "storage_path": str(tmp_path / "store"),
    }
    return parse_config({**tree, **changes}, origin="test")


def begin(config: Config, run_dir: Path) -> Storage:
    """What a run does before Ray starts."""
    check_storage(config, run_dir)
    check_run_dir(config, run_dir)
    with open_run_dir(config, run_dir):
        pass
    return open_storage(config, run_dir)


def row(step: int, prompt: str) -> dict[str, object]:
    return {"step": step, "prompt_id": prompt, "prompt": prompt, "reason": "blank answer", "detail": ""}


def parts_of(run_dir: Path, name: str = "ple") -> Parts:
    return Parts(str(run_dir / "rollouts" / name), BEST_SCHEMA)


def rejected_of(run_dir: Path) -> Rejected:
    return Rejected(str(run_dir / "rollouts" / "ple" / "rejected.parquet"))


def content(step: int, text: str = "a") -> list[dict[str, object]]:
    return [{"step": step, "prompt_id": f"p{step}", "answer": text}]


def test_a_new_run_keeps_its_config_first(tmp_path: Path) -> None:
    chosen, run_dir = config(tmp_path), tmp_path / "run"
    assert "holds nothing yet" in check_storage(chosen, run_dir)
    assert not list((tmp_path / "store").iterdir()), "the test file is gone"
    begin(chosen, run_dir)
    assert [path.name for path in (tmp_path / "store" / "tiny").iterdir()] == ["config.yaml"]
    assert "holds this run" in check_storage(chosen, tmp_path / "other")
    assert load_config(tmp_path / "store" / "tiny" / "config.yaml") == chosen


def test_another_config_is_refused_as_a_run_directory_does(tmp_path: Path) -> None:
    begin(config(tmp_path), tmp_path / "run")
    other = config(tmp_path, seed=7)
    with pytest.raises(ConfigError, match="`seed` is 0 there, 7 here") as raised:
        check_storage(other, tmp_path / "other")
    assert f"{tmp_path}/store/tiny: holds another config" in str(raised.value)
    check_storage(config(tmp_path, seed=7, name="second"), tmp_path / "other")


def test_what_is_no_runs_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "store" / "tiny" / "holiday.jpg", "x")
    with pytest.raises(ConfigError, match="exists and is no run's"):
        check_storage(config(tmp_path), tmp_path / "run")


def test_places_that_a_run_cannot_resume_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory of its own"):
        check_storage(config(tmp_path, storage_path="memory://runs"), tmp_path / "run")
    with pytest.raises(ConfigError, match="run directory itself"):
        check_storage(config(tmp_path), tmp_path / "store" / "tiny")
    write(tmp_path / "file", "x")
    with pytest.raises(ConfigError, match=r"storage_path: .*file/runs/tiny: .*it must be there"):
        check_storage(config(tmp_path, storage_path=f"{tmp_path}/file/runs"), tmp_path / "run")
    with pytest.raises(ConfigError, match="should have at least 1 character"):
        config(tmp_path, storage_path="")


def test_paths_in_the_working_directory_are_those_of_the_next_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray unpacks each job's working directory somewhere else."""
    first, second = tmp_path / "job-1", tmp_path / "job-2"
    for job in (first, second):
        write(job / "prompts.jsonl", "{}")
        (job / "model").mkdir()
    changes: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": {"path": "prompts.jsonl"}}}
    monkeypatch.chdir(first)
    one = config(tmp_path, **changes)
    begin(one, first / "runs" / "tiny")
    monkeypatch.chdir(second)
    two = config(tmp_path, **changes)
    assert one != two
    assert str(first) not in dump_config(one, within=first)
    begin(two, second / "runs" / "tiny")
    assert load_config(second / "runs" / "tiny" / "config.yaml").model.path == str(second / "model")


def test_a_relative_storage_path_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("store", "./store", f"file://{tmp_path}/store"):
        assert config(tmp_path, storage_path=given).storage_path == str(tmp_path / "store")
    assert config(tmp_path, storage_path="s3://bucket/runs").storage_path == "s3://bucket/runs"
    assert run_storage(config(tmp_path, storage_path="memory://"), tmp_path / "run").url == "memory://tiny"


def test_an_empty_directory_gets_all_that_resume_needs(tmp_path: Path) -> None:
    chosen, lost, new = config(tmp_path), tmp_path / "lost", tmp_path / "new"
    storage = begin(chosen, lost)
    parts, rejected = parts_of(lost), rejected_of(lost)
    for step in (1, 2):
        rejected.add(step, [row(step, f"r{step}")])
        parts.write(step, content(step))
    storage.push(*(Path(one.path(step)) for step in (1, 2) for one in (rejected, parts)))
    write(lost / "events.jsonl", '{"pipeline": "ple", "step": 1}\n')
    write(lost / "policies/ple/promotions.jsonl", "{}\n")
    write(lost / "notes.txt", "mine")
    push_logs(storage, lost)
    for version in (1, 2):
        files = ("adapter_config.json", "adapter_model.safetensors", PROOF)
        storage.push_directory(directory(lost / "policies/ple", f"v{version:06d}", *files), PROOF)
        storage.push_directory(directory(lost / "policies/sft", f"v{version:06d}", "config.json", PROOF), PROOF)
    storage.push(write(lost / "policies/ple/v000003/adapter_config.json", "{}"))  # no proof: it was cut short
    save_checkpoint(lost / "checkpoints/ple", 2)
    push_checkpoint(storage, lost / "checkpoints/ple", 2)
    shutil.rmtree(lost)

    storage = begin(chosen, new)
    assert parts_of(new).steps() == [1, 2]
    assert [r["prompt_id"] for r in rejected_of(new).read_all()] == ["r1", "r2"]
    assert (new / "events.jsonl").read_text() == '{"pipeline": "ple", "step": 1}\n'
    assert (new / "policies/ple/promotions.jsonl").exists()
    assert not (new / "notes.txt").exists()
    assert versions(new, "ple") == [1, 2], "all adapters"
    assert versions(new, "sft") == [2], "of whole models the newest"
    assert saved_step(storage, new / "checkpoints/ple") == 2
    assert not (new / "checkpoints").exists(), "a learner pulls its own"


def test_parts_that_another_machine_made_are_pulled_with_their_rejections(tmp_path: Path) -> None:
    chosen, here, there = config(tmp_path), tmp_path / "here", tmp_path / "there"
    begin(chosen, here)
    rejected_of(here).add(1, [row(1, "r1")])
    parts_of(here).write(1, content(1))
    begin(chosen, here)  # what the storage lacks is pushed
    storage = begin(chosen, there)
    assert parts_of(there).steps() == [1]
    rejected_of(there).add(2, [row(2, "r2")])
    parts_of(there).write(2, content(2))
    storage.push(Path(rejected_of(there).path(2)), Path(parts_of(there).path(2)))
    begin(chosen, here)
    assert parts_of(here).steps() == [1, 2]
    assert [r["prompt_id"] for r in rejected_of(here).read_all()] == ["r1", "r2"]


def test_rejections_of_a_step_that_was_cut_short_are_dropped_on_both_sides(tmp_path: Path) -> None:
    chosen, here, there = config(tmp_path), tmp_path / "here", tmp_path / "there"
    storage = begin(chosen, here)
    rejected_of(here).add(0, [row(0, "r0")])
    rejected_of(here).add(1, [row(1, "r1")])
    storage.push(Path(rejected_of(here).path(0)), Path(rejected_of(here).path(1)))  # and then it was killed
    storage = begin(chosen, there)
    assert [r["prompt_id"] for r in rejected_of(there).read_all()] == ["r0"]
    parts_of(there).write(1, content(1))  # the step rejects none this time
    storage.push(Path(parts_of(there).path(1)))
    for run_dir in (here, tmp_path / "new"):
        begin(chosen, run_dir)
        assert parts_of(run_dir).steps() == [1]
        assert [r["prompt_id"] for r in rejected_of(run_dir).read_all()] == ["r0"]


def test_what_is_newer_here_is_not_replaced_and_goes_there(tmp_path: Path) -> None:
    chosen, run_dir = config(tmp_path), tmp_path / "run"
    storage = begin(chosen, run_dir)
    log, result = write(run_dir / "events.jsonl", "1\n"), write(run_dir / "evaluation.json", "old and long")
    parts_of(run_dir).write(1, content(1))
    storage.push(log, result, Path(parts_of(run_dir).path(1)))
    # The storage is away: this only comes to be here.
    write(log, "1\n2\n")
    write(result, "new")
    rejected_of(run_dir).add(2, [row(2, "r2")])
    parts_of(run_dir).write(2, content(2))
    directory(run_dir / "policies/ple", "v000002", "adapter_config.json", PROOF)
    save_checkpoint(run_dir / "checkpoints/ple", 2)

    storage = begin(chosen, run_dir)
    assert (log.read_text(), result.read_text()) == ("1\n2\n", "new")
    store = tmp_path / "store" / "tiny"
    assert (store / "events.jsonl").read_text() == "1\n2\n"
    assert (store / "evaluation.json").read_text() == "new"
    assert Parts(str(store / "rollouts/ple"), read_only=True).steps() == [1, 2]
    assert len(Rejected(str(store / "rollouts/ple/rejected.parquet"), read_only=True).read_all()) == 1
    assert storage.complete(run_dir / "policies/ple", PROOF) == [2]
    assert saved_step(storage, run_dir / "checkpoints/ple") == 2


def test_answers_of_versions_come_along_and_the_newer_ones_stay(tmp_path: Path) -> None:
    chosen, here, there = config(tmp_path), tmp_path / "here", tmp_path / "there"
    storage = begin(chosen, here)
    write(here / "evaluated/ple@1.parquet", "first")
    write(here / "evaluated/.ple@2.parquet.tmp-0", "half")
    push_logs(storage, here)
    begin(chosen, there)
    assert [path.name for path in (there / "evaluated").iterdir()] == ["ple@1.parquet"]
    write(there / "evaluated/ple@1.parquet", "new")  # and shorter
    begin(chosen, there)
    assert (tmp_path / "store/tiny/evaluated/ple@1.parquet").read_text() == "new"
    assert (there / "evaluated/ple@1.parquet").read_text() == "new"


def test_an_older_checkpoint_here_is_not_what_counts(tmp_path: Path) -> None:
    chosen, here, there = config(tmp_path), tmp_path / "here", tmp_path / "there"
    for run_dir, steps in ((here, (1,)), (there, (2, 3, 4))):
        storage = begin(chosen, run_dir)
        for step in steps:
            save_checkpoint(run_dir / "checkpoints/ple", step)
            push_checkpoint(storage, run_dir / "checkpoints/ple", step)
    storage = begin(chosen, here)
    assert saved_step(storage, here / "checkpoints/ple") == 4
    assert storage.complete(here / "checkpoints/ple", MARKER) == [3, 4], f"{KEPT} are kept"


def test_a_checkpoint_that_several_machines_wrote_is_put_together_on_each(tmp_path: Path) -> None:
    """Each worker pushes what it wrote, the first the manifest; what another attempt left there is no part of it."""
    url, checkpoints = str(tmp_path / "store"), Path("checkpoints/ple")
    first, second = (Storage(tmp_path / name, url) for name in ("first", "second"))
    files = []
    for storage, name, value in ((second, "second", -1.0), (first, "first", 0.0), (second, "second", 2.0)):
        piece = Piece(values=torch.full((2,), value), start=0 if name == "first" else 2, shape=(4,))
        files.append(write_pieces(tmp_path / name / checkpoints, 3, {"weight": piece}))
        storage.push(files[-1])
    assert saved_step(first, tmp_path / "first" / checkpoints) == 0
    write_manifest(tmp_path / "first" / checkpoints, 3, [file.name for file in files[1:]], {})
    seal_checkpoint(first, tmp_path / "first" / checkpoints, 3)
    assert latest_step(tmp_path / "first" / checkpoints) == 0, "here, half of it is missing"
    for name in ("first", "second", "third"):
        storage, root = Storage(tmp_path / name, url), tmp_path / name / checkpoints
        assert saved_step(storage, root) == 3
        pull_checkpoint(storage, root, 3)
        with Checkpoint.opened(root, 3) as saved:
            assert saved.whole("weight").tolist() == [0.0, 0.0, 2.0, 2.0]
        assert latest_step(root) == 3


# Old versions


def test_old_versions_leave_both_places_but_those_that_somebody_needs(tmp_path: Path, url: str) -> None:
    """1 was promoted by a gate, 3 and 4 last by proofs alone, which 2 was too; 5 is being looked at; 10 is ahead."""
    run_dir = tmp_path / "run"
    storage = Storage(run_dir, url)
    for number in (*range(1, 8), 8, 9, 10):
        version = directory(run_dir / "policies/ple", f"v{number:06d}", "adapter_model.safetensors", PROOF)
        (version / "adapter_model.safetensors").write_bytes(TENSORS)
        (version / PROOF).write_text('{"probe_logps": [-1.0]}')
        storage.push_directory(version, PROOF)
        if number == 7:  # here it was never, as where the learner is elsewhere
            shutil.rmtree(version)
    for number, by in ((1, "gate"), (2, "proof"), (3, "proof"), (4, "proof")):
        promote(run_dir, Promotion(ref=PolicyRef(policy="ple", version=number), by=by))  # type: ignore[arg-type]
    prune_versions(storage, run_dir, "ple", step=9, keep=2, used={5})
    assert versions(run_dir, "ple") == storage.complete(run_dir / "policies/ple", PROOF) == [1, 3, 4, 5, 8, 9, 10]
    prune_versions(storage, run_dir, "ple", step=10, keep=9)
    assert versions(run_dir, "ple") == [1, 3, 4, 5, 8, 9, 10]


def test_without_a_storage_old_versions_leave_the_directory(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        directory(tmp_path / "policies/ple", f"v{number:06d}", "weights", PROOF)
    prune_versions(Storage(tmp_path, None), tmp_path, "ple", step=3, keep=1)
    assert versions(tmp_path, "ple") == [3]


@pytest.mark.parametrize("other", [{2: "of the same step, but longer"}, {3: "a"}])
def test_two_that_have_gone_apart_are_refused(tmp_path: Path, other: dict[int, str]) -> None:
    chosen, here, there = config(tmp_path), tmp_path / "here", tmp_path / "there"
    begin(chosen, here)
    parts_of(here).write(2, content(2))
    storage = Storage(there, str(tmp_path / "store" / "tiny"))
    for step, text in other.items():
        parts_of(there).write(step, content(step, text))
        storage.push(Path(parts_of(there).path(step)))
    if 2 in other:
        assert Path(parts_of(here).path(2)).stat().st_size != Path(parts_of(there).path(2)).stat().st_size
    with pytest.raises(ConfigError, match=f"have gone apart .*step-00000{next(iter(other))}"):
        begin(chosen, here)
    assert parts_of(here).steps() == [2]


def test_a_directory_where_only_a_learner_worked_is_a_new_one(tmp_path: Path) -> None:
    chosen, run_dir = config(tmp_path), tmp_path / "run"
    save_checkpoint(run_dir / "checkpoints/ple", 1)
    begin(chosen, run_dir)
    write(tmp_path / "mine" / "notes.txt", "x")
    with pytest.raises(ConfigError, match="is no run directory"):
        check_run_dir(chosen, tmp_path / "mine")


def test_the_last_lines_are_there_whatever_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, run_dir, said = config(tmp_path), tmp_path / "run", []
    storage = begin(chosen, run_dir)
    log, copy = run_dir / "events.jsonl", tmp_path / "store" / "tiny" / "events.jsonl"
    with pushed_at_end(storage, run_dir, said.append):
        write(log, "1\n")
    assert copy.read_text() == "1\n"
    with pytest.raises(KeyboardInterrupt), pushed_at_end(storage, run_dir, said.append):
        write(log, "1\n2\n")
        raise KeyboardInterrupt
    assert copy.read_text() == "1\n2\n"
    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    with pytest.raises(KeyboardInterrupt), pushed_at_end(storage, run_dir, said.append):
        write(log, "1\n2\n3\n")
        raise KeyboardInterrupt
    assert len(said) == 1 and "cannot write the storage" in said[0]
    with pytest.raises(RunError, match="cannot write the storage"), pushed_at_end(storage, run_dir, said.append):
        pass


def test_only_parts_that_are_missing_are_pulled(tmp_path: Path) -> None:
    chosen, here, there = config(tmp_path), tmp_path / "here", tmp_path / "there"
    storage = begin(chosen, here)
    for step in (1, 2):
        parts_of(here).write(step, content(step))
        storage.push(Path(parts_of(here).path(step)))
    write(there / "rollouts/ple/step-000001.parquet", "mine")
    pull_parts(Storage(there, storage.url), there, there / "rollouts/ple")
    assert (there / "rollouts/ple/step-000001.parquet").read_text() == "mine"
    assert parts_of(there).steps() == [1, 2]
    assert parts_of(there).read(2) == parts_of(here).read(2)


# Far away


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FarStore]]:
    """An object store whose calls are counted."""
    monkeypatch.setattr(FarStore, "latency", 0.001)
    FarStore.clear()
    yield FarStore
    FarStore.clear()


VERSION = ("adapter_config.json", "adapter_model.safetensors", PROOF)


REJECTED = "rejected.parquet/step-000001.parquet"


def long_run(run_dir: Path, steps: int) -> None:
    """What so many steps leave, and a version that was cut short."""
    for step in range(1, steps + 1):
        write(run_dir / f"rollouts/ple/step-{step:06d}.parquet", f"part {step}")
        directory(run_dir / "policies/ple", f"v{step:06d}", *VERSION)
    write(run_dir / f"rollouts/ple/{REJECTED}", "rejected")
    write(run_dir / "events.jsonl", "1\n")


def keep_run(far: type[FarStore], run_dir: Path) -> None:
    """All of a directory in the store of the run `tiny`, and nothing counted."""
    for file in (file for file in run_dir.rglob("*") if file.is_file() and not file.name.startswith(".")):
        far.objects[f"bucket/tiny/{file.relative_to(run_dir)}"] = file.read_bytes()
    far.calls.clear()
    far.most = 0


def test_an_empty_machine_lists_once_and_pulls_many_at_a_time(tmp_path: Path, far: type[FarStore]) -> None:
    chosen, steps = config(tmp_path, storage_path="far://bucket"), 150
    long_run(tmp_path / "first", steps)
    keep_run(far, tmp_path / "first")
    far.objects["bucket/tiny/policies/ple/v000999/adapter_config.json"] = b"no proof"
    open_storage(chosen, tmp_path / "second")
    assert far.calls == {"put": 1, "list": 1, "get": 4 * steps + 2}
    assert far.most == FILES
    here, files = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*") if file.is_file()}
        for root in (tmp_path / "first", tmp_path / "second")
    )
    files.pop(Path(".pull.lock"))
    assert files == here
    far.calls.clear()
    open_storage(chosen, tmp_path / "second")
    assert far.calls == {"put": 2, "list": 1}, "again, its config and its log"


def test_what_the_store_lacks_is_pushed_many_at_a_time_in_the_order_that_counts(
    tmp_path: Path, far: type[FarStore]
) -> None:
    chosen, steps, run_dir = config(tmp_path, storage_path="far://bucket"), 40, tmp_path / "run"
    long_run(run_dir, steps)
    open_storage(chosen, run_dir)
    assert far.calls == {"put": 4 * steps + 3, "list": 1}
    assert far.most == FILES
    names = [name.removeprefix("bucket/tiny/") for name in far.put_names]
    at = {name: position for position, name in enumerate(names)}
    assert all(at[f"rollouts/ple/{REJECTED}"] < at[name] for name in names if "/ple/step-" in name)
    for version in {name.rpartition("/")[0] for name in names if "/v" in name}:
        assert all(at[f"{version}/{name}"] <= at[f"{version}/{PROOF}"] for name in VERSION)


def test_a_learner_lists_once_for_its_parts(tmp_path: Path, far: type[FarStore]) -> None:
    long_run(tmp_path / "first", 100)
    keep_run(far, tmp_path / "first")
    write(tmp_path / "second/rollouts/ple/step-000007.parquet", "mine")
    storage = Storage(tmp_path / "second", "far://bucket/tiny")
    pull_parts(storage, tmp_path / "second", tmp_path / "second/rollouts/ple")
    assert far.calls == {"list": 1, "get": 99}
    assert far.most == FILES
    assert (tmp_path / "second/rollouts/ple/step-000007.parquet").read_text() == "mine"


def test_one_listing_says_which_checkpoints_are_old(tmp_path: Path, far: type[FarStore]) -> None:
    for step in range(1, 6):
        directory(tmp_path / "run/checkpoints/ple", f"step-{step:06d}", "a.safetensors", MARKER)
    keep_run(far, tmp_path / "run")
    Storage(tmp_path / "run", "far://bucket/tiny").keep_newest(tmp_path / "run/checkpoints/ple", MARKER, 4)
    assert far.calls == {"list": 2, "delete": 2}, "one of them is of what is removed"


def test_a_pull_that_fails_leaves_whole_files_and_goes_on(
    tmp_path: Path, far: type[FarStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, second = config(tmp_path, storage_path="far://bucket"), tmp_path / "second"
    long_run(tmp_path / "first", 100)
    keep_run(far, tmp_path / "first")
    get = FarStore._get_file

    async def fails(files: FarStore, rpath: str, lpath: str, **options: Any) -> None:
        await get(files, rpath, lpath, **options)
        if rpath.endswith(failing):
            Path(lpath).write_text("half")
            raise ConnectionResetError(104, "Connection reset by peer")

    with monkeypatch.context() as broken:
        broken.setattr(FarStore, "_get_file", fails)
        for failing in ("step-000090.parquet", "v000090/proof.json"):
            with pytest.raises(RunError, match=r"cannot read the storage far://bucket/tiny \(Connection"):
                open_storage(chosen, second)
            left = [path for path in second.rglob("*") if path.is_file() and path.name != ".pull.lock"]
            assert all(
                path.read_bytes() == (tmp_path / "first" / path.relative_to(second)).read_bytes() for path in left
            )
            assert len(list(second.glob("rollouts/ple/step-*"))) == (FILES if "step" in failing else 100)
    assert {len(list(version.iterdir())) for version in second.glob("policies/ple/*")} == {len(VERSION)}
    open_storage(chosen, second)
    assert versions(second, "ple") == list(range(1, 101))


def test_what_a_killed_process_was_pulling_is_forgotten(tmp_path: Path, far: type[FarStore]) -> None:
    chosen, second = config(tmp_path, storage_path="far://bucket"), tmp_path / "second"
    long_run(tmp_path / "first", 2)
    keep_run(far, tmp_path / "first")
    write(second / ASIDE / "policies/ple/v000001/of another time", "x")
    check_run_dir(chosen, second)
    open_storage(chosen, second)
    assert not (second / ASIDE).exists()
    assert sorted(path.name for path in (second / "policies/ple/v000001").iterdir()) == sorted(VERSION)


def test_large_files_are_not_all_in_memory_at_a_time() -> None:
    weights = {Path(str(i)): n for i, n in enumerate([5, 5, 1, 99, 1, *[0] * FILES])}
    assert [len(some) for some in batches(weights, 10)] == [2, 1, 1, FILES, 1]
    assert [path for some in batches(weights, 10) for path in some] == list(weights)


# In the loop


RAFT = [{"type": "raft", "batch_size": 1, "name": "ple", "generation": {"max_tokens": 16}}]


def raft(tmp_path: Path, model: Path, storage: Storage) -> tuple[Context, RaftMethod, list[Any]]:
    """A method of eight steps whose learner has published the newest version alone, and what is shown."""
    chosen = config(tmp_path, pipelines=RAFT)
    prompts = [Prompt(id=f"p{i}", messages=(Message(role="user", content="Why?"),), target="So.") for i in range(8)]
    shown: list[Any] = []

    class Store:
        async def published(self, ref: PolicyRef) -> Publication:
            assert ref.version >= 5, f"nobody publishes {ref}: this would wait for ever"
            logps: dict[str, Any] = {"probe_logps": [], "previous_probe_logps": [], "base_probe_logps": []}
            return Publication(ref=ref, files={}, metrics={"loss": 1.0}, **logps)

    fleet = SimpleNamespace(store=SimpleNamespace(wait=SimpleNamespace(remote=Store().published)))
    context = Context(
        config=chosen,
        run_dir=tmp_path / "run",
        device="cpu",
        dtype="float32",
        tokenizer=load_tokenizer(str(model)),
        rows=Rows(prompts=prompts, fits={"ple": Fit(prompts=prompts, unfit=[])}),
        events=EventLog(tmp_path / "run" / "events.jsonl", shown.append),
        fleet=fleet,  # type: ignore[arg-type]
        storage=storage,
    )
    return context, RaftMethod(context, chosen.pipelines[0]), shown  # type: ignore[arg-type]


def test_a_part_is_in_the_storage_after_its_rejections(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = begin(config(tmp_path, pipelines=RAFT), tmp_path / "run")
    context, method, _ = raft(tmp_path, tiny_model, storage)
    uploads = Uploads(monkeypatch)
    asyncio.run(commit(context, method, 1, Rollout(rows=content(1), rejected=[row(1, "r")], tokens=1)))
    asyncio.run(commit(context, method, 2, Rollout(rows=content(2), rejected=[], tokens=1)))
    assert uploads.names == ["step-000001.parquet", "step-000001.parquet", "step-000002.parquet"]
    assert uploads.rooms == ["rejected.parquet", method.directory.name, method.directory.name]
    assert method.parts.steps() == [1, 2]


def test_steps_without_an_event_get_one_though_their_versions_are_gone(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner was ahead of the events when the run was killed; it publishes its newest version alone."""
    monkeypatch.setattr("pipelines.loop.memory", dict)
    (tmp_path / "run").mkdir()
    context, method, shown = raft(tmp_path, tiny_model, Storage(tmp_path / "run", None))
    for step in range(1, 9):
        method.parts.write(step, [{**content(step)[0], "reward": 1.0, "rewards": [1.0]}])
    released: list[int] = []

    async def release() -> None:
        released.append(1)

    channel = SimpleNamespace(release=SimpleNamespace(remote=release))
    progress = Progress(resumed=5, logged=2, proved=5, undrawn=0)
    asyncio.run(asyncio.wait_for(advance(context, method, channel, progress), timeout=30))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [3, 4, 5, 6, 7, 8]
    assert [event.get("loss") for event in events] == [None, None, 1.0, 1.0, 1.0, 1.0]
    assert all(event["reward_best"] == 1.0 for event in events)
    assert len(released) == 3
    assert step_line(shown[0]).startswith("ple 3/8 · best +1.000")


def test_what_is_written_once_is_not_remembered(tmp_path: Path) -> None:
    """Of a long run that would be all its parts and checkpoints."""
    root = tmp_path / "run"
    storage = Storage(root, str(tmp_path / "store"))
    files = [root / "events.jsonl", root / "rollouts/ple/step-000001.parquet", root / "checkpoints/ple/step-000001/a"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a")
    storage.push(*files)
    assert set(storage.sizes(root)) == {file.relative_to(root).as_posix() for file in files}
    assert list(storage._stamps) == [root / "events.jsonl"]
