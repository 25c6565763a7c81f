"""The cache of log-probs: what a value is kept under, who shares it, and what happens to a damaged file."""

import math
import multiprocessing
import shutil
import sqlite3
import threading
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from plumbline.errors import ModelError, RunError
from plumbline.models.logp_cache import LogpCache, model_fingerprint
from plumbline.records import TokenGroup

GROUPS = [TokenGroup([5, 6], [[7, 2], [8]]), TokenGroup([5], [[7, 2]])]
VALUES = [[-1.25, -0.1], [-3.0000000000000004]]


@pytest.mark.parametrize("kept", ["file", "memory"])
def test_what_was_put_is_got_and_counted(tmp_path: Path, kept: str) -> None:
    cache = LogpCache(tmp_path / "new" / "logps.sqlite" if kept == "file" else None, "m")
    assert cache.get(GROUPS) == [[None, None], [None]]
    assert (cache.hits, cache.misses) == (0, 3)
    cache.put([GROUPS[0]], [VALUES[0]])
    assert cache.get(GROUPS) == [VALUES[0], [None]]
    assert (cache.hits, cache.misses) == (2, 4)
    cache.put([GROUPS[1]], [VALUES[1]])
    assert cache.get(GROUPS) == VALUES, "to the last bit of a float64"
    assert (cache.hits, cache.misses) == (5, 4)


def test_a_file_outlives_its_process_and_memory_does_not(tmp_path: Path) -> None:
    path = tmp_path / "logps.sqlite"
    LogpCache(path, "m").put(GROUPS, VALUES)
    again = LogpCache(path, "m")
    assert again.get(GROUPS) == VALUES
    assert (again.hits, again.misses) == (3, 0)
    assert LogpCache(path, "another").get(GROUPS) == [[None, None], [None]]
    LogpCache(None, "m").put(GROUPS, VALUES)
    assert LogpCache(None, "m").get(GROUPS) == [[None, None], [None]]


def test_values_of_two_models_lie_side_by_side(tmp_path: Path) -> None:
    one, two = (LogpCache(tmp_path / "logps.sqlite", model) for model in "ab")
    one.put([GROUPS[1]], [[-1.0]])
    two.put([GROUPS[1]], [[-2.0]])
    assert one.get([GROUPS[1]]) == [[-1.0]]
    assert two.get([GROUPS[1]]) == [[-2.0]]


def test_the_border_between_prompt_and_response_is_part_of_the_key() -> None:
    cache = LogpCache(None, "m")
    cache.put([TokenGroup([1, 2], [[3]])], [[-1.0]])
    others = [TokenGroup([1], [[2, 3]]), TokenGroup([1, 2, 3], [[]]), TokenGroup([1, 2], [[3, 0], [4], []])]
    assert cache.get(others) == [[None], [None], [None, None, None]]
    assert cache.get([TokenGroup([1, 2], [[4], [3]])]) == [[None, -1.0]], "its place in the group is not"


def test_an_empty_response_is_kept_like_any_other() -> None:
    cache = LogpCache(None, "m")
    cache.put([TokenGroup([1], [[]]), TokenGroup([2], [])], [[0.0], []])
    assert cache.get([TokenGroup([1], [[]]), TokenGroup([2], [])]) == [[0.0], []]
    assert (cache.hits, cache.misses) == (1, 0)
    assert cache.get([]) == []


def test_more_responses_than_one_query_takes() -> None:
    cache = LogpCache(None, "m")
    groups = [TokenGroup([1], [[i, j] for j in range(100)]) for i in range(30)]
    cache.put(groups[:20], [[-(100.0 * i + j) for j in range(100)] for i in range(20)])
    values = cache.get(groups)
    assert values[:20] == [[-(100.0 * i + j) for j in range(100)] for i in range(20)]
    assert values[20:] == [[None] * 100] * 10
    assert (cache.hits, cache.misses) == (2000, 1000)


def test_what_is_not_finite_is_not_kept_and_what_is_there_stays() -> None:
    cache = LogpCache(None, "m")
    cache.put(GROUPS, [[math.nan, -math.inf], [-1.0]])
    assert cache.get(GROUPS) == [[None, None], [-1.0]]
    cache.put(GROUPS, VALUES)
    assert cache.get(GROUPS) == [VALUES[0], [-1.0]]


def test_values_must_be_one_a_response() -> None:
    cache = LogpCache(None, "m")
    for values in ([[-1.0]], [[-1.0], [-2.0]]):
        with pytest.raises(ValueError, match="zip"):
            cache.put(GROUPS, values)
    assert cache.get(GROUPS) == [[None, None], [None]]


# Several processes


def _fill(path: Path, worker: int) -> None:
    """Opens the file, as all do at once, and puts groups that it shares with the others and groups of its own."""
    cache = LogpCache(path, "m")
    for i in range(40):
        cache.put([TokenGroup([0], [[i]]), TokenGroup([1], [[worker, i]])], [[-float(i)], [-float(worker)]])
        assert cache.get([TokenGroup([0], [[i]])]) == [[-float(i)]]


def test_several_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "logps.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    groups = [TokenGroup([0], [[i] for i in range(40)])]
    groups += [TokenGroup([1], [[worker, i] for i in range(40)]) for worker in range(3)]
    expected = [[-float(i) for i in range(40)]] + [[-float(worker)] * 40 for worker in range(3)]
    assert LogpCache(path, "m").get(groups) == expected


