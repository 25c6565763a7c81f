"""Checkpoints of a learner: safetensors and JSON in a directory a step, a file a worker, the manifest last.

Ours rather than Ray Train's: a part is acknowledged only once its checkpoint is on disk, and that must not wait for a
controller's next poll; and one mechanism then serves a dead worker, a resumed run and another number of workers. A
tensor may lie in pieces, whose numbers stand in the files; whoever reads takes what it needs of it, whoever wrote it.
"""

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline.errors import RunError
from plumbline.runs.disk import write_text, writing

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
"""Checkpoints of a learner that are kept, the newest ones."""
MARKER = "state.json"
"""The manifest: the files of the checkpoint and what is no tensor. What it does not list is not part of it."""
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Numbers of a tensor of this `shape` that lie side by side, from the `start`-th on."""

    values: "Tensor"
    start: int
    shape: Sequence[int]


def whole(tensor: "Tensor") -> Piece:
    """A tensor in one piece."""
    return Piece(values=tensor, start=0, shape=tensor.shape)


def write_pieces(root: Path, step: int, pieces: Mapping[str, Piece]) -> Path:
    """Write one worker's file into ``root/step-NNNNNN``, aside and renamed, under a name that no other has.

    Raises:
        DiskError: the disk did not take it.
    """
    from safetensors.torch import save_file

    directory = checkpoint_directory(root, step)
    file = directory / f"{uuid.uuid4().hex}.safetensors"
    aside = file.with_suffix(".aside")
    places = {name: [piece.start, *piece.shape] for name, piece in pieces.items()}
    tensors = {name: piece.values.detach().contiguous().view(-1) for name, piece in pieces.items()}
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, aside, metadata={"places": json.dumps(places)})
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
    return file


def write_manifest(root: Path, step: int, files: Sequence[str], meta: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose `files` are all there: from now on it counts. A crash before leaves
    what was there, also of the same step. Raises DiskError."""
    write_text(checkpoint_directory(root, step) / MARKER, json.dumps({"files": list(files), **meta}))


def remove_old(root: Path, step: int, keep: int = KEPT) -> None:
    """Remove what is older than the checkpoint of `step` and the `keep` - 1 before it."""
    older = [one for one in _steps(root) if one < step]
    for old in older[: len(older) - (keep - 1)]:
        shutil.rmtree(checkpoint_directory(root, old), ignore_errors=True)


def checkpoint_directory(root: Path, step: int) -> Path:
    """Where a checkpoint lies, or would."""
    return root / f"step-{step:06d}"


def listed(manifest: str) -> list[str]:
    """The files that a manifest lists."""
    return json.loads(manifest)["files"]


def latest_step(root: Path) -> int:
    """Step of the newest checkpoint whose files are all here, 0 where there is none."""
    return max((step for step in _steps(root) if _complete(checkpoint_directory(root, step))), default=0)


class Checkpoint:
    """A checkpoint that is open for reading, a part of a tensor at a time.

    Example: ``with Checkpoint.opened(root, 12) as saved: saved.read("model.a", start=4, count=2)``
    """

    def __init__(self, directory: Path, files: Sequence[Any], meta: dict[str, Any]) -> None:
        self.meta = meta
        self._directory = directory
        self._shapes: dict[str, list[int]] = {}
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            for name, (start, *shape) in json.loads(file.metadata()["places"]).items():
                self._shapes[name] = shape
                self._parts.setdefault(name, []).append((start, file.get_slice(name)))

    @classmethod
    @contextlib.contextmanager
    def opened(cls, root: Path, step: int) -> "Iterator[Checkpoint]":
        """The one of a step."""
        from safetensors import safe_open

        directory = checkpoint_directory(root, step)
        meta = json.loads((directory / MARKER).read_text("utf-8"))
        with contextlib.ExitStack() as stack:
            # Not through a map of the file, of which every page that was seen stays in memory.
            files = [
                stack.enter_context(safe_open(directory / name, framework="pt", backend="pread"))
                for name in meta.pop("files")
            ]
            yield cls(directory, files, meta)

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of every tensor, by name."""
        return self._shapes

    def read(self, name: str, start: int, count: int) -> "Tensor":
        """`count` numbers of a tensor from the `start`-th on, flat.

        Raises:
            KeyError: there is no such tensor.
            RunError: a piece of it is missing.
        """
        import torch

        found = torch.empty(0)
        filled = 0
        for begin, part in self._parts[name]:
            low, high = max(start, begin), min(start + count, begin + part.get_shape()[0])
            if low < high:
                values = part[low - begin : high - begin]
                found = found if filled else torch.empty(count, dtype=values.dtype)
                found[low - start : high - start] = values
                filled += high - low
        if filled != count:
            raise RunError(f"{self._directory}: it lacks a piece of {name}; without it, the run goes on from before")
        return found

    def whole(self, name: str) -> "Tensor":
        """A tensor as it was. Raises as `read`."""
        shape = self._shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)


def write_directory(target: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(aside)`` and rename `aside` to `target`, replacing one that is there. Raises DiskError."""
    for stale in target.parent.glob(f".{target.name}.*"):  # of a process that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    with writing(target):
        try:
            aside.mkdir(parents=True)
            write(aside)
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _complete(directory: Path) -> bool:
    manifest = directory / MARKER
    return manifest.exists() and all((directory / name).exists() for name in listed(manifest.read_text("utf-8")))


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for child in root.iterdir() if (m := _NAME.fullmatch(child.name)))
