"""Who goes on, and how many steps the next rung has."""

import math
from typing import Any

import pytest

from plumbline.errors import UserError
from plumbline.tuning.arms import Arm
from plumbline.tuning.halving import (
    Bounds,
    Spent,
    all_go_on,
    edge,
    fault,
    half,
    next_steps,
    parse_budget,
    rungs_of,
    sound,
)

BASE = {"reward": {"mean": 0.0}, "PPL": 10.0, "base PPL": 4.0, "tokens": 20.0, "distinct-2": 0.8}


def arm(lr: float, **values: float) -> Arm:
    return Arm(name=f"ple-lr-{lr:g}", values={"lr": lr, **values})


def row(reward: float, **figures: Any) -> dict[str, Any]:
    return {**BASE, "reward": {"mean": reward, "low": reward - 1, "high": reward + 1}, **figures}


def left(rewards: dict[float, Any], bounds: Bounds | None = None) -> list[float]:
    rows = {arm(lr).name: one if isinstance(one, dict) else row(one) for lr, one in rewards.items()}
    going = sound(rows, [arm(lr) for lr in rewards], BASE, bounds or Bounds())[: half(len(rewards))]
    return [one.values["lr"] for one in going]


def test_the_better_half_goes_on_the_best_first() -> None:
    assert left({1: 0.1, 2: 0.4, 3: 0.3, 4: 0.2}) == [2, 3]
    assert left({1: 0.1, 2: 0.4, 3: 0.3}) == [2, 3], "of an odd number one more"
    assert left({1: 0.1, 2: 0.4}) == [2]


def test_of_equal_rewards_the_lower_rate_is_better() -> None:
    assert left({3: 0.1, 1: 0.1, 2: 0.1, 4: 0.0}) == [1, 2]


def test_an_arm_that_is_out_makes_room_for_one_that_is_not() -> None:
    assert left({1: 0.1, 2: 0.2, 3: row(0.9, PPL=99.0), 4: {"failed": "NaN"}}) == [2, 1]
    assert left({1: 0.1, 2: {"failed": "NaN"}, 3: row(math.nan), 4: {**BASE, "reward": None}}) == [1]
    assert left({1: {"failed": "a"}, 2: row(1.0, tokens=1.0)}) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"PPL": 12.5}, ""),
        ({"PPL": 12.6}, "PPL 12.6, above 12.5"),
        ({"PPL": math.nan}, "PPL nan, above 12.5"),
        ({"PPL": None}, ""),
        ({"base PPL": 8.1}, "base PPL 8.1, above 8"),
        ({"base PPL": 1.0}, ""),
        ({"tokens": 9.0}, "tokens 9, below 10"),
        ({"tokens": 41.0}, "tokens 41, above 40"),
        ({"distinct-2": 0.3}, "distinct-2 0.3, below 0.4"),
    ],
)
def test_bounds_are_factors_of_what_the_base_has(figures: dict[str, Any], said: str) -> None:
    assert fault(row(1.0, **figures), BASE, Bounds()) == said


def test_a_base_that_writes_single_words_puts_no_arm_out() -> None:
    base = {**BASE, "distinct-2": 0.0}
    assert fault(row(1.0, **{"distinct-2": 0.0}), base, Bounds()) == ""
    assert fault(row(1.0, **{"distinct-2": 0.9}), base, Bounds()) == ""
    assert fault(row(1.0, **{"distinct-2": math.nan}), base, Bounds()) == "distinct-2 nan, above inf"


def test_bounds_may_be_wider() -> None:
    wide = Bounds(max_ppl_rise=9, max_base_ppl=9, length=(0, 9), min_distinct=0)
    assert left({1: row(1.0, PPL=99.0, tokens=1.0), 2: row(0.0)}, wide) == [1]


def test_seven_arms_have_three_rungs() -> None:
    assert [rungs_of(n) for n in (1, 2, 3, 4, 7, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]


def spent(steps: int, arms: int, seconds: float, per_step: float) -> Spent:
    return Spent(steps=steps, arms=arms, seconds=seconds, per_step=per_step)


def test_the_first_rung_is_short_whatever_the_budget() -> None:
    assert next_steps([], 7, 1000, 60) == 8
    assert next_steps([], 7, 16, 1e6) == 4, "a quarter, to be doubled twice"
    assert next_steps([], 7, 3, 60) == 2
    assert next_steps([], 7, 1, 60) == 1


def test_what_is_left_is_shared_by_the_rungs_that_are_left() -> None:
    """Of 600 s 100 are gone: 250 a rung, 20 of them for start and evaluation. 4 of 8 arms take 5 s a step."""
    assert next_steps([spent(8, 8, 100, 10)], 4, 1000, 600) == 46
    assert next_steps([spent(8, 8, 100, 10)], 4, 40, 600) == 40, "no more than the config has"


def test_what_is_drawn_for_all_arms_takes_as_long_for_half_of_them() -> None:
    """Of 600 s 100 are gone: 250 a rung, 20 of them for start and evaluation. 4 of 8 arms take 4 + 2 s a step."""
    drawing = Spent(steps=8, arms=8, seconds=100, per_step=8, drawn_per_step=2)
    assert next_steps([drawing], 4, 1000, 600) == 38


def test_steps_double_where_all_that_is_left_suffices() -> None:
    # Even shares of 70 s have room for 10 steps of 4 arms; both together for 24.
    assert next_steps([spent(8, 8, 100, 10)], 4, 1000, 240) == 16
    assert next_steps([spent(8, 8, 100, 10)], 4, 1000, 180) == 12


def test_no_rung_is_begun_that_would_not_be_longer() -> None:
    assert next_steps([spent(8, 8, 100, 10)], 4, 1000, 160) is None
    assert next_steps([spent(8, 8, 100, 10)], 4, 1000, 90) is None, "the first was over the budget"
    assert next_steps([spent(8, 8, 100, 10)], 4, 8, 1e6) is None, "it had all steps"


def test_the_first_rung_judges_no_reward_where_the_next_has_twice_its_steps_for_all() -> None:
    done = [spent(8, 8, 100, 10)]  # three rungs of 8 arms at 20 s and 10 s a step
    assert not all_go_on(done, 8, 1000, 100 + 3 * (20 + 159))
    assert all_go_on(done, 8, 1000, 100 + 3 * (20 + 160))
    assert not all_go_on(done, 8, 15, 1e6), "the config has no twice its steps"
    assert not all_go_on([*done, spent(16, 8, 100, 10)], 8, 1000, 1e6), "the second rung judges"
    assert not all_go_on(done, 1, 1000, 1e6)
    assert not all_go_on(done, 0, 1000, 1e6)


def test_a_step_that_took_no_time_breaks_nothing() -> None:
    assert next_steps([spent(8, 8, 100, 0.0)], 4, 1000, 600) == 1000


def test_a_rate_at_the_end_of_what_was_tried_is_told() -> None:
    arms = [arm(1, beta=0.1), arm(1, beta=0.2), arm(2, beta=0.1), arm(3, beta=0.1)]
    assert [edge(arms, one) for one in arms] == ["lowest", "lowest", "", "highest"]
    assert edge(arms[:2], arms[0]) == "", "one rate has no ends"


def test_budgets() -> None:
    assert [parse_budget(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for text in ("10x", "10", "m", "-1m", "0m", "1h30m", "", f"{'9' * 400}s"):
        with pytest.raises(UserError, match="such as 90s, 10m"):
            parse_budget(text)
