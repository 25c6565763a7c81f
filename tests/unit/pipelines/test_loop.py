"""How a run of a method ends: which failure is raised, and that nothing is left waiting."""

import asyncio
from typing import Any

import pytest

from pipelines.loop import first_of
from plumbline.errors import LossError, RunError


async def forever() -> None:
    await asyncio.Event().wait()


async def fails(error: Exception) -> None:
    raise error


def run(*stages: Any, learner: Exception | None = None, ends: bool = True) -> None:
    async def scenario() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if learner is not None:
            future.set_exception(learner)
        elif ends:
            future.set_result(None)
        await asyncio.wait_for(first_of(future, *stages), timeout=5)

    asyncio.run(scenario())


def test_it_ends_when_stages_and_learner_do() -> None:
    run(asyncio.sleep(0), asyncio.sleep(0.01))


def test_a_dead_learner_ends_stages_that_would_wait_for_ever() -> None:
    with pytest.raises(RunError, match="died too often"):
        run(forever(), forever(), learner=RunError("died too often"))


def test_a_failing_stage_ends_the_others_and_a_learner_that_goes_on() -> None:
    with pytest.raises(LossError):
        run(forever(), fails(LossError("nan")), ends=False)


def test_the_stage_says_more_than_the_learners_end() -> None:
    with pytest.raises(LossError):
        run(fails(LossError("nan")), forever(), learner=RunError("ended"))


def test_a_failure_inside_a_group_of_tasks_is_raised_as_itself() -> None:
    async def grouped() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forever())
            tasks.create_task(fails(LossError("nan")))

    with pytest.raises(LossError):
        run(grouped(), ends=False)
