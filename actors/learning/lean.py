"""Ray Train's trainer without the processes that a learner has no use for, and with a name on the places it takes.

Ray Train (2.60) starts two actors more for every run. One imports Ray Data for datasets that nobody gave. The other
asks a dashboard whether the run's controller lives, and takes the workers' place away where it hears no: a local Ray
has no dashboard, and where another Ray was started on this machine it asks that one, which knows no such controller.
So it ended learners that were well, and left the place of a dead controller taken for ever. Here whoever starts a
learner frees what an earlier one of its name left (`free_places`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock
from uuid import uuid4

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group


class LeanTrainer(TorchTrainer):
    """Ray Train's own, but for these two."""

    def _create_default_callbacks(self) -> list[Any]:
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, left_out)]


class NamesPlaces(WorkerGroupCallback):
    """Every placement group of the run is called ``place/...``."""

    def __init__(self, place: str) -> None:
        self._place = place

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        named = partial(placement_group, name=f"{self._place}/{uuid4().hex[:8]}")
        with mock.patch.object(worker_group, "placement_group", named):
            yield


def free_places(place: str) -> None:
    """Free what a run of this name has reserved, which ends the workers in it; nothing where it has ended well."""
    for group in placement_group_table().values():
        if group["name"].startswith(f"{place}/") and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))
