"""What a reward that fails costs: the answers that it failed on, and the pipeline where it is too many of them."""

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
    """Counts what one reward failed on, for one who asks it.

    Args:
        name: who asks, for messages.
        key: the reward's in the config.
    """

    def __init__(self, context: Context, name: str, reward: Reward | None, key: str = "reward") -> None:
        self._context, self._name, self._key = context, name, key
        self._most = reward.max_failed if reward else 0.0
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
