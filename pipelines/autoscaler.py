"""Generators that join and leave the pool while pipelines ask it: as many as the work needs, and lost ones again.

`Scaler` decides how many there should be, `Autoscaler` carries it out.

A new or restarted generator is asked nothing before it has proved the current version of every policy. One that leaves
ends what it was asked. Each change is an event of its own kind (`FLEET`), so that a timeline can be read.
"""

import asyncio
import contextlib
import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

from actors.spawn import ask, gather, started
from pipelines.context import Context
from plumbline.config.section import bounds, planned
from plumbline.errors import LostError, RunError
from plumbline.records import PolicyRef

FLEET = "fleet"
"""What these events say in place of a pipeline."""
EVERY = 0.5
"""Seconds between two looks at the pool."""
LISTED_EVERY = 10
"""Looks after which the store is told again who may be asked: one that died knows nobody."""


async def autoscale(context: Context) -> None:
    """Look after the pool's generators until cancelled. Where one fails for good, the pool does."""
    settings = context.config.fleet.generator
    low, high = bounds(planned(settings.replicas))
    scaler = Scaler(low=low, high=high, up_after=settings.scale_up_after, down_after=settings.scale_down_after)
    try:
        async with Autoscaler(context, scaler) as autoscaler:
            for looks in itertools.count(1):
                autoscaler.tend()
                if looks % LISTED_EVERY == 0:
                    await autoscaler.list_members()
                await asyncio.sleep(EVERY)
    except Exception as error:  # whoever waits for the pool would wait for ever
        context.pool.fail(error)


@dataclass(slots=True, kw_only=True)
class Scaler:
    """Follows the work between two bounds: up as soon as it waits too long, down one by one once it has been less.

    Attributes:
        low, high: bounds on the number of generators.
        up_after: seconds that requests may wait. Where there is no generator at all, waiting work starts one at once.
        down_after: seconds in which one generator less would have done.
    """

    low: int
    high: int
    up_after: float
    down_after: float
    _spare_since: float | None = None

    def wanted(self, *, there: int, demand: float, lag: float, now: float) -> int:
        """The number to have from now on.

        Args:
            there: generators that there are, or that are on their way.
            demand: generators that the work under way and the work that waits would fill.
            lag: seconds that the oldest waiting work has waited, 0 where none waits.
            now: seconds of a clock that only goes forward.
        """
        spare = lag == 0 and demand <= there - 1
        if not spare:
            self._spare_since = None
        elif self._spare_since is None:
            self._spare_since = now
        if lag > 0 and (there == 0 or lag >= self.up_after):
            there = max(there, math.ceil(demand))
        elif self._spare_since is not None and now - self._spare_since >= self.down_after:
            self._spare_since = now
            there -= 1
        return min(max(there, self.low), self.high)


class Autoscaler:
    """The generators that are on their way into the pool or out of it, each with the task that sees to it."""

    def __init__(self, context: Context, scaler: Scaler) -> None:
        self._context, self._scaler = context, scaler
        self._joining: dict[Any, asyncio.Task[None]] = {}
        self._leaving: dict[Any, asyncio.Task[None]] = {}

    async def __aenter__(self) -> "Autoscaler":
        await self.list_members()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._joining.values(), *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def tend(self) -> None:
        """Take in what was lost, and begin what the work asks for.

        Raises:
            SyncError: a generator that should have joined did not prove a version.
            RunError: one could not be started, or died too often.
        """
        for moving in (self._joining, self._leaving):
            for generator in [one for one, task in moving.items() if task.done()]:
                moving.pop(generator).result()
        fleet, pool = self._context.fleet, self._context.pool
        asked = pool.generators
        staying = [one for one in fleet.generators if one not in self._leaving]
        for generator in staying:
            if generator not in asked and generator not in self._joining:
                name = fleet.generator_names[generator]
                self._note({"lost": name}, f"{name} is lost; what it was asked goes to others")
                self._join(generator)
        wanted = self._scaler.wanted(there=len(staying), demand=pool.demand, lag=pool.lag, now=time.monotonic())
        for _ in range(wanted - len(staying)):
            generator = fleet.add_generator()
            self._note({"starting": fleet.generator_names[generator]})
            self._join(generator)
        for generator in [*self._joining, *asked][: max(0, len(staying) - wanted)]:
            self._leave(generator)

    def _join(self, generator: Any) -> None:
        self._joining[generator] = asyncio.create_task(self._bring(generator, time.monotonic()))

    def _leave(self, generator: Any) -> None:
        joining = self._joining.pop(generator, None)
        if joining is not None:
            joining.cancel()
        self._leaving[generator] = asyncio.create_task(self._dismiss(generator))

    async def _bring(self, generator: Any, since: float) -> None:
        """Wait until it is loaded and has proved all current versions; then the pool asks it too."""
        name, pool = self._context.fleet.generator_names[generator], self._context.pool
        await self.list_members()  # without it, where it is lost
        await self._started(generator)
        proved: set[PolicyRef] = set()
        while missing := set(pool.current.values()) - proved:  # more may have come while it proved others
            try:
                await gather(*(generator.load.remote(ref) for ref in missing))
                proved |= missing
            except LostError:
                await self._started(generator)
                proved = set()
        pool.join(generator)
        seconds = time.monotonic() - since
        event = {"joined": name, "proved": sorted(map(str, proved)), "seconds": seconds}
        self._note(event, f"{name} has joined the pool after {seconds:.0f} s")
        await self.list_members()

    async def _started(self, generator: Any) -> None:
        """Raises RunError where Ray starts it no more."""
        try:
            await ask(started(generator))
        except LostError as error:
            raise RunError(f"{self._context.fleet.generator_names[generator]} died too often: {error}") from None

    async def _dismiss(self, generator: Any) -> None:
        """Let it end what it was asked, and stop it."""
        fleet = self._context.fleet
        name = fleet.generator_names[generator]
        self._note({"leaving": name})
        await self._context.pool.leave(generator)
        await self.list_members()
        await fleet.remove_generator(generator)
        self._note({"left": name}, f"{name} has left the pool, where there is less to do")

    async def list_members(self) -> None:
        """Tell an endpoint beside the run, through the store, who may be asked."""
        with contextlib.suppress(LostError):  # the next time
            await self._context.fleet.enlist(self._context.pool.generators)

    def _note(self, event: dict[str, Any], message: str = "") -> None:
        """A line in the events, with how many the pool asks now, and one on the screen."""
        self._context.events.write({"pipeline": FLEET, "generators": len(self._context.pool.generators), **event})
        if message:
            self._context.events.say(message)
