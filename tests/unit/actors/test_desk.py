"""The desk: questions wait for the learner, go to its successor where it died, and never to one that has ended."""

import asyncio
from typing import Any

import pytest

from actors.desk import Desk, Question
from plumbline.errors import LossError, PlumblineError, RunError
from plumbline.records import TokenGroup

GROUPS = [TokenGroup([1], [[2]])]
COUNTS = {"hits": 1, "misses": 2}


async def asked(desk: Desk, count: int = 1) -> "list[asyncio.Task[Any]]":
    """Questions in order, of which the i-th has i prompts."""
    tasks = []
    for i in range(1, count + 1):
        tasks.append(asyncio.create_task(desk.logps(GROUPS * i)))
        await asyncio.sleep(0)
    return tasks


async def taken(desk: Desk, holder: str) -> Question:
    question = await asyncio.wait_for(desk.take(holder), 1)
    assert question is not None
    return question


def test_questions_are_answered_each_its_own_in_any_order() -> None:
    async def scenario() -> None:
        desk = Desk("dlma")
        await desk.attach("a")
        waiting = asyncio.create_task(desk.take("a"))
        contrast = asyncio.create_task(desk.contrast_logps(["p"], [], eos=True))
        one = await asyncio.wait_for(waiting, 1)
        assert one is not None and (one.method, one.arguments, one.options) == (
            "contrast_logps",
            (["p"], []),
            {"eos": True},
        )
        [logps] = await asked(desk)
        two = await taken(desk, "a")
        assert (two.method, two.arguments, two.options) == ("logps", (GROUPS,), {})
        await desk.answer(two.number, "a", [[-1.0]], COUNTS)
        assert await asyncio.wait_for(logps, 1) == [[-1.0]] and not contrast.done()
        await desk.answer(one.number, "a", ["c"], COUNTS)
        assert await asyncio.wait_for(contrast, 1) == ["c"]
        assert await desk.counts() == {"hits": 2, "misses": 4}

    asyncio.run(scenario())


def test_what_a_dead_learner_had_taken_goes_to_the_next_first_and_in_order() -> None:
    async def scenario() -> None:
        desk = Desk("dlma")
        tasks = await asked(desk, 3)
        await desk.attach("dead")
        early = [await taken(desk, "dead") for _ in range(2)]
        await desk.attach("b")
        await desk.answer(early[0].number, "dead", "late", COUNTS)
        again = [await taken(desk, "b") for _ in range(3)]
        assert [len(question.arguments[0]) for question in again] == [1, 2, 3]
        for question in again:
            await desk.answer(question.number, "b", question.number, COUNTS)
        assert await asyncio.gather(*tasks) == [question.number for question in again]
        assert await desk.counts() == {"hits": 3, "misses": 6}, "the late answer counts nothing"

    asyncio.run(scenario())


def test_a_replaced_learner_gets_no_question() -> None:
    async def scenario() -> None:
        desk = Desk("dlma")
        await desk.attach("a")
        zombie = asyncio.create_task(desk.take("a"))
        await asyncio.sleep(0)
        await desk.attach("b")
        assert await asyncio.wait_for(zombie, 1) is None
        [task] = await asked(desk)
        assert await desk.take("a") is None
        await desk.close("a")
        question = await taken(desk, "b")
        await desk.answer(question.number, "b", "yes", COUNTS)
        assert await asyncio.wait_for(task, 1) == "yes"

    asyncio.run(scenario())


def test_who_asks_of_a_failed_or_ended_learner_gets_the_reason() -> None:
    async def reasons(*ends: PlumblineError | None) -> list[PlumblineError]:
        desk = Desk("dlma")
        await desk.attach("a")
        tasks = await asked(desk, 2)
        question = await taken(desk, "a")
        for error in ends:
            await (desk.close("a") if error is None else desk.fail(error))
        await desk.answer(question.number, "a", "too late", COUNTS)
        found = await asyncio.wait_for(asyncio.gather(*tasks, *await asked(desk), return_exceptions=True), 1)
        with pytest.raises(PlumblineError):
            await desk.take("a")
        return found  # type: ignore[return-value]

    loss = LossError("the loss became nan")
    assert asyncio.run(reasons(loss)) == [loss] * 3
    assert asyncio.run(reasons(loss, RunError("dlma has ended: the loss became nan"))) == [loss] * 3, (
        "the first says most"
    )
    assert [str(error) for error in asyncio.run(reasons(None))] == [
        "the learner of dlma has ended, it answers no more"
    ] * 3


def test_an_answer_to_somebody_who_left_is_dropped() -> None:
    async def scenario() -> None:
        desk = Desk("dlma")
        await desk.attach("a")
        gone, stays = await asked(desk, 2)
        questions = [await taken(desk, "a") for _ in range(2)]
        gone.cancel()
        await asyncio.sleep(0)
        for question in questions:
            await desk.answer(question.number, "a", "yes", COUNTS)
        assert await asyncio.wait_for(stays, 1) == "yes"

    asyncio.run(scenario())
