"""What `benchmarks/hh.py` says of the claims of DLMA and Self-Contrast: computed from numbers alone, pure.

A claim that something is greater holds where the 95 % interval of the difference is above 0, does not hold where it is
below, and cannot be said where 0 is inside. Rewards are paired by prompt; of several seeds a prompt's is the mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from plumbline.methods.evaluation import Interval, mean_interval

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be said"
NEAR = 1.1
"""A perplexity is near another that it is at most so many times."""
Rewards = Mapping[str, Mapping[str, float]]
"""By policy, then by the key of a prompt; nan where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A line of the claims' table; `judged`: by the reward model's scores."""

    claim: str
    verdict: str
    figure: str
    judged: bool = True


def verdict(difference: Interval) -> str:
    """Whether a difference is above 0."""
    return HOLDS if difference.low > 0 else FAILS if difference.high < 0 else OPEN


def combined(rewards: Rewards, weights: Mapping[str, float]) -> Interval:
    """Mean over prompts of a sum of policies' rewards, each times its weight: ``{ours: 1, theirs: -1}`` is by how much
    ours is above theirs. Prompts that one of them has no finite reward on are left out."""
    prompts = set.intersection(*(set(rewards[name]) for name in weights))
    sums = [sum(weight * rewards[name][prompt] for name, weight in weights.items()) for prompt in sorted(prompts)]
    return mean_interval([one for one in sums if math.isfinite(one)])


def over_seeds(seeds: Sequence[Rewards]) -> Rewards:
    """Each prompt's mean over the seeds."""
    return {name: {prompt: fmean(one[name][prompt] for one in seeds) for prompt in seeds[0][name]} for name in seeds[0]}


def between(first: Interval, second: Interval) -> Interval:
    """By how much the second of two shares is above the first, by Newcombe's interval of their Wilson intervals."""
    difference = second.mean - first.mean
    below = math.hypot(second.mean - second.low, first.high - first.mean)
    above = math.hypot(second.high - second.mean, first.mean - first.low)
    return Interval(mean=difference, low=difference - below, high=difference + above, n=min(first.n, second.n))


def greater(rewards: Rewards, ours: str, theirs: str, claim: str) -> Claim:
    """That one policy's reward is above another's."""
    found = combined(rewards, {ours: 1, theirs: -1})
    return Claim(claim=claim, verdict=verdict(found), figure=f"{ours} − {theirs}: {told(found)}")


def above_chance(agreement: Interval, claim: str) -> Claim:
    """That a share is above one half."""
    around = Interval(mean=agreement.mean - 0.5, low=agreement.low - 0.5, high=agreement.high - 0.5, n=agreement.n)
    return Claim(claim=claim, verdict=verdict(around), figure=f"{percent(agreement)} of {agreement.n} pairs")


def near(ours: float, theirs: float, claim: str) -> Claim:
    """That a perplexity, which has no interval, is at most `NEAR` times another."""
    figure = f"{ours:.2f} against {theirs:.2f}, ×{ours / theirs:.3f} (near: at most ×{NEAR:g})"
    return Claim(claim=claim, verdict=HOLDS if ours <= NEAR * theirs else FAILS, figure=figure, judged=False)


def rises(shares: Mapping[str, Interval], claim: str) -> Claim:
    """That the last of several shares is above the first."""
    first, *_, last = shares
    found = between(shares[first], shares[last])
    listed = ", ".join(f"{name}: {one.mean:.1%}" for name, one in shares.items())
    return Claim(claim=claim, verdict=verdict(found), figure=f"{last} − {first}: {told(found)} ({listed})")


def best_inside(rewards: Rewards, names: Sequence[str], claim: str) -> Claim:
    """That the best policy of a row is none of its two ends: clear of both, or an end clear of all inside."""
    means = {name: combined(rewards, {name: 1}).mean for name in names}
    inside = max(names[1:-1], key=means.__getitem__)
    leads = {end: combined(rewards, {inside: 1, end: -1}) for end in (names[0], names[-1])}
    verdicts = [verdict(lead) for lead in leads.values()]
    found = HOLDS if set(verdicts) == {HOLDS} else FAILS if FAILS in verdicts else OPEN
    return Claim(
        claim=claim, verdict=found, figure="; ".join(f"{inside} − {end}: {told(lead)}" for end, lead in leads.items())
    )


def falling_returns(rewards: Rewards, first: str, middle: str, last: str, claim: str) -> Claim:
    """That the step from the first to the middle gains more than the one from the middle to the last."""
    found = combined(rewards, {middle: 2, first: -1, last: -1})
    figure = f"({middle} − {first}) − ({last} − {middle}): {told(found)}"
    return Claim(claim=claim, verdict=verdict(found), figure=figure)


def by_a_coin(claims: Sequence[Claim]) -> list[Claim]:
    """The claims where the reward model cannot be told from a coin: nothing can be said by its scores."""
    return [replace(one, verdict=OPEN) if one.judged else one for one in claims]


def told(found: Interval) -> str:
    """A difference with its interval."""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def percent(found: Interval) -> str:
    """A share with its interval."""
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"
