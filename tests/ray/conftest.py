"""A local Ray for every file of tests here."""

import os
from collections.abc import Iterator

import pytest

from actors.cluster import start_ray, stop_ray


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """Two processors of this machine, whatever cluster the environment names."""
    address = os.environ.pop("RAY_ADDRESS", None)
    start_ray(cpus=2)
    yield
    stop_ray()
    if address:
        os.environ["RAY_ADDRESS"] = address
