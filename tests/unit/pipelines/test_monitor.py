"""How busy the pool is, while generators join it, leave it and are started again."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.gpu import GpuUse
from pipelines.monitor import busy_share, gpu_use
from plumbline.errors import LostError


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ({"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 4.0}, 0.75),
        ({"a": 1.0}, {"a": 3.0, "new": 50.0}, 0.5),
        ({"a": 1.0, "gone": 9.0}, {"a": 3.0}, 0.5),
        ({"a": 90.0, "b": 1.0}, {"a": 0.5, "b": 5.0}, 0.5),  # a was started again
        ({"a": 1.0}, {"a": 6.0}, 1.0),
        ({}, {"new": 2.0}, 0.0),
        ({}, {}, 0.0),
    ],
)
def test_the_mean_share_of_those_that_were_there_all_the_time(
    before: dict[str, float], after: dict[str, float], share: float
) -> None:
    assert busy_share(before, after, seconds=4.0) == share


class Handle:
    """An actor's handle, seen from `ask`; one that is lost raises."""

    def __init__(self, use: GpuUse | None) -> None:
        self._use = use
        self.gpu_use = self

    async def remote(self) -> GpuUse:
        if self._use is None:
            raise LostError("it is gone")
        return self._use


def test_a_lost_generator_is_left_out() -> None:
    there, lost = Handle(GpuUse(samples=1)), Handle(None)
    context: Any = SimpleNamespace(pool=SimpleNamespace(generators=[there, lost]))
    assert asyncio.run(gpu_use(context)) == {there: GpuUse(samples=1)}
