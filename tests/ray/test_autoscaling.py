"""Ray's own autoscaler with its fake node provider: generator nodes come from zero on lag and go when there is no work.

`ray.cluster_utils.AutoscalingCluster` begins and ends with `ray stop --force`, which would end every other Ray of the
machine; so the head is started here, and ended by the mark in its processes' environment.
"""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from tests.runs import MARK, events, start
from tests.tiny import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1500)]
PATIENCE_S = 1200
EPOCHS = 40
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> None:
    """In place of the Ray that the other files of this directory share."""


def cluster_config(address: str) -> dict[str, Any]:
    """A head, and two generator nodes at most that are no machines but processes of this one."""
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            # By its own name, `fake_multinode`, Ray would look for defaults that its wheels do not have.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 2, "learner": 1}, "node_config": {}, "max_workers": 0},
            "generator": {
                "resources": {"CPU": 1, "generator": 1, "object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        # What Ray would take from a provider's defaults.
        **{f"{what}_commands": [] for what in COMMANDS},
        "file_mounts": {},
        "cluster_synced_files": [],
    }


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head with room for all but generators; the autoscaler may add two nodes for those, and ends idle ones."""
    monkeypatch.setenv(MARK, str(tmp_path))
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    address = f"127.0.0.1:{port}"
    (tmp_path / "cluster.json").write_text(json.dumps(cluster_config(address)))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=2"]
    command += ['--resources={"learner": 1}']
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000"]
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    try:
        subprocess.run(
            [*command, f"--autoscaling-config={tmp_path / 'cluster.json'}"],
            env=os.environ | environment,
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )
        yield address
    finally:
        ray.shutdown()
        end(tmp_path)


def end(directory: Path) -> None:
    """Stop every process that was started for a test in `directory`."""
    deadline = time.monotonic() + 30
    while there := mine(directory):
        assert time.monotonic() < deadline, there
        for process in there:
            process.kill()
        psutil.wait_procs(there, timeout=1)


def mine(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def commands(directory: Path) -> str:
    """Command lines of the processes that were started for a test."""
    lines = []
    for process in mine(directory):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


def generator_nodes() -> int:
    return sum(node["Alive"] and "generator" in node["Resources"] for node in ray.nodes())


def test_nodes_come_on_lag_and_go_when_idle(tmp_path: Path, address: str) -> None:
    config = tiny_config(tmp_path)
    [ple] = config["pipelines"]
    config["pipelines"] = [
        # All parts are drawn first; then it learns from them again and again, and nobody needs a generator.
        {"type": "raft", "samples": 2, "epochs": EPOCHS, "ahead": 8}
        | {key: ple[key] for key in ("batch_size", "generation")}
        | {"learner": ple["learner"] | {"resources": {"learner": 1}}}  # else it may sit down on a generator's node
    ]
    config["data"]["heldout"] = config["data"]["train"]
    config["evaluation"] = {"prompts": 16}
    config["fleet"] = {
        "engine": "transformers",
        "generator": {
            "replicas": [0, 2],
            "resources": {"generator": 1},
            "scale_up_after": 1,
            "scale_down_after": 3,
            "max_num_seqs": 8,
        },
    }
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    began = time.time()
    told = [(began, f"{generator_nodes()} generator nodes")]
    counts = [generator_nodes()]
    process = start(tmp_path, config, address)
    try:
        while process.poll() is None or counts[-1]:
            assert time.time() < began + PATIENCE_S, told
            assert "autoscaler/v2/monitor.py" in commands(tmp_path), "Ray's autoscaler has ended"
            if (now := generator_nodes()) != counts[-1]:
                counts.append(now)
                told.append((time.time(), f"{now} generator nodes"))
            time.sleep(0.3)
        code, _, err = process.returncode, *process.communicate()
    finally:
        process.kill()
    assert code == 0, err
    fleet, steps = events(tmp_path, "fleet"), events(tmp_path, "raft")
    told += [(event["time"], f"raft: step {event['step']}") for event in (steps[0], steps[7], steps[-1])]
    told += [(event["time"], describe(event)) for event in fleet]
    sys.stdout.writelines(f"{when - began:7.1f} s  {what}\n" for when, what in sorted(told))

    assert counts[0] == 0 and max(counts) == 2 and counts[-1] == 0
    assert [e["step"] for e in steps] == list(range(1, 8 * EPOCHS + 1))
    joined = [event for event in fleet if "joined" in event]
    names = [event["joined"] for event in joined]
    assert len(set(names)) == len(names) >= 3, "two for the parts, and one for the comparison at the end"
    left = [event["left"] for event in fleet if "left" in event]
    assert {"generator-0", "generator-1"} <= set(left)
    assert joined[-1]["proved"] == [f"raft@{8 * EPOCHS}"], "what it joins with is the newest version"
    assert joined[0]["time"] < steps[0]["time"] and steps[8]["time"] < joined[-1]["time"]
    # Between those that drew the parts and those that compared there was a time without any node.
    assert counts.index(2) < counts.index(0, 1) < len(counts) - 1
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"][1]["policy"] == "raft"


def describe(event: dict[str, Any]) -> str:
    what = next(key for key in ("starting", "joined", "leaving", "left", "lost") if key in event)
    proved = f", proved {' '.join(event['proved']) or 'nothing yet'}" if what == "joined" else ""
    return f"{event[what]} {what}{proved}; the pool asks {event['generators']}"
