"""RAFT, a baseline (METHODS.md §3): supervised fine-tuning on the best of several answers of π0, by the reward."""

import math
import statistics
from collections.abc import Sequence

from pipelines.context import Context
from pipelines.method import Method, Rollout, Row, rejected_row
from plumbline.config.pipelines import Raft
from plumbline.records import PolicyRef, Prompt, Sample
from plumbline.runs.rollouts import BEST_SCHEMA, best_row, best_sample, part_means


class RaftMethod(Method):
    """The best answer a prompt."""

    def __init__(self, context: Context, section: Raft) -> None:
        super().__init__(context, section, "rollouts", BEST_SCHEMA, context.rows.fits[section.name])
        self._samples = section.samples

    async def _roll_chunk(self, step: int, ref: PolicyRef, prompts: Sequence[Prompt]) -> Rollout:
        asked = await self._requests(step, prompts, ref, {"sample": None}, n=self._samples)
        drawn, *found = await self._generated(asked, *self._score_calls(self._queries(prompts)))
        scored = self.reward.look(found)
        assert scored is not None
        rows, rejected = [], []
        for number, (request, prompt, generation) in enumerate(zip(asked, prompts, drawn, strict=True)):
            own = scored.values[number]
            usable = [i for i, score in enumerate(own) if math.isfinite(score)]  # a blank answer's is not
            if not usable:
                failure = scored.failure(number)
                reason = ("reward failed", failure) if failure else ("no answer with a finite reward",)
                rejected.append(rejected_row(step, prompt, *reason))
                continue
            best = max(usable, key=lambda i: own[i])
            rows.append(
                best_row(
                    step=step,
                    prompt=prompt,
                    prompt_ids=request.prompt_ids,
                    best=generation.completions[best],
                    rewards=[own[i] for i in usable],
                    parts=[scored.parts(number, i) for i in usable],
                    engine=generation.engine,
                )
            )
        return Rollout(rows=rows, rejected=rejected, tokens=sum(one.tokens for one in drawn))

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """See `plumbline.runs.rollouts.best_sample`."""
        return [best_sample(row) for row in rows]

    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean reward of the best answers, and of all that were drawn."""
        if not rows:
            return {}
        return {
            "reward_best": statistics.fmean(row["reward"] for row in rows),
            "reward_mean": statistics.fmean(reward for row in rows for reward in row["rewards"]),
            **part_means(rows, reward_best="reward", reward_mean="rewards"),
        }
