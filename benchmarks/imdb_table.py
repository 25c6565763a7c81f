"""The table of PLE's IMDb experiment (`benchmarks/imdb.py`), what it says claim by claim, and the paper's own rows."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plumbline.methods.evaluation import Interval, markdown, mean_interval

ROWS = {
    "base": "base",
    "sft": "SFT",
    "dpo": "DPO, by the reward",
    "raft": "RAFT-4",
    "ple": "PLE",
    "no-rank": "PLE, no rank",
    "no-wsft": "PLE, no weighted SFT",
    "literal": "PLE, literal sum",
    "dlma": "DLMA",
    "spin": "SPIN",
    "m1": "Self-Contrast, m = 1",
    "m8": "Self-Contrast, m = 8",
}
"""What the policies are called, in the order of the table."""

FIGURES = ("PPL", "reward", "judge reward", "BLEU", "gap", "tokens", "distinct-2", "base PPL")
COLUMNS = {"tokens": "length", "judge reward": "judge", "base PPL": "SFT's PPL of the answers"}

PAPER = {
    "base": (28.63, -0.409, 0.0354),
    "SFT": (22.00, -0.287, 0.0363),
    "DPO": (28.38, 0.925, 0.0400),
    "PPO": (23.13, 1.023, 0.0390),
    "RAFT-4": (32.14, 0.997, 0.0436),
    "PLE": (23.25, 1.329, 0.0493),
    "PLE, no rank": (33.24, 0.856, 0.0361),
    "PLE, no weighted SFT": (26.38, 0.946, 0.0413),
}
"""PPL, reward and BLEU of GPT-2 in the paper (arXiv 2408.02599); its reward is another model's than ours."""

NEAR = 1.1
"""PLE's perplexity is near the SFT model's up to this factor; the paper's is 1.06."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be said"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What an evaluation says of a policy: its row, and the reward of each prompt, by the prompt's key; None where it
    has none."""

    figures: Mapping[str, Any]
    rewards: Mapping[str, float | None]


Seeds = Mapping[int, Mapping[str, Policy]]
"""Policies by seed and name."""

HIGHER = (
    ("PLE's reward is above SFT's", "ple", "sft"),
    ("PLE's reward is above DPO's", "ple", "dpo"),
    ("PLE's reward is above RAFT's", "ple", "raft"),
    ("without the ranking the reward is lower", "ple", "no-rank"),
    ("without the weighted SFT the reward is lower", "ple", "no-wsft"),
    ("DLMA's reward is above SFT's", "dlma", "sft"),
    ("Self-Contrast, m = 1, is above SPIN", "m1", "spin"),
    ("m = 8 is above m = 1", "m8", "m1"),
)
"""Claims on the reward: what is claimed, the policy that is better by it, the one that is worse."""


def table(seeds: Seeds) -> str:
    """A row a seed and policy; then the means over the seeds, where there are several."""
    rows = [_row(str(seed), name, one.figures) for seed, own in seeds.items() for name, one in _in_order(own)]
    if len(seeds) > 1:
        found = {name for own in seeds.values() for name in own}
        means = {name: [own[name].figures for own in seeds.values() if name in own] for name in found}
        rows += [_row("mean", name, _means(means[name])) for name in ROWS if name in means]
    return markdown(rows)


def _in_order(policies: Mapping[str, Policy]) -> Iterator[tuple[str, Policy]]:
    return ((name, policies[name]) for name in ROWS if name in policies)


def _row(seed: str, name: str, figures: Mapping[str, Any]) -> dict[str, object]:
    return {"seed": seed, "policy": ROWS[name], **{COLUMNS.get(one, one): _cell(figures.get(one)) for one in FIGURES}}


def _cell(value: Any) -> object:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]" if isinstance(value, Mapping) else value


