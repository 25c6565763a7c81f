"""DLMA (METHODS.md §1): answers to a wanted and to an opposite prompt, judged by π0's own odds, into a margin DPO.

Wiring only. With `sides: plain` both answers are to the query alone, and the judgement orders them (RLAIF). Generation
and judging are π0's throughout, so the learner trains while later parts are still being made.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from actors.frozen_logps import ContrastLogps, ContrastPrompts
from pipelines.context import Context
from pipelines.method import Method, Rollout, Row, rejected_row
from pipelines.offline import OfflinePairs
from plumbline.config.pipelines import Dlma
from plumbline.data.prompting import dlma_contrast
from plumbline.methods.selection import self_reward_margin
from plumbline.records import Completion, PolicyRef, Prompt, Sample
from plumbline.runs.pairs import PAIR_SCHEMA, Answer, pair_rows, pair_samples, values
from plumbline.runs.rollouts import part_means


class DlmaMethod(Method):
    """Pairs of π0's own answers, with its own margins."""

    def __init__(self, context: Context, section: Dlma) -> None:
        self._offline = OfflinePairs(context, section.pairs) if section.pairs else None
        fit = self._offline.fit if self._offline else context.rows.fits[section.name]
        super().__init__(context, section, "pairs", PAIR_SCHEMA, fit)
        self._dlma = section
        self._contrast = dlma_contrast(section.contrast)
        self._scoring = dlma_contrast(section.scoring or section.contrast)

    async def _roll_chunk(self, step: int, ref: PolicyRef, prompts: Sequence[Prompt]) -> Rollout:
        """Two answers a prompt, and six log-probs of π0: four for the margin, two as DPO's reference."""
        if self._offline:
            return self._offline.rollout(step, prompts)
        plain = self._dlma.sides == "plain"
        contrasts = {"positive": self._contrast.positive, "negative": self._contrast.negative}
        kinds = {"first": None, "second": None} if plain else contrasts
        asked = await self._requests(step, prompts, ref, kinds)
        judged = await self._contrast_prompts(prompts)
        queries = [query for query in self._queries(prompts) for _ in range(2)]
        context = self._context
        reference = context.reference(self.name)
        answers, logps, *found = await self._generated(
            asked,
            lambda drawn: reference.contrast_logps.remote(judged, drawn, eos=self._dlma.eos_in_margin),
            *self._score_calls(queries),
        )
        scored = self.reward.look(found)
        rows, rejected = [], []
        for i, prompt in enumerate(prompts):
            own = [answers[2 * i + side].completions[0] for side in (0, 1)]
            judgement = judge(logps[i])
            if reason := unusable(dict(zip(kinds, own, strict=True)), judgement["margin"]):
                rejected.append(rejected_row(step, prompt, *reason))
                continue
            order = (1, 0) if plain and judgement["margin"] < 0 else (0, 1)
            said = logps[i] if order == (0, 1) else turned(logps[i])
            rows += pair_rows(
                step=step,
                prompt=prompt,
                prompt_ids=judged[i].plain_ids,
                answers=[
                    Answer(text=own[side].text, ids=own[side].ids, finish_reason=own[side].finish_reason)
                    for side in order
                ],
                ref_logps=said.reference,
                rewards=[scored.values[2 * i + side][0] for side in order] if scored else None,
                parts=[scored.parts(2 * i + side, 0) for side in order] if scored else (),
                engine=answers[2 * i].engine,
                model=context.fingerprint,
                judged=judge(said),
            )
        return Rollout(rows=rows, rejected=rejected, tokens=sum(one.tokens for one in answers))

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """See `plumbline.runs.pairs.pair_samples`."""
        return pair_samples(rows)

    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """How the margins lie; with a reward, how often their sign agrees with it (ties of the reward left out)."""
        if not rows:
            return {}
        margins = torch.tensor([row["margin"] for row in rows], dtype=torch.float64)
        low, high = self._dlma.margin_clamp
        quantiles = margins.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        figures = {
            "margin_mean": float(margins.mean()),
            **dict(zip(("margin_q10", "margin_q50", "margin_q90"), quantiles, strict=True)),
            "margin_negative_share": float((margins < 0).double().mean()),
            "clamp_saturation": float(((margins <= low) | (margins >= high)).double().mean()),
        }
        chosen, other = values(rows, "chosen_reward"), values(rows, "rejected_reward")
        if len(chosen) == len(other) == len(rows):
            agrees = [
                (margin > 0) == (a > b) for margin, a, b in zip(margins.tolist(), chosen, other, strict=True) if a != b
            ]
            figures |= {"reward_chosen": sum(chosen) / len(rows), "reward_rejected": sum(other) / len(rows)}
            figures |= part_means(rows, reward_chosen="chosen_reward", reward_rejected="rejected_reward")
            if agrees:
                figures["agreement"] = sum(agrees) / len(agrees)
        return figures

    async def _contrast_prompts(self, prompts: Sequence[Prompt]) -> list[ContrastPrompts]:
        kinds = (None, self._scoring.positive, self._scoring.negative)
        ids = await self._rendered([(prompt, text) for prompt in prompts for text in kinds])
        three = zip(ids[::3], ids[1::3], ids[2::3], strict=True)
        return [ContrastPrompts(plain_ids=a, positive_ids=b, negative_ids=c) for a, b, c in three]


def judge(logps: ContrastLogps) -> dict[str, float]:
    """The margin R of a pair and the four log-probs that it is made of (METHODS.md §1)."""
    four = (logps.chosen_pos, logps.chosen_neg, logps.rejected_pos, logps.rejected_neg)
    margin = self_reward_margin(*(torch.tensor([value], dtype=torch.float64) for value in four))
    names = ("chosen_pos", "chosen_neg", "rejected_pos", "rejected_neg")
    return {"margin": float(margin), **dict(zip(names, four, strict=True))}


def turned(logps: ContrastLogps) -> ContrastLogps:
    """Those of the same two answers with the other one as the chosen: R has the other sign."""
    return ContrastLogps(
        reference=(logps.reference[1], logps.reference[0]),
        chosen_pos=logps.rejected_pos,
        chosen_neg=logps.rejected_neg,
        rejected_pos=logps.chosen_pos,
        rejected_neg=logps.chosen_neg,
    )


def unusable(answers: Mapping[str, Completion], margin: float) -> tuple[str, str] | None:
    """Why a pair cannot be learnt from, and a detail; None where it can (METHODS.md §4). `answers`: both, by kind."""
    for kind, answer in answers.items():
        if not answer.text.strip():
            return "blank answer", kind
    first, second = answers.values()
    if first.ids == second.ids:
        return "identical answers", ""
    return None if math.isfinite(margin) else ("margin not finite", str(margin))