def test_all_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    def put(path: Path, number: int) -> None:
        together.wait()
        try:
            LogpCache(path, "m").put([TokenGroup([1], [[number]])], [[-float(number)]])
        except Exception as error:
            failures.append(error)

    failures: list[Exception] = []
    together = threading.Barrier(6)
    for i in range(60):  # what a connection may do to another one depends on the file, not on the process
        path = tmp_path / f"{i}.sqlite"
        threads = [threading.Thread(target=put, args=(path, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        expected = [[-float(number) for number in range(6)]]
        assert LogpCache(path, "m").get([TokenGroup([1], [[number] for number in range(6)])]) == expected


def test_who_waits_too_long_for_another_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "logps.sqlite"
    monkeypatch.setattr("plumbline.models.value_cache._BUSY_S", 0.01)
    cache = LogpCache(path, "m")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match=r"cannot be read and written \(database is locked\)"):
        cache.put(GROUPS, VALUES)
    assert cache.get(GROUPS) == [[None, None], [None]], "readers do not wait for it"
    other.execute("COMMIT")
    cache.put(GROUPS, VALUES)
    assert cache.get(GROUPS) == VALUES


Partition = namedtuple("Partition", "mountpoint fstype")


def test_on_a_network_there_is_no_log_that_machines_cannot_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [Partition("/", "ext4"), Partition(str(tmp_path / "nfs"), "nfs4"), Partition(str(tmp_path), "tmpfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    for path, mode in ((tmp_path / "logps.sqlite", "wal"), (tmp_path / "nfs" / "logps.sqlite", "delete")):
        cache = LogpCache(path, "m")
        cache.put(GROUPS, VALUES)
        assert LogpCache(path, "m").get(GROUPS) == VALUES
        assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == (mode,)


def test_a_start_does_not_read_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "logps.sqlite"
    responses = [[i] for i in range(50_000)]
    cache = LogpCache(path, "m")
    cache.put([TokenGroup([1], responses)], [[-1.0] * len(responses)])
    cache._db.close()  # its pages are in the file now, not in the log beside it
    before = psutil.Process().io_counters().read_chars
    LogpCache(path, "m")
    assert psutil.Process().io_counters().read_chars - before < path.stat().st_size / 4


# Damaged files


def _one_line(error: BaseException, path: Path) -> str:
    text = str(error)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("damage", ["text", "cut", "hole", "another program's"])
def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "logps.sqlite"
    if damage == "text":
        path.write_text("these are no log-probs\n" * 100)
    elif damage == "another program's":
        sqlite3.connect(path).execute("CREATE TABLE logps (name TEXT, age INTEGER)").connection.commit()
    else:
        cache = LogpCache(path, "m")
        cache.put([TokenGroup([1], [[i] for i in range(2000)])], [[-float(i) for i in range(2000)]])
        cache._db.close()  # its pages are in the file now, not in the log beside it
        content = path.read_bytes()
        assert len(content) > 5 * 4096
        middle = b"\xff" * 4096 if damage == "hole" else b""
        path.write_bytes(content[: 3 * 4096] + middle + (content[4 * 4096 :] if damage == "hole" else b""))
    with pytest.raises(RunError) as caught:
        LogpCache(path, "m").get([TokenGroup([1], [[i] for i in range(2000)])])
    text = _one_line(caught.value, path)
    assert "is damaged" in text and "remove it" in text
    for file in tmp_path.iterdir():
        file.unlink()
    assert LogpCache(path, "m").get(GROUPS) == [[None, None], [None]], "removing it does help"


def test_a_place_that_cannot_be_written_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "logps.sqlite"):
        with pytest.raises(RunError) as caught:
            LogpCache(path, "m")
        assert "cannot be read and written" in _one_line(caught.value, path)


# Fingerprints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory of files that are named like a model's."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
    ):
        (directory / name).write_text(f"content of {name}")
    return directory


def test_every_file_that_matters_changes_the_fingerprint(model: Path) -> None:
    seen = {model_fingerprint(str(model))}
    for file in sorted(model.iterdir()):
        content = file.read_bytes()
        for other in (content + b"x", content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            file.write_bytes(other)
            seen.add(model_fingerprint(str(model)))
        file.write_bytes(content)
    assert len(seen) == 1 + 3 * 8
    assert model_fingerprint(str(model)) in seen


def test_swapped_and_renamed_files_are_another_model(model: Path) -> None:
    before = model_fingerprint(str(model))
    one, two = model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors"
    contents = one.read_bytes(), two.read_bytes()
    seen = {before}
    for first, second in (contents[::-1], (contents[0] + contents[1], b"")):
        one.write_bytes(first)
        two.write_bytes(second)
        seen.add(model_fingerprint(str(model)))
    one.write_bytes(contents[0])
    two.write_bytes(contents[1])
    assert model_fingerprint(str(model)) == before
    (model / "vocab.json").rename(model / "vocab.txt")
    assert len(seen | {model_fingerprint(str(model))}) == 4


def test_a_copy_elsewhere_with_other_notes_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "README.md").write_text("trained today")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert model_fingerprint(str(copy)) == model_fingerprint(str(model))
    assert len(model_fingerprint(str(copy))) == 64


def test_what_is_no_model_has_no_fingerprint(model: Path) -> None:
    for name, missing in (("config.json", "no config.json"), ("*.safetensors", r"no \*\.safetensors")):
        for file in list(model.glob(name)):
            file.rename(file.with_suffix(".away"))
        with pytest.raises(ModelError, match=missing):
            model_fingerprint(str(model))
        for file in list(model.glob("*.away")):
            file.rename(file.with_suffix(f".{name.rpartition('.')[2]}"))
    with pytest.raises(ModelError, match="no such directory"):
        model_fingerprint(str(model / "none"))
