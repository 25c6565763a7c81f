"""The channel: slots bound what is under way, parts are leased in order, and a dead holder's leases go to the next."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from actors.channel import Box, Channel, Lease
from plumbline.errors import LossError, RunError


async def is_waiting(task: "asyncio.Task[Any]") -> bool:
    """Whether the task still waits after everyone has had a turn."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


def started(coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    return asyncio.get_running_loop().create_task(coroutine)


async def filled(parts: int, slots: int = 9) -> Channel:
    """A channel with parts 1 to `parts`, each boxed as its own number, and holder "a" attached."""
    channel = Channel(slots)
    for step in range(1, parts + 1):
        await channel.put(step, Box(ref=step))
    await channel.attach("a", 0)
    return channel


def test_no_more_slots_than_there_are() -> None:
    async def scenario() -> None:
        channel = Channel(2)
        await channel.reserve()
        await channel.reserve()
        third = started(channel.reserve())
        assert await is_waiting(third)
        await channel.release()
        await asyncio.wait_for(third, 1)
        fourth = started(channel.reserve())
        assert await is_waiting(fourth), "the third took the slot that came back"
        fourth.cancel()

    asyncio.run(scenario())


def test_a_released_slot_goes_to_one_waiter() -> None:
    async def scenario() -> None:
        channel = Channel(1)
        await channel.reserve()
        waiters = [started(channel.reserve()) for _ in range(3)]
        await channel.release()
        waiting = [await is_waiting(waiter) for waiter in waiters]
        assert sum(waiting) == 2
        for waiter in waiters:
            waiter.cancel()

    asyncio.run(scenario())


def test_parts_are_leased_in_order_though_they_come_in_any() -> None:
    async def scenario() -> None:
        channel = Channel(9)
        await channel.attach("a", 0)
        first = started(channel.lease("a"))
        await channel.put(2, Box(ref="two"))
        await channel.put(3, Box(ref="three"))
        assert await is_waiting(first), "part 1 is not there yet"
        await channel.put(1, Box(ref="one"))
        assert await asyncio.wait_for(first, 1) == Lease(step=1, box=Box(ref="one"), holder="a")
        leases = [await channel.lease("a"), await channel.lease("a")]
        assert [lease and lease.box.ref for lease in leases] == ["two", "three"]

    asyncio.run(scenario())


def test_a_leased_part_stays_until_it_is_acknowledged() -> None:
    async def scenario() -> None:
        channel = await filled(3)
        await channel.lease("a")
        await channel.lease("a")
        assert await channel.depth() == 3
        assert await channel.peek(2) == Box(ref=2)
        await channel.ack(2, "a")
        assert await channel.depth() == 1
        with pytest.raises(KeyError):
            await channel.peek(2)

    asyncio.run(scenario())


def test_a_dead_holders_leases_go_to_the_next() -> None:
    async def scenario() -> None:
        channel = await filled(4)
        for _ in range(3):
            await channel.lease("a")
        await channel.ack(1, "a")
        await channel.attach("b", 1)  # a's checkpoint was of step 1; it died while it worked on 2 and 3
        leases = [await channel.lease("b") for _ in range(3)]
        assert [lease and (lease.step, lease.holder) for lease in leases] == [(2, "b"), (3, "b"), (4, "b")]

    asyncio.run(scenario())


def test_what_a_checkpoint_holds_is_not_handed_out_again() -> None:
    """The holder died between saving step 2 and acknowledging it."""

    async def scenario() -> None:
        channel = await filled(3)
        await channel.lease("a")
        await channel.lease("a")
        await channel.attach("b", 2)
        assert await channel.depth() == 1
        lease = await channel.lease("b")
        assert lease is not None and lease.step == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(("done", "refused"), [(3, True), (4, False), (5, False), (6, True)])
def test_a_holder_that_goes_on_from_elsewhere_is_refused(done: int, refused: bool) -> None:
    """Part 4 is not here any more, part 6 was never handed out: either would be waited for, or left out."""

    async def scenario() -> None:
        channel = Channel(9, "ple", done=2)
        for step in (3, 4, 5, 6):
            await channel.put(step, Box(ref=step))
        await channel.attach("a", 2)
        for _ in range(3):
            await channel.lease("a")
        await channel.ack(4, "a")
        assert await channel.acknowledged() == 4
        if refused:
            told = f"the learner of ple goes on after step {done}, but up to step 4 its parts are done for good"
            with pytest.raises(RunError, match=told):
                await channel.attach("b", done)
            return
        await channel.attach("b", done)
        lease = await channel.lease("b")
        assert lease is not None and lease.step == done + 1

    asyncio.run(scenario())


def test_a_zombies_waiting_lease_gets_nothing() -> None:
    async def scenario() -> None:
        channel = await filled(0)
        zombie = started(channel.lease("a"))
        assert await is_waiting(zombie)
        await channel.attach("b", 0)
        assert await asyncio.wait_for(zombie, 1) is None
        await channel.put(1, Box(ref=1))
        assert await channel.lease("a") is None, "it has been replaced"
        lease = await channel.lease("b")
        assert lease is not None and lease.step == 1

    asyncio.run(scenario())


def test_a_zombies_late_acknowledgement_is_ignored() -> None:
    async def scenario() -> None:
        channel = await filled(2)
        await channel.lease("a")
        await channel.attach("b", 0)
        await channel.ack(2, "a")
        assert await channel.depth() == 2
        lease = await channel.lease("b")
        assert lease is not None and lease.step == 1

    asyncio.run(scenario())


def test_a_closed_channel_is_emptied_first() -> None:
    async def scenario() -> None:
        channel = await filled(2)
        await channel.close()
        assert [lease and lease.step for lease in [await channel.lease("a") for _ in range(3)]] == [1, 2, None]

    asyncio.run(scenario())


def test_closing_ends_a_wait() -> None:
    async def scenario() -> None:
        channel = await filled(0)
        waiting = started(channel.lease("a"))
        assert await is_waiting(waiting)
        await channel.close()
        assert await asyncio.wait_for(waiting, 1) is None

    asyncio.run(scenario())


def test_a_closed_channel_still_serves_a_holder_that_comes_later() -> None:
    async def scenario() -> None:
        channel = await filled(2)
        await channel.close()
        for _ in range(2):
            await channel.lease("a")
        await channel.ack(1, "a")
        await channel.attach("b", 1)
        assert [lease and lease.step for lease in [await channel.lease("b") for _ in range(2)]] == [2, None]

    asyncio.run(scenario())


def test_a_failure_reaches_all_who_wait_and_all_who_come() -> None:
    async def scenario() -> None:
        channel = Channel(1)
        await channel.reserve()
        await channel.attach("a", 0)
        waiting = [started(channel.lease("a")), started(channel.reserve())]
        assert await is_waiting(waiting[0]) and await is_waiting(waiting[1])
        await channel.fail(LossError("the loss became nan"))
        for call in (*waiting, channel.lease("a"), channel.reserve()):
            with pytest.raises(LossError, match="became nan"):
                await asyncio.wait_for(call, 1)

    asyncio.run(scenario())
