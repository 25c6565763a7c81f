"""What `benchmarks/hh.py` prints: figures of every row as its runs left them, and the tables made of them."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hh_claims import (
    Claim,
    Rewards,
    above_chance,
    best_inside,
    by_a_coin,
    combined,
    falling_returns,
    greater,
    near,
    over_seeds,
    percent,
    rises,
    told,
)
from refusals import refusals, share
from worlds import comparison, events, interval, rewards, table

from plumbline.data.dataset import read_prompts
from plumbline.errors import DataError
from plumbline.methods.evaluation import Interval, reward_win_rate
from plumbline.runs.evaluated import prompt_key, read_answers

Row = Mapping[str, Any]
NOTHING = "**small size: shows that it runs, says nothing about the methods**"
ROWS = {
    "before": "π0",
    "sft": "SFT on HH's chosen answers",
    "dlma": "DLMA: w = .2, clamp ±40",
    "clamp-20": "clamp ±20",
    "clamp-80": "clamp ±80",
    "eos": "R counts the end of the answer (pairs of its own)",
    "rlcd": "w = 0: ordered by the prompts alone, as RLCD",
    "rlaif": "both answers to the query alone, ordered by R's sign, as RLAIF",
    "distilled": "SFT on the answers to p+: context distillation",
    "spin": "SPIN: one sample, no filter",
    "m-1": "Self-Contrast, a = .75, m = 1",
    "m-2": "m = 2",
    "m-4": "m = 4",
    "m-8": "m = 8",
    "m-16": "m = 16",
    "a-1": "Self-Contrast, m = 1, a = 1",
    "a-0.5": "a = 1/2",
    "a-0.25": "a = 1/4",
    "a-0.125": "a = 1/8",
    "a-0.0625": "a = 1/16",
}
"""All rows in the order of the table, and what they are."""
KEPT = [name for name in ROWS if name.startswith("a-")]
MANY = [name for name in ROWS if name.startswith("m-")]
JUDGED = ("dlma", "eos", "rlaif")
"""Rows that drew the pairs that have an R."""
CLAMPS = (20, 40, 80)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """Keys of the prompts that were held out, by what is asked of them."""

    hh: frozenset[str]
    safe: frozenset[str]
    unsafe: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One seed: of every row its line of the comparison, rewards on HH by prompt, answers by prompt, and updates; of
    rows that drew pairs, those."""

    seed: int
    lines: Mapping[str, dict[str, Any]]
    rewards: Rewards
    answers: Mapping[str, Mapping[str, str]]
    updates: Mapping[str, int]
    pairs: Mapping[str, list[Row]]


def pairs_of(directory: Path, name: str) -> list[Row]:
    """All rows of a pipeline's parts."""
    parts = sorted((directory / "pairs" / name).glob("step-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def read_counts(data: Path) -> dict[str, Any]:
    """How many rows each file of the benchmark's directory of data has, and what it was made of. Raises DataError."""
    path = data / "counts.json"
    try:
        counts = json.loads(path.read_text("utf-8"))
        counts["of"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path}: is damaged; remove {data}, or give another --out") from None
    return counts


def heldout_of(data: Path) -> Heldout:
    """Of the benchmark's directory of data."""
    xstest = read_prompts(str(data / "xstest.jsonl"))
    safe, unsafe = (frozenset(prompt_key(p) for p in xstest if p.extra["label"] == kind) for kind in ("safe", "unsafe"))
    hh = frozenset(prompt_key(prompt) for prompt in read_prompts(str(data / "heldout_hh.jsonl")))
    return Heldout(hh=hh, safe=safe, unsafe=unsafe)


def figures_of(seed: int, runs: Sequence[Path], heldout: Heldout) -> Figures:
    """All that the runs of a seed left; π0 is taken from the first."""
    lines: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, float]] = {}
    answers: dict[str, dict[str, str]] = {}
    updates: dict[str, int] = {"before": 0}
    pairs: dict[str, list[Row]] = {}
    for directory in runs:
        keys = json.loads((directory / "evaluation.json").read_text("utf-8"))["prompts"]
        own = {line["policy"]: line for line in comparison(directory)}
        for name, values in rewards(directory).items():
            found = {key: value for key, value in zip(keys, values, strict=True) if key in heldout.hh}
            scores.setdefault(name, found)
            lines.setdefault(name, own[name])
        for who, rows in read_answers(directory).items():
            name = "before" if who == "base" else who.partition("@")[0]
            answers.setdefault(name, {str(row["key"]): str(row["answer"]) for row in rows})
        for name in own:
            updates.setdefault(name, round(sum(line.get("updates", 0) for line in events(directory, name))))
        pairs |= {name: rows for name in own if (rows := pairs_of(directory, name))}
    return Figures(seed=seed, lines=lines, rewards=scores, answers=answers, updates=updates, pairs=pairs)


