"""Whose answer an engine makes next: users wait here for a place, and one with many prompts holds nobody up.

vLLM's own queue goes by arrival: a request of a thousand prompts would be answered whole before another user's one.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Who asks, in the task that answers; vLLM's classes, which stand between, hand nothing on."""


@dataclass(slots=True, eq=False)
class _Waiter:
    caller: str
    count: int
    number: int
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Places:
    """`seats` answers of one caller at once, and a quarter more of all. Who has the fewest under way goes next."""

    def __init__(self, seats: int) -> None:
        self._own, self._all = seats, seats + max(1, seats // 4)
        self._held: Counter[str] = Counter()
        self._last: dict[str, int] = {}  # when each caller that holds some was let in last
        self._waiting: list[_Waiter] = []
        self._numbers = itertools.count()

    @asynccontextmanager
    async def take(self, caller: str, count: int) -> AsyncIterator[None]:
        """Wait for places for so many answers, all seats at most, and hold them."""
        waiter = _Waiter(caller, min(count, self._own), next(self._numbers))
        self._waiting.append(waiter)
        self._admit()
        try:
            await waiter.admitted
            yield
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                self._held[caller] -= waiter.count
                if not self._held[caller]:
                    del self._held[caller], self._last[caller]
            self._admit()

    def _admit(self) -> None:
        """Let in who may now. One that needs more than is free keeps its turn: smaller ones do not pass it for ever."""
        while True:
            waiting = (one for one in self._waiting if not one.admitted.done())  # or given up, and about to leave
            able = [one for one in waiting if self._held[one.caller] + one.count <= self._own]
            best = min(able, key=self._turn, default=None)
            if best is None or self._held.total() + best.count > self._all:
                return
            self._waiting.remove(best)
            self._held[best.caller] += best.count
            self._last[best.caller] = next(self._numbers)
            best.admitted.set_result(None)

    def _turn(self, one: _Waiter) -> tuple[int, int, int]:
        return self._held[one.caller], self._last.get(one.caller, 0), one.number


class Queued:
    """A vLLM engine at which every prompt of a user waits for a place first."""

    def __init__(self, llm: Any, places: Places) -> None:
        self._llm, self._places = llm, places

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def generate(self, prompt: Any, sampling_params: Any, *given: Any, **named: Any) -> AsyncIterator[Any]:
        """See vLLM's `EngineClient.generate`."""
        answer = self._llm.generate(prompt, sampling_params, *given, **named)
        async with self._places.take(CALLER.get(), sampling_params.n), aclosing(answer) as outputs:
            async for output in outputs:
                yield output
