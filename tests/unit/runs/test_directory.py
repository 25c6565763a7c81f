"""A run directory is one process's at a time, and whoever comes second is told which."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from plumbline.config.file import parse_config
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.runs.directory import RUN_LOCK, check_run_dir, is_running, open_run_dir
from tests.tiny import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(tiny_config(tmp_path), origin="test")


def test_a_second_run_is_told_who_is_there(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_run_dir(config, run_dir):
        with pytest.raises(ConfigError) as told, open_run_dir(config, run_dir):
            pass
        assert str(told.value) == (
            f"{run_dir}: process {os.getpid()} on {socket.gethostname()} runs there; "
            "wait for it, or name another with --run-dir"
        )
    with open_run_dir(config, run_dir):  # it has ended
        pass


def test_a_killed_process_holds_nothing(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_run_dir(config, run_dir):
        pass
    code = (
        f"import fcntl, os; f = open({str(run_dir / '.run.lock')!r}, 'a'); fcntl.flock(f, 2); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    with open_run_dir(config, run_dir):
        pass


def test_a_directory_in_which_nothing_but_the_lock_was_made_is_new(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".run.lock").touch()
    check_run_dir(config, run_dir)


def test_whether_a_run_goes_on_is_told_without_its_lock(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert not is_running(run_dir)
    with open_run_dir(config, run_dir):
        assert is_running(run_dir)
    lock, host = run_dir / RUN_LOCK, socket.gethostname()
    os.utime(lock, (1, 1))  # this process is younger: the one that wrote it had its number
    assert not is_running(run_dir)
    for told in (
        "",
        f"process {os.getpid()} on another.{host}",
        f"process {2**22 + 1} on {host}",
        f"process {10**30} on {host}",
    ):
        lock.write_text(told)
        assert not is_running(run_dir), told


def test_a_commit_that_is_not_given_is_the_runs_and_another_one_is_refused(config: Config, tmp_path: Path) -> None:
    model = config.model.model_copy(update={"path": "org/model"})
    given, begun, other = (
        config.model_copy(update={"model": model, "commits": commits})
        for commits in ({}, {"org/model": "a" * 40}, {"org/model": "b" * 40})
    )
    with open_run_dir(begun, tmp_path / "run"):
        pass
    check_run_dir(given, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"`commits\.org/model` is 'a{40}' there, 'b{40}' here"):
        check_run_dir(other, tmp_path / "run")