def main_table(seeds: Sequence[Figures], heldout: Heldout) -> str:
    """A row a policy and seed."""
    head = ["seed", "row", "what it is", "updates", "reward [95 %]", "above SFT [95 %]", "win rate against SFT"]
    head += ["PPL", "base PPL", "distinct-2", "tokens", "refuses unsafe [95 %]", "refuses safe [95 %]"]
    rows = []
    for one in seeds:
        for name in (name for name in ROWS if name in one.lines):
            line, answers = one.lines[name], one.answers[name]
            both = [(one.rewards[name][key], one.rewards["sft"][key]) for key in one.rewards[name]]
            both = [pair for pair in both if all(map(math.isfinite, pair))]
            mean = combined(one.rewards, {name: 1})
            measured = name != "sft"
            rows.append(
                [
                    str(one.seed),
                    name,
                    ROWS[name],
                    str(one.updates[name]),
                    interval({"mean": mean.mean, "low": mean.low, "high": mean.high}),
                    told(combined(one.rewards, {name: 1, "sft": -1})) if measured else "",
                    f"{reward_win_rate(*zip(*both, strict=True)):.3f}" if measured else "",
                    *(f"{line[key]:.3f}" for key in ("PPL", "base PPL", "distinct-2")),
                    f"{line['tokens']:.1f}",
                    *(percent(refusals(answers[key] for key in keys)) for keys in (heldout.unsafe, heldout.safe)),
                ]
            )
    return table(head, rows)


def agreement(rows: Sequence[Row]) -> Interval | None:
    """How often the sign of R is that of the reward's difference, ties of the reward left out."""
    scored = [row for row in rows if None not in (row["chosen_reward"], row["rejected_reward"])]
    right = [
        (row["margin"] > 0) == (row["chosen_reward"] > row["rejected_reward"])
        for row in scored
        if row["chosen_reward"] != row["rejected_reward"]
    ]
    return share(right) if right else None


def saturation(margins: Sequence[float], bound: float) -> float:
    """Share of R at or beyond a clamp of ±`bound`."""
    return statistics.fmean(abs(margin) >= bound for margin in margins)


def margins_table(seeds: Sequence[Figures]) -> str:
    """How R lies in the pairs of each row that drew some."""
    head = ["seed", "pairs of", "pairs", "tokens an answer", "R, 10 %", "50 %", "90 %", "R < 0"]
    head += [*(f"at a clamp of ±{bound}" for bound in CLAMPS), "sign of R is the reward's [95 %]"]
    rows = []
    for one in seeds:
        for name in JUDGED:
            pairs = one.pairs[name]
            margins = [row["margin"] for row in pairs]
            tokens = statistics.fmean(len(row[side]) for row in pairs for side in ("chosen_ids", "rejected_ids"))
            tenths = statistics.quantiles(margins, n=10, method="inclusive")
            agrees = agreement(pairs)
            rows.append(
                [
                    str(one.seed),
                    name,
                    str(len(pairs)),
                    f"{tokens:.1f}",
                    *(f"{tenths[i]:+.1f}" for i in (0, 4, 8)),
                    f"{statistics.fmean(margin < 0 for margin in margins):.1%}",
                    *(f"{saturation(margins, bound):.1%}" for bound in CLAMPS),
                    percent(agrees) if agrees else "",
                ]
            )
    return table(head, rows)


def accuracy(rows: Sequence[Row]) -> Interval | None:
    """Share of negatives whose reward is below their target's."""
    scored = [row for row in rows if None not in (row["chosen_reward"], row["rejected_reward"])]
    return share(row["rejected_reward"] < row["chosen_reward"] for row in scored) if scored else None


def kept_table(seeds: Sequence[Figures]) -> str:
    """By the share of samples that negatives come from: how similar they are, and whether worse than their targets."""
    head = ["seed", "row", "negatives", "similarity, median", "data accuracy [95 %]", "reward [95 %]"]
    rows = []
    for one in seeds:
        for name in KEPT:
            pairs = one.pairs[name]
            right = accuracy(pairs)
            median = statistics.median(row["similarity"] for row in pairs)
            mean = told(combined(one.rewards, {name: 1}))
            rows.append([str(one.seed), name, str(len(pairs)), f"{median:.3f}", percent(right) if right else "", mean])
    return table(head, rows)


