"""Checkpoints: what is written comes back, the newest is found, and a crash leaves the old one whole."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plumbline.errors import RunError
from plumbline.runs.checkpoint import (
    MARKER,
    Checkpoint,
    Piece,
    latest_step,
    remove_old,
    whole,
    write_directory,
    write_manifest,
    write_pieces,
)


def save(root: Path, step: int, keep: int = 2) -> None:
    write(root, step, {"weight": whole(torch.full((2, 3), float(step)))}, meta={"step": step})
    remove_old(root, step, keep)


def write(root: Path, step: int, *workers: dict[str, Piece], meta: dict[str, Any] | None = None) -> None:
    """A checkpoint of so many workers' pieces."""
    write_manifest(root, step, [write_pieces(root, step, pieces).name for pieces in workers], meta or {})


def there(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "model.a": torch.randn(3, 4),
        "model.b": torch.randn(3, 4).to(torch.bfloat16),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "optimizer.0.step": torch.tensor(7.0),
        "rng.torch": torch.get_rng_state(),
    }
    meta = {"updates": 12, "previous_probe": [-1.25, -0.1], "metrics": {"loss": 0.5}}
    write(tmp_path / "ple", 3, {name: whole(tensor) for name, tensor in tensors.items()}, meta=meta)
    with Checkpoint.opened(tmp_path / "ple", 3) as saved:
        assert saved.meta == meta
        assert saved.shapes() == {name: list(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert saved.whole(name).dtype == tensor.dtype
            assert torch.equal(saved.whole(name), tensor)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_any_part_of_a_tensor_is_read_from_the_pieces_of_all_workers(tmp_path: Path, order: tuple[int, int]) -> None:
    """Two pieces of unlike size, and a third worker that has nothing of it; read in every way that others could."""
    numbers = torch.arange(10, dtype=torch.bfloat16)
    pieces = [Piece(values=numbers[start:end], start=start, shape=(2, 5)) for start, end in ((7, 10), (0, 7))]
    write(tmp_path, 1, {"a": pieces[order[0]]}, {"b": whole(torch.zeros(()))}, {"a": pieces[order[1]]})
    with Checkpoint.opened(tmp_path, 1) as saved:
        for start in range(10):
            for count in range(1, 11 - start):
                assert torch.equal(saved.read("a", start, count), numbers[start : start + count])
        assert torch.equal(saved.whole("a"), numbers.view(2, 5))
        with pytest.raises(KeyError):
            saved.whole("c")


def test_a_piece_that_no_worker_wrote_is_missed(tmp_path: Path) -> None:
    write(tmp_path, 1, *({"a": Piece(values=torch.ones(3), start=start, shape=(9,))} for start in (0, 6)))
    with Checkpoint.opened(tmp_path, 1) as saved:
        assert saved.read("a", 1, 2).tolist() == [1.0, 1.0]
        with pytest.raises(RunError, match="step-000001: it lacks a piece of a"):
            saved.read("a", 2, 2)


def test_the_newest_is_found_by_number_not_by_name_or_date(tmp_path: Path) -> None:
    assert latest_step(tmp_path / "none") == 0
    (tmp_path / "empty").mkdir()
    assert latest_step(tmp_path / "empty") == 0
    for step in (1_000_000, 999_999, 7):
        save(tmp_path, step, keep=9)
    for name in (".step-2000000.123", "step-3000000.old", "step-12"):
        (tmp_path / name).mkdir()
    assert latest_step(tmp_path) == 1_000_000


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert there(tmp_path) == ["step-000003", "step-000004"]
    save(tmp_path, 5, keep=1)
    assert there(tmp_path) == ["step-000005"]


def test_one_that_an_older_run_goes_on_from_is_not_taken_for_old(tmp_path: Path) -> None:
    for step in (3, 8, 9, 4):
        save(tmp_path, step, keep=2 if step == 4 else 9)
    assert there(tmp_path) == ["step-000003", "step-000004", "step-000008", "step-000009"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_crash_before_the_manifest_leaves_the_old_one_whole(tmp_path: Path, step: int) -> None:
    save(tmp_path, 1)
    write_pieces(tmp_path, step, {"weight": whole(torch.zeros(2, 3))})
    assert latest_step(tmp_path) == 1
    with Checkpoint.opened(tmp_path, 1) as saved:
        assert torch.equal(saved.whole("weight"), torch.ones(2, 3))
        assert saved.meta == {"step": 1}
    save(tmp_path, 2)
    assert latest_step(tmp_path) == 2


def test_a_crash_in_the_manifest_leaves_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def dies(path: Path, target: Path) -> None:
        if target.name == MARKER:
            raise KeyboardInterrupt
        os.replace(path, target)

    with monkeypatch.context() as crash, pytest.raises(KeyboardInterrupt):
        crash.setattr(Path, "replace", dies)
        save(tmp_path, 2)
    assert latest_step(tmp_path) == 1


def test_one_whose_files_are_not_all_here_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    next((tmp_path / "step-000002").glob("*.safetensors")).unlink()
    assert latest_step(tmp_path) == 1


def test_nothing_bears_the_name_before_it_is_complete(tmp_path: Path) -> None:
    seen: list[bool] = []

    def write(aside: Path) -> None:
        (aside / "one").write_text("1")
        seen.append((tmp_path / "target").exists())
        (aside / "two").write_text("2")

    write_directory(tmp_path / "target", write)
    assert seen == [False]
    assert there(tmp_path / "target") == ["one", "two"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_directory(tmp_path / "target", lambda aside: (aside / "old").write_text("1"))
    write_directory(tmp_path / "target", lambda aside: (aside / "new").write_text("2"))
    assert there(tmp_path) == ["target"]
    assert there(tmp_path / "target") == ["new"]


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path) -> None:
    write_directory(tmp_path / "target", lambda aside: (aside / "old").write_text("1"))

    def fails(aside: Path) -> None:
        (aside / "new").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(tmp_path / "target", fails)
    assert there(tmp_path / "target") == ["old"]
