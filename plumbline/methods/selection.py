"""Which self-made answers become training pairs: DLMA's self-reward margin and Self-Contrast's negative filter.

Called by the pipelines between scoring and commit. Pure functions, deterministic in their arguments. METHODS.md §1, §2.
"""

import math
import random
from collections.abc import Sequence

from jaxtyping import Float, Float64
from torch import Tensor


def self_reward_margin(
    chosen_pos: Float[Tensor, "G"],
    chosen_neg: Float[Tensor, "G"],
    rejected_pos: Float[Tensor, "G"],
    rejected_neg: Float[Tensor, "G"],
) -> Float64[Tensor, "G"]:
    """DLMA's R = [S(p+,a1) − S(p−,a1)] − [S(p+,a2) − S(p−,a2)], in nats (METHODS.md §1).

    The arguments are log-probs of the frozen model, sums over response tokens, not normalised by length: `chosen` a1,
    `rejected` a2, under the positive and the negative prompt. They are large and close to each other, hence fp64. A
    constant to the loss: it carries no gradient.
    """
    chosen_G = chosen_pos.detach().double() - chosen_neg.detach().double()
    rejected_G = rejected_pos.detach().double() - rejected_neg.detach().double()
    return chosen_G - rejected_G


def select_negatives(
    similarities: Float[Tensor, "R"] | Sequence[float],
    texts: Sequence[str],
    target: str,
    *,
    keep: float,
    count: int,
    seed: int,
) -> list[int]:
    """Self-Contrast's filter: draw `count` negatives uniformly from those least similar to the target (METHODS.md §2).

    Of exact duplicates the first stays. The pool is the K = min(int(R·keep), U−1) least similar of the U unique ones,
    so the most similar one never gets in; equal similarities go by index. Blank texts and the target itself then leave
    the pool. A text whose similarity is not finite takes no part, but counts in R, the number that was sampled.

    Args:
        similarities: cosine of each response with the target, [R].
        keep: the share a that stays, in (0, 1].
        count: m, how many negatives to draw, without replacement.
        seed: the draw's; the same arguments give the same indices.

    Returns:
        Indices into `texts`, in the order drawn; [] where fewer than `count` remain: drop that prompt and count it.

    Raises:
        ValueError: lengths differ, or `keep` or `count` is out of range.
    """
    if len(similarities) != len(texts):
        raise ValueError(f"{len(similarities)} similarities for {len(texts)} texts; each text needs one")
    if not 0 < keep <= 1 or count < 1:
        raise ValueError(f"keep={keep}, count={count}: keep is a share in (0, 1] and count at least 1")

    values = [float(value) for value in similarities]
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if math.isfinite(values[index]):
            first.setdefault(text, index)
    ranked = sorted(first.values(), key=lambda index: (values[index], index))
    kept = min(math.floor(len(texts) * keep + 1e-9), len(ranked) - 1)  # 100 · .29 is 28.999… in floats, and means 29
    pool = [index for index in ranked[: max(kept, 0)] if texts[index].strip() and texts[index] != target]
    return random.Random(seed).sample(pool, count) if len(pool) >= count else []


def negatives_needed(lam: float, pairs: float) -> float:
    """Self-Contrast's theorem: negatives on one positive that match `pairs` balanced pairs (METHODS.md §2).

    m ≥ λ/(λ + 1/l − 1) if l < 1/(1−λ), with λ = `lam` and l = `pairs`; ``math.inf`` where no number is enough. For
    negatives that are independent only given the positive, pass λ(1−ρ²).

    Raises:
        ValueError: `lam` is not in (0, 1], or `pairs` is below 1.
    """
    if not 0 < lam <= 1 or pairs < 1:
        raise ValueError(f"lam={lam}, pairs={pairs}: lam is in (0, 1] and pairs at least 1")
    if pairs * (1 - lam) >= 1 - 1e-12:  # rounding must not turn the border into a huge number
        return math.inf
    return lam / (lam + 1 / pairs - 1)