def claims(seeds: Sequence[Figures]) -> list[Claim]:
    """The claims of docs/methods.md, §1, §2 and §6, one by one."""
    scores = over_seeds([one.rewards for one in seeds])
    ppl = {name: statistics.fmean(one.lines[name]["PPL"] for one in seeds) for name in scores}
    judged = agreement([row for one in seeds for row in one.pairs["dlma"]])
    plain = agreement([row for one in seeds for row in one.pairs["rlaif"]])
    kept = {name: accuracy([row for one in seeds for row in one.pairs[name]]) for name in KEPT}
    shares = {name: one for name, one in kept.items() if one is not None}
    return [
        *([above_chance(judged, "§6.1 DLMA: sign(R) agrees with the preference")] if judged else []),
        *([above_chance(plain, "§6.1 the same where both answers are to the query alone")] if plain else []),
        greater(scores, "dlma", "before", "§6.1 DLMA: training raises the reward"),
        near(ppl["dlma"], ppl["sft"], "§6.1 DLMA: perplexity stays near SFT's"),
        near(ppl["dlma"], ppl["before"], "§1 DLMA: perplexity is kept"),
        greater(scores, "dlma", "rlaif", "§1 DLMA beats RLAIF"),
        greater(scores, "dlma", "rlcd", "§1 DLMA beats RLCD: w = .2 is better than w = 0"),
        greater(scores, "dlma", "distilled", "§1 DLMA beats context distillation"),
        greater(scores, "dlma", "clamp-20", "§1 a clamp of 40 is better than one of 20"),
        greater(scores, "clamp-80", "dlma", "§1 a clamp of 80 is better than one of 40"),
        *([rises(shares, "§6.2 Self-Contrast: P(r(n) < r(y*)) rises as a falls")] if len(shares) > 1 else []),
        best_inside(scores, KEPT, "§6.2 Self-Contrast: best at a middle a"),
        greater(scores, "m-16", "m-1", "§6.2 Self-Contrast: m from 1 to 16 helps"),
        falling_returns(scores, "m-1", "m-4", "m-16", "§6.2 Self-Contrast: with falling returns"),
        greater(scores, "m-1", "spin", "§6.2 Self-Contrast: filtered m = 1 beats SPIN"),
        greater(scores, "spin", "sft", "§2 SPIN beats SFT"),
        greater(scores, "m-1", "sft", "§2 Self-Contrast with m = 1 beats SFT"),
        greater(scores, "m-8", "m-1", "§2 m = 8 beats m = 1"),
        greater(scores, "m-16", "m-8", "§2 m = 16 beats m = 8"),
    ]


def best_many(seeds: Sequence[Figures]) -> str:
    """Which m was best, in words."""
    scores = over_seeds([one.rewards for one in seeds])
    best = max(MANY, key=lambda name: combined(scores, {name: 1}).mean)
    others = ", ".join(f"{one} {told(combined(scores, {best: 1, one: -1}))}" for one in MANY if one != best)
    return f"The best here was {best.replace('-', ' = ')}; above {others}."


def judge_of(out: Path) -> tuple[Interval, int]:
    """How often the reward model orders held-out pairs as people did, and of how many pairs it was trained."""
    [*_, found] = sorted((out / "reward/policies/reward").glob("v*/accuracy.json"))
    said = json.loads(found.read_text("utf-8"))
    right = round(said["heldout_accuracy"] * said["heldout"])
    return share([True] * right + [False] * (said["heldout"] - right)), said["trained_on"]


def judge_told(accuracy: Interval, trained_on: int) -> str:
    """How right the reward model is, and how little that says."""
    text = (
        f"The reward model, trained on {trained_on} human pairs of the other half, orders {percent(accuracy)} of "
        f"{accuracy.n} held-out pairs as people did, who do not agree with one another either. A difference that it "
        "sees is one that a weak judge sees."
    )
    coin = " Its interval holds one half: it cannot be told from a coin, and no claim can be said by its scores."
    return text + (coin if accuracy.low <= 0.5 else "")


def updates_told(seeds: Sequence[Figures]) -> str:
    """Whether all trained rows had equally many updates."""
    counts = {one.updates[name] for one in seeds for name in one.updates if name != "before"}
    return f"Updates of every trained row: {', '.join(map(str, sorted(counts)))}" + (
        "." if len(counts) == 1 else ": NOT EQUAL, since prompts were rejected; compare those rows with care."
    )


def report(out: Path, seeds: Sequence[Figures], heldout: Heldout, theory: Sequence[str]) -> str:
    """All tables."""
    counts = read_counts(out / "data")
    marked = [NOTHING] if counts["of"]["size"] == "small" else []
    split = (
        f"{counts['rows']} rows of HH; by conversation, one half: {counts['reward_train']} pairs for the reward model "
        f"and {counts['reward_heldout']} held out; the other: {counts['train']} prompts to train on and "
        f"{counts['heldout_hh']} held out. XSTest: {counts['xstest']} prompts. PPL is of HH's chosen answers; base PPL "
        "(π0's, of the new answers), distinct-2 and tokens are over all held-out prompts, XSTest's among them."
    )
    judge, trained_on = judge_of(out)
    found = claims(seeds) if judge.low > 0.5 else by_a_coin(claims(seeds))
    pieces = [
        *(split, judge_told(judge, trained_on), updates_told(seeds)),
        *marked,
        main_table(seeds, heldout),
        "How R lies in the pairs that were drawn:",
        *marked,
        margins_table(seeds),
        "The share a of samples that negatives come from:",
        *marked,
        kept_table(seeds),
        "Claims, by 95 % intervals:",
        *marked,
        table(["claim", "verdict", "by"], [[one.claim, one.verdict, one.figure] for one in found]),
        "How many negatives the theorem asks for (`plumbline theory`), beside the best m:",
        *marked,
        *(f"```\n{one.strip()}\n```" for one in theory),
        best_many(seeds),
    ]
    return "\n\n".join(pieces) + "\n"
