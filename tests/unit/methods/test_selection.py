"""The self-reward margin's identities, the negative filter's counts and the theorem's table, as METHODS.md has them."""

import math
from collections import Counter

import pytest
import torch

from plumbline.methods.losses import dpo_loss
from plumbline.methods.selection import negatives_needed, select_negatives, self_reward_margin


def pool(
    similarities: list[float], texts: list[str], keep: float, *, target: str = "y*", count: int | None = None
) -> list[int]:
    """All that the filter lets through, ascending by index: draws as many as there are."""
    for size in [count] if count else range(len(texts), 0, -1):
        if drawn := select_negatives(similarities, texts, target, keep=keep, count=size, seed=0):
            return sorted(drawn)
    return []


# Self-reward margin


def test_margin_by_hand() -> None:
    # [−10 − −12] − [−20 − −15] = 2 + 5
    margin = self_reward_margin(*(torch.tensor([value]) for value in (-10.0, -12.0, -20.0, -15.0)))
    assert margin.tolist() == [7.0] and margin.dtype == torch.float64


def test_margin_is_antisymmetric_and_zero_for_identical_answers() -> None:
    first_pos, first_neg, second_pos, second_neg = 100 * torch.randn(4, 50)
    margin = self_reward_margin(first_pos, first_neg, second_pos, second_neg)
    assert torch.equal(margin, -self_reward_margin(second_pos, second_neg, first_pos, first_neg))
    assert torch.equal(self_reward_margin(first_pos, first_neg, first_pos, first_neg), torch.zeros(50).double())


def test_margin_keeps_what_fp32_would_lose() -> None:
    # In fp32 16777216 + 1 is 16777216: the first difference, 16777217, would lose its 1.
    margin = self_reward_margin(*(torch.tensor([value]) for value in (16777216.0, -1.0, 0.0, 0.0)))
    assert margin.item() == 16777217.0


def test_margin_is_dpos_margin_with_p_plus_as_policy_and_p_minus_as_reference() -> None:
    chosen_pos, chosen_neg, rejected_pos, rejected_neg = torch.tensor([[-10.0], [-12.0], [-20.0], [-15.0]])
    _, metrics = dpo_loss(chosen_pos, rejected_pos[:, None], chosen_neg, rejected_neg[:, None], beta=0.1)
    margin = self_reward_margin(chosen_pos, chosen_neg, rejected_pos, rejected_neg)
    assert margin.item() == pytest.approx(metrics["margin"].item()) == 7.0


def test_margin_carries_no_gradient() -> None:
    logps = [torch.ones(1, requires_grad=True) for _ in range(4)]
    assert not self_reward_margin(*logps).requires_grad


# Filter


@pytest.mark.parametrize(("keep", "kept"), [(1, 31), (0.75, 24), (0.5, 16), (0.25, 8), (0.125, 4), (0.0625, 2)])
def test_counts_for_32_samples(keep: float, kept: int) -> None:
    similarities = [((17 * i) % 32) / 32 for i in range(32)]  # a permutation of 0/32 … 31/32
    texts = [f"text {i}" for i in range(32)]
    least_similar = sorted(sorted(range(32), key=lambda i: similarities[i])[:kept])
    assert pool(similarities, texts, keep, count=kept) == least_similar
    assert pool(similarities, texts, keep, count=kept + 1) == []


def test_too_few_left_drops_the_prompt() -> None:
    assert select_negatives([0.1, 0.2, 0.3, 0.4], list("abcd"), "y*", keep=0.5, count=3, seed=0) == []
    assert select_negatives([0.1], ["a"], "y*", keep=1, count=1, seed=0) == []  # the most similar one always goes
    assert select_negatives([], [], "y*", keep=1, count=1, seed=0) == []
    assert select_negatives([0.1, 0.2, 0.3], list("abc"), "y*", keep=0.3, count=1, seed=0) == []  # int(.9) is 0


