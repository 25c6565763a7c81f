"""Checkpoints: what is written comes back, the newest is found, and a crash leaves the old one whole."""

from pathlib import Path

import pytest
import torch

from plumbline.runs import checkpoint
from plumbline.runs.checkpoint import latest_step, load_checkpoint, save_checkpoint, write_directory


def save(root: Path, step: int, keep: int = 2) -> None:
    save_checkpoint(root, step, {"weight": torch.full((2, 3), float(step))}, {"step": step}, keep=keep)


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
    save_checkpoint(tmp_path / "ple", 3, tensors, meta)
    read, read_meta = load_checkpoint(tmp_path / "ple", 3)
    assert read_meta == meta
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_newest_is_found_by_number_not_by_name_or_date(tmp_path: Path) -> None:
    assert latest_step(tmp_path / "none") == 0
    (tmp_path / "empty").mkdir()
    assert latest_step(tmp_path / "empty") == 0
    for step in (1_000_000, 999_999, 7):
        (tmp_path / f"step-{step:06d}").mkdir()
    for name in (".step-2000000.123", "step-3000000.old", "step-12"):
        (tmp_path / name).mkdir()
    assert latest_step(tmp_path) == 1_000_000


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert there(tmp_path) == ["step-000003", "step-000004"]
    save(tmp_path, 5, keep=1)
    assert there(tmp_path) == ["step-000005"]


def test_a_crash_while_writing_leaves_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def dies(*_: object, **__: object) -> str:
        raise KeyboardInterrupt  # after the tensors are written, before their meta

    with monkeypatch.context() as crash:
        crash.setattr(checkpoint.json, "dumps", dies)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert latest_step(tmp_path) == 1
    tensors, meta = load_checkpoint(tmp_path, 1)
    assert torch.equal(tensors["weight"], torch.ones(2, 3))
    assert meta == {"step": 1}
    save(tmp_path, 2)
    assert latest_step(tmp_path) == 2
    assert there(tmp_path) == ["step-000001", "step-000002"], "what the crash left is gone"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-000002.1").mkdir()
    (tmp_path / ".step-000002.1" / "state.safetensors").write_text("half")
    save(tmp_path, 2)
    assert there(tmp_path) == ["step-000002"]


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