def _means(figures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the seeds, of intervals those of their means."""
    found = {}
    for name in FIGURES:
        values = [one[name] for one in figures if one.get(name) is not None]
        if values:
            found[name] = statistics.fmean(v["mean"] if isinstance(v, Mapping) else v for v in values)
    return found


def paper_table() -> str:
    """The rows of the paper."""
    return markdown(
        [{"policy": name, "PPL": ppl, "reward": reward, "BLEU": bleu} for name, (ppl, reward, bleu) in PAPER.items()]
    )


def claims(seeds: Seeds) -> str:
    """Claim by claim, whether it holds here."""
    rows = [higher(seeds, *one) for one in HIGHER]
    rows.insert(3, {"claim": "PLE's reward is above PPO's", "here": "", "seeds": "", "": f"{OPEN}: no PPO here"})
    rows += [near(seeds), apart(seeds, "guided", +1), apart(seeds, "gap", -1)]
    return markdown(rows)


def higher(seeds: Seeds, claim: str, better: str, worse: str) -> dict[str, object]:
    """Whether one policy's reward is above another's, prompt by prompt."""
    difference, each = paired(seeds, better, worse)
    told = "" if difference is None else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    verdict = OPEN
    if difference and difference.low > 0 and min(each) > 0:
        verdict = HOLDS
    elif difference and difference.high < 0 and max(each) < 0:
        verdict = FAILS
    return _claim(claim, told, [f"{one:+.3f}" for one in each], verdict)


def paired(seeds: Seeds, better: str, worse: str) -> tuple[Interval | None, list[float]]:
    """The mean difference of two policies' rewards with its interval over prompts, each prompt's difference being the
    mean over the seeds that have it; and the mean of each seed. None without a prompt that both have a reward of."""
    by_prompt: dict[str, list[float]] = {}
    each = []
    for own in seeds.values():
        if better in own and worse in own:
            theirs = own[worse].rewards
            both = [(key, a, theirs.get(key)) for key, a in own[better].rewards.items()]
            found = {key: a - b for key, a, b in both if a is not None and b is not None}
            for key, difference in found.items():
                by_prompt.setdefault(key, []).append(difference)
            each += [statistics.fmean(found.values())] if found else []
    return (mean_interval([statistics.fmean(one) for one in by_prompt.values()]) if by_prompt else None), each


def near(seeds: Seeds) -> dict[str, object]:
    """Whether PLE's perplexity is near the SFT model's."""
    ratios = [one["ple"].figures["PPL"] / one["sft"].figures["PPL"] for one in _with(seeds, "ple", "sft")]
    verdict = _all(ratio <= NEAR for ratio in ratios)
    told = f"× {statistics.fmean(ratios):.3f}" if ratios else ""
    return _claim("PLE's perplexity is near SFT's", told, [f"× {one:.3f}" for one in ratios], verdict)


def apart(seeds: Seeds, figure: str, sign: int) -> dict[str, object]:
    """Whether PLE moved a figure with an interval up (+1) or down (-1): so where each seed's intervals are apart."""
    pairs = [(one["ple"].figures[figure], one["sft"].figures[figure]) for one in _with(seeds, "ple", "sft")]
    moved = [sign * (ple["mean"] - sft["mean"]) > 0 for ple, sft in pairs]
    clear = [ple["low"] > sft["high"] or ple["high"] < sft["low"] for ple, sft in pairs]
    verdict = _all(moved) if all(clear) else OPEN
    differences = [ple["mean"] - sft["mean"] for ple, sft in pairs]
    claim = {"guided": "PLE's guided answers get better too", "gap": "the gap to guided answers shrinks"}[figure]
    told = f"{statistics.fmean(differences):+.3f}" if differences else ""
    return _claim(claim, told, [f"{one:+.3f}" for one in differences], verdict)


def _with(seeds: Seeds, *names: str) -> Iterator[Mapping[str, Policy]]:
    return (own for own in seeds.values() if all(name in own for name in names))


def _all(each: Iterable[bool]) -> str:
    """All seeds say so, none does, or they differ (or there is none)."""
    said = set(each)
    return OPEN if len(said) != 1 else HOLDS if said.pop() else FAILS


def _claim(claim: str, here: str, seeds: Sequence[str], verdict: str) -> dict[str, object]:
    return {"claim": claim, "here": here, "seeds": ", ".join(seeds), "": verdict}
