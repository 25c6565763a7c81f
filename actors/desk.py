"""Where a pipeline asks its own learner for π0's log-probs: the learner's model without the adapter is π0.

A pipeline asks as it asks a `Reference`. The learner takes a question while it waits for a part and between
micro-batches. What a dead holder had taken goes to the next one that attaches, as the parts of a channel do.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plumbline.errors import PlumblineError, RunError
from plumbline.records import Generation, TokenGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A call of `actors.frozen_logps.FrozenLogps`: the name of its method, and what it is called with."""

    number: int
    method: Literal["logps", "contrast_logps"]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


class Desk:
    """Many who ask, one holder at a time who answers. `pipeline` is whose learner that is, for messages."""

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._numbers = itertools.count(1)
        self._holder: str | None = None
        self._waiting: deque[Question] = deque()
        self._taken: dict[int, Question] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._counts = {"hits": 0, "misses": 0}
        self._failure: PlumblineError | None = None
        self._changed = asyncio.Condition()

    async def logps(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """See `FrozenLogps.logps`. Waits for the learner; raises what it failed with."""
        return await self._ask("logps", groups)

    async def contrast_logps(self, prompts: Sequence[Any], generations: Sequence[Generation], *, eos: bool) -> Any:
        """See `FrozenLogps.contrast_logps`. Waits for the learner; raises what it failed with."""
        return await self._ask("contrast_logps", prompts, generations, eos=eos)

    async def counts(self) -> dict[str, int]:
        """`hits` and `misses` of the cache, in responses, over all answers."""
        return self._counts

    async def attach(self, holder: str) -> None:
        """A learner (re)starts: it alone takes questions from now on, first those that were taken and not answered."""
        async with self._changed:
            self._holder = holder
            self._waiting.extendleft(reversed(self._taken.values()))
            self._taken.clear()
            self._changed.notify_all()

    async def take(self, holder: str) -> Question | None:
        """The oldest question that is not taken, waiting for it; None once `holder` was replaced."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or holder != self._holder or self._waiting)
            self._raise_failure()
            if holder != self._holder:
                return None
            question = self._waiting.popleft()
            self._taken[question.number] = question
            return question

    async def answer(self, number: int, holder: str, answer: Any, counts: Mapping[str, int]) -> None:
        """What a question came to, and by how much it moved `counts`. From anybody but the holder it is ignored."""
        if holder != self._holder or self._taken.pop(number, None) is None:
            return
        self._counts = {key: value + counts[key] for key, value in self._counts.items()}
        asked = self._answers.get(number)  # who asked may be gone, or know of a failure
        if asked and not asked.done():
            asked.set_result(answer)

    async def close(self, holder: str) -> None:
        """The holder has trained on all that there was, and is asked nothing more."""
        if holder == self._holder:
            await self.fail(RunError(f"the learner of {self._pipeline} has ended, it answers no more"))

    async def fail(self, error: PlumblineError) -> None:
        """Everyone who waits, now or later, gets `error`; the first one stays."""
        async with self._changed:
            self._failure = self._failure or error
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(self._failure)
            self._changed.notify_all()

    async def _ask(self, method: Literal["logps", "contrast_logps"], *arguments: Any, **options: Any) -> Any:
        async with self._changed:
            self._raise_failure()
            number = next(self._numbers)
            answer = self._answers[number] = asyncio.get_running_loop().create_future()
            self._waiting.append(Question(number=number, method=method, arguments=arguments, options=options))
            self._changed.notify_all()
        try:
            return await answer
        finally:
            del self._answers[number]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
