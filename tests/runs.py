"""Runs through the command line, from outside: started, waited for, killed in part, and what they left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil

from plumbline.runs.parts import Parts, Rejected
from tests.tiny import write_config

LIMIT_S = 400
MARK = "PLUMBLINE_TEST_RUN"
"""An environment variable by which a run's processes are told from those of other runs on this machine."""


def start(directory: Path, config: dict[str, Any], ray_address: str | None = None) -> subprocess.Popen[str]:
    """Run a config in `directory`, on a Ray of its own or on the cluster at `ray_address`."""
    path = write_config(directory, config)
    return plumbline(directory, "run", str(path), "--run-dir", str(directory / "run"), ray_address=ray_address)


def plumbline(
    directory: Path, *command: str, ray_address: str | None = None, output: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """`plumbline COMMAND` in `directory`, whose processes bear its mark.

    Args:
        output: where all that it prints goes: of a long run there is more than a pipe holds.
    """
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: str(directory)}
    if ray_address:
        environment["RAY_ADDRESS"] = ray_address
    arguments = [sys.executable, "-m", "cli", *command]
    return subprocess.Popen(arguments, cwd=directory, env=environment, text=True, stdout=output, stderr=output)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def events(directory: Path, pipeline: str = "ple") -> list[dict[str, Any]]:
    path = directory / "run" / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["pipeline"] == pipeline]


def wait_for(directory: Path, process: subprocess.Popen[str], steps: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(events(directory)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.1)


def processes(directory: Path) -> dict[psutil.Process, str]:
    """Processes of Ray and of engines that the run in `directory` started, and what they are called."""
    found = {}
    for p in psutil.process_iter():
        try:
            mine = p.environ().get(MARK) == str(directory) and p.status() != psutil.STATUS_ZOMBIE
            title = p.cmdline()[0]
            if mine and any(word in title for word in ("ray::", "raylet", "EngineCore")):
                found[p] = title
        except (psutil.Error, IndexError):
            continue
    return found


def titled(directory: Path, title: str) -> list[psutil.Process]:
    """The run's processes with this title."""
    return [p for p, called in processes(directory).items() if title in called]


def kill(directory: Path, title: str) -> int:
    """`kill -9` the run's processes with this title; returns how many there were."""
    chosen = titled(directory, title)
    for p in chosen:
        p.kill()
    return len(chosen)


def leftovers(directory: Path, patience_s: float = 15) -> list[str]:
    """What of a run is still there a moment after its end."""
    deadline = time.monotonic() + patience_s
    while (found := processes(directory)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return list(found.values())


def assert_each_prompt_once(
    directory: Path, name: str = "ple", steps: int = 8, prompts: int = 64
) -> list[dict[str, Any]]:
    """Every step is done, in order, and every prompt is in one part or rejected, never in both or twice."""
    assert [e["step"] for e in events(directory, name)] == list(range(1, steps + 1))
    rollouts = directory / "run" / "rollouts" / name
    parts = Parts(str(rollouts), read_only=True)
    assert parts.steps() == list(range(1, steps + 1))
    rows = parts.read_all()
    rejected = Rejected(str(rollouts / "rejected.parquet"), read_only=True).read_all()
    seen = [str(r["prompt_id"]) for r in [*rows, *rejected]]
    assert sorted(seen) == sorted(f"p{i}" for i in range(prompts))
    return rows


def tell(what: str, text: str) -> None:
    """A row of the table of faults, in the file that PLUMBLINE_FAULTS names."""
    with open(os.environ.get("PLUMBLINE_FAULTS", os.devnull), "a", encoding="utf-8") as table:
        table.write(f"| {what} | {text} |\n")
