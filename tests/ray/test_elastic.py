"""A learner with bounds on its workers: it grows when a node comes and shrinks when one dies, and learns the same."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster

from actors.channel import Box, Channel
from actors.cluster import start_ray, stop_ray
from actors.learning.learner import Trainer
from actors.weights import PolicyStore
from plumbline.records import PolicyRef
from tests.ray.test_learner import CASES, STEPS, assert_same, part, plain, spec_of
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1500)]
PATIENCE_S = 600


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> None:
    """In place of the Ray that the other files of this directory share."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head, and one node for a learner's worker."""
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    one: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    one.add_node(num_cpus=1, resources={"learner": 1})
    monkeypatch.setenv("RAY_ADDRESS", one.address)
    start_ray(cpus=0)
    yield one
    stop_ray()
    one.shutdown()


def workers(cluster: Cluster) -> int:
    actors = cluster.global_state.actor_table(None).values()
    return sum(a["ActorClassName"] == "RayTrainWorker" and a["State"] == "ALIVE" for a in actors)


def wait_until(holds: Callable[[], bool], training: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        done, _ = ray.wait([training], timeout=0)
        assert not done, ray.get(training)
        time.sleep(0.5)


def test_workers_follow_the_nodes_and_the_result_does_not(tmp_path: Path, cluster: Cluster) -> None:
    model, case = make_tiny_model(tmp_path / "model"), CASES[2]
    expected = plain(tmp_path / "plain", model, case)
    spec = spec_of(
        tmp_path / "elastic",
        model,
        case,
        workers=[1, 2],
        resources={"learner": 1},
        strategy="deepspeed",
        zero=2,
        checkpoint_every=1,
    )
    head: Any = cluster.head_node
    beside = {"num_cpus": 0, "max_concurrency": 100, "label_selector": {"ray.io/node-id": head.node_id}}
    channel: Any = ray.remote(Channel).options(**beside).remote(STEPS)
    store: Any = ray.remote(PolicyStore).options(**beside).remote(2 * STEPS)
    trainer: Any = ray.remote(Trainer).options(**beside).remote("test")
    training = trainer.run.remote(spec, channel, store)

    def train_to(step: int) -> None:
        for new in range(fed[0] + 1, step + 1):
            ray.get(channel.put.remote(new, Box(ref=ray.put(part(new)))))
        fed[0] = step
        ref = PolicyRef(policy="self_contrast", version=step)
        ready, _ = ray.wait([store.wait.remote(ref), training], timeout=PATIENCE_S)
        assert training not in ready, ray.get(training)
        assert ready, f"no version {step}"

    fed = [0]
    train_to(5)
    assert workers(cluster) == 1
    second = cluster.add_node(num_cpus=1, resources={"learner": 1})
    wait_until(lambda: workers(cluster) == 2, training)  # Ray Train looks once a minute
    train_to(12)
    assert workers(cluster) == 2
    [raylet] = second.all_processes["raylet"]
    raylet.process.kill()
    wait_until(lambda: workers(cluster) == 1, training)
    train_to(STEPS)
    ray.get(channel.close.remote())
    ray.get(training, timeout=PATIENCE_S)
    published = ray.get(
        [store.wait.remote(PolicyRef(policy="self_contrast", version=s)) for s in range(1, STEPS + 1)], timeout=60
    )
    assert_same(expected, published, tmp_path / "plain", tmp_path / "elastic")
