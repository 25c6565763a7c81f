"""Who gets the next place in the pool of generators: by weight, without starving anyone, and nothing is lost."""

import asyncio
from collections.abc import Awaitable

from pipelines.pool import Pool


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, timeout=10)

    asyncio.run(limited())


async def asks(pool: Pool, order: list[str], name: str, tokens: int = 10, share: float = 1.0) -> None:
    """One batch: notes when it is admitted, and holds its place for a turn of the loop."""
    async with pool.admit(name, tokens, share):
        order.append(name)
        await asyncio.sleep(0.001)


def test_a_newcomer_does_not_wait_behind_anothers_queue() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=20), []
        greedy = [asyncio.create_task(asks(pool, order, "greedy")) for _ in range(20)]
        await asyncio.sleep(0)
        late = asyncio.create_task(asks(pool, order, "late"))
        await asyncio.gather(late, *greedy)
        assert order.index("late") == 2, "two places were taken; the next free one is the newcomer's"

    run(work())


def test_places_go_by_weight_while_both_wait() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=40), []
        tasks = [asyncio.create_task(asks(pool, order, "heavy", share=3.0)) for _ in range(60)]
        tasks += [asyncio.create_task(asks(pool, order, "light", share=1.0)) for _ in range(60)]
        await asyncio.gather(*tasks)
        both = order[4:64]  # the first places went to who came first; later only one is left
        assert 40 <= both.count("heavy") <= 50, "three of four"
        assert both.count("light") >= 10

    run(work())


def test_a_deep_queue_gets_no_more_than_who_asks_for_little_at_a_time() -> None:
    """Where one batch fills the pool, nobody has anything outstanding when it is free."""

    async def work() -> None:
        pool, order = Pool(["g"], capacity=10), []
        deep = [asyncio.create_task(asks(pool, order, "deep")) for _ in range(60)]
        for _ in range(10):  # as an online method: the next two once those before are answered
            await asyncio.gather(asks(pool, order, "online"), asks(pool, order, "online"))
        assert order.count("online") == 20
        assert order.count("deep") <= 22
        await asyncio.gather(*deep)

    run(work())


def test_the_longest_wait_is_not_that_behind_ones_own_queue() -> None:
    async def work() -> None:
        pool = Pool(["g"], capacity=10)

        async def hold(name: str, seconds: float) -> None:
            async with pool.admit(name, 10):
                await asyncio.sleep(seconds)

        await asyncio.gather(*(hold("deep", 0.02) for _ in range(10)))
        assert pool.accounts["deep"].longest_wait < 0.1, "the last waited ten times as long, behind its own"
        await asyncio.gather(hold("other", 0.2), hold("late", 0.0))
        assert 0.15 < pool.accounts["late"].longest_wait < 0.5

    run(work())


def test_a_finished_pipeline_gives_its_share_back() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=40), []
        await asks(pool, order, "done")
        inside = 0

        async def hold() -> None:
            nonlocal inside
            async with pool.admit("other", 10):
                inside += 1
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(hold()) for _ in range(4)]
        await asyncio.sleep(0.001)
        assert inside == 4, "the whole pool"
        await asyncio.gather(*tasks)

    run(work())


def test_a_large_batch_is_not_overtaken_for_ever() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=20), []
        first = asyncio.create_task(asks(pool, order, "small"))
        await asyncio.sleep(0)
        large = asyncio.create_task(asks(pool, order, "large", tokens=100))
        await asyncio.sleep(0)
        more = [asyncio.create_task(asks(pool, order, "small")) for _ in range(10)]
        await asyncio.gather(first, large, *more)
        assert order.index("large") == 1, "larger than the pool: admitted alone, in its turn"

    run(work())


def test_the_generator_with_the_least_to_do_is_asked() -> None:
    async def work() -> None:
        pool = Pool(["a", "b"], capacity=100)
        async with pool.admit("x", 30) as first, pool.admit("x", 10) as second, pool.admit("y", 10) as third:
            assert (first, second, third) == ("a", "b", "b")
            assert pool.outstanding == 50
        assert pool.outstanding == 0

    run(work())


def test_a_cancelled_batch_gives_its_place_back() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=10), []
        async with pool.admit("x", 10):
            waiting = asyncio.create_task(asks(pool, order, "x"))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert pool.queue == 0
            admitted = asyncio.create_task(asks(pool, order, "y"))
            await asyncio.sleep(0)
        admitted.cancel()  # its turn has come, but it has not noticed yet
        await asyncio.gather(admitted, return_exceptions=True)
        assert (pool.outstanding, order) == (0, [])
        await asks(pool, order, "z")
        assert order == ["z"]

    run(work())


def test_shares_are_of_the_tokens_that_were_sampled() -> None:
    pool = Pool(["g"], capacity=10)
    assert pool.shares() == {}
    pool.count("a", 30)
    pool.count("b", 10)
    assert pool.shares() == {"a": 0.75, "b": 0.25}
