"""`ray job submit` to a running cluster: stopped as by Ctrl-C, resumed by a second job, with and without waiting."""

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.clusters import PATIENCE_S, ROOT, Head, free_ports, own_environment
from tests.runs import assert_each_prompt_once, events
from tests.tiny import tiny_config, write_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


def start_node(kind: str, ports: dict[str, int], environment: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    """A node, by the last of cluster.yaml's commands for its kind, with other ports and without the autoscaler.

    The commands before it, `ray stop`, would end every Ray of this machine.
    """
    command = yaml.safe_load((ROOT / "cluster.yaml").read_text())[f"{kind}_start_ray_commands"][-1]
    command = command.replace("6379", str(ports["port"])).replace("8076", str(ports[f"{kind}-objects"]))
    command = re.sub(r"--autoscaling-config=\S+", "", command)
    with (Path(environment["RAY_TMPDIR"]) / f"{kind}.log").open("w") as log:
        arguments = ["bash", "-c", " ".join([command, "--block", "--node-ip-address=127.0.0.1", *options])]
        return subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head and a worker, started as cluster.yaml says."""
    names = ["port", "head-objects", "worker-objects", "dashboard", "agent", "client", "metrics"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    of_head = ["--num-cpus=0", """--resources='{"head": 1}'""", f"--metrics-export-port={ports['metrics']}"]
    of_head += [f"--dashboard-port={ports['dashboard']}", f"--dashboard-agent-listen-port={ports['agent']}"]
    of_head += [f"--ray-client-server-port={ports['client']}"]
    with own_environment() as environment:
        temporary = environment["RAY_TMPDIR"]
        starting = start_node("head", ports, environment, f"--temp-dir={temporary}", *of_head)
        one = Head(address=f"http://127.0.0.1:{ports['dashboard']}", environment=environment)
        one.wait(starting, Path(temporary) / "head.log")
        # With files of its own, as on a machine of its own: the agents of two nodes would share the copies of a job's.
        of_worker = [
            "--num-cpus=4",
            """--resources='{"generator": 1, "learner": 1}'""",
            f"--temp-dir={temporary}/second",
        ]
        start_node("worker", ports, environment | {"RAY_HEAD_IP": "127.0.0.1"}, *of_worker)
        yield one


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
    [job] = set(re.findall(r"raysubmit_\w+", told))
    log = head.log_once(job, "succeeded")
    assert "done in" in log
    assert_each_prompt_once(tmp_path)
    assert all(p.stat().st_mtime_ns == then for p, then in before.items()), "a part was written twice"


def test_the_doctor_of_a_job_names_the_rule_that_left_a_module_out(head: Head, project: Path) -> None:
    (project / "build").mkdir()
    (project / "build/judge.py").write_text(
        "def score(requests):\n    return [float(len(r.response)) for r in requests]\n"
    )
    reward = ["--set", "reward={type: program, function: 'build.judge:score'}"]
    command = ["--working-dir", str(project), "--", "plumbline", "doctor", "config.yaml", *reward]

    (project / ".gitignore").write_text("*.log\nbuild/\n")
    told, _ = head.job("submit", *command).communicate(timeout=PATIENCE_S)
    assert "No module named 'build'" in told
    assert ".gitignore, line 2, 'build/', left it out of this job: write a rule that begins with /" in told
    assert "Traceback" not in told

    (project / ".gitignore").write_text("*.log\n/dist/\n")
    told, _ = head.job("submit", *command).communicate(timeout=PATIENCE_S)
    assert "build.judge:score" in told
    assert "No module" not in told


def test_a_job_without_the_token_is_refused(head: Head, project: Path) -> None:
    stranger = head.job("submit", "--working-dir", str(project), "--", "true", RAY_AUTH_TOKEN=secrets.token_hex(16))
    told, _ = stranger.communicate(timeout=PATIENCE_S)
    assert stranger.returncode != 0
    assert re.search("401|403|[Aa]uthenticat", told), told
