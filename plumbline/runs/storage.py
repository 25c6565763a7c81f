"""The storage of a run: a copy of its directory on any filesystem that fsspec knows, written through.

A run works in its local directory. What is complete there is pushed at once, and another machine pulls what it lacks.
`plumbline.runs.mirror` says what a run keeps here; learners push their own checkpoints and versions. Object storage has
no rename: a file appears whole, and a directory counts once its marker is there, pushed last and removed first. It is
far away, too: what has no order goes in one call of fsspec, whose object stores then move many files at a time.
"""

import contextlib
import fcntl
import os
import posixpath
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec.core
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from plumbline.errors import ConfigError, PlumblineError, RunError, in_one_line
from plumbline.runs.disk import writing

LOCK = ".pull.lock"
ASIDE = ".pulled"
"""Where directories lie while they are pulled, by the process that holds the lock."""
FILES = 64
"""At most so many files are moved at a time."""
BYTES = 64 * 2**20
"""Nor more than so many bytes are uploaded at a time, unless one file has more: libraries read small ones whole."""
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

    def complete(self, parent: Path, marker: str) -> list[int]:
        """The numbers of the directories in `parent` (`step-000012`, `v000012`) that are whole, ascending."""
        return sorted(complete_in(self.sizes(parent), marker))

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
        for file in files:
            self.push_together([file])

    def push_together(self, files: Iterable[Path]) -> None:
        """As `push`, but in any order, many at a time."""
        if self.url is None:
            return
        with self._pushing:
            stamps = {file: _stamp(file) for file in files}
            changed = {file: stamp[1] for file, stamp in stamps.items() if self._stamps.get(file) != stamp}
            for some in batches(changed, BYTES):
                self._upload(some)
                for file in some:
                    self._remember(file, stamps[file])

    def push_directory(self, directory: Path, marker: str) -> None:
        """Upload a directory, replacing one that is there; it is complete once `marker`, the last file, is there."""
        if self.url is None:
            return
        with self._told("write"):
            self._files.invalidate_cache()
            if self._files.exists(end := self._remote(directory / marker)):
                self._files.rm_file(end)
        self.push_new_directories([directory], marker)

    def push_new_directories(self, directories: Iterable[Path], marker: str) -> None:
        """Upload directories of which the storage has no `marker`, many at a time; they count from their marker on."""
        if self.url is None:
            return
        files = [sorted(path for path in one.rglob("*") if path.is_file()) for one in directories]
        ends = {one / marker for one in directories}
        for some in batches({file: file.stat().st_size for one in files for file in one if file not in ends}, BYTES):
            self._upload(some)
        for some in batches(dict.fromkeys(sorted(ends), 0), BYTES):
            self._upload(some)

    def pull(self, *files: Path) -> None:
        """Download files over those that are here, in any order, many at a time."""
        for some in batches(dict.fromkeys(files, 0), BYTES):
            asides = {file: file.with_name(f".{file.name}.tmp-{os.getpid():x}") for file in some}
            try:
                self._download(asides)
                for file, aside in asides.items():
                    with writing(file):
                        aside.replace(file)
                    self._remember(file, _stamp(file))
            finally:
                for aside in asides.values():
                    aside.unlink(missing_ok=True)

    def pull_directory(self, directory: Path, marker: str) -> None:
        """Download a directory that is complete in the storage and not here. Several processes may ask at once."""
        if self.url is not None and not directory.is_dir():
            with self.pulling():
                self._pull_whole({directory: list(self.sizes(directory))}, marker)

    def pull_directories(self, names: Mapping[Path, Collection[str]], marker: str) -> None:
        """As `pull_directory`, many at a time, with the `names` of their files, as a listing had them."""
        if not all(directory.is_dir() for directory in names):
            with self.pulling():
                self._pull_whole(names, marker)

    def _pull_whole(self, names: Mapping[Path, Collection[str]], marker: str) -> None:
        """Each appears whole; the lock is held."""
        missing = {one: len(there) for one, there in names.items() if marker in there and not one.is_dir()}
        root = self._root / ASIDE
        for some in batches(missing, FILES):
            shutil.rmtree(root, ignore_errors=True)  # also what a process that was killed left
            asides = {one: root / one.relative_to(self._root) for one in some}
            try:
                self._download({one / name: aside / name for one, aside in asides.items() for name in names[one]})
                for directory, aside in asides.items():
                    with writing(directory):
                        directory.parent.mkdir(parents=True, exist_ok=True)
                        aside.rename(directory)
            finally:
                shutil.rmtree(root, ignore_errors=True)

    @contextlib.contextmanager
    def pulling(self) -> Iterator[None]:
        """One process of this machine at a time."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def keep_newest(self, parent: Path, marker: str, keep: int) -> None:
        """Remove the numbered directories in `parent` that are older than the newest `keep` complete ones."""
        names = self.sizes(parent)
        kept = sorted(complete_in(names, marker))[-keep:]
        for name in sorted({name.split("/")[0] for name in names}):
            if (match := _NUMBERED.fullmatch(name)) and kept and int(match[1]) < kept[0]:
                self.remove(parent / name, marker)

    def remove(self, directory: Path, marker: str) -> None:
        """Remove a directory there, its marker first."""
        with self._told("remove from"):
            with contextlib.suppress(FileNotFoundError):  # one that was never complete
                self._files.rm_file(self._remote(directory / marker))
            self._files.rm(self._remote(directory), recursive=True)

    def discard(self, files: Iterable[Path]) -> None:
        """Remove files there."""
        if paths := [self._remote(file) for file in files]:
            with self._told("remove from"):
                self._files.rm(paths)

    def _remember(self, file: Path, stamp: tuple[int, int]) -> None:
        if not _NUMBERED.search(file.relative_to(self._root).as_posix()):
            self._stamps[file] = stamp

    def _remote(self, path: Path) -> str:
        return posixpath.normpath(posixpath.join(self._there, path.relative_to(self._root).as_posix()))

    def _upload(self, files: Collection[Path]) -> None:
        with self._told("write"):
            if not isinstance(self._files, LocalFileSystem):
                self._files.put([str(file) for file in files], [self._remote(file) for file in files])
                return
            for file in files:
                self._write(self._remote(file), lambda path, file=file: self._files.put_file(str(file), path))

    def _download(self, targets: Mapping[Path, Path]) -> None:
        """Files, each to its target, whose directories are made."""
        for target in targets.values():
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
        with self._told("read"):
            self._files.get([self._remote(file) for file in targets], [str(target) for target in targets.values()])

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


def complete_in(names: Iterable[str], marker: str) -> dict[int, str]:
    """Of a listing's names the numbered directories (`step-000012`, `v000012`) that hold `marker`, by their number."""
    found = {parts[0]: _NUMBERED.fullmatch(parts[0]) for n in names if (parts := n.split("/"))[1:] == [marker]}
    return {int(match[1]): name for name, match in found.items() if match}


def below(sizes: Mapping[str, int], directory: str) -> dict[str, int]:
    """Of a listing what is in `directory`, by the path relative to it."""
    return {name.removeprefix(f"{directory}/"): n for name, n in sizes.items() if name.startswith(f"{directory}/")}


def batches(weights: Mapping[Path, int], most: int) -> Iterator[list[Path]]:
    """Paths in their order, at most `FILES` at a time, which weigh at most `most` together where one alone does not."""
    some, weight = list[Path](), 0
    for path, own in weights.items():
        if some and (len(some) == FILES or weight + own > most):
            yield some
            some, weight = [], 0
        some.append(path)
        weight += own
    if some:
        yield some


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
