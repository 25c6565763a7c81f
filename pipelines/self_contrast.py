"""Self-Contrast (METHODS.md §2): negatives among many answers of π0, those least like the target, multi-negative DPO.

Wiring only. The same pipeline is SPIN (one sample, no filter) and DPO on given pairs (`pairs`): only where a prompt's
positive and negatives come from differs.
"""

import random
import statistics
import zlib
from collections.abc import Sequence
from itertools import islice

from actors.spawn import gather
from pipelines.context import Context
from pipelines.method import Method, Rollout, Row, rejected_row
from pipelines.offline import OfflinePairs
from plumbline.config.pipelines import SelfContrast
from plumbline.config.section import planned
from plumbline.data.ending import strip_stop
from plumbline.methods.evaluation import data_accuracy
from plumbline.methods.selection import select_negatives
from plumbline.records import Generation, PolicyRef, Prompt, Sample, TokenGroup
from plumbline.runs.pairs import PAIR_SCHEMA, Answer, pair_rows, pair_samples, prompts_of, values
from plumbline.runs.preferences import is_parts, usable_rejected
from plumbline.runs.rollouts import part_means


class SelfContrastMethod(Method):
    """A positive and m negatives a prompt."""

    def __init__(self, context: Context, section: SelfContrast) -> None:
        self._contrast = section
        given = section.pairs if section.pairs and is_parts(section.pairs) else None
        self._offline = OfflinePairs(context, given, section.negatives) if given else None
        fit = self._offline.fit if self._offline else context.rows.fits[section.name]
        super().__init__(context, section, "pairs", PAIR_SCHEMA, fit)

    async def _roll_chunk(self, step: int, ref: PolicyRef, prompts: Sequence[Prompt]) -> Rollout:
        if self._offline:
            return self._offline.rollout(step, prompts)
        if self._contrast.pairs:
            return await self._of_preferences(step, prompts)
        return await self._of_samples(step, ref, prompts)

    async def _of_samples(self, step: int, ref: PolicyRef, prompts: Sequence[Prompt]) -> Rollout:
        """R samples a prompt from one request; the positive is the target, up to a stop string as samples are."""
        settings = self._contrast
        asked = await self._requests(step, prompts, ref, {"sample": None}, n=settings.samples)
        targets = [strip_stop(prompt.target or "", self._sampling.stop) for prompt in prompts]
        then = []
        if settings.filter:
            embedder = self._context.pick(self._context.fleet.embedder)
            then.append(lambda drawn: embedder.similarities.remote(targets, drawn))
        drawn, *similarities = await self._generated(asked, *then)
        positives = await self._answers(targets)
        groups: list[tuple[Prompt, list[int], list[Answer]]] = []
        rejected = []
        for i, prompt in enumerate(prompts):
            picked = self._negatives(step, prompt, targets[i], drawn[i], similarities[0][i] if similarities else None)
            if not targets[i].strip():
                rejected.append(rejected_row(step, prompt, "blank target", "nothing stands before its stop string"))
            elif picked:
                groups.append((prompt, asked[i].prompt_ids, [positives[i], *picked]))
            else:
                detail = f"fewer than {settings.negatives} usable ones among {settings.samples} samples"
                rejected.append(rejected_row(step, prompt, "too few negatives", detail))
        rows = await self._rows(step, groups, engine=drawn[0].engine)
        return Rollout(rows=rows, rejected=rejected, tokens=sum(one.tokens for one in drawn))

    def _negatives(
        self, step: int, prompt: Prompt, target: str, drawn: Generation, similarities: Sequence[float] | None
    ) -> list[Answer]:
        """m of the samples, filtered or not; none where fewer can be used (METHODS.md §2)."""
        settings, completions = self._contrast, drawn.completions
        seed = zlib.crc32(f"{self._context.config.seed}/{self._luck}/{step}/{prompt.id}/negatives".encode())
        texts = [one.text for one in completions]
        if similarities is not None:
            chosen = select_negatives(
                similarities, texts, target, keep=settings.keep, count=settings.negatives, seed=seed
            )
        else:
            first = {text: i for i, text in reversed(list(enumerate(texts))) if text.strip() and text != target}
            pool = sorted(first.values())
            chosen = random.Random(seed).sample(pool, settings.negatives) if len(pool) >= settings.negatives else []
        return [
            Answer(
                text=completions[i].text,
                ids=completions[i].ids,
                finish_reason=completions[i].finish_reason,
                similarity=similarities[i] if similarities is not None else None,
            )
            for i in chosen
        ]

    async def _of_preferences(self, step: int, prompts: Sequence[Prompt]) -> Rollout:
        """The answers of a preference file. One that is equal to the chosen answer is no negative."""
        plain = await self._rendered([(prompt, None) for prompt in prompts])
        others = [usable_rejected(prompt)[: self._contrast.negatives] for prompt in prompts]
        sides = await self._answers([text for i, p in enumerate(prompts) for text in (p.chosen or "", *others[i])])
        given = iter(sides)
        groups: list[tuple[Prompt, list[int], list[Answer]]] = []
        rejected = []
        for prompt, ids, texts in zip(prompts, plain, others, strict=True):
            answers = list(islice(given, 1 + len(texts)))
            longest = len(ids) + max(len(one.ids) for one in answers)
            if not texts:
                rejected.append(rejected_row(step, prompt, "equal answers", "chosen and rejected are the same text"))
            elif longest > (limit := planned(self._context.config.model.max_len)):
                rejected.append(rejected_row(step, prompt, "answer too long", f"{longest} tokens, limit {limit}"))
            else:
                groups.append((prompt, ids, answers))
        return Rollout(rows=await self._rows(step, groups, engine=None), rejected=rejected, tokens=0)

    async def _rows(
        self, step: int, asked: Sequence[tuple[Prompt, list[int], Sequence[Answer]]], engine: str | None
    ) -> list[dict[str, object]]:
        """Rows of all prompts with their ids and answers: the reference's log-probs, and what a reward says of them."""
        if not asked:
            return []
        groups = [TokenGroup(ids, [one.ids for one in answers]) for _, ids, answers in asked]
        context = self._context
        wanted = [context.reference(self.name).logps.remote(groups)]
        queries = self._queries([prompt for prompt, _, _ in asked])
        texts = [[one.text for one in answers] for _, _, answers in asked]
        wanted += [one.score_answers.remote(queries, texts) for one in self.reward.scorers()]
        logps, *found = await gather(*wanted)
        scored = self.reward.look(found)
        return [
            row
            for i, ((prompt, _, answers), group, ref_logps) in enumerate(zip(asked, groups, logps, strict=True))
            for row in pair_rows(
                step=step,
                prompt=prompt,
                prompt_ids=group.prompt_ids,
                answers=answers,
                ref_logps=ref_logps,
                rewards=scored.values[i] if scored else None,
                parts=[scored.parts(i, k) for k in range(len(answers))] if scored else (),
                engine=engine,
                model=self._context.fingerprint,
            )
        ]

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """See `plumbline.runs.pairs.pair_samples`."""
        return pair_samples(rows)

    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """Share of prompts that kept enough negatives, how similar these are, and whether a reward agrees."""
        kept = list(prompts_of(rows))
        drawn = len(self._draw(rows[0]["step"])) if rows else 0
        figures = {"retention": len(kept) / drawn} if drawn else {"retention": 0.0}
        similarities = sorted(values(rows, "similarity"))
        if len(similarities) > 1:
            deciles = statistics.quantiles(similarities, n=10, method="inclusive")
            figures |= dict(zip(("similarity_q10", "similarity_q50", "similarity_q90"), deciles[::4], strict=True))
        scored = [row for row in rows if None not in (row["chosen_reward"], row["rejected_reward"])]
        if scored:
            negatives = [row["rejected_reward"] for row in scored]
            figures |= {
                "data_accuracy": data_accuracy(negatives, [row["chosen_reward"] for row in scored]),
                "reward_chosen": statistics.fmean(row["chosen_reward"] for row in prompts_of(scored)),
                "reward_rejected": statistics.fmean(negatives),
                **part_means(prompts_of(scored), reward_chosen="chosen_reward"),
                **part_means(scored, reward_rejected="rejected_reward"),
            }
        return figures
