"""What is said, and swept, after a run whose own process was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cli.guard import first_gone, rays_own, sweep

ROOT = Path(__file__).resolve().parents[3]


def guarded(ending: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process that is watched over, starts what Ray would, and ends by `ending`."""
    code = f"""
import os, signal, subprocess, sys, time, types
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from cli.guard import run_guard
session = f"--session=/tmp/ray/session_2026-11-27_05-30-00_123456_{{os.getpid()}}/logs"
sleep = ["-c", "import time; time.sleep(60)", session]
names = ["gcs_server", "raylet", "worker"]
gcs, raylet, left = [subprocess.Popen([f"/ray/{{name}}", *sleep], executable=sys.executable) for name in names]
print(left.pid, flush=True)
stopped = False
sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: not stopped)
try:
    with run_guard(Path("runs/a")):
        {ending}
finally:
    for one in (gcs, raylet, left):
        one.kill()
"""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "ending", ["pass", "raise SystemExit(1)", "time.sleep(2); stopped = True; raylet.kill(); gcs.kill(); time.sleep(3)"]
)
def test_nothing_is_said_of_a_run_that_ended_itself(tmp_path: Path, ending: str) -> None:
    """Its Ray ends before it does."""
    ended = guarded(ending, tmp_path)
    assert ended.stderr == ""
    assert ended.returncode == ("SystemExit" in ending)


KILLED = "the run was killed, or Ray under it"


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, KILLED),
        ("time.sleep(2); raylet.kill(); time.sleep(60)", 1, "Ray's raylet died, and the run with it"),
        ("time.sleep(2); gcs.kill(); time.sleep(60)", 1, "Ray's gcs_server died, and the run with it"),
    ],
)
def test_a_killed_run_is_told_how_to_go_on_and_leaves_no_process(
    tmp_path: Path, ending: str, code: int, said: str
) -> None:
    (tmp_path / "cli").mkdir()  # a user's own package of our name
    (tmp_path / "cli" / "__init__.py").write_text("raise RuntimeError")
    ended = guarded(ending, tmp_path)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr == (
        f"plumbline: {said}\n"
        "plumbline: all steps that are done are saved\n"
        "plumbline: continue with: plumbline resume runs/a\n"
    )
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(ended.stdout)) and psutil.Process(int(ended.stdout)).status() != "zombie":
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.1)


def test_the_process_of_rays_own_that_ended_first_is_named() -> None:
    driver = 4_000_000 + os.getpid()  # nobody's
    session = f"--session=/tmp/ray/session_2026-01-01_00-00-00_000000_{driver}"
    sleep = ["-c", "import time; time.sleep(60)", session]
    there = [subprocess.Popen([f"/ray/{name}", *sleep], executable=sys.executable) for name in ("gcs_server", "raylet")]
    try:
        own = rays_own(driver)
        assert list(own) == ["gcs_server", "raylet"] and first_gone(own) == ""
        there[1].kill()
        while not (gone := first_gone(own)):
            time.sleep(0.01)
        assert gone == "raylet" and rays_own(driver) == {}
        sweep(driver)
        assert [process.wait(10) for process in there] == [-signal.SIGKILL] * 2
        assert first_gone({}) == ""
    finally:
        for process in there:
            process.kill()
