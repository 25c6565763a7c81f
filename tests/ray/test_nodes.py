"""A cluster of several nodes on this machine: each role lands where its resources are, and the run outlives nodes."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster

from tests.runs import MARK, assert_each_prompt_once, events, finish, leftovers, start
from tests.tiny import make_prompts, make_tiny_model, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1500)]
PATIENCE_S = 600
STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> None:
    """In place of the Ray that the other files of this directory share: here every test has a cluster."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that offers no CPU, with tokens on, as in cluster.yaml."""
    monkeypatch.setenv(MARK, str(tmp_path))
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    one = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "resources": {"head": 1}, "include_dashboard": False}
    )
    yield one
    one.shutdown()
    assert leftovers(tmp_path, patience_s=120) == []


def join(cluster: Cluster, role: str) -> Any:
    return cluster.add_node(num_cpus=1, resources={role: 1})


def kill(node: Any) -> None:
    """`kill -9` a node's raylet: what happens to a spot node that is taken away."""
    [raylet] = node.all_processes["raylet"]
    raylet.process.kill()


def landed(cluster: Cluster, kind: str) -> set[str]:
    """The nodes on which living actors of this class are."""
    actors = cluster.global_state.actor_table(None).values()
    return {a["Address"]["NodeID"] for a in actors if a["ActorClassName"] == kind and a["State"] == "ALIVE"}


def names(cluster: Cluster) -> set[str]:
    return {a["Name"] for a in cluster.global_state.actor_table(None).values() if a["Name"]}


def test_roles_land_by_name_and_nodes_may_die(tmp_path: Path, cluster: Cluster) -> None:
    head: Any = cluster.head_node
    generator, learners = join(cluster, "generator"), [join(cluster, "learner") for _ in range(2)]
    make_tiny_model(tmp_path / "model")
    make_prompts(tmp_path / "prompts.jsonl", 8 * STEPS)
    learner = {"lr": 1e-3, "batch_size": 8, "workers": 2, "resources": {"learner": 1}}
    config = tiny_config(tmp_path, learner=learner)
    config["fleet"] = {
        "engine": "transformers",
        "generator": {"resources": {"generator": 1}},
        "scorer": {"resources": {"head": 0.1}},
    }
    process = start(tmp_path, config, cluster.address)

    def wait_until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"not reached after {len(events(tmp_path))} steps"
            time.sleep(0.1)

    def steps_on() -> None:
        """Some more than were under way."""
        done = len(events(tmp_path))
        wait_until(lambda: len(events(tmp_path)) >= done + 4)

    try:
        wait_until(lambda: len(events(tmp_path)) >= 2)
        assert landed(cluster, "Generator") == {generator.node_id}
        assert landed(cluster, "RayTrainWorker") == {node.node_id for node in learners}
        for kind in ("Scorer", "Channel", "PolicyStore", "Trainer", "TrainController"):
            assert landed(cluster, kind) == {head.node_id}, kind
        roles = {name.partition("/")[2] for name in names(cluster) if name.startswith("tiny-")}
        assert roles == {"policy-store", "generator-0", "scorer-0", "channel-ple-0", "trainer-0"}

        kill(generator)
        successor = join(cluster, "generator")
        wait_until(lambda: landed(cluster, "Generator") == {successor.node_id})
        steps_on()

        kill(learners[0])
        another = join(cluster, "learner")
        wait_until(lambda: landed(cluster, "RayTrainWorker") == {learners[1].node_id, another.node_id})
        steps_on()
        code, _, err = finish(process)
    finally:
        process.kill()
    assert code == 0, err
    assert_each_prompt_once(tmp_path, steps=STEPS, prompts=8 * STEPS)
    versions = sorted(os.listdir(tmp_path / "run" / "policies" / "ple"))
    assert versions == [f"v{i:06d}" for i in range(1, STEPS + 1)]


def test_what_no_node_offers_is_waited_for_and_said(tmp_path: Path, cluster: Cluster) -> None:
    config = tiny_config(tmp_path, steps=1)
    config["fleet"] = {"engine": "transformers", "generator": {"resources": {"generator": 1}}}
    process = start(tmp_path, config, cluster.address)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "Generator" not in {a["ActorClassName"] for a in cluster.global_state.actor_table(None).values()}:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert landed(cluster, "Generator") == set()
        cluster.add_node(num_cpus=2, resources={"generator": 1})
        code, out, err = finish(process)
    finally:
        process.kill()
    assert code == 0, err
    assert "the run asks for 1 generator, all nodes offer 0: what finds no room waits" in out
