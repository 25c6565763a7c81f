"""Compare policies on held-out prompts: reward, gap to guided answers, perplexity, BLEU, length, win rate.

A run calls it at its end (base against the newest versions); `plumbline evaluate` with any two versions or models.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from actors.scorer import Query
from actors.spawn import ask, gather
from pipelines.context import Context
from pipelines.rewarding import Rewarding
from plumbline.config.pipelines import Generation as Settings
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render, steerings
from plumbline.errors import PlumblineError
from plumbline.methods.evaluation import (
    Gap,
    Interval,
    bleu,
    corpus_ppl,
    distinct_n,
    gap,
    markdown,
    mean_interval,
    reward_win_rate,
)
from plumbline.records import Completion, GenerateRequest, Generation, PolicyRef, Prompt, Sampling, TokenGroup
from plumbline.runs.disk import write_text
from plumbline.runs.evaluated import heldout_order, keep_answers, prompt_key

JUDGED_AT_ONCE = 64
"""Answers that a reward is asked about at a time: what it fails on is lost together."""
TURN = "evaluation"
"""What the pool calls these requests, beside the pipelines: they take turns at weight 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One policy's answers to the plain and the guided prompts, in the order of the prompts, with both rewards.

    `ppl` is the policy's perplexity of the reference answers, `base_ppl` π0's of the policy's own plain ones.
    `parts` are what each part of a reward that is a sum gave to the plain ones, by their columns: ``reward NAME``.
    """

    plain: list[str]
    guided: list[str]
    rewards: list[float]
    guided_rewards: list[float]
    judged: list[float]
    judged_guided: list[float]
    lengths: list[int]
    finished: float
    ppl: float | None
    base_ppl: float | None = None
    parts: Mapping[str, list[float]] = field(default_factory=dict)


def evaluation_principle(config: Config) -> str | None:
    """What stands before the guided prompts: PLE's principle, or the wanted side of DLMA's contrast."""
    texts = [text for section in config.methods for text in steerings(section)[:1]]
    return next(iter(texts), None)


def heldout_prompts(context: Context) -> list[Prompt]:
    """Held-out prompts within the limits of every pipeline, in an order of the run's seed."""
    config, settings = context.config, context.config.evaluation
    assert settings is not None and config.data.heldout is not None
    return heldout_order(context.rows.heldout, config.seed)[: settings.prompts]


async def answers_by_name(
    context: Context, candidates: Mapping[str, PolicyRef], prompts: list[Prompt], base: PolicyRef | None = None
) -> dict[str, Answers]:
    """Every candidate's answers to the held-out prompts, sampled as the config says; `base`: see `answers_of`."""
    config = context.config
    assert config.evaluation is not None
    settings = config.evaluation.generation or config.methods[0].generation
    answers: dict[str, Answers] = {}
    for name, ref in candidates.items():
        context.events.say(f"evaluating {name} on {len(prompts)} held-out prompts")
        try:
            answers[name] = await answers_of(context, ref, prompts, settings, evaluation_principle(config), base)
        except PlumblineError:
            if answers:  # what was measured stays
                write_comparison(context, answers, prompts)
            raise
        who = str(ref) if ref.version else "base" if name == "before" else name
        keep_answers(context.run_dir, who, prompts, answers[name].plain, finite_or_none(answers[name].rewards))
    return answers


