"""How many negatives Self-Contrast's theorem asks for, by a model's gradients on preference data. `cli.theory` asks.

The theorem (METHODS.md §2) is about 1-D gradients. At the start of DPO the policy is the reference, h = 0, and a pair
has the gradient −(β/2)(∇S(chosen) − ∇S(rejected)) = a − b, with a = −(β/2)∇S(chosen), b = −(β/2)∇S(rejected) over all
trainable weights. Here a and b are their projections on the direction of the mean pair gradient, the one in which DPO
sets off. Over prompts, with one of a prompt's negatives drawn at random, σ1² = Var a, σ2² = Var b and ρ = corr(a, b). A
balanced pair thus varies by V = σ1² + σ2² − 2ρσ1σ2 and the mean of l of them by V/l, while the mean over m negatives on
one positive varies by V(1 − λ + λ/m), λ = σ2²/V: equating the two gives the theorem's m.

The direction comes from one half of the prompts and the projections from the other, then the other way round. In a mean
that it is itself part of, a gradient finds its own squared length, which varies more than what the theorem is about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from plumbline.errors import DataError, ModelError
from plumbline.methods.selection import negatives_needed
from plumbline.models.group_logps import group_logps
from plumbline.records import TokenGroup

MIN_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class Projected:
    """One prompt's a, and b of each of its negatives: how far each gradient reaches along the direction."""

    positive: float
    negatives: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Theory:
    """What the theorem is about, estimated; the symbols are those of METHODS.md §2.

    Attributes:
        prompts, negatives: how many gradients of each kind were projected.
        positive_variance, negative_variance, covariance: σ1², σ2² and ρσ1σ2.
        lam_error: standard error of λ by the jackknife over prompts, the directions taken as given.
        agreement: cosine of the two halves' mean gradients; near 0 the direction is noise, and more prompts are needed.
    """

    prompts: int
    negatives: int
    positive_variance: float
    negative_variance: float
    covariance: float
    lam_error: float
    agreement: float

    @property
    def correlation(self) -> float:
        """ρ."""
        return self.covariance / math.sqrt(self.positive_variance * self.negative_variance)

    @property
    def lam(self) -> float:
        """λ; above 1 negatives of a prompt are not independent of one another: means of many would vary by below 0."""
        return _lam(self.positive_variance, self.negative_variance, self.covariance)

    @property
    def lam_given_positive(self) -> float:
        """λ(1 − ρ²), in [0, 1]: takes λ's place for negatives that are independent only given the positive."""
        return min(self.lam * (1 - self.correlation**2), 1.0)


def estimate(model: nn.Module, groups: Sequence[TokenGroup], *, beta: float) -> Theory:
    """The theorem's quantities on a sample of prompts; two gradients of the model are held at once, never more.

    Args:
        model: a causal LM with dropout off, policy and reference in one; its trainable parameters count.
        groups: each prompt's chosen response and then its rejected ones, at least one; in random order.

    Raises:
        DataError: fewer than `MIN_PROMPTS` groups, or gradients that do not vary.
        ModelError: a gradient is not finite.
    """
    if len(groups) < MIN_PROMPTS:
        raise DataError(f"{len(groups)} prompts are too few to estimate from; at least {MIN_PROMPTS} are needed")
    halves = [groups[0::2], groups[1::2]]
    projected: list[list[Projected]] = []
    norms: list[float] = []  # of the other half's mean gradient
    for own, other in (halves, halves[::-1]):
        direction, norm = _mean_direction(model, other, beta)
        projected.append([_project(model, group, direction, beta) for group in own])
        norms.append(norm)
    positive, negative, covariance = moments(projected)
    if min(positive, negative, positive + negative - 2 * covariance) <= 0:
        raise DataError("the gradients of all prompts are alike, so there is no variance; give prompts that differ")
    return Theory(
        prompts=len(groups),
        negatives=sum(len(group.response_ids) - 1 for group in groups),
        positive_variance=positive,
        negative_variance=negative,
        covariance=covariance,
        lam_error=_jackknife(projected),
        agreement=fmean(one.positive - fmean(one.negatives) for one in projected[0]) / norms[1],
    )


def moments(halves: Sequence[Sequence[Projected]]) -> tuple[float, float, float]:
    """(σ1², σ2², ρσ1σ2) over prompts, each with a random one of its negatives; unbiased, about each half's own mean."""
    positive = negative = both = 0.0
    for half in halves:
        middle = fmean(one.positive for one in half)
        middle_negative = fmean(fmean(one.negatives) for one in half)
        for one in half:
            a, b = one.positive - middle, [value - middle_negative for value in one.negatives]
            positive += a * a
            negative += fmean(value * value for value in b)
            both += a * fmean(b)
    freedom = sum(len(half) - 1 for half in halves)
    return positive / freedom, negative / freedom, both / freedom


def needed(lam: float, pairs: float) -> float:
    """`negatives_needed`, with NaN for λ above 1, where the theorem says nothing, and inf for λ = 0."""
    if lam > 1:
        return math.nan
    return negatives_needed(lam, pairs) if lam > 0 else math.inf


def _mean_direction(model: nn.Module, groups: Sequence[TokenGroup], beta: float) -> tuple[list[Tensor], float]:
    """The mean pair gradient at h = 0, scaled to length 1, and the length that it had."""
    total: list[Tensor] | None = None
    for group in groups:
        logps = group_logps(model, [group])[0][0]
        gradient = _gradient(model, -beta / 2 * (logps[0] - logps[1:].mean()))
        if total is None:
            total = gradient
        else:
            for own, other in zip(total, gradient, strict=True):
                own.add_(other)
        del gradient, logps  # before the next is made
    assert total is not None
    norm = math.sqrt(_dot(total, total))
    if not math.isfinite(norm):
        raise ModelError("the model's gradients are not finite; its weights, or its log-probs on this data, are not")
    if norm == 0:
        raise DataError("the mean gradient is zero: chosen and rejected answers pull alike; check which is which")
    return [tensor.div_(norm) for tensor in total], norm / len(groups)


def _project(model: nn.Module, group: TokenGroup, direction: list[Tensor], beta: float) -> Projected:
    values: list[float] = []
    for response in group.response_ids:
        logps, _ = group_logps(model, [TokenGroup(group.prompt_ids, [response])])
        values.append(_dot(_gradient(model, -beta / 2 * logps.sum()), direction))
    return Projected(values[0], values[1:])


def _gradient(model: nn.Module, value: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(value, parameters, materialize_grads=True))


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return math.fsum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(one, other, strict=True))


def _lam(positive: float, negative: float, covariance: float) -> float:
    return negative / (positive + negative - 2 * covariance)


def _jackknife(halves: Sequence[Sequence[Projected]]) -> float:
    """Standard error of λ: what it does as each prompt in turn is left out."""
    without = [
        _lam(*moments([*halves[:h], [*half[:i], *half[i + 1 :]], *halves[h + 1 :]]))
        for h, half in enumerate(halves)
        for i in range(len(half))
    ]
    middle = fmean(without)
    return math.sqrt((len(without) - 1) / len(without) * math.fsum((value - middle) ** 2 for value in without))
