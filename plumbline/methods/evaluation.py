"""Numbers that say whether a policy got better (METHODS.md §5). Pure: lists of numbers in, records out, no models.

Called by `pipelines.evaluate`, the report and the benchmarks. Importing it imports neither numpy, scipy nor pandas.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean of `n` values and its confidence interval; NaN bounds where one value leaves the spread unknown."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Shares of `n` comparisons, in [0, 1], that add up to 1."""

    win: float
    tie: float
    lose: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """PLE's two means and what is between them: guided minus plain, paired by prompt (METHODS.md §6.3)."""

    plain: Interval
    guided: Interval
    gap: Interval


def corpus_ppl(nll_sums: Sequence[float], tokens: Sequence[int]) -> float:
    """``exp(ΣNLL / Σtokens)`` over a corpus; `nll_sums` [N] in nats, `tokens` [N] with EOS (METHODS.md §5).

    Raises:
        ValueError: lengths differ, or there is no token.
    """
    _same_length(nll_sums, tokens)
    if sum(tokens) <= 0:
        raise ValueError("perplexity of no tokens")
    return math.exp(math.fsum(nll_sums) / sum(tokens))


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of sacreBLEU with its default tokeniser, in [0, 1]; [N] texts each. Compare rankings only.

    Raises:
        ValueError: lengths differ, or there is no text.
    """
    import sacrebleu

    _same_length(hypotheses, references)
    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score / 100


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams over all n-grams of [N] texts together, in [0, 1]: a corpus that says the same again and again
    is near 0 (Li et al., arXiv 1510.03055). Words are what white space parts, in lower case; compare equally many texts
    of about equal lengths only. Without any n-gram it is 0.
    """
    words = [text.lower().split() for text in texts]
    grams = [tuple(one[i : i + n]) for one in words for i in range(len(one) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of `values` [N] with Student's t interval, ``mean ± t(N−1) · s / √N``: close to normal from N = 30 on.

    Raises:
        ValueError: no values, one that is not finite (drop and count those first, METHODS.md §4), or a bad confidence.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it should be between 0 and 1, such as 0.95")
    from scipy.stats import t

    n = len(values)
    if n == 0:
        raise ValueError("mean of no values")
    if not all(map(math.isfinite, values)):
        raise ValueError("mean of values that are not all finite")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean=mean, low=math.nan, high=math.nan, n=1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def paired_interval(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of ``after − before`` [N], paired by prompt, with Student's t interval of the differences.

    Raises:
        ValueError: lengths differ, or as `mean_interval`.
    """
    _same_length(before, after)
    return mean_interval([b - a for a, b in zip(before, after, strict=True)], confidence)


def win_rate(prefer_first: Sequence[tuple[float, float]]) -> WinRate:
    """Win, tie and lose of ours against theirs, each pair judged in both orders (METHODS.md §5).

    Args:
        prefer_first: [N] of (the first was preferred with ours first, the first was preferred with theirs first):
            booleans, or probabilities, of which over one half is a preference for it and under one half against it.

    Ours preferred in both orders is a win, theirs in both a loss, all else a tie: a judge that likes a position, or
    cannot decide, ties.

    Raises:
        ValueError: no comparison.
    """
    n = len(prefer_first)
    if n == 0:
        raise ValueError("win rate of no comparisons")
    win = sum(ours_first > 0.5 > theirs_first for ours_first, theirs_first in prefer_first)
    lose = sum(ours_first < 0.5 < theirs_first for ours_first, theirs_first in prefer_first)
    return WinRate(win=win / n, tie=(n - win - lose) / n, lose=lose / n, n=n)


def reward_win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of [N] prompts where our reward is the greater; an equal one counts one half (METHODS.md §5).

    Raises:
        ValueError: lengths differ, or there is no pair.
    """
    return _share(ours, theirs, lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0)


def data_accuracy(negatives: Sequence[float], targets: Sequence[float]) -> float:
    """Share of [N] negatives whose reward is below that of their own prompt's target, also [N] (METHODS.md §5, §6.2).

    Raises:
        ValueError: lengths differ, or there is no pair.
    """
    return _share(negatives, targets, lambda negative, target: float(negative < target))


def gap(plain_rewards: Sequence[float], guided_rewards: Sequence[float], confidence: float = 0.95) -> Gap:
    """Means of the plain and of the principle-guided rewards [N] and of their difference, paired by prompt.

    Raises:
        ValueError: as `paired_interval`.
    """
    return Gap(
        plain=mean_interval(plain_rewards, confidence),
        guided=mean_interval(guided_rewards, confidence),
        gap=paired_interval(plain_rewards, guided_rewards, confidence),
    )


def table(rows: Sequence[Mapping[str, object]]) -> "pd.DataFrame":
    """A row each, such as one per policy, as a frame: columns in the order they first appear, absent cells empty."""
    import pandas as pd

    columns = list(dict.fromkeys(name for row in rows for name in row))
    return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=pd.Index(columns), dtype=object)


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """`table` as Markdown, numbers to four digits and aligned to the right."""
    frame = table(rows)
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    columns = [str(name) for name in frame.columns]
    widths = [max([3, len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    numeric = [any(isinstance(v, int | float | Interval) for v in frame[name]) for name in frame.columns]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|".join(
        "-" * (width + 1) + ":" if right else "-" * (width + 2) for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(columns), f"|{rule}|", *map(line, cells)])


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _share(first: Sequence[float], second: Sequence[float], count: Callable[[float, float], float]) -> float:
    _same_length(first, second)
    if any(map(math.isnan, (*first, *second))):
        raise ValueError("a comparison with NaN: drop and count those first")
    return sum(count(a, b) for a, b in zip(first, second, strict=True)) / len(first)


def _same_length(first: Sequence[object], second: Sequence[object]) -> None:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values beside {len(second)}: they are paired, one each")
    if not first:
        raise ValueError("no values")
