"""What a job sees of the directory that it was submitted with: Ray's copy, without what two files there name."""

import os
from pathlib import Path

from pathspec import PathSpec

IGNORE_FILES = (".gitignore", ".rayignore")
"""Those of the directory itself; Ray reads none of its subdirectories'."""


def is_job() -> bool:
    """Whether this process is the entrypoint of a submitted job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def left_out(name: str | Path) -> str:
    """In a job, by which rule its working directory's copy lacks a path; empty where none did, or this is no job.

    Args:
        name: of a file or a directory in it, such as ``rewards/build.py``.

    Returns:
        the end of a sentence, with a separator before it.
    """
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    if not is_job() or path.is_absolute() or ".." in path.parts or path.exists():
        return ""
    for file in IGNORE_FILES:
        if rule := _rule(file, path):
            return (
                f"; {rule} left it out of this job: write a rule that begins with / where it means the top alone, "
                "or give an absolute path that all nodes see"
            )
    return ""


def left_out_module(name: str) -> str:
    """`left_out`, of a module, a file or a package, by its dotted name."""
    path = name.replace(".", "/")
    return left_out(f"{path}.py") or left_out(path)


def _rule(file: str, path: Path) -> str:
    """The last line that matches, as a path or as a directory's, unless it is one that takes in again."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError:
        return ""
    last = ""
    for number, line in enumerate(lines, start=1):
        names = line.strip().removeprefix("!")
        spec = PathSpec.from_lines("gitignore", [names])
        if names and (spec.match_file(path.as_posix()) or spec.match_file(f"{path.as_posix()}/__init__.py")):
            last = "" if line.strip().startswith("!") else f"{file}, line {number}, {line.strip()!r},"
    return last
