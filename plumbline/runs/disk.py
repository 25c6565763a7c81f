"""Writing what a run keeps: whole or not at all, and in one line where the disk is full or may not be written."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from plumbline.errors import DiskError

DISK = {
    errno.ENOSPC: "there is no room left on it",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "files may not become that large there",
    errno.EROFS: "it is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
    errno.EIO: "the disk has failed",
    errno.EISDIR: "a directory has its name",
    errno.ESTALE: "the share that it is on has gone away",
}
"""What of a write is the disk's fault, and how it is said."""


@contextlib.contextmanager
def writing(path: Path | str, then: str = "; all steps that are done are saved") -> Iterator[None]:
    """Around a write to `path`, or around work in a directory; `then` is what the message says at its end.

    Raises:
        DiskError: the disk did not take it.
    """
    try:
        yield
    except Exception as error:
        number = disk_fault(error)
        if number is None:
            raise
        names = [getattr(error, name, None) for name in ("filename2", "filename")]  # of a rename, first where to
        place = next(filter(None, names), path) if Path(path).is_dir() else path
        raise DiskError(f"{place}: cannot be written: {DISK[number]} ({os.strerror(number)}){then}") from error


def disk_fault(error: BaseException) -> int | None:
    """The number of the disk's fault behind an error; None where it is another. The libraries in Rust raise errors of
    their own, in whose text it stands."""
    number = getattr(error, "errno", None)
    if number is None and type(error).__name__ == "SafetensorError":
        return told_fault(str(error))
    return number if number in DISK else None


def told_fault(text: str) -> int | None:
    """The number of the disk's fault that an error's text tells of, such as another process's."""
    said = re.search(r"(?:\[Errno|os error) (\d+)", text)
    return int(said[1]) if said and int(said[1]) in DISK else None


def user_cache() -> Path:
    """Where a user's programs keep what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plumbline"


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it. Raises DiskError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_together(directory: Path, files: Mapping[str, str]) -> None:
    """Make a directory with these files, all or none of them. Raises DiskError."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    with writing(directory):
        try:
            aside.mkdir(parents=True)
            for name, text in files.items():
                (aside / name).write_text(text, encoding="utf-8")
            aside.replace(directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Add a line in append mode: it is there whole or not at all, whoever else adds some. Raises DiskError."""
    content = f"{line}\n".encode()
    with writing(path), path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            if file.seek(0, os.SEEK_END) == start + written:
                file.truncate(start)
            raise
        if sync:
            os.fsync(file.fileno())
