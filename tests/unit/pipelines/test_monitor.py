"""How busy the pool is, while generators join it, leave it and are started again."""

import asyncio
import itertools
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.gpu import GpuUse
from pipelines import monitor
from pipelines.monitor import busy_share, gpu_use, monitor_pool
from pipelines.pool import Pool
from plumbline.errors import LostError
from plumbline.models.services import Cost


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


def test_the_pools_lines_grow_rarer_as_a_run_grows_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 5 seconds for some hours; a month has some ten thousand, not half a million."""
    clock, times, ended = [0.0], [], asyncio.Event()
    days = 3 * 86_400

    async def passes(waiting: Any, timeout: float) -> None:
        waiting.close()
        clock[0] += timeout
        if clock[0] >= days:
            ended.set()

    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(monitor.asyncio, "wait_for", passes)
    fleet = SimpleNamespace(reference=[], desks={}, embedder=[], rewards={})
    events = SimpleNamespace(write=lambda event: times.append(clock[0]))
    context: Any = SimpleNamespace(pool=Pool([], 0), fleet=fleet, events=events)
    asyncio.run(monitor_pool(context, ended))
    assert times[:1000] == [5.0 * i for i in range(1, 1001)]
    assert times[-1] == days, "the last line has the totals"
    assert 2_000 < len(times) < 10_000, "of 51,840"
    assert max(b - a for a, b in itertools.pairwise(times)) <= days / 2000 + 5


def test_what_a_service_was_asked_is_the_last_line() -> None:
    class Costly:
        """A scorer that asks a service."""

        def __getattr__(self, name: str) -> Any:
            assert name == "cost"
            return SimpleNamespace(remote=self._cost)

        async def _cost(self) -> dict[str, int]:
            return asdict(
                Cost(asked=2000, cached=500, failed=1, requests=750, prompt_tokens=9000, completion_tokens=750)
            )

    ended, said = asyncio.Event(), []
    ended.set()
    fleet = SimpleNamespace(reference=[], desks={}, embedder=[], rewards={"reward": [Costly(), Costly()]})
    events = SimpleNamespace(write=lambda event: None, say=said.append)
    context: Any = SimpleNamespace(pool=Pool([], 0), fleet=fleet, events=events)
    asyncio.run(monitor_pool(context, ended))
    assert said == [
        "reward: 4,000 answers scored (1,000 known, 2 without a score) in 1,500 requests, "
        "18,000 tokens read and 1,500 written"
    ]


def test_long_logs_are_pushed_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 5 seconds, a month's 20 MB would be ten terabytes."""
    log, waits, pushed = tmp_path / "events.jsonl", [], []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            raise asyncio.CancelledError
        log.write_bytes(b"x" * 2 ** (16 + 4 * len(waits)))

    monkeypatch.setattr(monitor.asyncio, "sleep", sleep)
    monkeypatch.setattr(monitor, "push_logs", lambda storage, run_dir: pushed.append(log.stat().st_size))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(monitor.push_events(SimpleNamespace(run_dir=tmp_path, storage=None)))  # type: ignore[arg-type]
    assert pushed == [2**20, 2**24, 2**28]
    assert waits == [5, 5, 64, 1024]