async def answers_of(
    context: Context,
    ref: PolicyRef,
    prompts: Sequence[Prompt],
    settings: Settings,
    principle: str | None,
    base: PolicyRef | None = None,
) -> Answers:
    """Generate, score and measure one policy. Seeds are the prompts', so that policies meet the same luck.

    Args:
        base: π0 among the pool's policies, which then says how likely it finds the answers.
    """
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=tuple(settings.stop),
    )
    kinds = [("plain", None), ("guided", principle)] if principle else [("plain", None)]
    requests = [
        GenerateRequest(
            key=f"{prompt.id}/{kind}",
            prompt_ids=render(context.tokenizer, prompt.messages, principle=text),
            ref=ref,
            sampling=sampling,
            seed=zlib.crc32(f"{context.config.seed}/evaluate/{prompt.id}/{kind}".encode()) >> 1,
        )
        for kind, text in kinds
        for prompt in prompts
    ]
    generations = await generated(context, requests)
    queries = [Query(messages=p.messages, extra=dict(p.extra)) for _ in kinds for p in prompts]
    judge = context.config.evaluation.judge if context.config.evaluation else None
    rewarding = Rewarding(context, TURN, context.config.reward)
    judging = Rewarding(context, TURN, judge, "evaluation.judge")
    rewards, parts = await scores_of(rewarding, queries, generations)
    judged, judged_parts = await scores_of(judging, queries, generations)
    n = len(prompts)
    texts = [g.completions[0].text for g in generations]
    plain = [g.completions[0] for g in generations[:n]]
    return Answers(
        plain=texts[:n],
        guided=texts[n:],
        rewards=rewards[:n],
        guided_rewards=rewards[n:],
        judged=judged[:n],
        judged_guided=judged[n:],
        lengths=[len(c.ids) for c in plain],
        finished=sum(c.finish_reason == "stop" for c in plain) / n,
        ppl=await target_ppl(context, ref, prompts),
        base_ppl=await answers_ppl(context, base, requests[:n], plain) if base else None,
        parts={
            **{f"reward {name}": scores[:n] for name, scores in parts.items()},
            **{f"judge reward {name}": scores[:n] for name, scores in judged_parts.items()},
        },
    )


async def generated(context: Context, requests: Sequence[GenerateRequest]) -> list[Generation]:
    """Answers from the pool, in the order of the requests, in batches that take turns with the pipelines'."""
    pool = context.pool

    async def one(batch: Sequence[GenerateRequest]) -> list[Generation]:
        answers = sum(request.n for request in batch)
        tokens = sum(request.n * request.sampling.max_tokens for request in batch)
        return await pool.ask(TURN, answers, tokens, lambda generator: ask(generator.generate.remote(list(batch))))

    batches = [requests[i : i + pool.batch] for i in range(0, len(requests), pool.batch)]
    generations = [generation for batch in await gather(*map(one, batches)) for generation in batch]
    pool.count(TURN, sum(one.tokens for one in generations))
    return generations


async def scores_of(
    reward: Rewarding, queries: Sequence[Query], generations: Sequence[Any]
) -> tuple[list[float], dict[str, list[float]]]:
    """One replica's score of each answer, and what each part gave where the reward is a sum; nothing where there is no
    such reward.

    Raises:
        RunError: see `Rewarding.look`.
    """
    scorers = reward.scorers()
    pieces = [slice(i, i + JUDGED_AT_ONCE) for i in range(0, len(queries), JUDGED_AT_ONCE)] if scorers else []
    asked = [one.score_generations.remote(list(queries[i]), list(generations[i])) for i in pieces for one in scorers]
    found = await gather(*asked)
    scores: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in reward.names}
    for i in range(0, len(found), max(1, len(scorers))):
        scored = reward.look(found[i : i + len(scorers)])
        assert scored is not None
        scores += [one[0] for one in scored.values]
        for name in parts:
            parts[name] += [one[0] for one in scored.given[name].values]
    return scores, parts


async def answers_ppl(
    context: Context, base: PolicyRef, requests: Sequence[GenerateRequest], answers: Sequence[Completion]
) -> float | None:
    """Corpus perplexity of `base` on the answers [N] to requests [N], as sampled; None where all of them are empty."""
    groups = [TokenGroup(request.prompt_ids, [one.ids]) for request, one in zip(requests, answers, strict=True)]
    return await ppl_of(context, base, groups)


async def target_ppl(context: Context, ref: PolicyRef, prompts: Sequence[Prompt]) -> float | None:
    """Corpus perplexity of the reference answers under the plain prompt, with EOS; None without references."""
    groups = [
        TokenGroup(render(context.tokenizer, p.messages), [encode_response(context.tokenizer, p.target)])
        for p in prompts
        if p.target is not None
    ]
    return await ppl_of(context, ref, groups)


async def ppl_of(context: Context, ref: PolicyRef, groups: Sequence[TokenGroup]) -> float | None:
    """Corpus perplexity of the only response of each group; None where there is none, or all are empty.

    Engines take a sequence that leaves them room for one token more: the last one of `model.max_len` is not measured.
    """
    pool, limit = context.pool, planned(context.config.model.max_len) - 1
    cut = [TokenGroup(one.prompt_ids, [one.response_ids[0][: limit - len(one.prompt_ids)]]) for one in groups]
    groups = [one for one in cut if one.response_ids[0]]
    if not groups:
        return None

    async def one(batch: Sequence[TokenGroup]) -> list[list[list[float]]]:
        answers, tokens = sum(len(group.response_ids) for group in batch), sum(group.tokens for group in batch)
        return await pool.ask(TURN, answers, tokens, lambda generator: ask(generator.logprobs.remote(list(batch), ref)))

    batches = [groups[i : i + pool.batch] for i in range(0, len(groups), pool.batch)]
    scored = [scores[0] for batch in await gather(*map(one, batches)) for scores in batch]
    return corpus_ppl([-sum(one) for one in scored], [len(one) for one in scored])


