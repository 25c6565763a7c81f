"""Who joins the pool of generators and who leaves it: only proved ones are asked, and what fails for good is told."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.autoscaler import EVERY, Autoscaler, Scaler, autoscale
from pipelines.loop import prove_everywhere
from pipelines.pool import Pool
from plumbline.config.file import parse_config
from plumbline.errors import LostError, RunError, SyncError
from plumbline.records import PolicyRef


class Call:
    """An actor's method: `remote` calls it, whatever its options."""

    def __init__(self, work: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.remote = work

    def options(self, **_: object) -> "Call":
        return self


class Engine:
    """A generator that starts once `may_start` is set, and notes the versions that it was told to load."""

    def __init__(self, loads: Callable[["Engine", PolicyRef], None] = lambda engine, ref: None) -> None:
        self.may_start = asyncio.Event()
        self.loaded: list[PolicyRef] = []
        self._loads = loads
        self.start, self.load = Call(self._start), Call(self._load)

    async def _start(self) -> None:
        await self.may_start.wait()

    async def _load(self, ref: PolicyRef) -> str:
        await asyncio.sleep(0)
        self._loads(self, ref)
        self.loaded.append(ref)
        return f"proof of {ref}"


class FakeFleet:
    """Starts engines that `make` gives."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self.generators: list[Engine] = []
        self.generator_names: dict[Engine, str] = {}
        self.listed: list[Engine] = []
        self.store = SimpleNamespace(wait=Call(self._published))

    def add_generator(self) -> Engine:
        engine = self._make()
        self.generator_names[engine] = f"generator-{len(self.generator_names)}"
        self.generators.append(engine)
        return engine

    async def remove_generator(self, engine: Engine) -> None:
        self.generators.remove(engine)

    async def enlist(self, engines: list[Engine]) -> None:
        self.listed = list(engines)

    async def _published(self, ref: PolicyRef) -> None:
        pass


class World:
    """A context of fakes around a real pool, with what was written to the events."""

    def __init__(self, make: Callable[[], Engine] = Engine, replicas: Any = (0, 2)) -> None:
        self.events: list[dict[str, Any]] = []
        self.fleet = FakeFleet(make)
        self.pool = Pool([], capacity=10)
        config = parse_config(
            {
                "name": "autoscaler",
                "model": {"path": "model"},
                "data": {"train": {"path": "prompts.jsonl"}},
                "fleet": {"generator": {"replicas": list(replicas), "scale_down_after": 0.01}},
                "pipelines": [{"type": "self_contrast", "filter": False, "samples": 8}],
            },
            origin="test",
        )
        log = SimpleNamespace(write=self.events.append, say=lambda message: None)
        self.context: Any = SimpleNamespace(config=config, fleet=self.fleet, pool=self.pool, events=log)

    def autoscaler(self, low: int = 0, high: int = 2) -> Autoscaler:
        return Autoscaler(self.context, Scaler(low=low, high=high, up_after=5, down_after=1e-9))

    def told(self, key: str) -> list[str]:
        return [event[key] for event in self.events if key in event]


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, timeout=10)

    asyncio.run(limited())


async def settle() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


async def tend_twice(autoscaler: Autoscaler) -> None:
    """The first look sees that less would do, the second that it has for long enough."""
    autoscaler.tend()
    await asyncio.sleep(0.001)
    autoscaler.tend()


PLE, DLMA = PolicyRef(policy="ple", version=1), PolicyRef(policy="dlma", version=3)


def test_one_is_asked_only_once_it_has_proved_every_current_version() -> None:
    async def work() -> None:
        world = World()
        async with world.autoscaler(low=1) as autoscaler:
            autoscaler.tend()
            [engine] = world.fleet.generators
            assert await prove_everywhere(world.context, PLE) == []
            assert await prove_everywhere(world.context, DLMA) == []
            newest = PolicyRef(policy="ple", version=2)
            engine._loads = lambda one, ref: ref != PLE or world.pool.current.update(ple=newest)  # while it proves
            await settle()
            assert engine.loaded == [] and world.pool.generators == []
            engine.may_start.set()
            await settle()
            assert world.pool.generators == [engine] == world.fleet.listed
            assert set(engine.loaded) == {PLE, DLMA, newest} and engine.loaded[-1] == newest
            assert await prove_everywhere(world.context, PolicyRef(policy="ple", version=3)) == ["proof of ple@3"]
        assert world.told("starting") == world.told("joined") == ["generator-0"]

    run(work())


def test_a_lost_one_proves_anew_before_it_is_asked_again() -> None:
    async def work() -> None:
        world = World()
        async with world.autoscaler(low=1, high=1) as autoscaler:
            autoscaler.tend()
            [engine] = world.fleet.generators
            engine.may_start.set()
            await settle()
            engine._loads = lambda one, ref: raise_(LostError("its node is gone"))
            assert await prove_everywhere(world.context, PLE) == []
            assert world.pool.generators == []
            engine.may_start.clear()
            engine._loads = lambda one, ref: None
            autoscaler.tend()
            await settle()
            assert world.pool.generators == [] and world.told("lost") == ["generator-0"]
            engine.may_start.set()
            await settle()
            assert world.pool.generators == [engine] and engine.loaded == [PLE]
            autoscaler.tend()
            assert world.fleet.generators == [engine], "the same one again, no second"

    run(work())


def test_one_that_dies_while_it_proves_starts_again() -> None:
    async def work() -> None:
        deaths = [LostError("once"), LostError("twice")]
        world = World(lambda: Engine(lambda one, ref: raise_(deaths.pop()) if deaths else None))
        world.pool.current["ple"] = PLE
        async with world.autoscaler(low=1) as autoscaler:
            autoscaler.tend()
            world.fleet.generators[0].may_start.set()
            await settle()
            assert world.pool.generators == world.fleet.generators and not deaths

    run(work())


def test_the_least_loaded_leaves_and_ends_what_it_was_asked() -> None:
    async def work() -> None:
        world = World()
        async with world.autoscaler(low=2) as autoscaler:
            autoscaler.tend()
            for engine in world.fleet.generators:
                engine.may_start.set()
            await settle()
            first, second = world.fleet.generators
            autoscaler._scaler.low = 0
            async with world.pool.admit("x", 5, 5) as asked:
                assert asked is first
                await tend_twice(autoscaler)
                await settle()
                assert world.told("left") == ["generator-1"] and world.fleet.listed == [first]
            await asyncio.sleep(0.001)
            async with world.pool.admit("x", 5, 5):
                world.pool.lose(second)  # gone already: nothing happens
                autoscaler._leave(first)
                await settle()
                assert world.told("left") == ["generator-1"], "it is still answering"
            await settle()
            assert world.told("left") == ["generator-1", "generator-0"] and world.fleet.generators == []

    run(work())


def test_one_that_is_still_starting_is_given_up_first() -> None:
    async def work() -> None:
        world = World()
        async with world.autoscaler(low=2) as autoscaler:
            autoscaler.tend()
            ready, late = world.fleet.generators
            ready.may_start.set()
            await settle()
            autoscaler._scaler.low = 1
            await tend_twice(autoscaler)
            await settle()
            late.may_start.set()
            await settle()
            assert world.pool.generators == [ready] == world.fleet.generators
        assert world.told("joined") == ["generator-0"] and world.told("left") == ["generator-1"]

    run(work())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (SyncError("ple", 1, "generator-0", 0.5, "it still answers as base@0"), SyncError),
        (ValueError("a bug"), ValueError),
    ],
)
def test_who_waits_for_the_pool_is_told_what_failed(error: Exception, raised: type[Exception]) -> None:
    async def work() -> None:
        def make() -> Engine:
            engine = Engine(lambda one, ref: raise_(error))
            engine.may_start.set()
            return engine

        world = World(make)
        world.pool.current["ple"] = PLE
        keeping = asyncio.create_task(autoscale(world.context))
        with pytest.raises(raised):
            async with world.pool.admit("x", 5, 5):
                pass
        await keeping

    run(work())


def test_one_that_starts_no_more_ends_the_run() -> None:
    async def work() -> None:
        world = World(replicas=(1, 1))
        autoscaler = world.autoscaler(low=1, high=1)
        autoscaler.tend()
        world.fleet.generators[0].start = Call(lambda: fails(LostError("The actor is dead")))
        await settle()
        with pytest.raises(RunError, match="generator-0 died too often: The actor is dead"):
            autoscaler.tend()

    run(work())


def test_from_none_on_work_and_back_when_there_is_none() -> None:
    async def work() -> None:
        def make() -> Engine:
            engine = Engine()
            engine.may_start.set()
            return engine

        world = World(make, replicas=(0, 1))
        keeping = asyncio.create_task(autoscale(world.context))
        await asyncio.sleep(2 * EVERY)
        assert world.fleet.generators == []
        async with world.pool.admit("x", 5, 5) as engine:
            assert [engine] == world.fleet.generators
        await asyncio.sleep(4 * EVERY)
        assert world.fleet.generators == [] and world.told("left") == ["generator-0"]
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    run(work())


async def fails(error: Exception) -> None:
    raise error


def raise_(error: Exception) -> None:
    raise error
