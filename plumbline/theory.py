"""How many negatives Self-Contrast's theorem asks for, by gradients of a model on preference data: `plumbline theory`.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plumbline.config import Source
from plumbline.dataset import read_preferences
from plumbline.errors import DataError, ModelError, UserError
from plumbline.given import is_parts, read_parts, usable_rejected
from plumbline.modeling import group_logps
from plumbline.pairs import pair_samples
from plumbline.prompting import encode_response, load_tokenizer, render
from plumbline.records import Message, TokenGroup
from plumbline.selection import negatives_needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def measure(
    model_path: str,
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    prompts: int = 64,
    beta: float = 0.1,
    max_len: int = 512,
    seed: int = 0,
) -> Theory:
    """`estimate` for a model directory, in float32, and a sample that `read_groups` draws from a preference file.

    Raises:
        UserError: an argument out of range, a model that cannot be loaded, or what the two functions raise.
    """
    if prompts < MIN_PROMPTS:
        raise UserError(f"{prompts} prompts are too few to estimate from; at least {MIN_PROMPTS} are needed")
    if not beta > 0:
        raise UserError(f"beta is {beta:g}; it should be above 0, such as 0.1")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    tokenizer = load_tokenizer(model_path)
    logging.disable_progress_bar()  # an error is to be the only line on stderr
    try:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config()
        max_len = min(max_len, getattr(config, "max_position_embeddings", max_len))
        groups = read_groups(data, tokenizer, columns=columns, prompts=prompts, max_len=max_len, seed=seed)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())[:300]
        raise ModelError(f"model {model_path}: cannot be loaded as a causal language model ({what})") from error
    nn.Module.to(model.eval(), "cuda" if torch.cuda.is_available() else "cpu")
    return estimate(model, groups, beta=beta)


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


def read_groups(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    columns: Mapping[str, str] | None = None,
    prompts: int,
    max_len: int,
    seed: int,
) -> list[TokenGroup]:
    """A random sample of prompts as groups, the chosen response first, each response once.

    Args:
        path: a preference file or dataset, one rejected answer a row or several (rows with the same prompt and chosen
            answer are one prompt), or a directory of parts such as ``runs/NAME/pairs/self_contrast``.
        prompts: at most so many; of fewer all are used.
        max_len: tokens of a prompt with a response; longer ones are left out.

    Raises:
        DataError: as `read_preferences`, or fewer than `MIN_PROMPTS` prompts are left.
    """
    groups: list[TokenGroup] = []
    equal = long = 0
    for group in _shuffled(path, tokenizer, columns or {}, Random(seed)):
        if len(group.response_ids) < 2:
            equal += 1
        elif fit := _fit(group, max_len):
            groups.append(fit)
        else:
            long += 1
        if len(groups) >= prompts:
            break
    if len(groups) < MIN_PROMPTS:
        raise DataError(
            f"{path}: {len(groups)} prompts to estimate from, at least {MIN_PROMPTS} are needed ({equal} have no "
            f"rejected answer other than the chosen one, {long} are longer than {max_len} tokens)"
        )
    return groups


def _shuffled(
    path: str, tokenizer: "PreTrainedTokenizerBase", columns: Mapping[str, str], draw: Random
) -> Iterator[TokenGroup]:
    """All prompts in random order, tokenised as they are asked for; no rejected response where none differs."""
    source = Source(path=path)
    if is_parts(source):
        yield from draw.sample(groups := [sample.group for sample in pair_samples(read_parts(source))], len(groups))
        return
    answers: dict[tuple[tuple[Message, ...], str], dict[str, None]] = {}
    for row in read_preferences(path, columns=columns):
        assert row.chosen is not None
        answers.setdefault((row.messages, row.chosen), {}).update(dict.fromkeys(usable_rejected(row)))
    for (messages, chosen), rejected in draw.sample(list(answers.items()), len(answers)):
        responses = [encode_response(tokenizer, text) for text in (chosen, *rejected)]
        yield TokenGroup(render(tokenizer, messages), responses)


def theory_text(theory: Theory, pairs: Sequence[float]) -> str:
    """What `plumbline theory` prints: the estimates, and the theorem's m for each number of balanced pairs."""
    lines = [
        f"{theory.prompts} prompts with {theory.negatives} negatives; gradients of all weights along their mean",
        f"σ1² {theory.positive_variance:.4g} (chosen) · σ2² {theory.negative_variance:.4g} (rejected) "
        f"· ρ {theory.correlation:+.3f} · λ {theory.lam:.3f} ± {theory.lam_error:.3f} "
        f"· λ(1−ρ²) {theory.lam_given_positive:.3f}",
        f"mean gradients of the two halves of the prompts: cosine {theory.agreement:.3f} (near 0: raise --prompts)",
        "",
        "| balanced pairs l | negatives m on one positive | m, if independent only given the positive |",
        "|---:|---:|---:|",
    ]
    for count in pairs:
        cells = (_count(needed(lam, count)) for lam in (theory.lam, theory.lam_given_positive))
        lines.append(f"| {count:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(m: float) -> str:
    if math.isnan(m):
        return "does not hold: λ > 1"
    return "no number is enough" if math.isinf(m) else f"{math.ceil(m - 1e-9)} ({m:.3f})"


def _fit(group: TokenGroup, max_len: int) -> TokenGroup | None:
    """The group without negatives that are too long; None where the chosen response is, or no negative is left."""
    room = max_len - len(group.prompt_ids)
    chosen, *rejected = group.response_ids
    short = [ids for ids in rejected if len(ids) <= room]
    return TokenGroup(group.prompt_ids, [chosen, *short]) if short and len(chosen) <= room else None


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