def summarize(answers: Mapping[str, Answers], prompts: Sequence[Prompt], samples: int) -> dict[str, Any]:
    """Figures of every candidate, the first being what the others are compared with.

    Means are over answers with a finite score; a blank one has none, and is counted.

    Returns:
        ``{"rows": [...], "table": Markdown, "samples": [{"prompt", name: answer, ...}], "prompts": [key, ...],
        "rewards": {name: [...]}}``, a key and a reward a prompt, None where it is not finite, and nothing without a
        reward: other runs are compared by them on the prompts that both were asked, pair by pair.
    """
    first = next(iter(answers))
    rows, shown = [], []
    for name, one in answers.items():
        row: dict[str, Any] = {"policy": name, "prompts": len(prompts)}
        row |= reward_columns("", one.rewards, one.guided_rewards)
        row |= reward_columns("judge ", one.judged, one.judged_guided)
        scored = {column: [a for a in scores if finite(a)] for column, scores in one.parts.items()}
        row |= {column: mean_interval(scores) for column, scores in scored.items() if scores}
        if one.ppl is not None:
            row["PPL"] = one.ppl
        if all(p.target is not None for p in prompts):
            row["BLEU"] = bleu(one.plain, [p.target or "" for p in prompts])
        if one.base_ppl is not None:
            row["base PPL"] = one.base_ppl
        row["distinct-2"] = distinct_n(one.plain)
        row["tokens"] = sum(one.lengths) / len(one.lengths)
        row["finished"] = one.finished
        row["blank"] = sum(not text.strip() for text in one.plain)
        both = [(a, b) for a, b in zip(one.rewards, answers[first].rewards, strict=True) if finite(a, b)]
        if name != first and both:
            row["win rate"] = reward_win_rate(*zip(*both, strict=True))
        rows.append(row)
    for i, prompt in enumerate(prompts[:samples]):
        shown.append({"prompt": prompt.query, **{name: one.plain[i] for name, one in answers.items()}})
    plain_rows = [{k: asdict(v) if isinstance(v, Interval) else v for k, v in row.items()} for row in rows]
    return {
        "rows": plain_rows,
        "table": markdown(rows),
        "samples": shown,
        "prompts": [prompt_key(prompt) for prompt in prompts],
        "rewards": {name: finite_or_none(one.rewards) for name, one in answers.items() if one.rewards},
    }


def reward_columns(prefix: str, rewards: Sequence[float], guided: Sequence[float]) -> dict[str, Interval]:
    """Mean of plain answers, and gap to guided ones where there are any, with 95 % intervals."""
    scored = [a for a in rewards if finite(a)]
    if not scored:
        return {}
    if not guided:
        return {f"{prefix}reward": mean_interval(scored)}
    pairs = [(a, b) for a, b in zip(rewards, guided, strict=True) if finite(a, b)]
    if not pairs:
        return {}
    figures: Gap = gap([a for a, _ in pairs], [b for _, b in pairs])
    return {
        f"{prefix}reward": mean_interval(scored),
        f"{prefix}guided": figures.guided,
        f"{prefix}gap": figures.gap,
    }


def write_comparison(context: Context, answers: Mapping[str, Answers], prompts: list[Prompt]) -> dict[str, Any]:
    """`evaluation.json`, and what the command line shows."""
    assert context.config.evaluation is not None
    result = summarize(answers, prompts, context.config.evaluation.samples)
    text = json.dumps(result, ensure_ascii=False, indent=1)
    write_text(context.run_dir / "evaluation.json", text)
    return result


def finite(*values: float) -> bool:
    """Whether all are numbers, and neither infinite."""
    return all(v - v == 0 for v in values)


def finite_or_none(values: Sequence[float]) -> list[float | None]:
    """As JSON and Parquet keep them."""
    return [value if finite(value) else None for value in values]