def test_exact_duplicates_leave_before_the_count() -> None:
    # U = 3 of R = 4: K = min(2, 2), and the second "a" does not use up a place
    assert pool([0.1, 0.1, 0.2, 0.3], ["a", "a", "b", "c"], 0.5) == [0, 2]
    assert pool([0.1, 0.1, 0.2, 0.3], ["a", "a", "b", "c"], 1) == [0, 2]  # K = min(4, 2)
    assert pool([0.9, 0.1, 0.2, 0.3], ["a", "a", "b", "c"], 0.5) == [2, 3]  # the first one's rank counts
    assert pool([0.1] * 4, ["a"] * 4, 1) == []


def test_blanks_and_the_target_leave_after_the_count() -> None:
    assert pool([0.0, 0.1, 0.2, 0.3], [" \n", "a", "b", "c"], 0.75) == [1, 2]  # K = 3, of which one is blank
    assert pool([0.0, 0.1, 0.2, 0.3], ["a", "y*", "b", "c"], 0.75) == [0, 2]
    assert pool([0.0, 0.1, 0.2, 0.3], ["a", "y* ", "b", "c"], 0.75) == [0, 1, 2]


def test_equal_similarities_go_by_index() -> None:
    assert pool([0.5] * 6, list("abcdef"), 0.5) == [0, 1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_similarities_that_are_not_finite_take_no_part(bad: float) -> None:
    assert pool([0.4, bad, 0.1, 0.2], list("abcd"), 0.5) == [2, 3]  # K = min(int(4 · .5), 3 − 1)
    assert pool([bad, 0.4, 0.1, 0.2], ["a", "a", "b", "c"], 1) == [2, 3]  # the finite "a" stands in
    assert pool([bad] * 4, list("abcd"), 1) == []


def test_shares_that_floats_miss_by_a_hair() -> None:
    texts = [str(i) for i in range(100)]
    assert int(100 * 0.29) == 28  # the trap
    assert len(pool([i / 100 for i in range(100)], texts, 0.29, count=29)) == 29
    assert pool([i / 100 for i in range(100)], texts, 0.29, count=30) == []
    assert len(pool([i / 100 for i in range(10)], texts[:10], 0.35, count=3)) == 3  # 3.5 is still 3
    assert pool([i / 100 for i in range(10)], texts[:10], 0.35, count=4) == []


def test_the_draw_is_uniform_without_replacement_and_seeded() -> None:
    def draw(seed: int) -> list[int]:
        return select_negatives(torch.arange(8) / 8, list("abcdefgh"), "y*", keep=0.5, count=2, seed=seed)

    assert draw(5) == draw(5)
    drawn = [draw(seed) for seed in range(2000)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    counts = Counter(index for pair in drawn for index in pair)
    assert set(counts) == {0, 1, 2, 3}
    assert all(900 < count < 1100 for count in counts.values())  # 1000 expected, 22 the standard deviation


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="2 similarities for 1 texts"):
        select_negatives([0.1, 0.2], ["a"], "y*", keep=0.5, count=1, seed=0)
    for keep, count in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="keep is a share"):
            select_negatives([0.1], ["a"], "y*", keep=keep, count=count, seed=0)


# Theorem


@pytest.mark.parametrize(
    ("lam", "pairs", "needed"),
    [
        (0.8, 2, 2.667),
        (0.8, 3, 6.0),
        (0.8, 4, 16.0),
        (0.9, 3, 3.857),
        (0.95, 4, 4.75),
        (1.0, 7, 7.0),
        (0.5, 1, 1.0),
        (0.5, 2, math.inf),
        (0.8, 5, math.inf),  # exactly on the border, which floats put on the wrong side
        (0.8, 6, math.inf),
    ],
)
def test_theorem(lam: float, pairs: float, needed: float) -> None:
    assert negatives_needed(lam, pairs) == pytest.approx(needed, abs=5e-4)


def test_theorem_refuses_what_it_does_not_cover() -> None:
    for lam, pairs in ((0.0, 2), (1.1, 2), (0.8, 0.5)):
        with pytest.raises(ValueError, match="lam is in"):
            negatives_needed(lam, pairs)
