"""A run's directory: opened for a new run, or for the one that it holds."""

import fcntl
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from plumbline.config.file import dump_config, load_config
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.runs.storage import ASIDE, LOCK

RUN_LOCK = ".run.lock"
"""Held by the process that runs there, and says which that is."""
LEARNERS = {"checkpoints", "policies", "rollouts", LOCK, ASIDE, RUN_LOCK}
"""All that the directory holds on a machine where only a learner of the run has worked, or that was just made."""


def check_run_dir(config: Config, run_dir: Path) -> None:
    """Whether `config` may run there: in a new or empty directory, or in the one of the same run.

    Raises:
        ConfigError: it holds another config, or something else.
    """
    kept = run_dir / "config.yaml"
    if kept.exists():
        resumes = f"`plumbline resume {run_dir}` continues it as it was"
        check_same(load_config(kept), config, str(run_dir), f"{resumes}, `--run-dir DIR` or another `name` starts anew")
    elif run_dir.exists() and not (run_dir.is_dir() and all(child.name in LEARNERS for child in run_dir.iterdir())):
        raise ConfigError(f"{run_dir}: exists and is no run directory; name another with --run-dir")
    elif file := next((parent for parent in run_dir.absolute().parents if parent.is_file()), None):
        raise ConfigError(f"{run_dir}: {file} is a file, no directory; name another with --run-dir")


@contextmanager
def open_run_dir(config: Config, run_dir: Path) -> Iterator[None]:
    """Make the directory and keep the config in it, for a run that `check_run_dir` let pass; it has it to itself.

    Raises:
        ConfigError: it cannot be written, or another process runs there.
    """
    kept = run_dir / "config.yaml"
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((run_dir / RUN_LOCK).open("a+", encoding="utf-8"))
            _take(lock, run_dir)
            if not kept.exists():
                aside = run_dir / f".config.{os.getpid()}"
                aside.write_text(dump_config(config), encoding="utf-8")
                aside.replace(kept)
        except OSError as error:
            raise ConfigError(f"{run_dir}: cannot be written ({error.strerror}); name another with --run-dir") from None
        yield


def _take(lock: TextIO, run_dir: Path) -> None:
    """Lock an open file until it is closed, which the end of a process does, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ConfigError(
            f"{run_dir}: {lock.read() or 'another process'} runs there; wait for it, or name another with --run-dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def is_running(run_dir: Path) -> bool:
    """Whether the process that the lock names is there, on this machine. The lock itself is not tried: a run that
    starts just then would find it taken."""
    try:
        told = re.fullmatch(r"process (\d+) on (.+)", (run_dir / RUN_LOCK).read_text("utf-8", errors="replace"))
        locked = (run_dir / RUN_LOCK).stat().st_mtime
        if told is None or told[2] != socket.gethostname():
            return False
        process = psutil.Process(int(told[1]))
        return process.create_time() <= locked and process.status() != psutil.STATUS_ZOMBIE  # numbers are used again
    except (OSError, OverflowError, psutil.Error):
        return False


def check_same(there: Config, here: Config, where: str, remedy: str) -> None:
    """Raises ConfigError: `where` holds another config, of which one difference is named. Commits that `here` does not
    give yet are those of `there`."""
    here = here.model_copy(update={"commits": there.commits | here.commits})
    if there != here:
        raise ConfigError(f"{where}: holds another config ({_first_difference(there, here)}); {remedy}")


def _first_difference(there: Config, here: Config) -> str:
    """The first key whose values differ, with both."""
    before, after = (dict(leaves(config.model_dump(mode="json"))) for config in (there, here))
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            return f"`{key}` is {before.get(key)!r} there, {after.get(key)!r} here"
    raise AssertionError("equal configs")


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    if not isinstance(node, Mapping | list) or not node:
        yield key, node
        return
    for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        yield from leaves(value, f"{key}.{name}" if key else str(name))
