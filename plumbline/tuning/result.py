"""What a tuning ends with: a table, lines that say what it means, and the config that it recommends.

`cli.tuning` calls it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from plumbline.config.file import dump_config
from plumbline.config.tree import Config
from plumbline.methods.evaluation import Interval, markdown
from plumbline.tuning.arms import Arm, shown, with_values
from plumbline.tuning.halving import Bounds, Row, edge, fault, reward_of
from plumbline.tuning.ledger import BASE
from plumbline.tuning.series import Outcome

FIGURES = ("PPL", "base PPL", "tokens", "distinct-2", "finished")


def table(outcomes: Sequence[Outcome], bounds: Bounds) -> str:
    """Every arm of every rung, π0 before them, as Markdown."""
    rows: list[dict[str, object]] = []
    for outcome in outcomes:
        for number, (rung, going) in enumerate(zip(outcome.rungs, outcome.left, strict=True)):
            assert rung.rows is not None
            base = rung.rows[BASE]
            ran = [arm for arm in outcome.arms if arm.name in rung.arms]
            place: dict[str, object] = {"pipeline": outcome.section.name, "rung": number, "steps": rung.steps}
            rows.append({**place, "arm": "π0", **_figures(base), "then": ""})
            for arm in ran:
                row = rung.rows[arm.name]
                said = fault(row, base, bounds) or _fate(outcome, number, arm, going)
                rows.append({**place, "arm": str(arm), **_figures(row), "then": said})
    return markdown(rows)


def _fate(outcome: Outcome, number: int, arm: Arm, going: Sequence[Arm]) -> str:
    if number + 1 < len(outcome.rungs):
        return "goes on" if arm in going else "below the better half"
    if arm == outcome.best:
        return "recommended"
    return "highest, at few steps" if arm == outcome.highest else "not the best"


def _figures(row: Row) -> dict[str, object]:
    reward = row.get("reward")
    shown: dict[str, object] = {"reward": Interval(**reward) if isinstance(reward, Mapping) else None}
    return shown | {name: row.get(name) for name in FIGURES}


def said(outcome: Outcome, bounds: Bounds, budget: float) -> list[str]:
    """What to know of a pipeline's result, in lines."""
    name, best, last = outcome.section.name, outcome.best, outcome.rungs[-1]
    assert last.rows is not None
    over = f", {outcome.seconds - budget:.0f} s more than the budget" if outcome.seconds > budget else ""
    plural = "s" if len(outcome.rungs) > 1 else ""
    used = f"{name}: {outcome.seconds:.0f} s of {budget:.0f} s used, {len(outcome.rungs)} rung{plural}{over}"
    if best is None:
        lowest = min((arm for arm in outcome.arms if arm.name in last.arms), key=lambda arm: arm.values["lr"])
        why = fault(last.rows[lowest.name], last.rows[BASE], bounds)
        rung = len(outcome.rungs) - 1
        return [used, f"{name}: nothing to recommend: every arm of rung {rung} is out; the lowest, {lowest}: {why}"]
    lines = [used, f"{name}: {best} (the config has lr {shown(outcome.section.learner.lr)})"]
    left = outcome.left[-1]
    if len(left) > 1 and last.steps < outcome.full:
        if best is not outcome.highest:
            taken = f"the rate below that of the highest reward, {outcome.highest}, is taken, for"
        elif outcome.short:
            taken = "the best is taken, for no lower rate was tried that is not out, though"
        else:
            taken = "the best is taken, and"
        lines.append(
            f"{name}: the budget ended at {last.steps} of {outcome.full} steps with {len(left)} arms left: {taken} "
            "fewer steps favour higher rates"
        )
    base = reward_of(last.rows[BASE])
    if not reward_of(last.rows[left[0].name]) > base:
        lines.append(f"{name}: no arm's reward is above π0's: more steps, another method or another reward may do")
    elif not reward_of(last.rows[best.name]) > base:
        lines.append(
            f"{name}: at {last.steps} steps its reward is not above π0's; more steps would show whether it rises"
        )
    if end := edge(outcome.arms, best):
        lines.append(f"{name}: that is the {end} rate that was tried, so a better one may lie beyond: --over lr=…")
    return lines


def recommended(config: Config, outcomes: Sequence[Outcome], origin: str) -> str:
    """The config with what was found in place, as a file."""
    found: dict[str, Any] = {one.section.name: one.best for one in outcomes if one.best}
    head = "".join(
        f"# {name}: {arm}; reward {_reward(one)} on held-out prompts that the evaluation does not ask\n"
        for one in outcomes
        for name, arm in [(one.section.name, one.best)]
        if arm
    )
    return f"# {origin}, with what `plumbline tune` found.\n{head}{dump_config(with_values(config, found), brief=True)}"


def _reward(outcome: Outcome) -> str:
    rows, best = outcome.rungs[-1].rows, outcome.best
    assert rows is not None and best is not None
    return f"{reward_of(rows[best.name]):+.3f} (π0 {reward_of(rows[BASE]):+.3f})"
