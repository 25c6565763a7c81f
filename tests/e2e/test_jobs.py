"""`ray job submit` to a running cluster: stopped as by Ctrl-C, resumed by a second job, with and without waiting."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.runs import MARK, assert_each_prompt_once, events
from tests.tiny import tiny_config, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE_S = 600
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    """A cluster with ports, a token and files of its own; `environment` reaches it."""

    address: str
    environment: dict[str, str]

    def job(self, verb: str, *arguments: str, **options: str) -> subprocess.Popen[str]:
        """`ray job VERB`, both outputs in one."""
        command = [str(BIN / "ray"), "job", verb, "--address", self.address, *arguments]
        return subprocess.Popen(
            command, env=self.environment | options, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def started(kind: str, ports: dict[str, int], temporary: str, options: list[str], environment: dict[str, str]) -> Any:
    """A node, by the last of cluster.yaml's commands for its kind, with other ports and without the autoscaler.

    The commands before it, `ray stop`, would end every Ray of this machine.
    """
    command = yaml.safe_load((ROOT / "cluster.yaml").read_text())[f"{kind}_start_ray_commands"][-1]
    command = command.replace("6379", str(ports["port"])).replace("8076", str(ports[f"{kind}-objects"]))
    command = re.sub(r"--autoscaling-config=\S+", "", command)
    with (Path(temporary) / f"{kind}.log").open("w") as log:
        arguments = ["bash", "-c", " ".join([command, "--block", "--node-ip-address=127.0.0.1", *options])]
        return subprocess.Popen(arguments, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head and a worker, started as cluster.yaml says, and everything that came of them gone at the end."""
    temporary = tempfile.mkdtemp(prefix="plumb", dir="/tmp")  # sockets in it must have short names
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = keep | {
        MARK: temporary,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # the image has `plumbline` in its path too
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_AUTH_MODE": "token",
        "RAY_HEAD_IP": "127.0.0.1",
        "RAY_TMPDIR": temporary,
    }
    names = ["port", "head-objects", "worker-objects", "dashboard", "agent", "client", "metrics"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    of_head = [f"--temp-dir={temporary}", "--num-cpus=0", """--resources='{"head": 1}'"""]
    of_head += [f"--dashboard-port={ports['dashboard']}", f"--dashboard-agent-listen-port={ports['agent']}"]
    of_head += [f"--ray-client-server-port={ports['client']}", f"--metrics-export-port={ports['metrics']}"]
    of_worker = ["--num-cpus=4", """--resources='{"generator": 1, "learner": 1}'"""]
    nodes = [started("head", ports, temporary, of_head, environment)]
    one = Head(address=f"http://127.0.0.1:{ports['dashboard']}", environment=environment)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while (listing := one.job("list")).wait() != 0:
            assert nodes[0].poll() is None, (Path(temporary) / "head.log").read_text()
            assert time.monotonic() < deadline, listing.communicate()
            time.sleep(1)
        nodes.append(started("worker", ports, temporary, of_worker, environment))
        yield one
    finally:
        for node in reversed(nodes):
            os.killpg(node.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(timeout=60)
        for left in of_cluster(temporary):
            left.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def of_cluster(mark: str) -> list[psutil.Process]:
    """All processes that the cluster started, and those that they did."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a user submits: a config with relative paths, its data and model; and what must stay behind."""
    directory = tmp_path / "project"
    directory.mkdir()
    config = tiny_config(directory, learner={"lr": 1e-3, "batch_size": 8, "resources": {"learner": 1}})
    config["model"]["path"], config["data"]["train"]["path"] = "model", "prompts.jsonl"
    config["fleet"] = {"engine": "transformers", "generator": {"resources": {"generator": 1}}}
    write_config(directory, config)
    shutil.copy(ROOT / ".rayignore", directory)
    for left_behind in (".venv", ".git", "runs"):
        (directory / left_behind).mkdir()
        (directory / left_behind / "large").write_bytes(os.urandom(2**20))
    return directory


def submitted(output: str) -> str:
    [job] = set(re.findall(r"raysubmit_\w+", output))
    return job


def wait_until(head: Head, job: str, ended: str) -> str:
    """The job's log once its status is `ended`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        told = head.job("status", job).communicate(timeout=PATIENCE_S)[0]
        if ended in told:
            return head.job("logs", job).communicate(timeout=PATIENCE_S)[0]
        assert not re.search("FAILED|SUCCEEDED|STOPPED", told), head.job("logs", job).communicate(timeout=60)[0]
        assert time.monotonic() < deadline, told
        time.sleep(1)


def test_a_job_is_stopped_and_resumed_by_another(head: Head, project: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["--working-dir", str(project), "--", "plumbline", "run", "config.yaml", "--run-dir", str(run_dir)]
    # A variable that Plumbline sets too, in the job's own environment: no conflict.
    job_environment = ["--runtime-env-json", '{"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}']
    first = head.job("submit", "--submission-id", "raysubmit_first", *job_environment, *command)
    deadline = time.monotonic() + PATIENCE_S
    while len(events(tmp_path)) < 3:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.1)
    copies = Path(head.environment["RAY_TMPDIR"]).glob("session_2*/**/working_dir_files/_ray_pkg_*/")
    copy = next(copies)
    assert {one.name for one in copy.iterdir()} >= {"config.yaml", "model", "prompts.jsonl"}
    assert not {".venv", ".git", "runs"} & {one.name for one in copy.iterdir()}

    assert head.job("stop", "raysubmit_first").wait(timeout=PATIENCE_S) == 0
    streamed, _ = first.communicate(timeout=PATIENCE_S)
    assert "ple 3/8" in streamed
    assert "plumbline: interrupted; all steps that are done are saved" in streamed
    assert f"continue with: plumbline resume {run_dir}" in streamed
    assert "Traceback" not in streamed
    done = len(events(tmp_path))
    assert 3 <= done < 8
    before = {p: p.stat().st_mtime_ns for p in (run_dir / "rollouts").rglob("step-*.parquet")}

    second = head.job("submit", "--no-wait", "--working-dir", str(project), "--", "plumbline", "resume", str(run_dir))
    told, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, told
    log = wait_until(head, submitted(told), "SUCCEEDED")
    assert "done in" in log
    assert_each_prompt_once(tmp_path)
    assert all(p.stat().st_mtime_ns == then for p, then in before.items()), "a part was written twice"


def test_a_job_without_the_token_is_refused(head: Head, project: Path) -> None:
    stranger = head.job("submit", "--working-dir", str(project), "--", "true", RAY_AUTH_TOKEN=secrets.token_hex(16))
    told, _ = stranger.communicate(timeout=PATIENCE_S)
    assert stranger.returncode != 0
    assert re.search("401|403|[Aa]uthenticat", told), told
