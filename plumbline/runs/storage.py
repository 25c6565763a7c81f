"""The storage of a run: a copy of its directory on any filesystem that fsspec knows, written through.

A run works in its local directory. What is complete there is pushed at once, and another machine pulls what it lacks.
`plumbline.runs.mirror` says what a run keeps here; learners push their own checkpoints and versions. Object storage has
no rename: a file appears whole, and a directory counts once its marker is there, pushed last and removed first.
"""

import contextlib
import fcntl
import os
import posixpath
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.core
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from plumbline.errors import ConfigError, PlumblineError, RunError, in_one_line
from plumbline.runs.checkpoint import write_directory
from plumbline.runs.disk import writing

LOCK = ".pull.lock"
_NUMBERED = re.compile(r"(?:step-|v)(\d{6,})")


class Storage:
    """The copy of the directory `root` at `url`; without a URL every call does nothing and finds nothing.

    Example: ``Storage(Path("runs/a"), "s3://bucket/a").push(Path("runs/a/events.jsonl"))``. All paths that its methods
    take are local ones, in `root`.

    Raises:
        ConfigError: `url` cannot be opened: of an unknown kind, or its package is missing.
        RunError: from every method, where the storage fails.
    """

    def __init__(self, root: Path, url: str | None) -> None:
        self.url = url
        self._root = root
        self._stamps: dict[Path, tuple[int, int]] = {}  # of files as they were pushed or pulled
        self._pushing = threading.Lock()  # or an older state of a file could be pushed over a newer one
        self._files: Any = None
        self._there = ""
        if url:
            self._files, self._there = _open(url)

    def check(self) -> None:
        """Write a small file and remove it. Raises ConfigError where a run could not resume from there."""
        if self.url is None:
            return
        if isinstance(self._files, MemoryFileSystem):
            raise ConfigError("storage_path: memory: each process has a memory of its own; give a path or a URL")
        if isinstance(self._files, LocalFileSystem) and Path(self._there).resolve() == self._root.resolve():
            raise ConfigError(f"storage_path: {self._root} is the run directory itself; give a place elsewhere")
        place = posixpath.join(posixpath.dirname(self._there), f".plumbline-{uuid.uuid4().hex}")
        with self._told("write"):
            self._write(place, lambda path: self._files.pipe_file(path, b"plumbline"))
            self._files.rm_file(place)

    def sizes(self, directory: Path) -> dict[str, int]:
        """Bytes of every file in `directory` and below, by its path relative to it; hidden ones are not told."""
        if self.url is None:
            return {}
        top = self._remote(directory)
        with self._told("list"):
            self._files.invalidate_cache()  # others write here too
            try:
                found: dict[str, Any] = self._files.find(top, detail=True)
            except FileNotFoundError:
                return {}
        names = {path.removeprefix(top).lstrip("/"): info["size"] for path, info in found.items() if path != top}
        # Names become local paths: one that leads out of the directory is none of ours.
        return {name: size for name, size in names.items() if not any(p.startswith(".") for p in name.split("/"))}

    def complete(self, parent: Path, marker: str) -> dict[int, Path]:
        """The numbered directories in `parent` (`step-000012`, `v000012`) that are whole, ascending."""
        names = (name.split("/") for name in self.sizes(parent))
        found = {parts[0]: _NUMBERED.fullmatch(parts[0]) for parts in names if parts[1:] == [marker]}
        return dict(sorted((int(match[1]), parent / name) for name, match in found.items() if match))

    def read_text(self, file: Path) -> str | None:
        """A file's text, None where there is none."""
        if self.url is None:
            return None
        with self._told("read"):
            try:
                return self._files.cat_file(self._remote(file)).decode("utf-8")
            except FileNotFoundError:
                return None

    def write_text(self, file: Path, text: str) -> None:
        """Write a file that is not the local one of that name."""
        if self.url is not None:
            with self._told("write"):
                self._write(self._remote(file), lambda path: self._files.pipe_file(path, text.encode("utf-8")))

    def push(self, *files: Path) -> None:
        """Upload files, in this order, but for those that have not changed since they were pushed or pulled here. What
        has a number is written once, and not remembered."""
        if self.url is None:
            return
        with self._pushing:
            for file in files:
                stamp = _stamp(file)
                if self._stamps.get(file) != stamp:
                    self._upload(file)
                    self._remember(file, stamp)

    def push_directory(self, directory: Path, marker: str) -> None:
        """Upload a directory, replacing one that is there; it is complete once `marker`, the last file, is there."""
        if self.url is None:
            return
        with self._told("write"):
            self._files.invalidate_cache()
            if self._files.exists(end := self._remote(directory / marker)):
                self._files.rm_file(end)
        files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / marker)
        for file in [*files, directory / marker]:
            self._upload(file)

    def pull(self, *files: Path) -> None:
        """Download files, in this order, over those that are here."""
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.tmp-{os.getpid():x}")
            with writing(file):
                try:
                    self._download(file, aside)
                    aside.replace(file)
                finally:
                    aside.unlink(missing_ok=True)
            self._remember(file, _stamp(file))

    def pull_directory(self, directory: Path, marker: str) -> None:
        """Download a directory that is complete in the storage and not here. Several processes may ask at once."""
        if self.url is None or directory.is_dir():
            return
        with self.pulling():
            names = {} if directory.is_dir() else self.sizes(directory)

            def download(aside: Path) -> None:
                for name in names:
                    (aside / name).parent.mkdir(parents=True, exist_ok=True)
                    self._download(directory / name, aside / name)

            if marker in names:
                write_directory(directory, download)

    @contextlib.contextmanager
    def pulling(self) -> Iterator[None]:
        """One process of this machine at a time."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def keep_newest(self, parent: Path, marker: str, keep: int) -> None:
        """Remove the numbered directories in `parent` that are older than the newest `keep` complete ones."""
        kept = list(self.complete(parent, marker))[-keep:]
        there = {name.split("/")[0] for name in self.sizes(parent)}
        for name in sorted(there):
            if (match := _NUMBERED.fullmatch(name)) and kept and int(match[1]) < kept[0]:
                self.remove(parent / name, marker)

    def remove(self, directory: Path, marker: str) -> None:
        """Remove a directory there, its marker first."""
        with self._told("remove from"):
            with contextlib.suppress(FileNotFoundError):  # one that was never complete
                self._files.rm_file(self._remote(directory / marker))
            self._files.rm(self._remote(directory), recursive=True)

    def discard(self, *files: Path) -> None:
        """Remove files there."""
        with self._told("remove from"):
            for file in files:
                self._files.rm_file(self._remote(file))

    def _remember(self, file: Path, stamp: tuple[int, int]) -> None:
        if not _NUMBERED.search(file.relative_to(self._root).as_posix()):
            self._stamps[file] = stamp

    def _remote(self, path: Path) -> str:
        return posixpath.normpath(posixpath.join(self._there, path.relative_to(self._root).as_posix()))

    def _upload(self, file: Path) -> None:
        with self._told("write"):
            self._write(self._remote(file), lambda path: self._files.put_file(str(file), path))

    def _download(self, file: Path, target: Path) -> None:
        with self._told("read"):
            self._files.get_file(self._remote(file), str(target))

    def _write(self, path: str, write: Callable[[str], object]) -> None:
        """Call ``write(path)``; on a disk aside and renamed, for there a file is seen while it is being written."""
        if not isinstance(self._files, LocalFileSystem):
            write(path)
            return
        directory, name = posixpath.split(path)
        aside = posixpath.join(directory, f".{name}.aside")
        self._files.makedirs(directory, exist_ok=True)
        write(aside)
        self._files.mv(aside, path)

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except PlumblineError:
            raise
        except Exception as error:  # the filesystems' libraries have errors of their own, of any type
            raise RunError(
                f"cannot {doing} the storage {redacted(str(self.url))} ({redacted(in_one_line(error))}); "
                f"{self._root} is whole, and the same command goes on from it"
            ) from error


def redacted(text: str) -> str:
    """`text` without the names and passwords of the URLs in it."""
    return re.sub(r"://\S*:\S*@", "://***@", text)


def _open(url: str) -> tuple[Any, str]:
    if redacted(url) != url or "?" in url:
        shown = redacted(url).partition("?")[0]
        raise ConfigError(
            f"storage_path: {shown}: a password or a query in it would be kept with the run; give credentials by the "
            "environment, as the storage's own tools read them"
        )
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"storage_path: {url}: {error}; give a path, or a URL such as s3://bucket/runs") from None
    except Exception as error:  # some filesystems connect at once, and fail as their libraries do
        raise ConfigError(f"storage_path: {url}: cannot be opened ({redacted(in_one_line(error))})") from None


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
