"""What a reward that fails costs: a batch of answers at a time, and the pipeline where it is too many of them."""

from collections import deque

from actors.scorer import Scores
from pipelines.context import Context
from plumbline.config.data import Reward
from plumbline.errors import RunError

WINDOW = 100
"""Batches that the share of failed ones is taken over, the last ones."""
LEAST = 20
"""As how many they count at least: what fails in the first batch alone is no share of anything yet."""


class RewardWatch:
    """Counts the batches that one reward failed on, for one who asks it.

    Args:
        name: who asks, for messages.
        key: the reward's in the config.
    """

    def __init__(self, context: Context, name: str, reward: Reward | None, key: str = "reward") -> None:
        self._context, self._name, self._key = context, name, key
        self._most = reward.max_failed if reward else 0.0
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def look(self, scores: Scores) -> list[list[float]]:
        """Its values; where the reward failed all are nan, and it is said.

        Raises:
            RunError: it failed on more than `max_failed` of its last batches.
        """
        self._failed.append(bool(scores.failure))
        if scores.failure:
            count, of = sum(self._failed), len(self._failed)
            if count > self._most * max(of, LEAST):
                raise RunError(
                    f"{self._key} failed on {count} of its last {of} batches, which is more than "
                    f"{self._key}.max_failed ({self._most:g}) lets pass: {scores.failure}"
                )
            self._context.events.say(
                f"{self._name}: {self._key} failed twice on {len(scores.values)} answers' batch, which goes on without "
                f"scores: {scores.failure}"
            )
        return scores.values
