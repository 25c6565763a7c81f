"""cluster.yaml through `ray up`, with its provider swapped for Ray's local one: head and worker start, a run ends.

There is no other machine here, so `ssh` and `rsync` are two small programs that do on this one what they are asked to
do on the other. All else is Ray's own: how it reads the config, its commands, its autoscaler, which starts the worker.
"""

import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters import PATIENCE_S, ROOT, Head, free_ports, own_environment
from tests.runs import assert_each_prompt_once
from tests.tiny import tiny_config, write_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

SSH = """#!/usr/bin/env python3
import os, sys
rest = sys.argv[1:]
while rest and rest[0].startswith("-"):  # an option, and its value where it has one
    rest = rest[2:] if rest[0] in ("-o", "-i", "-L", "-p") else rest[1:]
os.execvp("bash", ["bash", "-c", " ".join(rest[1:])])
"""
RSYNC = """#!/usr/bin/env python3
import os, shutil, sys
source, target = sys.argv[-2:]
target = os.path.expanduser(target.partition(":")[2])
os.makedirs(os.path.dirname(target.rstrip("/")), exist_ok=True)
copy = shutil.copytree if os.path.isdir(source) else shutil.copy
copy(source, target, **({"dirs_exist_ok": True} if os.path.isdir(source) else {}))
"""
WORKER = "127.0.0.2"


def swapped(ports: list[int], temporary: str, name: str) -> dict[str, Any]:
    """cluster.yaml for this machine: another provider, no containers, and what AWS's node types said as options."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for key in ("available_node_types", "head_node_type", "docker"):
        del config[key]
    head = socket.gethostbyname(socket.gethostname())
    config |= {
        "cluster_name": name,
        "provider": {"type": "local", "head_ip": head, "worker_ips": [WORKER]},
        "file_mounts": {},  # the token is in the environment
        "initialization_commands": [],
        "max_workers": 1,
    }
    options = {
        "head": f"--num-cpus=0 --resources='{{\"head\": 1}}' --temp-dir={temporary} --dashboard-port={ports[2]} "
        f"--dashboard-agent-listen-port={ports[3]} --ray-client-server-port={ports[4]}",
        "worker": f'--num-cpus=4 --resources=\'{{"generator": 1, "learner": 1}}\' --temp-dir={temporary}/second '
        f"--node-ip-address={WORKER} --dashboard-agent-listen-port={ports[5]}",
    }
    for i, kind in enumerate(options):
        command = config[f"{kind}_start_ray_commands"][-1]  # without `ray stop`, which would end every Ray here
        command = command.replace("6379", str(ports[0])).replace("8076", str(ports[6 + i]))
        # Ray's newer autoscaler takes the head for the one node of the provider's one type that there should be.
        older = command.replace("ray start", "RAY_enable_autoscaler_v2=0 ray start")
        config[f"{kind}_start_ray_commands"] = [f"{older} {options[kind]}"]
    return config


@pytest.fixture
def head() -> Iterator[Head]:
    ports, name = free_ports(8), f"plumbline-{uuid.uuid4().hex[:8]}"
    with own_environment() as environment:
        temporary = Path(environment["RAY_TMPDIR"])
        (temporary / "bin").mkdir()
        for program, text in (("ssh", SSH), ("rsync", RSYNC)):
            (temporary / "bin" / program).write_text(text)
            (temporary / "bin" / program).chmod(0o755)
        environment |= {"PATH": f"{temporary}/bin:{environment['PATH']}", "HOME": str(temporary)}
        for profile in (".bashrc", ".bash_profile"):  # Ray runs commands in login shells, which begin with a PATH anew
            (temporary / profile).write_text(f"export PATH={environment['PATH']}\n")
        path = temporary / "cluster.yaml"
        path.write_text(yaml.safe_dump(swapped(ports, str(temporary), name)))
        command = ["ray", "up", "--yes", "--no-config-cache", str(path)]
        with (temporary / "up.log").open("w") as log:
            starting = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        one = Head(address=f"http://127.0.0.1:{ports[2]}", environment=environment)
        one.wait(starting, temporary / "up.log")
        assert starting.wait(timeout=PATIENCE_S) == 0, (temporary / "up.log").read_text()
        yield one


def test_ray_up_starts_a_cluster_that_runs_a_job(head: Head, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, learner={"lr": 1e-3, "batch_size": 8, "resources": {"learner": 1}})
    config["fleet"] = {"engine": "transformers", "generator": {"resources": {"generator": 1}}}
    path = write_config(tmp_path, config)
    job = head.job("submit", "--", "plumbline", "run", str(path), "--run-dir", str(tmp_path / "run"))
    streamed, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, streamed
    assert "ple 8/8" in streamed and "done in" in streamed
    assert_each_prompt_once(tmp_path)
