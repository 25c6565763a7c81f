"""PLE (METHODS.md §3): an answer with and one without a principle, both scored, a ranking and a weighted-SFT loss.

Wiring only: what is drawn, asked and kept. The stages are `pipelines.loop`'s, the loss is
`plumbline.methods.losses.ple_loss`.
"""

import math
from collections.abc import Sequence

from pipelines.context import Context
from pipelines.method import Method, Rollout, Row, rejected_row
from plumbline.config.pipelines import Ple
from plumbline.data.prompting import principle_text
from plumbline.records import Completion, PolicyRef, Prompt, Sample
from plumbline.runs.rollouts import PLE_SCHEMA, part_means, ple_row, ple_sample


class PleMethod(Method):
    """Online: the newest proved policy answers, at most `max_staleness` versions behind."""

    def __init__(self, context: Context, section: Ple) -> None:
        super().__init__(context, section, "rollouts", PLE_SCHEMA, context.rows.fits[section.name])
        self._ple = section
        self._principle = principle_text(section.principle)

    def ref(self, proved: int) -> PolicyRef:
        """The newest version that all generators serve."""
        return PolicyRef(policy=self.name, version=proved)

    async def _roll_chunk(self, step: int, ref: PolicyRef, prompts: Sequence[Prompt]) -> Rollout:
        """Two answers a prompt; both scored against the plain query."""
        asked = await self._requests(step, prompts, ref, {"plain": None, "guided": self._principle})
        queries = [query for query in self._queries(prompts) for _ in range(2)]
        answers, *found = await self._generated(asked, *self._score_calls(queries))
        scored = self.reward.look(found)
        assert scored is not None
        scores = scored.values
        rows, rejected = [], []
        for i, prompt in enumerate(prompts):
            plain, guided = answers[2 * i], answers[2 * i + 1]
            rewards = (scores[2 * i][0], scores[2 * i + 1][0])
            # A pair goes into the part, or into the rejected with a reason (METHODS.md §4).
            failure = scored.failure(2 * i) or scored.failure(2 * i + 1)
            if reason := unusable((plain.completions[0], guided.completions[0]), rewards, failure):
                rejected.append(rejected_row(step, prompt, *reason))
                continue
            rows.append(
                ple_row(
                    step=step,
                    prompt=prompt,
                    prompt_ids=asked[2 * i].prompt_ids,
                    plain=plain.completions[0],
                    guided=guided.completions[0],
                    rewards=rewards,
                    parts=(scored.parts(2 * i, 0), scored.parts(2 * i + 1, 0)),
                    version=plain.ref.version,
                    staleness=step - 1 - plain.ref.version,
                    engine=plain.engine,
                )
            )
        return Rollout(rows=rows, rejected=rejected, tokens=sum(one.tokens for one in answers))

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """See `plumbline.runs.rollouts.ple_sample`."""
        return [ple_sample(row) for row in rows]

    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean rewards, their gap, the share above the present τ, and the staleness of a part."""
        if not rows:
            return {}
        tau = self._ple.tau0 * self._ple.alpha ** (rows[0]["step"] - 1)
        gaps = [row["guided_reward"] - row["plain_reward"] for row in rows]
        return {
            "reward_plain": sum(row["plain_reward"] for row in rows) / len(rows),
            "reward_guided": sum(row["guided_reward"] for row in rows) / len(rows),
            "gap": sum(gaps) / len(gaps),
            "rank_share_new": sum(gap > tau for gap in gaps) / len(gaps),
            "staleness": float(max(row["staleness"] for row in rows)),
            **part_means(rows, reward_plain="plain_reward", reward_guided="guided_reward"),
        }


def unusable(
    answers: tuple[Completion, Completion], rewards: tuple[float, float], failure: str = ""
) -> tuple[str, str] | None:
    """Why a pair of answers cannot be learnt from, and a detail; None where it can (METHODS.md §4).

    Args:
        failure: why the reward did not score some answers.
    """
    for kind, answer, reward in zip(("plain", "guided"), answers, rewards, strict=True):
        if not answer.text.strip():
            return "blank answer", kind
        if not math.isfinite(reward):
            return ("reward failed", failure) if failure else ("reward not finite", f"{kind}: {reward}")
    return ("identical answers", "") if answers[0].ids == answers[1].ids else None
