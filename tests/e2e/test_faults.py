"""`kill -9` of each kind of process in the middle of a run of three methods that serves users: what heals by itself.

`make test-faults` runs them. With PLUMBLINE_FAULTS=FILE it adds a row for each to that file: how it went on, seconds
until all three methods had made two more steps, and until a user's question was answered.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from cli.guard import of_ray
from plumbline.runs.parts import Parts, Rejected
from tests.clusters import another_ray
from tests.endpoints import KEY, TURN, client, free_port
from tests.runs import (
    LIMIT_S,
    assert_each_prompt_once,
    events,
    finish,
    kill,
    leftovers,
    plumbline,
    start,
    tell,
    wait_for,
)
from tests.tiny import make_tiny_embedder, tiny_config, write_config

pytest.importorskip("vllm")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

NAMES = ("ple", "dlma", "self_contrast")
BATCH, PROMPTS = 8, 64
PRINTED = "printed.txt"
STEPS = 2000  # more than there is time for: the run is interrupted once all were killed

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


@dataclass
class Run:
    """Three methods beside an endpoint, in `directory`; `process` is the one that runs them now."""

    directory: Path
    port: int
    process: subprocess.Popen[str]

    def steps(self) -> dict[str, int]:
        return {name: len([e for e in events(self.directory, name) if "step" in e]) for name in NAMES}

    def wait_for_steps(self, wanted: dict[str, int]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while any(self.steps()[name] < count for name, count in wanted.items()):
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, (self.steps(), wanted)
            time.sleep(0.2)

    def seconds_until_all_step(self, since: float) -> float:
        """From `since` until each method has made two more steps: the first may have been under way."""
        self.wait_for_steps({name: count + 2 for name, count in self.steps().items()})
        return time.monotonic() - since

    def seconds_until_answered(self, since: float) -> float:
        """From `since` until a user's question is answered."""
        talker = client(f"http://127.0.0.1:{self.port}")
        while time.monotonic() < since + LIMIT_S:
            assert self.process.poll() is None, self.printed()
            with contextlib.suppress(openai.OpenAIError):
                talker.chat.completions.create(model="base", messages=TURN, max_tokens=4)
                return time.monotonic() - since
            time.sleep(0.5)
        raise AssertionError("no answer in time")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(LIMIT_S) == 130, self.printed()

    def printed(self) -> str:
        """All that was printed since the beginning."""
        return (self.directory / PRINTED).read_text()

    def assert_whole(self) -> None:
        """Every step has its event once, in order; every prompt of every pass is in exactly one part, or rejected."""
        for name, count in self.steps().items():
            assert [e["step"] for e in events(self.directory, name) if "step" in e] == list(range(1, count + 1)), name
            room = self.directory / "run" / ("rollouts" if name == "ple" else "pairs") / name
            parts = Parts(str(room), read_only=True)
            rejected = Rejected(str(room / "rejected.parquet"), read_only=True).read_all()
            drawn = {(int(str(row["step"])), row["prompt_id"]) for row in parts.read_all()}
            refused = [(int(str(row["step"])), row["prompt_id"]) for row in rejected]
            assert len(refused) == len(set(refused)) and not drawn & set(refused), name
            passes = Counter(((step - 1) // (PROMPTS // BATCH), prompt) for step, prompt in [*drawn, *refused])
            assert set(passes.values()) == {1}, name
            assert len(passes) == len(parts.steps()) * BATCH, name
            assert set(range(1, count + 1)) <= set(parts.steps()), name


def begin(directory: Path, *command: str) -> subprocess.Popen[str]:
    """`plumbline COMMAND`, whose output goes to the file `PRINTED`."""
    with (directory / PRINTED).open("a") as printed:
        return plumbline(directory, *command, output=printed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory, port = tmp_path_factory.mktemp("faults"), free_port()
    config = tiny_config(directory, steps=STEPS, learner={"lr": 1e-3, "batch_size": 8, "max_failures": 100})
    make_tiny_embedder(directory / "embedder")
    (directory / "keys").write_text(KEY + "\n")
    config["embedder"] = {"path": str(directory / "embedder")}
    config["serve"] = {"enabled": True, "port": port, "api_keys": str(directory / "keys")}
    [ple] = config["pipelines"]
    common = {key: ple[key] for key in ("steps", "batch_size", "generation", "learner")}
    config["pipelines"] += [
        {"type": "dlma", **common},
        {"type": "self_contrast", "samples": 8, "keep": 0.5, "negatives": 2, **common},
    ]
    path = write_config(directory, config)
    one = Run(directory, port, begin(directory, "run", str(path), "--run-dir", str(directory / "run")))
    try:
        one.wait_for_steps(dict.fromkeys(NAMES, 2))
        yield one
    finally:
        one.process.kill()
        leftovers(directory)


@pytest.mark.parametrize("what", KILLED)
def test_it_heals_by_itself(run: Run, what: str) -> None:
    assert kill(run.directory, KILLED[what]) >= 1
    killed = time.monotonic()
    answered = run.seconds_until_answered(killed)
    stepped = run.seconds_until_all_step(killed)
    tell(what, f"heals by itself | {stepped:.0f} | {answered:.0f}")


def test_after_all_that_nothing_is_lost_and_nothing_twice(run: Run) -> None:
    run.interrupt()
    assert "infinite retries" not in run.printed() and "Traceback" not in run.printed()
    run.assert_whole()
    assert leftovers(run.directory) == []


def test_a_killed_run_is_resumed_with_one_command(run: Run) -> None:
    run.process = begin(run.directory, "resume", str(run.directory / "run"))
    run.wait_for_steps({name: count + 1 for name, count in run.steps().items()})
    run.process.kill()
    killed = time.monotonic()
    run.process.wait()
    assert leftovers(run.directory) == []
    assert run.printed().endswith(f"plumbline: continue with: plumbline resume {run.directory / 'run'}\n")
    gone, began = time.monotonic() - killed, time.monotonic()
    run.process = begin(run.directory, "resume", str(run.directory / "run"))
    stepped = run.seconds_until_all_step(began)
    tell("driver", f"`plumbline resume`; the last of its processes was gone after {gone:.0f} s | {stepped:.0f} | |")
    run.interrupt()
    run.assert_whole()
    assert leftovers(run.directory) == []


@pytest.mark.parametrize("what", ["raylet", "gcs_server"])
def test_a_run_whose_ray_died_is_resumed_with_one_command(run: Run, what: str) -> None:
    if run.process.poll() is not None:
        run.process = begin(run.directory, "resume", str(run.directory / "run"))
    run.wait_for_steps({name: count + 1 for name, count in run.steps().items()})
    [process] = [one for one in of_ray(run.process.pid) if os.path.basename(one[1][0]) == what]
    process[0].kill()
    killed = time.monotonic()
    assert run.process.wait(LIMIT_S) == 1, run.printed()
    ended = time.monotonic() - killed
    assert run.printed().endswith(
        f"plumbline: Ray's {what} died, and the run with it\nplumbline: all steps that are done are saved\n"
        f"plumbline: continue with: plumbline resume {run.directory / 'run'}\n"
    )
    assert leftovers(run.directory) == []
    began = time.monotonic()
    run.process = begin(run.directory, "resume", str(run.directory / "run"))
    stepped = run.seconds_until_all_step(began)
    tell(what, f"the run ends after {ended:.0f} s; `plumbline resume` | {stepped:.0f} | |")
    run.interrupt()
    run.assert_whole()


def test_another_ray_of_this_machine_leaves_a_run_alone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=24)
    config["pipelines"][0]["learner"]["max_failures"] = 0
    process = start(tmp_path, config)
    wait_for(tmp_path, process, steps=2)
    with another_ray():
        code, out, err = finish(process)
    assert code == 0, err
    assert "goes on from its newest checkpoint" not in out
    assert leftovers(tmp_path) == []


def test_three_runs_at_once_one_of_them_resumed(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b", "c")]
    configs = []
    for place in places:
        place.mkdir()
        config = tiny_config(place)
        config["fleet"] = {"engine": "transformers"}
        configs.append(config)
    first = start(places[0], configs[0])
    wait_for(places[0], first, steps=2)
    first.send_signal(signal.SIGINT)
    assert finish(first)[0] == 130
    together = [start(place, config) for place, config in zip(places, configs, strict=True)]
    for place, process in zip(places, together, strict=True):
        code, _, err = finish(process)
        assert code == 0, err
        assert_each_prompt_once(place)
        assert leftovers(place) == []


def test_a_directory_is_one_runs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config["fleet"] = {"engine": "transformers"}
    process = start(tmp_path, config)
    wait_for(tmp_path, process, steps=1)
    code, _, err = finish(start(tmp_path, config))
    assert code == 2
    assert re.fullmatch(
        rf"plumbline: {tmp_path}/run: process {process.pid} on .+ runs there; wait for it, or .+--run-dir\n", err
    )
    assert finish(process)[0] == 0
