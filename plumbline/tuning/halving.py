"""Who goes on to the next rung, and how many steps that has. Pure: figures in, decisions out.

`plumbline.tuning.series` calls it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plumbline.errors import UserError
from plumbline.tuning.arms import Arm

FIRST_STEPS = 8
"""Of the first rung at most: it is run before anybody knows how long a step takes."""
TELLING = 2
"""A rung that has so many times the steps of the first one can do without its verdict on rewards: eight steps favour
rates that are too high for a hundred, and of some methods show nothing yet."""
UNITS = {"s": 1, "m": 60, "h": 3600}
Row = Mapping[str, Any]
"""A policy's figures in `evaluation.json`; of an arm that failed ``{"failed": why}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How far an arm may be from π0, all as factors of π0's own figure but the first, which is what is above 1."""

    max_ppl_rise: float = 0.25
    max_base_ppl: float = 2.0
    length: tuple[float, float] = (0.5, 2.0)
    min_distinct: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """A rung that was run: its steps and arms, the wall time of all of it, of a step of all its arms, and of drawing a
    step's pairs once for all of them."""

    steps: int
    arms: int
    seconds: float
    per_step: float
    drawn_per_step: float = 0.0


def parse_budget(text: str) -> float:
    """Seconds of ``90s``, ``10m`` or ``1.5h``. Raises UserError."""
    told = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if told is None or not 0 < float(told[1]) < math.inf:
        raise UserError(f"--budget {text}: should be a time such as 90s, 10m or 1.5h")
    return float(told[1]) * UNITS[told[2]]


def reward_of(row: Row) -> float:
    """Mean reward; NaN where there is none."""
    reward = row.get("reward")
    return float(reward["mean"]) if isinstance(reward, Mapping) else math.nan


def fault(row: Row, base: Row, bounds: Bounds) -> str:
    """Why an arm is out, whatever its reward; nothing where it is not. `base` are π0's figures."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if not math.isfinite(reward_of(row)):
        return "no finite reward"
    low, high = bounds.length
    limits = (
        ("PPL", 0.0, 1 + bounds.max_ppl_rise),
        ("base PPL", 0.0, bounds.max_base_ppl),
        ("tokens", low, high),
        ("distinct-2", bounds.min_distinct, math.inf),
    )
    for name, least, most in limits:
        own, of = row.get(name), base.get(name)
        if own is None or of is None:  # rows without targets have no PPL of references
            continue
        lowest, highest = least * of, most if math.isinf(most) else most * of
        if not lowest <= own <= highest:  # so that NaN is out
            side = f"below {lowest:.3g}" if own < lowest else f"above {highest:.3g}"
            return f"{name} {own:.3g}, {side}"
    return ""


def sound(rows: Mapping[str, Row], arms: Sequence[Arm], base: Row, bounds: Bounds) -> list[Arm]:
    """Arms that are not out, by reward, the highest first; of equal ones the lower rate, which moved less for it."""
    there = [arm for arm in arms if not fault(rows[arm.name], base, bounds)]
    return sorted(there, key=lambda arm: (-reward_of(rows[arm.name]), arm.values["lr"]))


def half(arms: int) -> int:
    """How many of a rung's arms go on at most."""
    return -(-arms // 2)


def rungs_of(arms: int) -> int:
    """Rungs until one of so many arms is left."""
    return math.ceil(math.log2(arms)) if arms > 1 else 0


def next_steps(done: Sequence[Spent], arms: int, full: int, budget: float) -> int | None:
    """Steps of the next rung, or None where there is none: the last one had all, or no longer one fits the budget.

    What is left of the budget is shared evenly by the rungs that are left, and a rung has twice the steps of the one
    before wherever all that is left suffices.

    Args:
        done: rungs of this pipeline.
        arms: that are left, two or more.
        full: steps that the config has.
        budget: seconds of wall time.
    """
    if not done:
        return min(full, FIRST_STEPS, max(2, -(-full // 2 ** (rungs_of(arms) - 1))))
    last, most = done[-1], _steps_within(done, arms, budget, 1)
    if last.steps >= full or most <= last.steps:
        return None
    return min(full, max(_steps_within(done, arms, budget, rungs_of(arms)), min(2 * last.steps, most)))


def all_go_on(done: Sequence[Spent], arms: int, full: int, budget: float) -> bool:
    """Whether the first rung was only there to see how long a step takes, and what fails at once: see `TELLING`. The
    arguments are those of `next_steps`."""
    if len(done) > 1 or arms < 2:
        return False
    return min(full, _steps_within(done, arms, budget, rungs_of(arms))) >= TELLING * done[0].steps


def _steps_within(done: Sequence[Spent], arms: int, budget: float, rungs: int) -> int:
    """Steps for which the next of so many rungs has time: a step takes it as there are arms, which share a machine, and
    what is drawn for all of them as ever; starting and evaluating takes what it took."""
    last = done[-1]
    beside = max(0.0, last.seconds - (last.per_step + last.drawn_per_step) * last.steps)
    left = (budget - sum(one.seconds for one in done)) / rungs
    return int((left - beside) / max(last.per_step * arms / last.arms + last.drawn_per_step, 1e-9))


def edge(arms: Sequence[Arm], best: Arm) -> str:
    """``lowest`` or ``highest`` where the best rate is at an end of what was tried; nothing else."""
    rates = sorted({arm.values["lr"] for arm in arms})
    if len(rates) < 2:
        return ""
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(best.values["lr"], "")
