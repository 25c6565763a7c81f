"""PLE (METHODS.md §3): an answer with and one without a principle, both scored, a ranking and a weighted-SFT loss.

Wiring only: what is drawn, asked and kept. The stages are `pipelines.loop`'s, the loss is `plumbline.losses.ple_loss`.
"""

import math
import random
import zlib
from collections.abc import Sequence

from actors.scorer import Query
from actors.spawn import gather
from pipelines.context import Context
from pipelines.loop import Rollout, Row, batch_count, run_method
from plumbline.config import Ple
from plumbline.lengths import prompt_lengths
from plumbline.parts import Parts, Rejected
from plumbline.prompting import principle_text, render
from plumbline.records import Completion, GenerateRequest, Generation, PolicyRef, Prompt, Sample, Sampling
from plumbline.rollouts import PLE_SCHEMA, ple_row, ple_sample, prompt_text


async def run_ple(context: Context, section: Ple) -> None:
    """Run PLE to its last step. Raises what `loop.run_method` raises."""
    method = PleMethod(context, section)
    await run_method(context, method, context.learner_spec(section, method.total, "adapter"))


class PleMethod:
    """What PLE draws, asks and keeps."""

    def __init__(self, context: Context, section: Ple) -> None:
        self._context = context
        self._section = section
        self._principle = principle_text(section.principle)
        directory = context.run_dir / "rollouts" / section.name
        self.parts = Parts(str(directory), PLE_SCHEMA)
        self.rejected = Rejected(str(directory / "rejected.parquet"))
        self._prompts, too_long = self._fitting(context.prompts)
        if not self.rejected.rows():
            self.rejected.add(0, too_long)
        self.name = section.name
        self.slots = section.max_staleness + 1
        self.total = section.steps or batch_count(len(self._prompts), section.batch_size)
        batch_count(len(self._prompts), section.batch_size)
        self._sampling = Sampling(
            max_tokens=section.generation.max_tokens,
            temperature=section.generation.temperature,
            top_p=section.generation.top_p,
            stop=tuple(section.generation.stop),
        )

    async def roll_out(self, step: int, ref: PolicyRef) -> Rollout:
        """Two answers a prompt, from one request batch a generator; both scored against the plain query."""
        prompts = self._draw(step)
        generators, scorers = self._context.fleet.generators, self._context.fleet.scorer
        shards = [prompts[i :: len(generators)] for i in range(len(generators))]
        asked = []
        for i, shard in enumerate(shards):
            generations = generators[i].generate.remote([r for p in shard for r in self._requests(step, p, ref)])
            queries = [Query(messages=p.messages, extra=dict(p.extra)) for p in shard for _ in range(2)]
            asked += [generations, scorers[i % len(scorers)].score_generations.remote(queries, generations)]
        answers = await gather(*asked)
        rows, rejected, tokens = [], [], 0
        for shard, generations, scores in zip(shards, answers[::2], answers[1::2], strict=True):
            for i, prompt in enumerate(shard):
                plain, guided = generations[2 * i], generations[2 * i + 1]
                tokens += len(plain.completions[0].ids) + len(guided.completions[0].ids)
                rewards = (scores[2 * i][0], scores[2 * i + 1][0])
                # A pair goes into the part, or into the rejected with a reason (METHODS.md §4).
                if reason := unusable((plain.completions[0], guided.completions[0]), rewards):
                    rejected.append(rejected_row(step, prompt, *reason))
                else:
                    rows.append(self._row(step, prompt, plain, guided, rewards))
        return Rollout(rows=rows, rejected=rejected, tokens=tokens)

    def sample(self, row: Row) -> Sample:
        """See `plumbline.rollouts.ple_sample`."""
        return ple_sample(row)

    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean rewards, their gap, the share above the present τ, and the staleness of a part."""
        if not rows:
            return {}
        step = rows[0]["step"]
        tau = self._section.tau0 * self._section.alpha ** (step - 1)
        gaps = [row["guided_reward"] - row["plain_reward"] for row in rows]
        return {
            "reward_plain": sum(row["plain_reward"] for row in rows) / len(rows),
            "reward_guided": sum(row["guided_reward"] for row in rows) / len(rows),
            "gap": sum(gaps) / len(gaps),
            "rank_share_new": sum(gap > tau for gap in gaps) / len(gaps),
            "staleness": float(max(row["staleness"] for row in rows)),
        }

    def _draw(self, step: int) -> list[Prompt]:
        """The step's prompts: the same at every call, each once a pass, in an order that changes with the pass."""
        size, count = self._section.batch_size, len(self._prompts)
        per_pass = batch_count(count, size)
        pass_, position = divmod(step - 1, per_pass)
        order = list(range(count))
        random.Random(f"{self._context.config.seed}-{self.name}-{pass_}").shuffle(order)
        return [self._prompts[i] for i in order[position * size : (position + 1) * size]]

    def _requests(self, step: int, prompt: Prompt, ref: PolicyRef) -> list[GenerateRequest]:
        """The plain request, then the guided one."""
        return [
            GenerateRequest(
                key=f"{step}/{prompt.id}/{kind}",
                prompt_ids=render(self._context.tokenizer, prompt.messages, principle=principle),
                ref=ref,
                sampling=self._sampling,
                seed=zlib.crc32(f"{self._context.config.seed}/{self.name}/{step}/{prompt.id}/{kind}".encode()) >> 1,
            )
            for kind, principle in (("plain", None), ("guided", self._principle))
        ]

    def _row(
        self, step: int, prompt: Prompt, plain: Generation, guided: Generation, rewards: tuple[float, float]
    ) -> dict[str, object]:
        return ple_row(
            step=step,
            prompt=prompt,
            prompt_ids=render(self._context.tokenizer, prompt.messages),
            plain=plain.completions[0],
            guided=guided.completions[0],
            rewards=rewards,
            version=plain.ref.version,
            staleness=step - 1 - plain.ref.version,
            engine=plain.engine,
        )

    def _fitting(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[dict[str, object]]]:
        """Prompts within the limit, and the rejected rows of the others."""
        config, tokenizer, tokens = self._context.config, self._context.tokenizer, self._section.generation.max_tokens
        fitting, too_long = [], []
        for prompt in prompts:
            lengths = prompt_lengths(config, tokenizer, prompt, self._principle, tokens)
            if lengths.fit:
                fitting.append(prompt)
            else:
                too_long.append(rejected_row(0, prompt, "prompt too long", str(lengths)))
        return fitting, too_long


def unusable(answers: tuple[Completion, Completion], rewards: tuple[float, float]) -> tuple[str, str] | None:
    """Why a pair of answers cannot be learnt from, and a detail; None where it can (METHODS.md §4)."""
    for kind, answer, reward in zip(("plain", "guided"), answers, rewards, strict=True):
        if not answer.text.strip():
            return "blank answer", kind
        if not math.isfinite(reward):
            return "reward not finite", f"{kind}: {reward}"
    return ("identical answers", "") if answers[0].ids == answers[1].ids else None


def rejected_row(step: int, prompt: Prompt, reason: str, detail: str) -> dict[str, object]:
    """One row of `rejected.parquet`."""
    return {"step": step, "prompt_id": prompt.id, "prompt": prompt_text(prompt), "reason": reason, "detail": detail}
