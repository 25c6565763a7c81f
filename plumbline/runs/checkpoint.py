"""Checkpoints of a learner: safetensors and JSON in a directory a step, written aside and renamed.

Ours rather than Ray Train's: a part is acknowledged only once its checkpoint is on disk, and that must not wait for a
controller's next poll; and one mechanism then serves a dead worker, a resumed run and another number of workers.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
"""Checkpoints of a learner that are kept, the newest ones."""
MARKER = "state.json"
"""The file that is written last."""
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    root: Path, step: int, tensors: "Mapping[str, Tensor]", meta: Mapping[str, Any], keep: int = KEPT
) -> None:
    """Write `root/step-NNNNNN`; afterwards all but the newest `keep` are removed. A crash leaves the old ones whole."""
    from safetensors.torch import save_file

    def write(directory: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "state.safetensors")
        (directory / MARKER).write_text(json.dumps(dict(meta)), encoding="utf-8")

    write_directory(checkpoint_directory(root, step), write)
    for old in _steps(root)[:-keep]:
        shutil.rmtree(checkpoint_directory(root, old), ignore_errors=True)


def checkpoint_directory(root: Path, step: int) -> Path:
    """Where a checkpoint lies, or would."""
    return root / f"step-{step:06d}"


def latest_step(root: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max(_steps(root), default=0)


def load_checkpoint(root: Path, step: int) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Tensors and meta of one checkpoint."""
    from safetensors.torch import load_file

    directory = checkpoint_directory(root, step)
    return load_file(directory / "state.safetensors"), json.loads((directory / MARKER).read_text("utf-8"))


def write_directory(target: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(aside)`` and rename `aside` to `target`, replacing one that is there."""
    for stale in target.parent.glob(f".{target.name}.*"):  # of a process that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    write(aside)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for child in root.iterdir() if (m := _NAME.fullmatch(child.name)))
