"""What `benchmarks/hh.py` says of claims, of numbers worked by hand."""

import math

import pytest

from benchmarks.hh_claims import (
    FAILS,
    HOLDS,
    OPEN,
    above_chance,
    best_inside,
    between,
    by_a_coin,
    combined,
    falling_returns,
    greater,
    near,
    over_seeds,
    rises,
)
from benchmarks.refusals import share


def row(*values: float) -> dict[str, float]:
    return {f"p{i}": value for i, value in enumerate(values)}


LOW, HIGH, SAME = row(0, 1, 2, 3), row(1, 2.1, 3, 3.9), row(0.5, 0.6, 2.5, 2.6)


def test_a_difference_is_paired_by_prompt() -> None:
    found = combined({"a": HIGH, "b": LOW}, {"a": 1, "b": -1})
    assert found.mean == pytest.approx(1.0) and found.n == 4
    assert found.high - found.mean == pytest.approx(3.1824 * 0.0816497 / 2, abs=1e-4), "t(3) · s / √4"


def test_a_prompt_without_a_reward_of_both_is_left_out() -> None:
    found = combined({"a": row(1, 5, math.nan), "b": row(0, 4, 3) | {"other": 9}}, {"a": 1, "b": -1})
    assert (found.mean, found.n) == (1.0, 2)


def test_a_claim_holds_does_not_hold_or_cannot_be_said() -> None:
    rewards = {"low": LOW, "high": HIGH, "same": SAME}
    assert greater(rewards, "high", "low", "c").verdict == HOLDS
    assert greater(rewards, "low", "high", "c").verdict == FAILS
    assert greater(rewards, "same", "low", "c").verdict == OPEN
    assert "high − low: +1.000" in greater(rewards, "high", "low", "c").figure


def test_seeds_count_as_one_prompt_each() -> None:
    found = over_seeds([{"a": row(0, 1)}, {"a": row(2, 5)}])
    assert found == {"a": row(1, 3)}


def test_agreement_is_held_against_one_half() -> None:
    assert above_chance(share([True] * 40 + [False] * 10), "c").verdict == HOLDS
    assert above_chance(share([True] * 10 + [False] * 40), "c").verdict == FAILS
    assert above_chance(share([True, False]), "c").verdict == OPEN


def test_perplexity_is_near_up_to_a_tenth() -> None:
    assert near(10.9, 10, "c").verdict == HOLDS and near(8, 10, "c").verdict == HOLDS
    assert near(11.2, 10, "c").verdict == FAILS


def test_shares_rise_from_the_first_to_the_last() -> None:
    few, many = share([True] * 10 + [False] * 40), share([True] * 40 + [False] * 10)
    found = between(few, many)
    assert found.mean == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((0.41563, 0.72384), abs=1e-4), "Newcombe (1998), method 10"
    assert rises({"a = 1": few, "a = 1/2": few, "a = 1/16": many}, "c").verdict == HOLDS
    assert rises({"a = 1": many, "a = 1/16": few}, "c").verdict == FAILS
    assert rises({"a = 1": few, "a = 1/2": many, "a = 1/16": few}, "c").verdict == OPEN


def test_the_best_is_inside_where_it_is_clear_of_both_ends() -> None:
    assert best_inside({"1": LOW, "2": LOW, "3": HIGH, "4": LOW}, ["1", "2", "3", "4"], "c").verdict == HOLDS
    assert best_inside({"1": LOW, "2": LOW, "3": SAME, "4": HIGH}, ["1", "2", "3", "4"], "c").verdict == FAILS
    assert best_inside({"1": LOW, "2": HIGH, "3": HIGH}, ["1", "2", "3"], "c").verdict == OPEN


def test_returns_fall_where_the_first_step_gains_more() -> None:
    steps = {"1": LOW, "4": HIGH, "16": row(1.1, 2.2, 3.1, 4.0)}
    assert falling_returns(steps, "1", "4", "16", "c").verdict == HOLDS
    assert falling_returns({"1": LOW, "4": row(0.1, 1.1, 2.1, 3.1), "16": HIGH}, "1", "4", "16", "c").verdict == FAILS


def test_by_a_coin_nothing_is_said_but_of_perplexity() -> None:
    found = by_a_coin([greater({"low": LOW, "high": HIGH}, "high", "low", "c"), near(10, 10, "c")])
    assert [one.verdict for one in found] == [OPEN, HOLDS] and "+1.000" in found[0].figure
