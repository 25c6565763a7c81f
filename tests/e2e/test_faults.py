"""`kill -9` of each kind of process in the middle of a run of three methods that serves users: what heals by itself.

`make test-faults` runs them, and prints a line for each: how it went on, and how many seconds later all three methods
had made another step.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from plumbline.runs.parts import Parts, Rejected
from tests.endpoints import KEY, TURN, client, free_port
from tests.runs import LIMIT_S, MARK, events, finish, kill, leftovers, start
from tests.tiny import make_tiny_embedder, tiny_config

pytest.importorskip("vllm")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

NAMES = ("ple", "dlma", "self_contrast")
STEPS = 12
PROMPTS = 64

KILLED = {
    "generator actor": "ray::Generator",
    "engine core": "EngineCore",
    "scorer": "ray::Scorer",
    "reference": "ray::Reference",
    "embedder": "ray::Embedder",
    "learner worker": "RayTrainWorker",
    "train controller": "ray::TrainController",
    "trainer": "ray::Trainer",
    "channel": "ray::Channel",
    "store": "ray::PolicyStore",
    "serve replica": "ray::ServeReplica",
    "proxy": "ray::ProxyActor",
}


def three_methods(directory: Path) -> tuple[dict[str, Any], int]:
    """A config of all three methods beside an endpoint, and its port."""
    config = tiny_config(directory, steps=STEPS)
    make_tiny_embedder(directory / "embedder")
    (directory / "keys").write_text(KEY + "\n")
    port = free_port()
    config["embedder"] = {"path": str(directory / "embedder")}
    config["serve"] = {"enabled": True, "port": port, "api_keys": str(directory / "keys")}
    common = {
        "steps": STEPS,
        "batch_size": 8,
        "generation": {"max_tokens": 16},
        "learner": config["pipelines"][0]["learner"],
    }
    config["pipelines"] += [
        {"type": "dlma", **common},
        {"type": "self_contrast", "samples": 8, "keep": 0.5, "negatives": 2, **common},
    ]
    return config, port


def steps(directory: Path) -> dict[str, int]:
    return {name: len([e for e in events(directory, name) if "step" in e]) for name in NAMES}


def wait_for_steps(directory: Path, process: subprocess.Popen[str], wanted: dict[str, int]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while any(steps(directory)[name] < count for name, count in wanted.items()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, (steps(directory), wanted)
        time.sleep(0.2)


def assert_whole(directory: Path) -> None:
    """Every prompt of every pass is in exactly one part, or rejected; every step has its event, once and in order."""
    for name in NAMES:
        assert [e["step"] for e in events(directory, name) if "step" in e] == list(range(1, STEPS + 1)), name
        room = directory / "run" / ("rollouts" if name == "ple" else "pairs") / name
        rows = Parts(str(room), read_only=True).read_all()
        rejected = Rejected(str(room / "rejected.parquet"), read_only=True).rows()
        drawn = {(row["step"], row["prompt_id"]) for row in rows}
        refused = {(row["step"], row["prompt_id"]) for row in rejected}
        assert not drawn & refused, name
        assert len(drawn | refused) == STEPS * 8, name
        assert len(refused) == len(rejected), name


def ask(port: int) -> str:
    answer = client(f"http://127.0.0.1:{port}").chat.completions.create(model="base", messages=TURN, max_tokens=4)
    return answer.choices[0].message.content or ""


def served_again(port: int, process: subprocess.Popen[str]) -> float:
    """Seconds until a question is answered."""
    began = time.monotonic()
    while time.monotonic() < began + LIMIT_S:
        assert process.poll() is None, process.communicate()
        try:
            ask(port)
            return time.monotonic() - began
        except Exception:  # whatever a client makes of it
            time.sleep(0.5)
    raise AssertionError("no answer in time")


def tell(what: str, text: str) -> None:
    """A line of the table, which pytest would keep to itself."""
    with open(os.environ.get("PLUMBLINE_FAULTS", os.devnull), "a", encoding="utf-8") as table:
        table.write(f"| {what} | {text} |\n")


@pytest.mark.parametrize("what", KILLED)
def test_it_heals_by_itself(tmp_path: Path, what: str) -> None:
    config, port = three_methods(tmp_path)
    process = start(tmp_path, config)
    try:
        wait_for_steps(tmp_path, process, dict.fromkeys(NAMES, 3))
        before = steps(tmp_path)
        assert kill(tmp_path, KILLED[what]) >= 1
        killed = time.monotonic()
        answered = served_again(port, process)
        wait_for_steps(tmp_path, process, {name: min(count + 1, STEPS) for name, count in before.items()})
        lost = time.monotonic() - killed
        code, out, err = finish(process)
    finally:
        process.kill()
    assert code == 0, err
    assert "infinite retries" not in out + err and "Traceback" not in out + err
    assert_whole(tmp_path)
    assert leftovers(tmp_path) == []
    tell(what, f"heals | {lost:.0f} s | {answered:.0f} s")


def test_the_driver_is_resumed_with_one_command(tmp_path: Path) -> None:
    config, _ = three_methods(tmp_path)
    process = start(tmp_path, config)
    wait_for_steps(tmp_path, process, dict.fromkeys(NAMES, 3))
    before = steps(tmp_path)
    process.kill()
    process.wait()
    killed = time.monotonic()
    assert leftovers(tmp_path) == []
    ended = time.monotonic() - killed
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: str(tmp_path)}
    command = [sys.executable, "-m", "cli", "resume", str(tmp_path / "run")]
    began = time.monotonic()
    again = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_steps(tmp_path, again, {name: min(count + 1, STEPS) for name, count in before.items()})
    lost = time.monotonic() - began
    code, _, err = finish(again)
    assert code == 0, err
    assert_whole(tmp_path)
    assert leftovers(tmp_path) == []
    tell("driver", f"`plumbline resume`; its processes were gone after {ended:.0f} s | {lost:.0f} s | after the run |")
