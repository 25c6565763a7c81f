"""How a run of a method ends: which failure is raised, what is tried again, and that nothing is left waiting."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import loop
from pipelines.loop import beside_learner, first_of, mended
from plumbline.errors import LossError, LostError, RunError


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


class Screen:
    """Of a context, what `mended` needs; it keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events = SimpleNamespace(say=self.said.append)
        self.fleet = SimpleNamespace(restored=self._restored)

    async def _restored(self) -> None:
        self.said.append("restored")


def attempts(failures: list[Exception], max_failures: int = 2) -> tuple[int, list[str]]:
    """How often `mended` tried, where its attempts end in these, and then well; and what it said."""
    section: Any = SimpleNamespace(name="ple", learner=SimpleNamespace(max_failures=max_failures))
    screen: Any = Screen()
    made = 0

    async def attempt() -> None:
        nonlocal made
        made += 1
        if failures:
            raise failures.pop(0)

    asyncio.run(mended(screen, section, attempt))
    return made, screen.said


def test_a_lost_process_is_mended_from_the_checkpoint_and_told() -> None:
    made, said = attempts([LostError("the process run/channel-ple-0 died")])
    assert made == 2
    assert said == ["ple goes on from its newest checkpoint: the process run/channel-ple-0 died", "restored"]


def test_it_is_mended_no_more_often_than_max_failures() -> None:
    with pytest.raises(LostError, match="third"):
        attempts([LostError("first"), LostError("second"), LostError("third")])


def test_what_would_happen_again_is_not_tried_again() -> None:
    with pytest.raises(LossError):
        attempts([LossError("nan")])


def stop(learner_ends: bool, error: Exception) -> tuple[list[str], BaseException]:
    """What the learner's channel and desk were told when a stage failed, and what was raised."""
    told: list[str] = []

    class Asked:
        """A channel or a desk; the first of them is dead."""

        def __init__(self) -> None:
            self.fail = SimpleNamespace(remote=self._fail)

        async def _fail(self, why: Exception) -> None:
            told.append(str(why))
            if len(told) == 1:
                raise LostError("dead")

    async def scenario() -> None:
        learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if learner_ends:
            asyncio.get_running_loop().call_later(0.05, learner.set_result, None)
        await beside_learner(learner, [Asked(), Asked()], fails(error), forever())

    with pytest.raises(RunError) as raised:
        asyncio.run(scenario())
    return told, raised.value


def test_before_another_learner_starts_the_old_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LEARNER_ENDS_S", 0.2)
    told, raised = stop(True, LostError("the channel died"))
    assert isinstance(raised, LostError)
    assert told == ["the pipeline has ended: the channel died"] * 2
    _, raised = stop(False, LostError("the channel died"))
    assert not isinstance(raised, LostError)
    assert str(raised) == "its learner did not end after this: the channel died"
