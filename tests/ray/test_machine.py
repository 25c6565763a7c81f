"""What a plan is told of a cluster, asked of real nodes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster

from actors.machine import find_machine
from plumbline.errors import ConfigError
from plumbline.placement.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> None:
    """In place of the Ray that the other files of this directory share."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without processors, and a node with three."""
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    one: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    one.add_node(num_cpus=3)
    monkeypatch.setenv("RAY_ADDRESS", one.address)
    yield one
    one.shutdown()


def test_a_cluster_is_asked_and_left(cluster: Any, tmp_path: Path) -> None:
    expected = Machine(gpus=0, gib=0.0, cpus=3, ram_gib=0.0, per_node=0, cluster=True)
    assert find_machine() == expected
    (tmp_path / "here").mkdir()
    assert find_machine(tmp_path / "here" / "run") == expected, "all its nodes see that place"
    assert list((tmp_path / "here").iterdir()) == [], "nothing is left there"
    assert not ray.is_initialized(), "a run joins it again, by its own name"
    cluster.add_node(num_cpus=1, num_gpus=2)  # of which torch knows nothing, on a machine without a GPU
    with pytest.raises(ConfigError, match="a node offers GPUs, but torch sees none there"):
        find_machine()
    assert not ray.is_initialized()
