"""Whose turn it is at an engine: many prompts of one caller hold no other up."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from actors.engines.places import CALLER, Places, Queued


class Engine:
    """Answers once it is allowed to; who is being answered, and in which order they came in."""

    def __init__(self) -> None:
        self.under_way: list[str] = []
        self.order: list[str] = []
        self.allowed = asyncio.Semaphore(0)
        self.closed = 0

    async def generate(self, prompt: str, params: Any, request_id: str, **_: Any) -> AsyncIterator[str]:
        self.under_way.append(prompt)
        self.order.append(prompt)
        try:
            await self.allowed.acquire()
            yield f"{prompt} answered"
        finally:
            self.under_way.remove(prompt)
            self.closed += 1


async def ask(engine: Any, caller: str, prompt: str, n: int = 1) -> list[str]:
    CALLER.set(caller)
    return [one async for one in engine.generate(prompt, SimpleNamespace(n=n), request_id="0")]


def play(work: Any, seats: int = 4) -> None:
    async def main() -> None:
        engine = Engine()
        await work(engine, Queued(engine, Places(seats)))

    asyncio.run(main())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_who_comes_late_with_little_is_let_in_at_once() -> None:
    async def work(engine: Engine, queued: Any) -> None:
        many = [asyncio.create_task(ask(queued, "a", f"a{i}")) for i in range(100)]
        await settle()
        assert len(engine.under_way) == 4, "one caller has the seats, and no more"
        late = asyncio.create_task(ask(queued, "b", "b0"))
        await settle()
        assert engine.under_way[-1] == "b0"
        for _ in range(101):
            engine.allowed.release()
        assert await late == ["b0 answered"] and len(await asyncio.gather(*many)) == 100
        assert not queued._places._held and not queued._places._waiting

    play(work)


def test_two_with_much_share_alike() -> None:
    async def work(engine: Engine, queued: Any) -> None:
        asked = [asyncio.create_task(ask(queued, caller, f"{caller}{i}")) for caller in "ab" for i in range(40)]
        await settle()
        for _ in range(40):
            engine.allowed.release()
            await settle()
        first = [prompt[0] for prompt in engine.order[:44]]
        assert abs(first.count("a") - first.count("b")) <= 4
        for _ in range(40):
            engine.allowed.release()
        await asyncio.gather(*asked)

    play(work)


def test_one_that_needs_several_places_keeps_its_turn() -> None:
    async def work(engine: Engine, queued: Any) -> None:
        small = [asyncio.create_task(ask(queued, f"c{i}", f"c{i}")) for i in range(5)]
        await settle()
        large = asyncio.create_task(ask(queued, "b", "large", n=8))  # as many as there are seats
        await settle()
        later = [asyncio.create_task(ask(queued, f"d{i}", f"d{i}")) for i in range(5)]
        for _ in range(11):
            engine.allowed.release()
            await settle()
        assert engine.order[5] == "large"
        await asyncio.gather(*small, large, *later)

    play(work)


def test_who_gives_up_leaves_the_place() -> None:
    async def work(engine: Engine, queued: Any) -> None:
        asked = [asyncio.create_task(ask(queued, "a", f"a{i}")) for i in range(200)]
        await settle()
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert engine.closed == 4 and not queued._places._held and not queued._places._waiting
        last = asyncio.create_task(ask(queued, "a", "last"))
        engine.allowed.release()
        assert await last == ["last answered"]

    play(work)
