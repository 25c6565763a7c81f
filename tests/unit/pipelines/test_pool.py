"""Who gets the next place in the pool of generators: by weight, without starving anyone, and nothing is lost."""

import asyncio
from collections.abc import Awaitable

import pytest

from pipelines.pool import ASKED, Pool
from plumbline.errors import LostError, RunError


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, timeout=10)

    asyncio.run(limited())


async def asks(pool: Pool, order: list[str], name: str, size: int = 10, share: float = 1.0) -> None:
    """A batch of as many answers as tokens: notes when it is admitted, holds its places for a turn of the loop."""
    async with pool.admit(name, size, size, share):
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
            async with pool.admit(name, 10, 10):
                await asyncio.sleep(seconds)

        await asyncio.gather(*(hold("deep", 0.02) for _ in range(10)))
        assert pool.accounts["deep"].longest_wait < 0.1, "the last waited ten times as long, behind its own"
        await asyncio.gather(hold("other", 0.2), hold("late", 0.0))
        assert 0.15 < pool.accounts["late"].longest_wait < 0.5

    run(work())


def test_long_answers_of_one_pipeline_make_no_room_for_more_short_ones() -> None:
    """An engine has so many places, whatever is in them; turns go by tokens all the same."""

    async def work() -> None:
        pool, inside, most = Pool(["g"], capacity=40), 0, 0

        async def batch(name: str, tokens: int) -> None:
            nonlocal inside, most
            async with pool.admit(name, 10, 10 * tokens):
                inside, most = inside + 10, max(most, inside + 10)
                await asyncio.sleep(0.001)
                inside -= 10

        await asyncio.gather(*(batch("short", 256) for _ in range(64)), *(batch("long", 4096) for _ in range(4)))
        assert most == 40

    run(work())


def test_a_finished_pipeline_gives_its_share_back() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=40), []
        await asks(pool, order, "done")
        inside = 0

        async def hold() -> None:
            nonlocal inside
            async with pool.admit("other", 10, 10):
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
        large = asyncio.create_task(asks(pool, order, "large", size=100))
        await asyncio.sleep(0)
        more = [asyncio.create_task(asks(pool, order, "small")) for _ in range(10)]
        await asyncio.gather(first, large, *more)
        assert order.index("large") == 1, "larger than the pool: admitted alone, in its turn"

    run(work())


def test_the_generator_with_the_least_to_do_is_asked() -> None:
    async def work() -> None:
        pool = Pool(["a", "b"], capacity=100)
        async with (
            pool.admit("x", 30, 30) as first,
            pool.admit("x", 10, 10) as second,
            pool.admit("y", 10, 10) as third,
        ):
            assert (first, second, third) == ("a", "b", "b")
            assert pool.outstanding == 50
        assert pool.outstanding == 0

    run(work())


def test_a_cancelled_batch_gives_its_place_back() -> None:
    async def work() -> None:
        pool, order = Pool(["g"], capacity=10), []
        async with pool.admit("x", 10, 10):
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


def test_one_that_joins_is_asked_at_once_and_its_room_counts() -> None:
    async def work() -> None:
        pool, order = Pool([], capacity=10), []
        waiting = [asyncio.create_task(asks(pool, order, "x")) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (order, pool.queue, pool.demand) == ([], 3, 3.0) and pool.lag > 0.04
        pool.join("a")
        pool.join("b")
        await asyncio.sleep(0)
        assert (order, pool.queue, pool.outstanding) == (["x", "x"], 1, 20)
        await asyncio.gather(*waiting)
        assert (pool.lag, pool.demand) == (0.0, 0.0)

    run(work())


def test_one_that_leaves_ends_its_batches_and_gets_no_more() -> None:
    async def work() -> None:
        pool = Pool(["a", "b"], capacity=20)
        async with pool.admit("x", 10, 10) as first:
            assert first == "a"
            leaving = asyncio.create_task(pool.leave("a"))
            await asyncio.sleep(0)
            assert pool.generators == ["b"] and not leaving.done()
            async with pool.admit("x", 10, 10) as second, pool.admit("x", 10, 10) as third:
                assert (second, third) == ("b", "b")
                assert pool.outstanding == 20, "what the leaving one has takes no place of the others"
        await leaving
        await pool.leave("b")  # nothing to wait for
        assert pool.generators == []

    run(work())


def test_one_that_is_held_leaves_afterwards() -> None:
    async def work() -> None:
        pool = Pool(["a"], capacity=20)
        with pool.hold("a"):
            leaving = asyncio.create_task(pool.leave("a"))
            await asyncio.sleep(0.01)
            assert pool.generators == [] and not leaving.done()
        await leaving
        with pytest.raises(LostError), pool.hold("a"):
            pass

    run(work())


def test_what_a_lost_one_was_asked_goes_to_another_before_what_its_pipeline_asked_later() -> None:
    async def work() -> None:
        pool, order = Pool(["spot"], capacity=10), []

        async def question(generator: str) -> str:
            await asyncio.sleep(0.01)
            if generator == "spot":
                raise LostError("its node is gone")
            order.append("again")
            return generator

        first = asyncio.create_task(pool.ask("x", 10, 10, question))
        await asyncio.sleep(0)
        later = [asyncio.create_task(asks(pool, order, "x")) for _ in range(3)]
        other = asyncio.create_task(asks(pool, order, "y"))
        await asyncio.sleep(0.05)
        assert pool.generators == [] and order == []
        pool.join("new")
        assert await first == "new"
        await asyncio.gather(*later, other)
        assert [one for one in order if one != "y"] == ["again", "x", "x", "x"]
        assert pool.outstanding == 0

    run(work())


def test_one_that_came_back_is_not_lost_by_a_late_answer_of_before() -> None:
    async def work() -> None:
        pool, asked = Pool(["g"], capacity=100), []

        async def question(generator: str) -> str:
            asked.append(generator)
            await asyncio.sleep(0.01 * len(asked))
            if len(asked) <= 2 and pool.accounts["late"].sampled == 0:
                raise LostError("died")
            return generator

        pool.count("late", 0)
        both = [asyncio.create_task(pool.ask("late", 10, 10, question)) for _ in range(2)]
        await asyncio.sleep(0.015)  # the first has failed, the second is under way
        assert pool.generators == []
        pool.join("g")
        assert await asyncio.gather(*both) == ["g", "g"]
        assert pool.generators == ["g"]

    run(work())


def test_a_failed_pool_tells_everyone() -> None:
    async def work() -> None:
        pool, order = Pool([], capacity=10), []
        waiting = asyncio.create_task(asks(pool, order, "x"))
        await asyncio.sleep(0)
        pool.fail(RunError("generator-0 died too often"))
        for one in (waiting, asks(pool, order, "y")):
            with pytest.raises(RunError, match="died too often"):
                await one
        assert (order, pool.queue) == ([], 0)

    run(work())


def test_what_kills_one_after_another_is_to_blame_itself() -> None:
    async def work() -> None:
        pool = Pool(["g"], capacity=4)

        async def question(generator: str) -> None:
            pool.join(generator)  # Ray starts it again
            raise LostError("died")

        with pytest.raises(RunError, match=f"{ASKED} generators died one after another over the same 2 answers"):
            await pool.ask("a", 2, 10, question)

    run(work())
