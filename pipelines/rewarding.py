"""Where scores are asked for: one reward or the parts of a sum, and what it costs where one of them fails: the answers
that it failed on, and the pipeline where it is too many of them.

A method and an evaluation have a `Rewarding` each.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.scorer import Scores
from pipelines.context import Context
from plumbline.config.data import Reward, SingleReward, SumReward, reward_parts
from plumbline.errors import RunError

WINDOW = 100
"""Batches that the share of failed ones is taken over, the last ones."""
LEAST = 20
"""As how many they count at least: what fails in the first batch alone is no share of anything yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a reward gave: `values` one list a query, one a answer, nan for a blank one and where a part failed.

    `given` is what each part gave, before its weight, by its name; of a reward that is no sum, itself.
    """

    values: list[list[float]]
    given: Mapping[str, Scores]
    summed: bool

    def parts(self, query: int, answer: int) -> dict[str, float]:
        """What each part of a sum gave to one answer; nothing of a reward that is none."""
        return {name: one.values[query][answer] for name, one in self.given.items()} if self.summed else {}

    def failure(self, query: int) -> str:
        """Why an answer to a query has no score, or "" where nothing failed."""
        for name, one in self.given.items():
            if one.failure and any(map(math.isnan, one.values[query])):
                return f"{name}: {one.failure}" if self.summed else one.failure
        return ""


class Rewarding:
    """A reward of the config, for one who asks it.

    Args:
        name: who asks, for messages.
        key: the reward's in the config.
    """

    def __init__(self, context: Context, name: str, reward: Reward | None, key: str = "reward") -> None:
        self._context, self._summed = context, isinstance(reward, SumReward)
        self._parts = reward_parts(reward, key)
        self._watches = [RewardWatch(context, name, part.reward, key) for key, part in self._parts.items()]

    @property
    def names(self) -> list[str]:
        """Of a sum's parts; none of a reward that is no sum."""
        return [part.name for part in self._parts.values()] if self._summed else []

    def scorers(self) -> list[Any]:
        """Whom to ask about every answer: one for each part, whose replicas take turns. None without a reward."""
        replicas = [self._context.fleet.rewards[key] for key in self._parts]
        return list(self._context.pick(list(zip(*replicas, strict=True)))) if replicas else []

    def look(self, found: Sequence[Scores]) -> Scored | None:
        """What the scores of all `scorers` come to; None where there are none.

        Raises:
            RunError: a part failed on more than its `max_failed` of its last batches' answers.
        """
        if not found:
            return None
        parts = list(self._parts.values())
        given = [watch.look(one) for watch, one in zip(self._watches, found, strict=True)]

        def weighed(scores: Sequence[float]) -> float:
            return sum(part.weight * score for part, score in zip(parts, scores, strict=True))

        return Scored(
            values=[list(map(weighed, zip(*query, strict=True))) for query in zip(*given, strict=True)],
            given={part.name: one for part, one in zip(parts, found, strict=True)},
            summed=self._summed,
        )


class RewardWatch:
    """Counts what one reward, or one part of a sum, failed on; see `Rewarding`."""

    def __init__(self, context: Context, name: str, reward: SingleReward, key: str) -> None:
        self._context, self._name, self._key = context, name, key
        self._most = reward.max_failed
        self._failed: deque[float] = deque(maxlen=WINDOW)  # the share of each batch

    def look(self, scores: Scores) -> list[list[float]]:
        """Its values; where the reward failed they are nan, and it is said.

        Raises:
            RunError: it failed on more than `max_failed` of its last batches' answers.
        """
        count = sum(map(len, scores.values))
        self._failed.append(scores.failed / max(count, 1))
        if scores.failure:
            lost, of = sum(self._failed), len(self._failed)
            if lost > self._most * max(of, LEAST):
                raise RunError(
                    f"{self._key} failed on {lost / of:.0%} of the answers of its last {of} batches, which is more "
                    f"than {self._key}.max_failed ({self._most:g}) lets pass: {scores.failure}"
                )
            self._context.events.say(
                f"{self._name}: {self._key} failed on {scores.failed} of {count} answers, which go on without scores: "
                f"{scores.failure}"
            )
        return scores.values
